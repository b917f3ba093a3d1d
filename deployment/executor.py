"""The executor: turns chunks that arrive late into one smooth reference for the tool.

Three ways, so that they can be compared:

- `asynchronous`: the next chunk is inferred while the arm moves. A chunk is placed in time by the capture time of its
  observation; rows whose time has passed are dropped, and the rest joins the running reference with continuous
  position and velocity. An arm that follows later than the one in training is told earlier, by `lead_s`; a row whose
  time to be told has passed is dropped, too (docs/decisions/0013).
- `plain`: inferred while the arm moves, too, but executed from its first row on when it arrives, wherever the arm is.
- `synchronous`: the arm executes a chunk, stops, looks, waits for the next.

No threads, no clock: the caller passes the time in s, of the clock that stamps the observations.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.spatial.transform import Rotation

from deployment.reference import Curve, Pose, Reference, Waypoints
from vla.contract import ActionSemantics
from vla.types import ActionChunk

HISTORY_S = 3.0  # of references, for observations that are older than the present curve
Mode = Literal["asynchronous", "plain", "synchronous"]


@dataclass(frozen=True)
class ExecutorConfig:
    """How chunks become motion.

    mode: asynchronous, plain or synchronous, see the module.
    execute: rows of a chunk after which the next one is to take over.
    blend_s: longest time in which a new chunk takes over.
    delay_s: from an observation's capture to the chunk's arrival, as long as nothing has been measured.
    lead_s: of asynchronous motion: how long before a chunk wants the tool somewhere the arm is told so. The gripper is
        not told earlier: it doesn't wait for the arm.
    dwell_s: time for which the tool waits where the gripper opens or closes. A hand takes longer than a simulator's
        fingers, and a policy that has learnt with those moves on at once. 0 for a policy that waits by itself.
    """

    mode: Mode = "asynchronous"
    execute: int = 6
    blend_s: float = 0.15
    delay_s: float = 0.1
    dwell_s: float = 0.4
    lead_s: float = 0.0

    def __post_init__(self) -> None:
        if self.lead_s < 0:
            raise ValueError(f"lead_s is {self.lead_s:g}: expected 0 or more, nothing holds back an arm that is early")


@dataclass(frozen=True)
class Arrival:
    """What became of a chunk. dropped: rows whose time to be told had passed. delay_s: from capture to arrival."""

    dropped: int
    rows: int
    delay_s: float

    @property
    def used(self) -> bool:
        return self.dropped < self.rows


class Delay:
    """The delay from capture to arrival: its recent quantiles, in s."""

    def __init__(self, guess_s: float, window: int = 200):
        self._guess = guess_s
        self._values: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        self._values.append(seconds)

    def quantile(self, q: float) -> float:
        """The guess, as long as fewer than five chunks have arrived."""
        return float(np.quantile(self._values, q)) if len(self._values) >= 5 else self._guess


class Executor:
    """See the module's docstring. Starts holding `pose` with the gripper as told.

    Curves run in the chunks' own time, in which the arm is told at `now` what is wanted at `now + lead`.
    """

    def __init__(self, action: ActionSemantics, pose: Pose, gripper_open: bool, now: float,
                 config: ExecutorConfig | None = None):  # fmt: skip
        self.action, self.config = action, config or ExecutorConfig()
        self.step_s = 1.0 / action.rate_hz
        self.lead_s = self.config.lead_s if self.config.mode == "asynchronous" else 0.0  # others begin on arrival
        self.delay = Delay(self.config.delay_s)
        self._past: deque[tuple[float, Curve]] = deque()
        self.hold(pose, gripper_open, now)

    def hold(self, pose: Pose, gripper_open: bool, now: float) -> None:
        """Forget every chunk and stand still."""
        rows = np.array([gripper_open])
        still = Waypoints(now, pose, np.array([now + self.step_s]), pose.position[None], pose.rotation[None], rows)
        self._past.clear()
        self._newest = now  # whatever answers an earlier observation is out of date
        self._begin(Curve(still), now, still.times[-1])

    def reference(self, now: float) -> Reference:
        """What to tell the arm at `now`."""
        told = self._past[-1][1].at(now + self.lead_s)
        return replace(told, gripper_open=self.reference_then(now).gripper_open) if self.lead_s else told

    def reference_then(self, time: float) -> Reference:
        """Where the tool was wanted at a time within the last seconds: what an observation of then has to say."""
        for begun, curve in reversed(self._past):
            if begun <= time:
                return curve.at(time)
        return self._past[0][1].at(time)

    def due(self) -> float:
        """The policy should answer an observation that is captured at this time or soon after."""
        curve = self._past[-1][1]
        if self.config.mode == "synchronous":
            return curve.end
        return self._next - self.lead_s - self.delay.quantile(0.9)

    def waypoints(self, chunk: ActionChunk) -> Waypoints:
        """A chunk of delta actions as poses, from where the tool was wanted when its observation was captured."""
        return integrate(chunk, self.reference_then(chunk.stamp).pose, self.step_s)

    def accept(self, waypoints: Waypoints, now: float) -> Arrival:
        """Let a chunk take over from `now` on. One that is too late as a whole, or overtaken, changes nothing."""
        delay = now - waypoints.stamp
        self.delay.add(delay)
        rows = len(waypoints.times)
        if waypoints.stamp < self._newest:
            return Arrival(rows, rows, delay)
        self._newest = waypoints.stamp
        if self.config.dwell_s > 0:
            before = self.reference_then(waypoints.stamp).gripper_open
            waypoints, where = dwelling(waypoints, before, self.config.dwell_s)
        else:
            where = np.arange(rows)
        last = where[min(self.config.execute, rows) - 1]  # row after which the next chunk is to take over
        if self.config.mode != "asynchronous":
            shifted = self._from_here(waypoints, now)
            self._begin(Curve(shifted), now, shifted.times[last])
            return Arrival(0, rows, delay)
        told = now + self.lead_s  # the time that the arm is told of now
        dropped = int((waypoints.times[where] <= told).sum())
        if dropped < rows:
            curve, current = Curve(waypoints), self._past[-1][1].at(told)
            curve.join(told, current, max(self.step_s, min(self.config.blend_s, curve.end - told)))
            self._begin(curve, told, waypoints.times[last])
        return Arrival(dropped, rows, delay)

    def _begin(self, curve: Curve, now: float, until: float) -> None:
        """Follow a curve from the time `now` on; the next one is to take over at `until`."""
        self._past.append((now, curve))
        self._next = float(until)
        while len(self._past) > 1 and self._past[1][0] < now - HISTORY_S:
            self._past.popleft()

    def _from_here(self, waypoints: Waypoints, now: float) -> Waypoints:
        """The same motion, begun now and at the present reference."""
        here = self.reference(now).pose
        turn = Rotation.from_quat(here.rotation) * Rotation.from_quat(waypoints.anchor.rotation).inv()
        return replace(
            waypoints, stamp=now, anchor=here, times=waypoints.times + (now - waypoints.stamp),
            positions=waypoints.positions + (here.position - waypoints.anchor.position),
            rotations=(turn * Rotation.from_quat(waypoints.rotations)).as_quat(),
        )  # fmt: skip


def dwelling(waypoints: Waypoints, gripper_open: bool, seconds: float) -> tuple[Waypoints, np.ndarray]:
    """The same waypoints with a pause before each row that changes the gripper, and where each row is now, int `[C]`.

    gripper_open: before the first row.
    """
    toggles = np.flatnonzero(np.diff([gripper_open, *waypoints.gripper_open]))
    rows = np.arange(len(waypoints.times))
    before = np.searchsorted(toggles, rows, side="right")  # pauses before each row
    starts = np.array([waypoints.stamp, *waypoints.times])[toggles]
    positions = np.concatenate([waypoints.anchor.position[None], waypoints.positions])[toggles]
    rotations = np.concatenate([waypoints.anchor.rotation[None], waypoints.rotations])[toggles]
    paused = replace(
        waypoints,
        times=np.insert(waypoints.times + seconds * before, toggles, starts + seconds * np.arange(1, len(toggles) + 1)),
        positions=np.insert(waypoints.positions, toggles, positions, 0),
        rotations=np.insert(waypoints.rotations, toggles, rotations, 0),
        gripper_open=np.insert(waypoints.gripper_open, toggles, waypoints.gripper_open[toggles]),
    )
    return paused, rows + before


def integrate(chunk: ActionChunk, anchor: Pose, step_s: float) -> Waypoints:
    """Delta actions `[C, 7]` (m, rotation vector in rad, base frame, gripper 1 = open) as poses from `anchor` on."""
    actions = chunk.actions
    rotations, current = [], Rotation.from_quat(anchor.rotation)
    for turn in actions[:, 3:6]:
        current = Rotation.from_rotvec(turn) * current
        rotations.append(current.as_quat(canonical=True))
    return Waypoints(
        chunk.stamp, anchor, chunk.stamp + step_s * np.arange(1, len(actions) + 1),
        anchor.position + np.cumsum(actions[:, :3], 0), np.array(rotations), actions[:, 6] > 0.5,
    )  # fmt: skip
