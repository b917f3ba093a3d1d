"""`vla train` as its user runs it: it learns, it resumes from any kill, and it says what is wrong."""

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from point_env import untrained
from rich.console import Console
from train_run import Run, Start

from training.algorithms.ppo import PPOConfig
from training.envs import EnvConfig
from training.pipeline.placement import PlacementConfig
from training.pipeline.status import Doing
from training.pipeline.timeline import kept, read
from training.report import ReportConfig, report
from training.run import RunFolder, Totals
from training.top import view
from training.train import TrainConfig, _start, train
from vla import configuration
from vla.checkpoint import load
from vla.contract import ContractError
from vla.errors import ConfigError, SimrealError
from vla.lora import Lora
from vla.models.mlp import MLPConfig
from vla.results import commit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    untrained(folder)
    return folder


def iterations(run: Run) -> list[float]:
    return [row["iteration"] for row in run.rows]


@pytest.mark.parametrize("critic", ["ppo", pytest.param("ppo_privileged", marks=pytest.mark.slow)])
def test_ppo_learns_to_reach_the_point(start: Start, critic: str) -> None:
    run = start(
        f"algorithm={critic}", "slots=16", "decisions=16", "iterations=14", "algorithm.learning_rate=3e-3",
        "algorithm.epochs=3", "algorithm.critic_iterations=1", "algorithm.minibatches=4", "algorithm.gamma=0.95",
        "placement.micro_batch=auto",
    )  # fmt: skip
    assert run.finish() == 0, run.text
    assert "micro-batches of 64 samples fit the learners' memory" in run.text
    success = [row["rollout/success"] for row in run.rows]
    returns = [row["rollout/return"] for row in run.rows]
    assert max(success[:2]) < 0.75
    assert min(success[-2:]) > 0.85
    assert min(returns[-2:]) > max(returns[:2]) + 0.3
    standard = ("train/approx_kl", "train/clip_fraction", "train/explained_variance", "time/env_steps_per_s")
    assert all(name in run.rows[-1] for name in (*standard, "time/rollout_s", "time/update_s"))
    assert list((run.out / "tensorboard").glob("events*"))
    trained = load(run.out / "checkpoint", None)
    assert trained.provenance.curve["iterations"] == 14
    assert trained.provenance.config["slots"] == 16
    assert trained.provenance.commit == commit()


ASYNCHRONOUS = ("placement=asynchronous", "placement.environment_workers=2", "placement.lanes=2")


@pytest.mark.slow
def test_ppo_learns_with_the_asynchronous_schedule(start: Start) -> None:
    run = start(
        *ASYNCHRONOUS, "algorithm=ppo", "slots=16", "decisions=16", "iterations=16", "algorithm.learning_rate=1e-3",
        "algorithm.epochs=3", "algorithm.critic_iterations=1", "algorithm.minibatches=4", "algorithm.gamma=0.95",
        "placement.micro_batch=20",
    )  # fmt: skip
    assert run.finish() == 0, run.text
    success = [row["rollout/success"] for row in run.rows]
    assert max(success[:2]) < 0.75
    assert sum(success[-4:]) / 4 > 0.85
    assert all(row["train/staleness_max"] <= 1 for row in run.rows)
    assert any(row["train/staleness_mean"] > 0 for row in run.rows), "nothing overlapped"
    waits = ("env_wait_s", "env_throttled_s", "policy_wait_s", "learner_wait_s")
    assert all(row[f"time/{name}"] >= 0 for row in run.rows for name in waits)
    assert all(4 <= row["rollout/batch_mean"] <= 16 for row in run.rows)
    load(run.out / "checkpoint", None)


@pytest.mark.slow
def test_the_asynchronous_schedule_resumes_after_kill_of_the_driver(start: Start) -> None:
    options = (*ASYNCHRONOUS, "iterations=14", "env.settings.pause_s=0.02", "placement.learners=2")
    first = start(*options)
    first.wait_for(lambda: len(first.rows) >= 3)
    orphans = [psutil.Process(p) for p in first.workers.values()]
    first.kill()
    done = len(first.rows)
    saved = max((first.out / "states").glob("iteration_*"))
    last = int(saved.name.rsplit("_", 1)[1])
    begun = sum(json.loads((saved / "state.json").read_text())["counters"])
    assert last >= done - 2 and begun >= 8
    second = start(*options)
    assert second.finish() == 0, second.text
    assert f"resuming {second.out} at iteration {last + 1}" in second.text
    assert iterations(second) == list(range(14))
    steps = [row["time/total_env_steps"] for row in second.rows]
    assert steps == sorted(steps)
    final = max((second.out / "states").glob("iteration_*"))
    assert sum(json.loads((final / "state.json").read_text())["counters"]) > begun
    assert not psutil.wait_procs(orphans, timeout=10)[1], "workers of the killed driver are still there"


