"""RL on a published architecture, imported for this task: adapters alone change."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_iteration_of_rl_on_an_imported_model(tmp_path: Path) -> None:
    def vla(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "vla", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    vla(
        "import", f"path={ROOT}/tests/vla/models/reference/checkpoint", f"out={tmp_path}/oft", "decoding=parallel",
        "stop=false", "values=1", "dtype=float32", f"like={ROOT}/checkpoints/put_on_plate",
    )  # fmt: skip
    train = (
        "train", "experiment=tabletop_ppo", f"checkpoint={tmp_path}/oft", f"out={tmp_path}/run", "iterations=1",
        "slots=4", "decisions=4", "lora.rank=4", "algorithm.minibatches=1", "algorithm.critic_iterations=0",
        "algorithm.train_vision=true",
    )  # fmt: skip
    told = vla(*train)
    assert re.search(r"adapters are merged; the outputs of a test image deviate by [\d.e-]+", told), told
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("oft", "run/checkpoint"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layer = (
        r"(vision_backbone|projector|language_model)\..*(qkv|proj|fc1|fc2|fc3|[qkvo]_proj|gate_proj|up_proj|down_proj)"
    )
    assert changed and all(re.fullmatch(layer + r"\.weight", name) for name in changed), sorted(changed)[:5]
    assert any(name.startswith("vision_backbone.featurizer") for name in changed)
    assert not any("blocks.2." in name or "attn_pool" in name for name in changed)  # no output depends on these

    states = sorted((tmp_path / "run" / "states").glob("iteration_*"))
    saved = load_file(states[-1] / "learner.safetensors")
    (tmp_path / "run" / "checkpoint").rename(tmp_path / "first")
    resumed = vla(*train)
    assert "resuming" in resumed and "at iteration 1" in resumed
    # Nothing was left to learn: the adapters of the state, merged again, are the first bundle.
    again = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert saved and all(torch.equal(again[name], after[name]) for name in after)
