"""An episode as its policy took it in: observations, decisions, and what the arm then did.

Messages go through the streams and the assembler of policy_node. With recorded decisions the very observations come
out that were answered; without, those that would have been.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from vla.assembler import Assembler, History
from vla.contract import BARE_INSTRUCTION, Instruction, PolicyContract
from vla.decision import Decision
from vla.episode_reader import Episode
from vla.episodes import EpisodeError
from vla.errors import Fault
from vla.rig import CameraCalibration, read_attachment
from vla.ros_messages import read_pose, read_width, to_seconds
from vla.streams import Streams
from vla.types import Observation, Pose

LATE_S = 0.3  # a decision's parts have been recorded so long after it at the latest
NEAR_S = 0.08  # between a control step and its frame: one frame of 20 Hz may be lost
JUMP_S = 2.0  # by which a message may come later than another of its topic
BACK_S = 0.2  # by which messages of a topic may overtake each other
MOVED_M = 0.002  # of the gripper's width: fingers that have been told to move
IMAGE = "/image_raw/compressed"
STATES = ("joint_states", "current_pose", "commanded_pose")


@dataclass(frozen=True)
class Track:
    """Poses over time: times `[N]` s, positions `[N, 3]` m, rotations xyzw `[N, 4]`."""

    times: np.ndarray
    positions: np.ndarray
    rotations: np.ndarray

    def at(self, times: np.ndarray) -> tuple[np.ndarray, Rotation]:
        """Positions and rotations at these times, which have to lie within the track."""
        positions = np.stack([np.interp(times, self.times, column) for column in self.positions.T], -1)
        return positions, Slerp(self.times, Rotation.from_quat(self.rotations))(times)


@dataclass(frozen=True)
class Opening:
    """What a chunk says about the gripper: from each of times `[C]` s on, whether it is open; known from `since` on."""

    since: float
    times: np.ndarray
    open: np.ndarray


@dataclass(frozen=True)
class Moment:
    """An observation, or None if a part of it was not recorded. decision: what was recorded with it, if anything."""

    seen: Observation | None
    decision: Decision | None


class Recording:
    """See the module's docstring. Raises EpisodeError if the episode can't be taken for what a policy saw.

    read_s: what reading took, of the clock and of the processor.
    """

    def __init__(self, episode: Episode):
        began = time.perf_counter(), time.process_time()
        self.episode, self.info = episode, episode.info
        if "contract.json" not in episode.attachments:
            remedy = "Record with recorder_node, which is told the checkpoint or its contract."
            raise EpisodeError(Fault("NO_CONTRACT", str(episode.path), "contract.json inside", "none", remedy))
        self.contract = PolicyContract.from_json(episode.attachments["contract.json"].decode())
        self._prefix = f"{episode.info.namespace.rstrip('/')}/"
        self.cameras = tuple(camera.name for camera in self.contract.cameras)
        topics = [*(f"{name}{IMAGE}" for name in self.cameras), *STATES, "decision", "chunk", "action",
                  "policy_node/instruction", "franka_node/status", "twin_node/time"]  # fmt: skip
        self._messages = [
            (message.log_ns / 1e9, message.topic.removeprefix(self._prefix), said)
            for message, said in episode.decoded(*(self._prefix + topic for topic in topics))
        ]
        self._check_clocks()
        self.decisions = [(log, Decision.from_json(said.data)) for log, said in self.of("decision")]
        self.read_s = time.perf_counter() - began[0], time.process_time() - began[1]

    def decided(self) -> Iterator[Moment]:
        """The observations that were answered, one for each recorded decision."""
        needed = {(name, d.stamps.get(name)) for _, d in self.decisions for name in self.cameras}
        waiting = deque(self.decisions)
        feed, late = _Feed(self.contract, self.late), self.late
        for log, topic, said in self._messages:
            while waiting and log > waiting[0][0] + LATE_S:
                yield feed.of(waiting.popleft()[1])
            camera = topic.removesuffix(IMAGE)
            if camera == topic or (camera, to_seconds(said.header.stamp) - late.get(camera, 0.0)) in needed:
                feed.take(topic, said)
        for _, decision in waiting:
            yield feed.of(decision)

    def sampled(self, every_s: float) -> Iterator[Moment]:
        """While the policy acted, an observation every so many s, made of the frames that are nearest.

        Where a camera was silent there is none.
        """
        begin, end = self.acting
        feed, messages, index = _Feed(self.contract, self.late), self._messages, 0
        feed.instruction = self.info.instruction
        for tick in range(max(0, round((end - begin) / every_s))):
            time_s = begin + tick * every_s
            while index < len(messages) and messages[index][0] <= time_s + LATE_S:
                feed.take(*messages[index][1:])
                index += 1
            yield Moment(feed.assembler.observation_near(time_s, NEAR_S, feed.instruction), None)

    @cached_property
    def calibrations(self) -> dict[str, CameraCalibration]:
        """Of the cameras, as they were when the episode was recorded; empty without a store."""
        return read_attachment(self.episode.attachments.get("calibration.json"), str(self.episode.path))

    @cached_property
    def late(self) -> dict[str, float]:
        """Camera -> s that its stamps come after what they show, which the policy took off.

        As its decisions tell; where they don't, as the calibration that was recorded with the episode.
        """
        told = next((decision.late for _, decision in self.decisions if decision.late is not None), None)
        if told is not None:
            return dict(told)
        return {name: found.delay.capture_s for name, found in self.calibrations.items() if found.delay is not None}

    @property
    def offered(self) -> PolicyContract:
        """What the recording offers to any policy: its observations, with the bare sentence and no statistics."""
        instruction = Instruction(BARE_INSTRUCTION, self.contract.instruction.task_set)
        return replace(self.contract, instruction=instruction, statistics_hash=None)

    @cached_property
    def acting(self) -> tuple[float, float]:
        """From when until when the policy acted, s; the whole episode where nobody says."""
        running: list[float] = []
        first = last = 0.0
        for log, said in self.of("franka_node/status"):
            if said.data == "running":
                first, running = first or log, [log]
            elif running:
                last, running = log, []
        end = self.episode.end_ns / 1e9
        return (first, end if running else last) if first else (self.episode.begin_ns / 1e9, end)

    @cached_property
    def tool(self) -> Track:
        """The tool as it was measured."""
        return self._track("current_pose")

    @cached_property
    def commanded(self) -> Track:
        """The tool as the policy wanted it: the reference that the arm follows."""
        return self._track("commanded_pose")

    @cached_property
    def target(self) -> Track:
        """The smooth and bounded version of that, which the arm was sent."""
        return self._track("target_pose")

    @cached_property
    def simulated(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a twin: times `[N]` s, and the seconds that were simulated by then `[N]`. Empty for an arm."""
        found = [(to_seconds(said.header.stamp), to_seconds(said.time_ref)) for _, said in self.of("twin_node/time")]
        times, seconds = np.array(found, np.float64).reshape(-1, 2).T
        order = np.unique(times, return_index=True)[1]
        return times[order], seconds[order]

    @cached_property
    def widths(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the gripper: times `[N]` s and widths `[N]` m."""
        found = [(to_seconds(said.header.stamp), read_width(said)) for _, said in self.of("joint_states")]
        times, widths = np.array(found, np.float64).reshape(-1, 2).T
        order = np.unique(times, return_index=True)[1]
        return times[order], widths[order]

    @cached_property
    def openings(self) -> list[Opening]:
        """What the chunks say about the gripper, in the order in which they came."""
        found = []
        for log, said in self.of("chunk"):
            stamp, rows = to_seconds(said.header.stamp), said.points[1:]
            times = [p.time_from_start.sec + 1e-9 * p.time_from_start.nanosec for p in said.points[:-1]]
            opens = [p.transforms[1].translation.x > 0.5 for p in rows]
            found.append(Opening(log, stamp + np.array(times), np.array(opens)))
        return found

    @cached_property
    def chunks(self) -> list[tuple[float, Any]]:
        """When each chunk was recorded, s, and its message."""
        return self.of("chunk")

    def executed(self, begin: float, rows: int) -> np.ndarray:
        """What was done from a time on, as actions of the contract, `[rows, 7]`; NaN beyond what is recorded.

        Where the actions themselves were recorded (`action`, from a demonstration), these. Else the motion is that of
        the reference (commanded_pose), and the gripper what the chunks in force asked for; without chunks, what the
        fingers did last.
        """
        if len(self._actions[0]):
            return self._demonstrated(begin, rows)
        action = self.contract.action
        if (action.control_mode, action.rotation, action.frame) != ("delta_ee", "rotvec", "base"):
            found = f"{action.control_mode}, {action.rotation}, {action.frame}"
            remedy = "What was executed can be told for such actions only."
            raise EpisodeError(Fault("ACTION_MODE", str(self.episode.path), "delta_ee, rotvec, base", found, remedy))
        track = self.commanded
        times = begin + np.arange(rows + 1) / action.rate_hz
        found_rows = np.full((rows, 7), np.nan)
        if not len(track.times):
            return found_rows
        inside = (times >= track.times[0]) & (times <= track.times[-1])
        known = inside[:-1] & inside[1:]
        if known.any():
            positions, rotations = track.at(np.clip(times, track.times[0], track.times[-1]))
            found_rows[known, :3] = np.diff(positions, axis=0)[known]
            found_rows[known, 3:6] = (rotations[1:] * rotations[:-1].inv()).as_rotvec()[known]
            found_rows[known, 6] = [float(self.opened(t)) for t in times[:-1][known]]
        return found_rows

    @cached_property
    def _actions(self) -> tuple[np.ndarray, np.ndarray]:
        """Recorded actions: when each began `[N]` s, and `[N, D]`."""
        found = [(to_seconds(said.header.stamp), said.position) for _, said in self.of("action")]
        return np.array([stamp for stamp, _ in found]), np.array([row for _, row in found], np.float64)

    def _demonstrated(self, begin: float, rows: int) -> np.ndarray:
        """The recorded actions of the control steps that begin then."""
        stamps, actions = self._actions
        step_s = 1.0 / self.contract.action.rate_hz
        wanted = begin + step_s * np.arange(rows)
        nearest = np.clip(np.searchsorted(stamps, wanted - 0.5 * step_s), 0, len(stamps) - 1)
        known = np.abs(stamps[nearest] - wanted) <= 0.5 * step_s
        return np.where(known[:, None], actions[nearest], np.nan)

    def opened(self, time: float) -> bool:
        """Whether the gripper was to be open."""
        for opening in reversed(self.openings):
            if opening.since <= time:
                return bool(opening.open[max(0, int(np.searchsorted(opening.times, time, side="right")) - 1)])
        times, widths = self.widths
        upto = widths[: max(1, int(np.searchsorted(times, time + 0.1)))]
        if not len(upto):
            return True
        moved = np.flatnonzero(np.abs(upto - upto[-1]) > MOVED_M)
        return bool(upto[-1] > upto[moved[-1]]) if len(moved) else bool(upto[-1] > 0.5 * widths.max())

    def of(self, topic: str) -> list[tuple[float, Any]]:
        """Messages of one of the topics that a policy has to do with: when they came, s, and what they say."""
        return [(log, said) for log, name, said in self._messages if name == topic]

    def _track(self, topic: str) -> Track:
        found = self.of(topic)
        if topic not in STATES:
            found = [(m.log_ns / 1e9, said) for m, said in self.episode.decoded(self._prefix + topic)]
        stamps = np.array([to_seconds(said.header.stamp) for _, said in found])
        poses = [read_pose(said) for _, said in found]
        order = np.unique(stamps, return_index=True)[1]
        positions = np.array([p.position for p in poses]).reshape(-1, 3)
        return Track(stamps[order], positions[order], np.array([p.rotation for p in poses]).reshape(-1, 4)[order])

    def _check_clocks(self) -> None:
        """Refuse an episode in which the clock of a stream, or that of the recorder, was set."""
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        for log, topic, said in self._messages:
            if topic not in STATES and not topic.endswith(IMAGE):
                continue
            stamp = to_seconds(said.header.stamp)
            change = log - stamp - first.setdefault(topic, log - stamp)
            back = last.get(topic, stamp) - stamp
            last[topic] = stamp
            if abs(change) > JUMP_S or back > BACK_S:
                what = f"goes back by {back:.2f} s" if back > BACK_S else f"is off by {change:+.2f} s"
                found = f"{topic} {what} {log - self.episode.begin_ns / 1e9:.1f} s after the beginning"
                remedy = "Its delays and actions mean nothing: leave it out, and set the clocks before recording."
                fault = Fault("CLOCK_JUMPED", str(self.episode.path), "clocks that run evenly", found, remedy)
                raise EpisodeError(fault)


class _Feed:
    """The way of a message into an observation."""

    def __init__(self, contract: PolicyContract, late: Mapping[str, float]):
        self.history = History()
        self.assembler = Assembler(contract, self.history.at)
        self.streams = Streams(self, late)
        self.instruction = ""

    def image(self, camera: str, stamp: float, image: np.ndarray, encoding: str) -> None:
        self.assembler.image(camera, stamp, image, encoding)

    def state(self, stamp: float, tool: Pose, gripper_width: float) -> None:
        self.assembler.state(stamp, tool, gripper_width)

    def commanded(self, stamp: float, pose: Pose) -> None:
        self.history.add(stamp, pose)

    def take(self, topic: str, said: Any) -> None:
        if topic.endswith(IMAGE):
            self.streams.image(topic.removesuffix(IMAGE), said)
        elif topic == "joint_states":
            self.streams.joints(said)
        elif topic == "current_pose":
            self.streams.pose(said)
        elif topic == "commanded_pose":
            self.streams.commanded(said)
        elif topic == "policy_node/instruction":
            self.instruction = said.data

    def of(self, decision: Decision) -> Moment:
        return Moment(self.assembler.observation_of(decision.stamps, decision.instruction), decision)