def test_goes_on_after_kill_of_an_environment_worker_and_of_the_driver(start: Start) -> None:
    options = ("iterations=12", "env.settings.pause_s=0.03")
    first = start(*options)
    first.wait_for(lambda: len(first.rows) >= 2)
    victim = first.workers["environment worker 0"]
    os.kill(victim, signal.SIGKILL)
    first.wait_for(lambda: first.workers["environment worker 0"] != victim)
    first.wait_iterations(1)
    assert f"environment worker 0 (process {victim}) is restarted: its process died" in first.text
    orphans = [psutil.Process(p) for p in first.workers.values()]
    first.kill()
    done = len(first.rows)
    assert 3 <= done < 12
    saved = max((first.out / "states").glob("iteration_*"))
    last = int(saved.name.rsplit("_", 1)[1])
    assert last >= done - 2  # one iteration is lost at most
    second = start(*options)
    assert second.finish() == 0, second.text
    assert f"resuming {second.out} at iteration {last + 1}" in second.text
    assert iterations(second) == list(range(12))
    steps = [row["time/total_env_steps"] for row in second.rows]
    assert steps == sorted(steps)
    load(second.out / "checkpoint", None)
    assert not psutil.wait_procs(orphans, timeout=10)[1], "workers of the killed driver are still there"


@pytest.mark.parametrize("schedule", ["pipelined", pytest.param("asynchronous", marks=pytest.mark.slow)])
def test_one_sees_who_does_what_during_a_run_and_after_it(start: Start, schedule: str) -> None:
    run = start(f"placement={schedule}", "iterations=10", "env.settings.pause_s=0.03", "placement.learners=2")
    run.wait_for(lambda: len(run.rows) >= 2)
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(view(run.out))
    said = console.export_text()
    stepping = "environment worker 0" if schedule == "pipelined" else "lane 0"
    assert all(name in said for name in (stepping, "policy worker 0", "learner 1", "driver", "wait for the policy"))
    assert all(f"{stage} 0%" not in said for stage in ("environments", "policy", "learners")), said
    assert run.finish() == 0, run.text
    assert all(0 < row[f"use/{stage}"] < 1 for row in run.rows for stage in ("environments", "policy", "learners"))
    for row in run.rows:  # what the stages say fits the rollout, but for calls to and fro
        parts = row["time/env_step_s"] + row["time/env_wait_s"] + row.get("time/env_throttled_s", 0.0)
        assert 0.5 * row["time/rollout_s"] < parts < 1.05 * row["time/rollout_s"] + 0.1
    intervals = read(run.out / "timeline", kept(run.out / "timeline")[-2:])
    seen = {(interval.name, interval.doing) for interval in intervals}
    assert {(stepping, Doing.STEPPING), ("policy worker 0", Doing.DECIDING), ("learner 1", Doing.UPDATING)} < seen
    report(ReportConfig(run.out))
    assert "trace.json" in (run.out / "report.html").read_text() and (run.out / "trace.json").exists()


def test_nan_stops_the_run_says_where_and_keeps_the_last_state(start: Start, tmp_path: Path) -> None:
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    options = ("iterations=8", "env.settings.pause_s=0.03", f"env.settings.trouble={trouble}")
    run = start(*options)
    run.wait_for(lambda: len(run.rows) >= 2)
    (trouble / "nan").touch()
    assert run.finish() == 2, run.text
    good = len(run.rows)
    assert "vla: [NAN_REWARD] " in run.text and "rewards are not finite, the first in decision " in run.text
    assert "action 0: nan" in run.text and "workers start again" not in run.text
    saved = sorted((run.out / "states").glob("iteration_*"))
    assert saved[-1].name == f"iteration_{good - 1:06d}"
    assert {"learner.safetensors", "critic.safetensors", "state.json"} == {p.name for p in saved[-1].iterdir()}


def tiny(out: Path, checkpoint: Path | None, **changes: Any) -> TrainConfig:
    given = {
        "iterations": 2, "slots": 8, "decisions": 8, "algorithm": PPOConfig(minibatches=2),
        "env": EnvConfig("point_env:make", {"image_size": 16, "chunk": 2}),
        "placement": PlacementConfig(learners=1),
    }  # fmt: skip
    return TrainConfig(out, checkpoint, **{**given, **changes})


def test_a_folder_with_another_run_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    RunFolder(out, tiny(out, checkpoint), ignore=("out", "placement", "cluster")).create()
    before = (out / "config.json").read_bytes()
    other = tiny(out, checkpoint, seed=7, algorithm=PPOConfig(minibatches=2, gamma=0.5))
    with pytest.raises(SimrealError) as caught:
        train(other)
    assert caught.value.code == "OUTPUT_EXISTS"
    assert "algorithm.gamma (0.97 there, 0.5 now); seed (0 there, 7 now)" in str(caught.value)
    assert (out / "config.json").read_bytes() == before
    assert not ray.is_initialized()
    # The placement may change: it is the same run on other processes.
    moved = tiny(out, checkpoint, placement=PlacementConfig(stages=2))
    RunFolder(out, moved, ignore=("out", "placement", "cluster"))
    # A version before knew fewer options: they had what is their default now.
    told = json.loads(before)
    del told["lora"]["modules_to_save"], told["algorithm"]["adaptive_kl"]
    (out / "config.json").write_text(json.dumps(told))
    RunFolder(out, moved, ignore=("out", "placement", "cluster"))
    changed = tiny(out, checkpoint, lora=Lora(modules_to_save=["projector"]))
    with pytest.raises(SimrealError, match=r"lora.modules_to_save \(\[\] there, \['projector'\] now\)"):
        RunFolder(out, changed, ignore=("out", "placement", "cluster"))


