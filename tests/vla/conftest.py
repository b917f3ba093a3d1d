"""A small but real policy of the tabletop, and raw observations for it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vla.adapters.tabletop import observation, tabletop_contract
from vla.contract import PolicyContract
from vla.policy import Policy, Provenance
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import InstructionTokenizer, train_tokenizer
from vla.types import Observation

SENTENCES = ("put the carrot on the plate", "put the mug on the wooden plate")
MODEL = {
    "class": "nano",
    "vision": {"image_size": 32, "widths": [8, 8, 16, 16], "keypoints": 4},
    "hidden": 16,
    "layers": 1,
    "heads": 2,
    "intermediate": 32,
    "chunk": 4,
    "n_bins": 32,
    "prompt_length": 12,
}
Native = Callable[[int], dict[str, Any]]


@pytest.fixture
def offered() -> PolicyContract:
    return tabletop_contract(image_size=32, chunk=4, max_translation=0.02, max_rotation=0.1)


@pytest.fixture
def statistics(offered: PolicyContract) -> Statistics:
    action = ArrayStatistics.from_bounds([-0.02] * 3 + [-0.1] * 3 + [0.0], [0.02] * 3 + [0.1] * 3 + [1.0])
    size = offered.state_size
    return Statistics(action, ArrayStatistics.from_bounds([-0.9] * size, [1.1] * size))


@pytest.fixture(scope="session")
def tokenizer() -> InstructionTokenizer:
    return train_tokenizer(SENTENCES, vocab_size=512, length=12)


@pytest.fixture
def policy(offered: PolicyContract, statistics: Statistics, tokenizer: InstructionTokenizer) -> Policy:
    provenance = Provenance(commit="0123abc", config={"lr": 1e-4}, seed=7, curve={"success": 0.5})
    return Policy.untrained(MODEL, offered, statistics, tokenizer, seed=7, provenance=provenance)


@pytest.fixture
def native() -> Native:
    """Raw observation of the tabletop, drawn from a seed."""

    def draw(seed: int) -> dict[str, Any]:
        random = np.random.default_rng(seed)
        quaternion = random.normal(size=4)
        return {
            "third_person": random.integers(0, 256, (32, 32, 3), dtype=np.uint8),
            "wrist": random.integers(0, 256, (32, 32, 3), dtype=np.uint8),
            "qpos": random.normal(size=9),
            "eef_pos": random.uniform(-0.5, 0.5, 3),
            "commanded_pos": random.uniform(-0.5, 0.5, 3),
            "eef_quat_wxyz": quaternion / np.linalg.norm(quaternion),
            "gripper_width": float(random.uniform(0.0, 0.08)),
            "time": 0.05 * seed,
        }

    return draw


@pytest.fixture
def observations(native: Native) -> list[Observation]:
    return [observation(native(seed), SENTENCES[seed % 2]) for seed in range(4)]
