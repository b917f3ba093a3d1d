"""The station: an arm and a camera behind the graph's topics, as the runs of a calibration need them.

It takes the policy's place: `franka_node` gets chunks from here, checks them as any others, and drives the arm.
"""

import os
import socket
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import Image, JointState
from trajectory_msgs.msg import MultiDOFJointTrajectory

from deployment.calibration_poses import Way
from deployment.calibration_run import Motion
from deployment.reference import Pose, Waypoints
from vla.errors import SimrealError
from vla_policy import messages
from vla_policy.client import Client

READY_S = 120.0
IMAGE_S = 5.0  # without an image: the camera is silent
STALE_S = 0.06  # between the image and the nearest pose
KEPT_S = 60.0  # of poses
ROWS, STEP_S, CHUNK_S = 20, 0.05, 0.1  # of a chunk, and between chunks
REST_S, REST_M, REST_RAD = 0.5, 2e-4, 1e-3  # a tool that moves less in this time is at rest
REST_POSES = 5  # that are needed to tell
ARRIVE_S = 8.0  # after the way's end, until it has to be
AVERAGED_S = 0.1  # of poses around an image
RAMP = 0.5  # periods, in which a sinusoid grows


class StationROS(Client):
    """Meets `deployment.calibration_run.Station`. drives: whether franka_node follows; else somebody guides the arm."""

    def __init__(self, namespace: str, camera: str, arm_id: str, ended: Callable[[], str], with_arm: bool = True,
                 drives: bool = True):  # fmt: skip
        super().__init__("calibrator", namespace, ended, [f"franka_node/{name}" for name in ("home", "start", "stop")])
        self.camera, self._arm_id = camera, arm_id
        self._with_arm, self._drives = with_arm, drives
        self._image: tuple[float, Image] | None = None
        self._arrived = 0.0
        self._frames: list[tuple[float, float, Image]] | None = None  # while recording
        self._poses: deque[tuple[float, Pose]] = deque()
        self._commanded: deque[tuple[float, Pose]] = deque()
        self._joints = np.zeros(7)
        self._width, self._spread = 0.08, 0.0  # m; the latter how far the tool moved of late
        self._where: Callable[[float], Pose] | None = None
        self._source = f"{socket.gethostname()}:{os.getpid()}"
        node, sensor = self.node, messages.SENSOR
        node.create_subscription(Image, f"{camera}/image_raw", self._on_image, sensor)
        node.create_subscription(PoseStamped, "current_pose", lambda m: self._on_pose(self._poses, m), sensor)
        node.create_subscription(PoseStamped, "commanded_pose", lambda m: self._on_pose(self._commanded, m), sensor)
        node.create_subscription(JointState, "joint_states", self._on_joints, sensor)
        if drives:
            self._chunks = node.create_publisher(MultiDOFJointTrajectory, "chunk", messages.COMMAND)
            self._life = node.create_publisher(DiagnosticStatus, "policy_status", sensor)
            node.create_timer(0.05, self._beat)
            node.create_timer(CHUNK_S, self._send)
        self.spin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drives and self.status in ("running", "holding") and not self._ended():
            self.trigger("franka_node/stop")
        super().__exit__(kind, error, trace)

    def begin(self) -> None:
        """Go home and take control."""
        self.look(READY_S)
        if not self._with_arm:
            return
        self.until(lambda: bool(self._poses), READY_S, "the arm's state")
        if not self._drives:
            return
        self.until(lambda: all(c.service_is_ready() for c in self._triggers.values()), READY_S, "franka_node")
        self.home()
        self.until(self._rests, ARRIVE_S, "the arm at rest")
        self.start(READY_S)
        here = self.pose()
        self._where = lambda _: here

    # Station

    def look(self, limit_s: float = IMAGE_S) -> tuple[float, np.ndarray]:
        asked = time.time()
        end = time.monotonic() + limit_s
        with self._changed:
            while self._image is None or self._image[0] < asked:
                self._check()
                if time.monotonic() > end:
                    topic = self.node.resolve_topic_name(f"{self.camera}/image_raw")
                    late = asked - self._image[0] if self._image is not None and self._arrived > asked else 0.0
                    what = f"images are stamped {late:.1f} s ago" if late else f"no image for {limit_s:g} s"
                    raise SimrealError(
                        f"{topic}: {what}", code="STALE_IMAGE" if late else "CAMERA_SILENT",
                        remedy="Check cable, driver and clock, then run the same command again: it goes on from here.",
                    )  # fmt: skip
                self._changed.wait(0.1)
            stamp, message = self._image
        return stamp, messages.read_rgb(message, self.camera)

    def tool(self, stamp: float) -> np.ndarray:
        end = time.monotonic() + 1.0
        while time.monotonic() < end and (not self._poses or self._poses[-1][0] < stamp + AVERAGED_S / 2):
            time.sleep(0.01)
        near = [(t, p) for t, p in list(self._poses) if abs(t - stamp) <= AVERAGED_S / 2]
        if not near or min(abs(t - stamp) for t, _ in near) > STALE_S:
            away = min((t - stamp for t, _ in list(self._poses)), key=abs, default=float("inf"))
            raise SimrealError(
                f"no pose of the tool within {1e3 * STALE_S:.0f} ms of the image; the nearest is {away:+.2f} s from it",
                code="STALE_POSE",
                remedy="Stamp both with one clock (chrony or PTP), and give franka_node's machine less other work.",
            )  # fmt: skip
        made = np.eye(4)
        made[:3, 3] = np.mean([p.position for _, p in near], axis=0)
        made[:3, :3] = Rotation.from_quat([p.rotation for _, p in near]).mean().as_matrix()
        return made

    def joints(self) -> np.ndarray:
        return self._joints.copy()

    def pose(self) -> Pose:
        """Where the tool is."""
        return self._poses[-1][1]

    def go(self, pose: Pose) -> None:
        start = self._where(time.time()) if self._where else self.pose()
        way, begun = Way(start, pose), time.time() + CHUNK_S
        self._where = lambda now: way.at(now - begun)
        time.sleep(way.seconds + CHUNK_S)
        end = time.monotonic() + ARRIVE_S
        while not self._rests():
            self._check()
            if self.status == "fault":
                _, text = self.trigger("franka_node/start")
                raise SimrealError(
                    f"the arm has stopped: {text}", code="ARM_FAULT",
                    remedy="Remove the cause and call ~/reset_fault, then run the same command again.",
                )  # fmt: skip
            if time.monotonic() > end:
                moves = f"its tool still moves by {1e3 * self._spread:.1f} mm in {REST_S:g} s"
                why = "its poses come too seldom to tell" if np.isnan(self._spread) else moves
                raise SimrealError(
                    f"the arm does not come to rest within {ARRIVE_S:g} s ({self.status}): {why}", code="NO_REST",
                    remedy="See what shakes it. The twin shakes where other work keeps its machine from real time.",
                )  # fmt: skip
            time.sleep(0.05)

    def shake(self, seconds: float, frequency_hz: float, amplitude_m: float) -> Motion:
        assert self._where is not None
        centre, begun = self._where(time.time()), time.time() + CHUNK_S

        def where(now: float) -> Pose:
            periods = max(0.0, (now - begun) * frequency_hz)
            away = amplitude_m * min(1.0, periods / RAMP) * np.sin(2 * np.pi * periods)
            return Pose(centre.position + np.array([0.0, away, 0.0]), centre.rotation)

        self._where = where
        time.sleep(1.5 / frequency_hz)  # until it has grown and settled
        with self._changed:
            self._frames = []
        first = time.time()
        end = first + seconds
        while time.time() < end:
            self._check()
            time.sleep(0.05)
        with self._changed:
            frames, self._frames = self._frames, None
        self._where = lambda _: centre
        recorded = [_track(kept, first, end) for kept in (self._commanded, self._poses)]
        images = [(stamp, arrival, messages.read_rgb(message, self.camera)) for stamp, arrival, message in frames]
        return Motion(recorded[0], recorded[1], images)

    # Inside

    def _beat(self) -> None:
        self._life.publish(messages.status_message(self.node.get_fully_qualified_name(), self._source, None))

    def _send(self) -> None:
        where = self._where
        if where is None or self.status not in ("running", "holding"):
            return
        now = time.time()
        times = now + STEP_S * np.arange(1, ROWS + 1)
        poses = [where(float(t)) for t in times]
        is_open = np.full(ROWS, self._width > 0.04)  # what is held stays held
        positions, rotations = np.array([p.position for p in poses]), np.array([p.rotation for p in poses])
        rows = Waypoints(now, where(now), times, positions, rotations, is_open)
        self._chunks.publish(messages.chunk_message(rows, self._arm_id))

    def _rests(self) -> bool:
        poses = list(self._poses)
        times = [t for t, _ in poses if t > poses[-1][0] - REST_S]
        if len(times) < REST_POSES or times[-1] - times[0] < 0.7 * REST_S or time.time() - times[-1] > REST_S:
            self._spread = float("nan")  # too little is known
            return False
        recent = [p for _, p in poses[-len(times) :]]
        self._spread = float(np.ptp([p.position for p in recent], axis=0).max())
        turn = (Rotation.from_quat(recent[0].rotation) * Rotation.from_quat(recent[-1].rotation).inv()).magnitude()
        return bool(self._spread < REST_M and turn < REST_RAD)

    def _on_image(self, message: Image) -> None:
        arrival, stamp = time.time(), messages.to_seconds(message.header.stamp)
        with self._changed:
            self._image, self._arrived = (stamp, message), arrival
            if self._frames is not None:
                self._frames.append((stamp, arrival, message))
            self._changed.notify_all()

    def _on_pose(self, kept: deque[tuple[float, Pose]], message: PoseStamped) -> None:
        stamp = messages.to_seconds(message.header.stamp)
        kept.append((stamp, messages.read_pose(message)))
        while kept[0][0] < stamp - KEPT_S:
            kept.popleft()

    def _on_joints(self, message: JointState) -> None:
        self._joints, self._width = np.array(message.position[:7]), messages.read_width(message)


def _track(kept: deque[tuple[float, Pose]], first: float, last: float) -> tuple[np.ndarray, np.ndarray]:
    inside = {t: p.position for t, p in list(kept) if first <= t <= last}
    if not inside:
        raise SimrealError(
            "franka_node told no poses while the arm moved", code="STATE_SILENT", remedy="Look at /diagnostics."
        )
    return np.array(list(inside)), np.array(list(inside.values()))