@pytest.mark.parametrize("word", ["policy=runs/oft/bundle", "bundle=runs/oft/bundle", "policy.folder=x"])
def test_who_names_a_bundle_otherwise_is_told_that_the_option_is_checkpoint(word: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key '[a-z.]*': the option is 'checkpoint' \(bundle to start"):
        configuration.load(TrainConfig, "train", ["experiment=tabletop_ppo", "out=x", word])


def test_a_run_starts_from_a_bundle_or_from_random_weights(checkpoint: Path, tmp_path: Path) -> None:
    both = {"checkpoint": checkpoint, "model": MLPConfig()}
    for given, found in (({}, "neither is given"), (both, "both are given")):
        with pytest.raises(SimrealError, match=found) as caught:
            train(TrainConfig(tmp_path / "run", **given))
        assert caught.value.code == "START"
    assert not (tmp_path / "run").exists()


def test_an_mlp_learns_from_random_weights(start: Start) -> None:
    run = start(
        "checkpoint=null", "model=mlp", "model.hidden=64", "model.layers=2", "algorithm=ppo", "slots=16",
        "decisions=16", "iterations=12", "algorithm.learning_rate=3e-3", "algorithm.epochs=3",
        "algorithm.critic_iterations=1", "algorithm.minibatches=4", "algorithm.gamma=0.95",
    )  # fmt: skip
    assert run.finish() == 0, run.text
    success = [row["rollout/success"] for row in run.rows]
    assert max(success[:2]) < 0.75
    assert min(success[-2:]) > 0.85
    first, last = (load(run.out / name, None) for name in ("start", "checkpoint"))
    assert first.contract == last.contract and first.provenance.config["model"]["hidden"] == 64


def test_a_finished_run_is_left_alone(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    RunFolder(out, tiny(out, checkpoint), ignore=("out", "placement", "cluster")).create()
    (out / "checkpoint").mkdir()
    train(tiny(out, checkpoint))
    assert f"{out}/checkpoint is there already" in capsys.readouterr().out
    assert not any((out / "checkpoint").iterdir())
    assert not ray.is_initialized()


def test_a_folder_with_foreign_files_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SimrealError, match="is not empty and holds no run"):
        train(tiny(tmp_path, checkpoint))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert not ray.is_initialized()


def test_a_checkpoint_for_another_environment_is_refused_before_anything_starts(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    env = EnvConfig("point_env:make", {"image_size": 32, "chunk": 4})
    with pytest.raises(ContractError) as caught:
        train(tiny(out, checkpoint, env=env))
    assert caught.value.codes == ("CAMERA_SIZE", "ACTION_CHUNK")
    assert not out.exists()
    assert not ray.is_initialized()


def test_ray_that_does_not_start_is_an_error_in_words(start: Start) -> None:
    run = start("iterations=2", RAY_TMPDIR="/dev/null/nowhere")
    assert run.finish() == 2
    assert run.text.startswith("vla: [RAY] Ray does not start: ")
    assert "Traceback" not in run.text


def test_states_of_a_run_folder(tmp_path: Path, checkpoint: Path) -> None:
    """Half a state and half a line of metrics, as a kill leaves them, don't count; old states go."""
    folder = RunFolder(tmp_path / "run", tiny(tmp_path / "run", checkpoint))
    folder.create()
    assert folder.latest() is None
    with pytest.raises(SimrealError, match="another process is at work"):
        RunFolder(tmp_path / "run", tiny(tmp_path / "run", checkpoint)).create()
    for iteration in range(4):
        folder.log(iteration, {"loss": float(iteration)})
        folder.commit_state(folder.begin_state(), Totals(iteration))
    (folder.begin_state() / "learner.safetensors").write_bytes(b"half")
    with (folder.out / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "lo')
    folder.close()
    again = RunFolder(tmp_path / "run", tiny(tmp_path / "run", checkpoint))
    latest = again.latest()
    assert latest is not None
    assert latest.name == "iteration_000003"
    assert sorted(p.name for p in (folder.out / "states").glob("iteration_*")) == [
        "iteration_000002",
        latest.name,
    ]
    assert [row["iteration"] for row in again.metrics()] == [0, 1, 2, 3]
    again.forget_after(3)
    assert [row["iteration"] for row in again.metrics()] == [0, 1, 2]


def test_a_run_goes_on_with_the_weights_that_it_started_with(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", None, model=MLPConfig(hidden=8))
    aside = _start(config, tmp_path / "aside")
    assert aside == tmp_path / "aside" / "start" and not config.out.exists()
    config.out.mkdir()
    aside.rename(config.out / "start")
    assert _start(config, tmp_path / "elsewhere") == config.out / "start"
    assert not (tmp_path / "elsewhere").exists()
