"""`vla train from=RUN`: the same curve again, other options where they are given, and what stands in the way."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from point_env import untrained
from train_run import TINY

from training import origin
from training.train import TrainConfig, command, train
from vla import checkpoint as bundles
from vla import cli, configuration
from vla.errors import ConfigError, SimrealError

pytestmark = pytest.mark.timeout(300)  # runs of several processes, on a busy machine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    untrained(folder)
    return folder


def learn(*options: str) -> None:
    """`vla train`, in this process."""
    assert cli.main(["train", *options]) == 0


@pytest.fixture(scope="module")
def first(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose placement and seed are not the usual ones."""
    out = tmp_path_factory.mktemp("first") / "run"
    learn(f"out={out}", f"checkpoint={checkpoint}", *TINY, "algorithm=ppo", "iterations=2", "seed=5",
          "placement.stages=2", "algorithm.critic_iterations=1")  # fmt: skip
    return out


def curve(run: Path) -> list[dict[str, Any]]:
    """All metrics but times and shares of time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "use/"))} for row in rows]


def test_a_repetition_has_the_same_curve_bit_for_bit(first: Path, tmp_path: Path) -> None:
    learn(f"from={first}", f"out={tmp_path / 'again'}")
    assert len(curve(first)) == 2 and len(curve(first)[0]) > 15
    assert curve(tmp_path / "again") == curve(first)
    assert bundles.fingerprint(tmp_path / "again" / "checkpoint") == bundles.fingerprint(first / "checkpoint")
    told = origin.read(tmp_path / "again")
    assert told["repeats"] == str(first)
    assert told["starts"][0]["placement"]["stages"] == 2
    assert told["starts"][0]["packages"]["torch"] and "simreal" in told["starts"][0]["packages"]
    assert (tmp_path / "again" / "config.json").read_bytes() == (first / "config.json").read_bytes()


def test_options_given_override_and_the_curve_is_another(first: Path, tmp_path: Path) -> None:
    learn(f"from={first}", f"out={tmp_path / 'other'}", "seed=6", "iterations=1")
    assert len(curve(tmp_path / "other")) == 1
    assert curve(tmp_path / "other")[0] != curve(first)[0]
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert (config["seed"], config["iterations"], config["slots"]) == (6, 1, 8)


def compose(run: Path, *options: str) -> TrainConfig:
    return configuration.load(TrainConfig, "train", [f"from={run}", "out=x", *options], base=origin.options_of(run))


def test_a_group_may_be_chosen_anew(first: Path) -> None:
    config = compose(first, "algorithm=grpo", "algorithm.groups=4", "placement=pipelined")
    assert type(config.algorithm).__name__ == "GRPOConfig" and config.algorithm.groups == 4
    assert (config.seed, config.slots, config.placement.stages, config.placement.learners) == (5, 8, 2, 2)
    assert config.env.name == "point_env:make" and config.env.settings == {"image_size": 16, "chunk": 2}
    with pytest.raises(ConfigError, match="one of the two"):
        compose(first, "experiment=tabletop_ppo")


def moved(first: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of the run that began with a copy of its bundle: both may be damaged."""
    run, bundle = folder / "run", folder / "bundle"
    shutil.copytree(first, run)
    shutil.copytree(origin.read(first)["checkpoint"]["path"], bundle)
    told = json.loads((run / origin.FILE).read_text())
    told["checkpoint"]["path"] = str(bundle)
    (run / origin.FILE).write_text(json.dumps(told))
    return run, bundle


def test_a_beginning_that_is_gone_or_has_changed_is_refused(first: Path, checkpoint: Path, tmp_path: Path) -> None:
    run, bundle = moved(first, tmp_path)
    out = tmp_path / "new"
    config = replace(compose(run), out=out)
    assert config.checkpoint == bundle
    (bundle / "provenance.json").write_text("{}")  # says where it comes from, not what it is
    origin.check(run, out, bundle)
    weights = bytearray((bundle / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(weights)
    with pytest.raises(SimrealError, match=r"has changed since: its sha256 was \w{16} and is \w{16}") as caught:
        train(config)
    assert caught.value.code == "START_CHANGED" and "checkpoint=BUNDLE" in caught.value.remedy
    shutil.rmtree(bundle)
    with pytest.raises(SimrealError, match="which is gone") as caught:
        train(config)
    assert caught.value.code == "START_MISSING" and "checkpoint=BUNDLE" in caught.value.remedy
    assert not out.exists()
    origin.check(run, out, checkpoint)  # another beginning, knowingly
    with pytest.raises(SimrealError, match="both") as caught:
        origin.check(run, run, checkpoint)
    assert caught.value.code == "OUTPUT_EXISTS"


def test_a_run_that_kept_no_beginning_is_refused(first: Path, tmp_path: Path) -> None:
    run, _ = moved(first, tmp_path)
    (run / origin.FILE).unlink()
    with pytest.raises(SimrealError, match="an earlier version") as caught:
        command.base(run)
    assert caught.value.code == "ORIGIN"
    with pytest.raises(SimrealError, match="holds no run") as caught:
        command.base(tmp_path)
    assert caught.value.code == "RUN_MISSING"


def test_other_versions_and_interruptions_are_told(first: Path, tmp_path: Path) -> None:
    assert not [line for line in origin.differences(first) if "commit" not in line]
    run, _ = moved(first, tmp_path)
    told = json.loads((run / origin.FILE).read_text())
    begun = told["starts"][0]
    begun["packages"]["torch"] = "1.0"
    begun["packages"]["gone"] = "2.0"
    begun["commit"] = "0123"
    begun["machine"]["cores"] = 999
    killed = begun | {"placement": begun["placement"] | {"stages": 1}}
    told["starts"] = [killed, begun, begun | {"iteration": 2}]  # killed before its first state, then after the second
    (run / origin.FILE).write_text(json.dumps(told))
    said = "\n".join(origin.differences(run))
    for part in ("torch is ", "was 1.0", "gone is not installed, was 2.0", "was at 0123", "cores is ", "was 999",
                 "interrupted before iteration 2"):  # fmt: skip
        assert part in said, said
    assert compose(run).placement.stages == 2


def test_random_weights_are_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    learn(f"out={run}", *TINY, "model=mlp", "model.hidden=16", "model.layers=1", "algorithm=ppo", "iterations=1")
    learn(f"from={run}", f"out={again}")
    assert curve(again) == curve(run) and "other random weights" not in capsys.readouterr().out
    told = json.loads((run / origin.FILE).read_text())
    told["checkpoint"]["sha256"] = "0" * 64
    (run / origin.FILE).write_text(json.dumps(told))
    learn(f"from={run}", f"out={tmp_path / 'third'}")
    assert f"repeating {run}: it began with other random weights" in capsys.readouterr().out
