"""A small, untrained, but real policy for the tests of the deployment, and a way to wait."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployment.franka import ArmConfig
from vla import configuration, graphics
from vla.adapters.tabletop import tabletop_contract
from vla.policy import Policy
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer

graphics.choose()  # before any test imports mujoco

SENTENCE = "put the red cube on the plate"


def untrained() -> Policy:
    """64 px and chunks of 8, as the quickstart's; it moves the tool by 1 mm a step at most."""
    contract = tabletop_contract(
        image_size=64, chunk=8, max_translation=0.02, max_rotation=0.06, task_set="put_on_plate"
    )
    action = ArrayStatistics.from_bounds([-0.001] * 3 + [-0.002] * 3 + [0.0], [0.001] * 3 + [0.002] * 3 + [1.0])
    state = ArrayStatistics.from_bounds([-1.0] * contract.state_size, [1.0] * contract.state_size)
    model = {
        "class": "nano", "vision": {"image_size": 64, "widths": [8, 16], "keypoints": 4}, "hidden": 16,
        "layers": 1, "heads": 2, "intermediate": 32, "chunk": 8, "n_bins": 32, "prompt_length": 48,
    }  # fmt: skip
    return Policy.untrained(model, contract, Statistics(action, state), train_tokenizer([SENTENCE], 512, 48), 3)


@pytest.fixture
def policy() -> Policy:
    return untrained()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a checkpoint."""
    folder = tmp_path_factory.mktemp("bundle") / "checkpoint"
    untrained().save(folder)
    return folder


@pytest.fixture
def until() -> Callable[..., bool]:
    """until(condition, seconds): waits for it; whether it came true in time."""

    def wait(condition: Callable[[], Any], seconds: float = 5.0) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    return wait


@pytest.fixture(scope="module")
def robot() -> ArmConfig:
    return configuration.load(ArmConfig, "fr3", folder=configuration.config_folder() / "robot")
