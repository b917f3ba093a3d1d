"""A recorded episode once more on the twin: the arm goes the same way, and how far it is off is told."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployment.reference import Pose, Reference
from deployment.replay_sources import Source, TwinClock, source
from deployment.replay_twin import PRESETS, Drift, Rerun, Sample, compare, summary
from vla.episode_reader import Episode
from vla.errors import SimrealError
from vla.policy import Policy
from vla.recording import Recording

Record = Callable[..., Path]
SECONDS, PACE = 3.0, 0.35


@pytest.fixture(scope="module")
def made() -> Iterator[Rerun]:
    rerun = Rerun("fr3", PRESETS["nominal"])
    yield rerun
    rerun.close()


class Noted:
    """A source that notes what it gives."""

    def __init__(self, inner: Source):
        self.inner = inner
        self.times: list[float] = []
        self.given: list[Reference] = []

    def at(self, time: float, dt: float, tool: Pose) -> Reference:
        self.times.append(time)
        self.given.append(self.inner.at(time, dt, tool))
        return self.given[-1]


def swing(topic: str, since: float, message: dict[str, Any]) -> dict[str, Any]:
    """A motion of up to 0.35 m/s, as policies have them."""
    if topic in ("target_pose", "current_pose", "commanded_pose"):
        message["pose"]["position"] = dict(zip("xyz", (0.46 + 0.1 * (1 - np.cos(3.5 * since)), 0.0, 0.22), strict=True))
    return message


def test_the_drift_is_the_distance_at_the_same_time(tmp_path: Path, policy: Policy, record: Record) -> None:
    recording = Recording(Episode(record(tmp_path, policy, seconds=2.0, pace=0.5)))
    begin, end = recording.acting
    times = np.arange(begin, end, 0.01)
    positions, _ = recording.tool.at(np.clip(times, recording.tool.times[0], recording.tool.times[-1]))
    samples = [(t, p, 0.08) for t, p in zip(times, positions + np.array([0.003, 0.0, 0.004]), strict=True)]
    drift = compare(recording, samples)
    assert drift.mean_mm == pytest.approx(5.0, abs=0.1) and drift.max_mm == pytest.approx(5.0, abs=0.1)
    assert drift.end_mm == pytest.approx(5.0, abs=0.1) and drift.seconds == pytest.approx(1.98, abs=0.03)
    assert drift.width_mm == pytest.approx(12.5, abs=1.0)  # it was to close for the last half second
    assert drift.pace == pytest.approx(0.5, abs=1e-3) and drift.lag_then_mm == pytest.approx(1.6, abs=0.3)
    told = summary([drift], "nominal", "references", {})
    assert told["mean_mm"] == drift.mean_mm and told["judged"] == 0 and told["faulted"] == 0
    with pytest.raises(SimrealError, match="TOO_SHORT"):
        compare(recording, samples[:1])


def test_the_time_of_a_twin_is_its_own_and_that_of_an_arm_the_clocks(
    tmp_path: Path, policy: Policy, record: Record
) -> None:
    slow = TwinClock(Recording(Episode(record(tmp_path, policy, seconds=2.0, pace=0.4))))
    begin = 1_795_280_550.25
    assert slow.between(begin + 0.5, begin + 1.0) == pytest.approx(0.2, abs=1e-4)
    assert slow.between(begin - 1.0, begin) == pytest.approx(1.0, abs=1e-4)  # before anything was told
    arm = TwinClock(Recording(Episode(record(tmp_path, policy, seconds=2.0, number=2))))
    assert arm.between(begin + 0.5, begin + 1.0) == pytest.approx(0.5)


@pytest.mark.timeout(400)
def test_what_a_slow_twin_was_sent_is_executed_again_within_millimetres(
    tmp_path: Path, policy: Policy, record: Record, made: Rerun
) -> None:
    """The twin that was recorded had 35% of the time that passed, as on a busy machine."""
    wanted = Recording(Episode(record(tmp_path / "wanted", policy, SECONDS, edit=swing, pace=PACE)))
    sent, samples = followed(made, wanted)
    times, places = np.array(sent.times), np.array([given.pose.position for given in sent.given])
    seen = np.array([sample[0] for sample in samples]), np.array([sample[1] for sample in samples])

    def as_it_went(topic: str, since: float, message: dict[str, Any]) -> dict[str, Any]:
        if topic in ("target_pose", "current_pose"):
            at, rows = (times, places) if topic == "target_pose" else seen
            stamp = wanted.acting[0] + since
            place = (float(np.interp(stamp, at, column)) for column in rows.T)
            message["pose"]["position"] = dict(zip("xyz", place, strict=True))
        return message

    found: dict[str, Drift] = {}
    for name, pace in (("its own time", PACE), ("the clock's", None)):
        found[name] = made.play(
            Recording(Episode(record(tmp_path / name, policy, SECONDS, edit=as_it_went, pace=pace)))
        )
    own, clock = found["its own time"], found["the clock's"]
    assert not own.fault and own.pace == pytest.approx(PACE, abs=0.01)
    assert own.mean_mm < 3.0 and own.max_mm < 10.0, own
    assert own.lag_then_mm is not None and own.lag_mm == pytest.approx(own.lag_then_mm, abs=2.0)
    # Why an open loop on the wall clock drifted: the arm that was recorded lagged behind, and now it keeps up.
    assert clock.mean_mm > 3 * own.mean_mm and clock.mean_mm > 10.0, clock


@pytest.mark.timeout(300)
def test_chunks_are_executed_again_and_the_scene_is_judged(
    tmp_path: Path, policy: Policy, record: Record, made: Rerun
) -> None:
    file = record(tmp_path, policy, seconds=3.0, seed=90_001, variant="in_distribution", outcome="failure")
    recording = Recording(Episode(file))
    made.follow = "chunks"
    try:
        drift, again = made.play(recording), made.play(recording)
    finally:
        made.follow = "references"
    for each in (drift, again):
        assert not each.fault and each.seconds > 2.5 and each.success is False and each.recorded is False
        assert 0.0 < each.mean_mm <= each.max_mm < 60.0 and each.distance_mm is not None
    assert again.mean_mm == pytest.approx(drift.mean_mm, abs=1.0)


def test_an_episode_that_began_elsewhere_is_refused(
    tmp_path: Path, policy: Policy, record: Record, made: Rerun
) -> None:
    def elsewhere(topic: str, since: float, message: dict[str, Any]) -> dict[str, Any]:
        if topic == "target_pose":
            message["pose"]["position"]["y"] = 0.3
        return message

    with pytest.raises(SimrealError, match="START_POSE"):
        made.play(Recording(Episode(record(tmp_path, policy, seconds=1.0, edit=elsewhere))))


def followed(made: Rerun, recording: Recording) -> tuple[Noted, list[Sample]]:
    """What the arm was sent, and where it went."""
    made._go(None)
    noted = Noted(source("references", recording, made.robot.limits, made.arm.begin()))
    made.twin.hold()
    samples, fault = made._run(recording, noted, *recording.acting)
    made.arm.end()
    assert not fault
    return noted, samples
