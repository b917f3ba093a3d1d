"""Figures of trials, against what was worked out by hand."""

import numpy as np
import pytest

from deployment.trials import Trace, Trial, summary


def straight(times: np.ndarray, x: np.ndarray, closes_at: float = 10.0) -> Trace:
    return Trace(times, np.stack([x, np.zeros_like(x), np.zeros_like(x)], 1), np.where(times < closes_at, 0.08, 0.04))


def test_pauses_are_counted_between_the_first_and_the_last_motion() -> None:
    times = np.arange(0.0, 2.0, 0.01)
    moving = ((times > 0.2) & (times < 0.6)) | ((times > 0.8) & (times < 1.2)) | ((times > 1.23) & (times < 1.6))
    x = np.cumsum(np.where(moving, 0.1, 0.0)) * 0.01
    trace = straight(times, x)
    # 0.2 s; the one of 0.03 s is too short, and the rest before and after does not count
    assert trace.pauses() == trace.idle_pauses() == 1
    assert straight(times, np.zeros_like(times)).pauses() == 0
    grasping = straight(times, x, closes_at=0.7)
    assert (grasping.pauses(), grasping.idle_pauses()) == (1, 0)
    assert straight(times, x, closes_at=0.4).idle_pauses() == 1


def test_the_squared_jerk_of_a_cubic_is_known() -> None:
    times = np.arange(0.0, 1.0001, 0.01)
    assert straight(times, times**3).squared_jerk() == pytest.approx(36.0, rel=0.05)  # x''' = 6 for a second
    assert straight(times, times**2).squared_jerk() == pytest.approx(0.0, abs=1e-3)


def test_faulted_trials_are_listed_and_not_scored() -> None:
    trials = [Trial(i, "in_distribution", "", i < 3, 2.0, 0.0) for i in range(4)]
    trials.append(Trial(9, "in_distribution", "", False, 1.0, 0.1, "REFLEX"))
    result = summary(trials, [10.0, 20.0, 30.0], [])
    assert (result["successes"], result["episodes"], result["rate"], result["faulted"]) == (3, 4, 0.75, 1)
    assert result["wilson95"] == pytest.approx([0.3006, 0.9544], abs=1e-3)
    assert result["latency_ms"]["p50"] == 20.0 and result["period_error_ms"]["p99"] is None
    assert [t["fault"] for t in result["trials"]] == [""] * 4 + ["REFLEX"]
    assert summary(trials[4:], [], [])["rate"] is None
