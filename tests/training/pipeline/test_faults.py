"""A run of `vla train` whose workers die, hang or leak goes on, and says what happened."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from point_env import untrained
from train_run import Run, Start

from training.pipeline.actors import UPDATE_DEADLINE_S
from training.pipeline.leaks import grown
from training.pipeline.patience import Patience, Pulse
from vla.checkpoint import load

KILLS = 25  # in each schedule, by hand
A_FEW = 6  # in CI
SCHEDULES = {
    "synchronous": ("placement=pipelined",),
    "asynchronous": ("placement=asynchronous", "placement.lanes=2"),
}
KINDS = ("environment worker", "policy worker", "learner")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    untrained(folder)
    return folder


@pytest.fixture
def trouble(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "trouble"
    folder.mkdir()
    yield folder


def victim(run: Run, kind: str) -> tuple[str, int]:
    """Name and process of the last worker of a kind."""
    return [(name, process) for name, process in run.workers.items() if name.startswith(kind)][-1]


def strike(run: Run, kind: str, how: signal.Signals = signal.SIGKILL) -> tuple[str, int]:
    """Send a signal to a worker and wait until another process is in its place."""
    name, process = victim(run, kind)
    os.kill(process, how)
    run.wait_for(lambda: run.workers[name] != process)
    return name, process


def check_complete(run: Run, iterations: int) -> None:
    """Every iteration is there once, steps only grow, and the bundle can be loaded (it refuses what is not finite)."""
    assert [row["iteration"] for row in run.rows] == list(range(iterations))
    steps = [row["time/total_env_steps"] for row in run.rows]
    assert all(a < b for a, b in pairwise(steps))
    elapsed = [row["time/elapsed_s"] for row in run.rows]
    assert elapsed == sorted(elapsed)
    assert all(bool(p.isfinite().all()) for p in load(run.out / "checkpoint", None).model.state_dict().values())


@pytest.mark.slow
def test_after_a_killed_learner_and_a_stopped_policy_worker_all_start_anew(start: Start) -> None:
    run = start(
        "iterations=12", "env.settings.pause_s=0.02", "placement.learners=2", "placement.deadline_s=3"
    )  # fmt: skip
    run.wait_for((run.out / "processes.json").exists)
    name, _ = strike(run, "learner")  # at once: there may be no state yet
    assert f"the {name} failed: its process died; all workers start again (1 of 3 " in run.text
    run.wait_iterations(2)
    name, stopped = strike(run, "policy worker", signal.SIGSTOP)
    assert f"the {name} does not answer; all workers start again (1 of 3 " in run.text
    assert not psutil.pid_exists(stopped)
    assert run.finish() == 0, run.text
    assert f"resuming {run.out} at iteration " in run.text
    check_complete(run, 12)


@pytest.mark.long
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_stopped_learner_is_found_by_how_long_updates_take(start: Start, schedule: str) -> None:
    """After a minute by default, not after the half hour that the first update may take."""
    run = start(*SCHEDULES[schedule], "iterations=14", "env.settings.pause_s=0.02", "placement.deadline_s=6")
    run.wait_for(lambda: len(run.rows) >= 5)  # the first three train the critic alone
    name, stopped = strike(run, "learner", signal.SIGSTOP)
    found = re.search(rf"{name} has not used the processor for (\d+) s; all workers start again \(1 of 3 ", run.text)
    assert found is not None and 6 <= float(found[1]) < 30, run.text
    assert not psutil.pid_exists(stopped)
    assert run.finish() == 0, run.text
    check_complete(run, 14)


def test_patience_grows_with_what_was_waited_for() -> None:
    patience = Patience(times=100, least_s=2)
    assert patience.of("update") == UPDATE_DEADLINE_S
    with pytest.raises(ZeroDivisionError), patience.measuring("update"):
        raise ZeroDivisionError
    assert patience.of("update") == UPDATE_DEADLINE_S, "what has failed tells nothing"
    for seconds in (0.001, 0.1, 0.001):
        with patience.measuring("update"):
            time.sleep(seconds)
    assert 10 <= patience.of("update") < 20 and patience.of("save") == UPDATE_DEADLINE_S
    with patience.measuring("save"):
        pass
    assert patience.of("save") == 2


def test_a_process_that_waits_is_told_from_one_that_is_stopped() -> None:
    words = [sys.executable, "-c", "while True: sum(range(10000))"]
    with subprocess.Popen(words) as busy, subprocess.Popen(words) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        pulse, began = Pulse({"busy": busy.pid, "stopped": stopped.pid}), time.monotonic()
        while not (still := pulse.still(2.0)):
            assert time.monotonic() - began < 30
            time.sleep(0.1)
        busy.kill()
        stopped.kill()
    assert still == ["stopped"]


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_ends_the_run(start: Start) -> None:
    run = start("iterations=4", "env.settings.pause_s=1")  # no iteration is over before the next blow
    run.wait_for((run.out / "processes.json").exists)
    for _ in range(3):
        strike(run, "learner")
    os.kill(victim(run, "learner")[1], signal.SIGKILL)
    assert run.finish() == 2, run.text
    assert "(3 of 3 times without a complete iteration)" in run.text
    assert "vla: [WORKER] the learner 0 failed: its process died" in run.text
    assert "The same command goes on" in run.text
    assert "Traceback" not in run.text.split("vla: [WORKER]")[1]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_environment_worker_that_leaks_is_replaced(start: Start, trouble: Path, schedule: str) -> None:
    run = start(
        *SCHEDULES[schedule], "iterations=10", "placement.environment_workers=2", "placement.worker_memory_gib=0.5",
        "env.settings.pause_s=0.02", f"env.settings.trouble={trouble}",
    )  # fmt: skip
    run.wait_for(lambda: len(run.rows) >= 2)
    before = run.workers
    (trouble / "leak").touch()
    run.wait_for(lambda: run.workers != before)
    (name,) = (name for name in before if before[name] != run.workers[name])
    assert before[name] == int((trouble / "leak.done").read_text())
    assert f"{name} (process {before[name]}) is restarted: it has grown to 0." in run.text
    assert run.finish() == 0, run.text
    assert run.text.count("is restarted") == 1
    check_complete(run, 10)


@pytest.mark.slow
def test_a_bound_of_memory_that_no_worker_keeps_is_refused(start: Start) -> None:
    run = start("iterations=2", "placement.worker_memory_gib=0.01")
    assert run.finish() == 2
    assert "vla: [PLACEMENT] the environment worker 0 takes 0." in run.text
    assert "as soon as it is set up, and worker_memory_gib is 0.01" in run.text


def test_memory_of_a_process_that_is_gone_is_nothing() -> None:
    me = os.getpid()
    assert grown({"me": me}, None) == {}
    assert grown({"me": me, "gone": 2**22 + 1}, 0.0).keys() == {"me"}


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kills", [
    pytest.param(A_FEW, marks=pytest.mark.slow), pytest.param(KILLS, marks=pytest.mark.long)
])  # fmt: skip
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_killed_at_random_moments_a_run_finishes(start: Start, schedule: str, kills: int) -> None:
    iterations, seed = 3 * kills + 5, 0
    dice = random.Random(seed)
    run = start(
        *SCHEDULES[schedule], f"iterations={iterations}", "placement.environment_workers=2", "placement.learners=2",
        "env.settings.pause_s=0.05",
    )  # fmt: skip
    run.wait_for((run.out / "processes.json").exists)
    order = [KINDS[number % len(KINDS)] for number in range(kills)]
    dice.shuffle(order)
    for kind in order:
        there = len(run.rows)
        time.sleep(dice.uniform(0, 2))  # about two iterations
        name = dice.choice([name for name in run.workers if name.startswith(kind)])
        process = run.workers[name]
        os.kill(process, signal.SIGKILL)
        run.wait_for(lambda name=name, process=process: run.workers[name] != process)
        run.wait_for(lambda there=there: len(run.rows) > there)  # else it would be given up, as it should
    assert len(run.rows) < iterations, "the kills have to reach a run that is at work"
    assert run.finish() == 0, run.text
    check_complete(run, iterations)
