"""`vla sweep`: variants times seeds, played out, gone on with, scored and compared."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray_nodes
from point_env import untrained
from train_run import TINY

from training import metrics
from training.start import revalued
from training.sweep import Evaluation, SweepConfig, beginnings, runs, score_of, sweep, title
from training.sweep_reuse import take_over
from training.train import TrainConfig, train
from vla import configuration, options
from vla.checkpoint import fingerprint, load
from vla.errors import ConfigError, SimrealError

pytestmark = pytest.mark.timeout(600)  # runs of several processes, on a busy machine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    untrained(folder)
    return folder


def small(out: Path, checkpoint: Path, **changes: Any) -> SweepConfig:
    variants = {"slow": ["algorithm.learning_rate=1e-5"], "fast": ["algorithm.learning_rate=1e-3"]}
    given = {"variants": variants, "base": [*TINY, "algorithm=ppo", "iterations=1"], "checkpoint": checkpoint,
             "seeds": [0], "evaluation": Evaluation(episodes=3)}  # fmt: skip
    return SweepConfig(out, **{**given, **changes})


def test_a_fresh_value_head_and_all_else_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    assert revalued(checkpoint, 1, 0) is None
    before, made = load(checkpoint, None).model.state_dict(), revalued(checkpoint, 2, 0)
    assert made is not None
    after = made.model.state_dict()
    heads = {key for key in after if key.startswith("value_head.")}
    assert heads and all((before[key] == after[key]).all() for key in after if key not in heads)
    made.save(tmp_path / "a")
    again, other = revalued(checkpoint, 2, 0), revalued(checkpoint, 2, 1)
    assert again is not None and other is not None
    again.save(tmp_path / "b")
    other.save(tmp_path / "c")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") != fingerprint(tmp_path / "c")
    with pytest.raises(SimrealError, match="for a bundle"):
        train(configuration.load(TrainConfig, "train", [f"out={tmp_path / 'x'}", "model=mlp", "values=chunk"]))


def test_what_can_be_no_sweep_is_refused_before_anything_starts(checkpoint: Path, tmp_path: Path) -> None:
    config = small(tmp_path / "sweep", checkpoint)
    for wrong in (replace(config, variants={}), replace(config, seeds=[]), replace(config, jobs=0)):
        with pytest.raises(SimrealError, match="needs variants") as caught:
            sweep(wrong)
        assert caught.value.code == "SWEEP"
    with pytest.raises(ConfigError, match=r"variant fast: unknown key 'algorithm.learning_rat'"):
        sweep(replace(config, variants={"fast": ["algorithm.learning_rat=1"]}))
    with pytest.raises(ConfigError, match="can't be a folder"):
        sweep(replace(config, variants={"../fast": []}))
    run = tmp_path / "sweep" / "fast" / "seed_0"
    run.mkdir(parents=True)
    told = options.write(runs(config)["fast/seed_0"]) | {"slots": 99}
    (run / "config.json").write_text(json.dumps(told))
    with pytest.raises(SimrealError, match=r"holds another run; it differs in slots \(99 there, 8 now\)"):
        sweep(config)
    assert not (tmp_path / "sweep" / "slow").exists()


def test_a_failure_does_not_end_the_others_and_what_is_finished_stays(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a sweep, and=more"
    config = small(out, checkpoint)
    variants = {"broken": [f"checkpoint={tmp_path / 'nowhere'}"], "fast": config.variants["fast"]}
    config = replace(config, variants=variants)
    assert sweep(config) == 1
    said = capsys.readouterr().out
    assert "broken/seed_0 failed: " in said and "CHECKPOINT_MISSING" in said and "fast/seed_0 finished" in said
    found = json.loads((out / "results.json").read_text())
    assert list(found["groups"]) == ["fast"] and "CHECKPOINT_MISSING" in found["failed"]["broken/seed_0"]
    greedy = found["groups"]["fast"]["greedy"]
    assert greedy["episodes"] == 3 and found["evaluated"]["seeds"] == [90_001, 90_002, 90_003]
    table = (out / "table.md").read_text()
    assert "| fast | 0 |" in table and (out / "curves.png").stat().st_size > 10_000
    (file,) = (out / "beginning").glob("eval_*_in_distribution.json")
    played = json.loads(file.read_text())
    assert played["checkpoint"] == str(checkpoint) and list(found["beginnings"]) == ["beginning"]
    wins = played["variants"]["in_distribution"]
    before = found["beginnings"]["beginning"]
    assert (before["rate"], before["episodes"], before["interval95"]) == (wins["rate"], 3, wins["wilson95"])
    assert f"| beginning |  | {wins['rate']:.1%} (" in table
    bundle = out / "fast" / "seed_0" / "checkpoint" / "model.safetensors"
    made = bundle.stat().st_mtime_ns
    file.write_text(json.dumps(played | {"checkpoint": "another"}))
    assert sweep(replace(config, variants={"fast": variants["fast"]})) == 0
    assert json.loads(file.read_text()) == played, "it was another bundle's"
    assert "1 of 1 runs are finished already" in capsys.readouterr().out and bundle.stat().st_mtime_ns == made


def test_one_bundle_in_two_simulators_is_two_beginnings(checkpoint: Path, tmp_path: Path) -> None:
    variants: dict[str, list[str]] = {"usual": [], "fast": ["algorithm.learning_rate=1e-3"]}
    config = small(tmp_path, checkpoint, variants=variants)
    (only,) = beginnings(config, runs(config).values())
    assert title(only, 1) == "beginning"
    config = replace(config, variants=variants | {"slow": ["env.settings.pause_s=0.01"]})
    first, second = found = beginnings(config, runs(config).values())
    assert first == only and first.checkpoint == second.checkpoint and first.file != second.file
    assert [title(score, len(found)) for score in found] == [f"beginning {checkpoint}", f"beginning_2 {checkpoint}"]


def test_what_another_sweep_has_finished_is_copied(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = small(tmp_path / "first", checkpoint, variants={"usual": []})
    assert sweep(first) == 0
    (made,) = (tmp_path / "first" / "usual" / "seed_0").glob("metrics.jsonl")
    told = json.loads(made.with_name("config.json").read_text())
    del told["lora"]["modules_to_save"]  # as a version before that option has it
    made.with_name("config.json").write_text(json.dumps(told))
    variants = {"again": [], "fast": ["algorithm.learning_rate=1e-3"]}
    with pytest.raises(SimrealError, match="holds no run of a sweep"):
        sweep(small(tmp_path / "second", checkpoint, variants=variants, reuse=[tmp_path]))
    second = small(tmp_path / "second", checkpoint, variants=variants, reuse=[first.out])
    capsys.readouterr()
    assert sweep(second) == 0
    said = capsys.readouterr().out
    assert "again/seed_0 is a copy of" in said and "1 of 2 runs are finished already" in said
    assert "fast/seed_0 is a copy" not in said and "fast/seed_0 finished" in said
    assert (second.out / "again" / "seed_0" / "metrics.jsonl").read_bytes() == made.read_bytes()
    groups = json.loads((second.out / "results.json").read_text())["groups"]
    assert groups["again"]["greedy"]["episodes"] == 3

    bundle = tmp_path / "other"
    untrained(bundle, values=2)
    other = small(tmp_path / "third", bundle, variants={"usual": []}, reuse=[first.out])
    assert take_over(other.reuse, runs(other)["usual/seed_0"], None) is None, "it began with another bundle"
    gone = replace(runs(first)["usual/seed_0"], checkpoint=tmp_path / "nowhere", out=tmp_path / "gone")
    assert take_over([first.out], gone, None) is None, "its own run says what is wrong, the others go on"
    longer = replace(second, out=tmp_path / "fourth", variants={"usual": []}, evaluation=Evaluation(episodes=4))
    run = runs(longer)["usual/seed_0"]
    elsewhere = replace(run, placement=replace(run.placement, staleness=run.placement.staleness + 1))
    assert take_over(longer.reuse, elsewhere, None) is None, "it was placed otherwise"
    assert take_over(longer.reuse, run, score_of(longer, run)) is not None
    assert (run.out / "checkpoint").exists() and not list(run.out.glob("eval_*")), "it has 3 episodes, 4 are wanted"


@pytest.mark.slow
def test_a_killed_sweep_leaves_nothing_behind_and_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    config = small(out, checkpoint, variants={"one": []}, evaluation=Evaluation(episodes=0))
    config = replace(config, base=[*config.base[:-1], "iterations=6", "env.settings.pause_s=0.03"])
    told = json.dumps([str(out), options.write(config)])
    program = f"""if True:
        import json, sys
        from training.sweep import SweepConfig, sweep
        from vla import options
        sys.exit(sweep(options.read(SweepConfig, json.loads({told!r})[1])))
    """
    process = subprocess.Popen([sys.executable, "-c", program])
    run, end = out / "one" / "seed_0", time.monotonic() + 300
    while len(metrics.read(run)) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert children and not psutil.wait_procs(children, timeout=30)[1]
    done = len(metrics.read(run))
    assert done < 6 and sweep(config) == 0
    assert [row["iteration"] for row in metrics.read(run)] == list(range(6))
    assert f"resuming {run} at iteration" in run.with_suffix(".log").read_text()


def test_a_run_ends_with_its_sweep_even_if_it_hears_no_signal() -> None:
    """As when it waits for Ray to start."""
    run = """if True:
        import os, signal, threading, time
        from training import sweep_run
        sweep_run.GRACE_S = 0.2
        signal.signal(signal.SIGTERM, lambda *_: None)
        threading.Thread(target=sweep_run.end_with, args=(os.getppid(),), daemon=True).start()
        print(os.getpid(), flush=True)
        time.sleep(3600)
    """
    words = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {run!r}])"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        process = psutil.Process(int(starter.stdout.readline()))
        assert process.is_running()
        starter.kill()
        assert not psutil.wait_procs([process], timeout=30)[1]


@pytest.mark.slow
def test_runs_are_tasks_of_a_cluster(checkpoint: Path, tmp_path: Path) -> None:
    with ray_nodes.head() as address:
        config = small(tmp_path / "sweep", checkpoint, jobs=2, cluster=address, resources={"CPU": 1.0})
        assert sweep(config) == 0
    found = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert list(found["groups"]) == ["slow", "fast"] and found["failed"] == {}
