"""What the arm is given when an episode is executed again: the references that were recorded, or its chunks anew.

Neither has a clock: time is that of the recording.
"""

from collections import deque
from typing import Any, Literal, Protocol

import numpy as np

from deployment.chunks import read_chunk
from deployment.executor import Executor
from deployment.reference import Pose, Reference
from deployment.supervisor import Limits, Slew, Supervisor
from vla.episodes import EpisodeError
from vla.errors import Fault
from vla.recording import Recording, Track

Follow = Literal["references", "chunks"]


class Source(Protocol):
    """Gives the reference for the `dt` s from a time of the recording on; times only grow. tool: where it is."""

    def at(self, time: float, dt: float, tool: Pose) -> Reference: ...


class References:
    """target_pose as it was sent to the arm, and the gripper as the chunks in force asked for it."""

    def __init__(self, recording: Recording):
        self._recording, self._track = recording, recording.target
        if not len(self._track.times):
            remedy = "Replay it with follow=chunks."
            raise EpisodeError(Fault("NO_TARGET", str(recording.episode.path), "target_pose", "none", remedy))

    def at(self, time: float, dt: float, tool: Pose) -> Reference:
        positions, rotations = _within(self._track, np.array([time, time - dt, time + dt]))
        turn = (rotations[2] * rotations[1].inv()).as_rotvec()
        pose = Pose(positions[0], rotations[0].as_quat(canonical=True))
        velocity, angular = (positions[2] - positions[1]) / (2 * dt), turn / (2 * dt)
        return Reference(pose, velocity, angular, self._recording.opened(time))


class Chunks:
    """The recorded chunks at the times at which they came, through supervisor, executor and slew as in the driver.

    What the driver did besides, as holding while the policy was silent, is not repeated.
    """

    def __init__(self, recording: Recording, limits: Limits, start: Pose):
        action, begin = recording.contract.action, recording.acting[0]
        self._waiting = deque((log, read_chunk(said)) for log, said in recording.chunks)
        self._supervisor = Supervisor(limits.tightened(action))
        self._supervisor.start(begin)
        self._executor = Executor(action, start, recording.opened(begin), begin)
        self._slew = Slew(limits.tightened(action), start)

    def at(self, time: float, dt: float, tool: Pose) -> Reference:
        while self._waiting and self._waiting[0][0] <= time:
            allowed = self._supervisor.review(self._waiting.popleft()[1], tool, time)
            if allowed is not None:
                self._executor.accept(allowed, time)
        return self._slew.follow(self._executor.reference(time + dt), dt)


def source(follow: Follow, recording: Recording, limits: Limits, start: Pose) -> Source:
    return References(recording) if follow == "references" else Chunks(recording, limits, start)


class TwinClock:
    """How much a twin simulated from a time of the recording to another one; of an arm, as much as has passed."""

    def __init__(self, recording: Recording):
        times, seconds = recording.simulated
        if not len(times):
            times = seconds = np.array([recording.episode.begin_ns / 1e9])
        far = 1e4  # s before and after what was told, in which time passes evenly
        self._times = np.array([times[0] - far, *times, times[-1] + far])
        self._seconds = np.array([seconds[0] - far, *seconds, seconds[-1] + far])

    def between(self, begin: float, end: float) -> float:
        first, last = np.interp([begin, end], self._times, self._seconds)
        return float(last - first)


def _within(track: Track, times: np.ndarray) -> tuple[np.ndarray, Any]:
    """Poses; before and after the track as at its ends."""
    return track.at(np.clip(times, track.times[0], track.times[-1]))
