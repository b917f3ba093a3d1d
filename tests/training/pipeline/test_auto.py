"""What `vla plan --auto` proposes from stage times, and the file that it writes."""

import subprocess
import sys
from pathlib import Path

import pytest

from training.pipeline import auto
from training.pipeline.auto import StageTimes, as_yaml, candidates, propose
from training.pipeline.placement import PlacementConfig
from training.pipeline.seats import Cluster
from training.plan import PlanConfig
from vla import configuration

EQUAL = StageTimes(slots=24, decisions=8, environment_s=0.2, policy_s=0.2, policy_half_s=0.1, learner_s=0.1)


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto.os, "cpu_count", lambda: 8)


def test_the_fixed_part_of_a_forward_pass_comes_from_two_sizes() -> None:
    assert EQUAL.policy_fixed_s == pytest.approx(0.0)
    assert StageTimes(2, 1, 0.1, 0.1, 0.08, 0.1).policy_fixed_s == pytest.approx(0.06)
    assert StageTimes(2, 1, 0.1, 0.1, 0.2, 0.1).policy_fixed_s == 0.1  # noise: never more than all of it


def test_an_update_of_full_size_has_its_fixed_part_once() -> None:
    assert auto.at_size({2: 3.0, 6: 5.0}, 32) == pytest.approx(2.0 + 32 * 0.5)
    assert auto.at_size({2: 3.0}, 32) == pytest.approx(48.0)  # one size: all of it grows
    assert auto.at_size({2: 1.0, 6: 6.0}, 12) == pytest.approx(12.0)  # noise: no fixed part below zero
    assert auto.at_size({2: 6.0, 6: 5.0}, 32) == 5.0


def test_what_can_overlap_is_proposed_before_what_takes_turns() -> None:
    found = {one.name: one for one in propose(EQUAL, PlacementConfig(), Cluster(1, 0))}
    rates = [one.chunks_per_s for one in found.values()]
    assert rates == sorted(rates, reverse=True)
    one, two = (found[f"{name}, 1 environment workers"] for name in ("sequential", "pipelined, 2 stages"))
    assert 1.5 < two.chunks_per_s / one.chunks_per_s < 2.0  # equal times: twice as fast but for filling and the update


def test_with_gpus_every_policy_worker_has_environments() -> None:
    found = [placement for _, placement, _, _ in candidates(PlacementConfig(), Cluster(1, 4), 24)]
    pipelined = [one for one in found if one.schedule == "synchronous"]
    assert pipelined and all(one.environment_workers >= 4 and one.policy == "all" for one in pipelined)


def test_the_file_is_a_placement(tmp_path: Path) -> None:
    best = propose(EQUAL, PlacementConfig(), Cluster(1, 4))[0].placement
    file = tmp_path / "best.yaml"
    file.write_text(as_yaml(best))
    assert configuration.load(PlanConfig, "plan", [f"placement={file}"]).placement == best


@pytest.mark.slow
@pytest.mark.timeout(600)  # two starts of Ray, on a busy machine
def test_in_a_clone_it_measures_with_the_policy_that_comes_along(tmp_path: Path) -> None:
    best = tmp_path / "best.yaml"
    words = ["--auto", "slots=4", "decisions=2", "auto_seconds=1", f"auto_out={best}"]
    done = subprocess.run(
        [sys.executable, "-m", "vla", "plan", *words], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "measured with checkpoints/put_on_plate" in done.stdout and "chunks/s" in done.stdout
    workers = configuration.load(PlanConfig, "plan", [f"placement={best}"]).placement.environment_workers
    assert 1 <= workers <= 4  # slots


def test_elsewhere_it_says_that_it_needs_a_policy(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "vla", "plan", "--auto"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "needs checkpoint=" in done.stderr
