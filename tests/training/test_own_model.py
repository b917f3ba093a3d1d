"""A model of one's own, as the guide brings it: docs/guide/bring-your-own-model.md."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_model import OwnConfig
from safetensors.torch import load_file

from training.sft import SftConfig
from vla import configuration
from vla.adapters.tabletop import tabletop_contract
from vla.checkpoint import CheckpointError
from vla.errors import ConfigError
from vla.policy import Policy, PolicyError
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer
from vla.types import ModelInputs

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "guide" / "bring-your-own-model.md"
SENTENCE = "put the red cube on the plate"
SMALL = {
    "demos": ("episodes=6", "workers=1"),
    "sft": ("samples=1600", "batch=16", "held_out=0.2", "processes=1", "augment=false"),
    "eval": ("episodes=1", "workers=1"),
    "train": (
        "iterations=1", "slots=4", "decisions=4", "algorithm.minibatches=1", "algorithm.critic_iterations=0",
        "placement.learners=1", "placement.environment_workers=1", "placement.policy_threads=1",
    ),
}  # fmt: skip


def untrained(**sizes: Any) -> Policy:
    contract = tabletop_contract(image_size=64, chunk=8, max_translation=0.02, max_rotation=0.06, task_set="x")
    numbers = Statistics(
        ArrayStatistics.from_bounds([-0.02] * 3 + [-0.06] * 3 + [0.0], [0.02] * 3 + [0.06] * 3 + [1.0]),
        ArrayStatistics.from_bounds([-1.0] * contract.state_size, [1.0] * contract.state_size),
    )
    return Policy.untrained(OwnConfig(**sizes).data(), contract, numbers, train_tokenizer([SENTENCE], 512, 48), 3)


@pytest.fixture
def inputs() -> ModelInputs:
    random = np.random.default_rng(0)
    tokens = np.zeros((3, 48), np.int64)
    tokens[:, -6:] = random.integers(3, 260, (3, 6))
    return ModelInputs(
        random.integers(0, 256, (3, 2, 64, 64, 3), dtype=np.uint8), random.random((3, 11), np.float32), tokens
    )


def test_a_bundle_gives_the_same_numbers(tmp_path: Path, inputs: ModelInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = untrained()
    policy.save(tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle" / "model.json").read_text())["class"] == "own_model.OwnConfig"
    assert torch.equal(Policy.load(tmp_path / "bundle", None).outputs(inputs), policy.outputs(inputs))
    monkeypatch.delitem(sys.modules, "own_model")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if Path(folder) != HERE])
    with pytest.raises(CheckpointError, match=r"own_model.OwnConfig can't be imported.*PYTHONPATH") as caught:
        Policy.load(tmp_path / "bundle", None)
    assert caught.value.codes == ("MODEL_CONFIG",)


def test_rollout_and_training_see_the_same_probabilities(inputs: ModelInputs) -> None:
    policy = untrained()
    drawn = policy.sample(inputs, 1.0, torch.Generator().manual_seed(0))
    again = policy.evaluate_actions(inputs, drawn.tokens, 1.0)
    assert again.log_probs.requires_grad
    assert (again.log_probs - drawn.log_probs).abs().max() < 1e-5
    alone = policy.sample(ModelInputs(*(part[:1] for part in vars(inputs).values())), 0.0)
    assert torch.allclose(policy.sample(inputs, 0.0).log_probs[:1], alone.log_probs, atol=1e-5)


def test_a_class_that_is_no_model_is_not_called(tmp_path: Path) -> None:
    untrained().save(tmp_path / "bundle")
    file = tmp_path / "bundle" / "model.json"
    whole = json.loads(file.read_text())
    for name in ("subprocess.Popen", "vla.contract.Camera", "nowhere.Model", "own"):
        file.write_text(json.dumps(whole | {"class": name}))
        with pytest.raises(CheckpointError, match="MODEL_CONFIG"):
            Policy.load(tmp_path / "bundle", None)


def test_sizes_and_keys_that_do_not_fit_are_told() -> None:
    for sizes, name in (
        ({"cameras": 1}, "cameras"), ({"image_size": 32}, "image_size"), ({"vocabulary": 100}, "TOKENIZER_VOCABULARY"),
    ):  # fmt: skip
        with pytest.raises(PolicyError, match=name):
            untrained(**sizes)
    options = ("out=x", "demos=y", f"model={HERE / 'own_model.yaml'}")
    assert configuration.load(SftConfig, "sft", [*options, "model.width=96"]).model == OwnConfig(width=96)
    with pytest.raises(ConfigError, match=r"unknown key 'model.widht': did you mean 'model.width'"):
        configuration.load(SftConfig, "sft", [*options, "model.widht=96"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_page(tmp_path: Path) -> None:
    """In the folder of the two files, with smaller numbers."""
    for name in ("own_model.py", "own_model.yaml"):
        shutil.copy(HERE / name, tmp_path)
    page = PAGE.read_text()
    assert (HERE / "own_model.yaml").read_text() in page
    commands = re.findall(r"^vla (\w+) (.*)$", re.search(r"```sh\n(.*?)```", page, re.DOTALL)[1], re.MULTILINE)
    assert [name for name, _ in commands] == list(SMALL)
    # The module is to be found in the folder alone.
    root = os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")]), str(HERE.parents[1])])
    paths = [p for p in root.split(os.pathsep) if p == "." or Path(p) != HERE]
    for name, words in commands:
        done = subprocess.run(
            [sys.executable, "-m", "vla", name, *words.split(), *SMALL[name]], capture_output=True, text=True,
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/sft/metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"imitation"}
    assert rows[-1]["loss"] < 4.8, "5.5 is that of a guess"
    assert json.loads((tmp_path / "runs/sft.json").read_text())["variants"]["in_distribution"]["episodes"] == 1
    (row,) = [json.loads(line) for line in (tmp_path / "runs/rl/metrics.jsonl").read_text().splitlines()]
    assert row["train/rollout_logprob_gap_max"] < 1e-4
    before, after = (load_file(tmp_path / f"runs/{f}/checkpoint/model.safetensors") for f in ("sft", "rl"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if not name.startswith("value_head")} == changed
