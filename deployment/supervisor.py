"""The supervisor: what may reach the arm. It lives with the driver, in another process than the policy.

Whatever arrives is checked row by row; what the arm follows is slewed within velocity and acceleration bounds;
silence of the policy, the cameras or the arm means hold, then stop. Faults latch: only `reset` clears them. A
checkpoint may tighten the limits, never loosen them.

No threads, no clock: the caller passes the time in s, of the clock that stamps the observations.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.spatial.transform import Rotation

from deployment.reference import Pose, Reference, Waypoints
from vla.contract import ActionSemantics
from vla.errors import Fault

RESET = "Remove the cause, then call reset_fault."
Status = Literal["idle", "running", "holding", "fault"]


@dataclass(frozen=True)
class Limits:
    """Bounds of the arm's motion, tool centre in the robot base frame; a file of configs/robot has them.

    workspace_low, workspace_high: corners of the box that the tool may be in, m.
    max_step_translation: of a row of a chunk, each component, m. max_step_rotation: rad.
    max_velocity: m/s. max_acceleration: m/s2. max_jerk: m/s3. max_angular_velocity: rad/s.
    max_angular_acceleration: rad/s2. max_angular_jerk: rad/s3. The arm overshoots what its motors can't do.
    brake_acceleration: m/s2. brake_jerk: m/s3. Those of an arm that has to stop, where smoothness counts for less.
    joint_lower, joint_upper: positions that the arm can reach, rad. joint_margin: how far to stay away from them, rad.
    start_distance, start_angle: how far the first target may be from where the tool is, m and rad.
    """

    workspace_low: tuple[float, float, float]
    workspace_high: tuple[float, float, float]
    max_step_translation: float
    max_step_rotation: float
    max_velocity: float
    max_acceleration: float
    max_jerk: float
    max_angular_velocity: float
    max_angular_acceleration: float
    max_angular_jerk: float
    brake_acceleration: float
    brake_jerk: float
    joint_lower: tuple[float, ...]
    joint_upper: tuple[float, ...]
    joint_margin: float = 0.1
    start_distance: float = 0.03
    start_angle: float = 0.2

    def tightened(self, action: ActionSemantics) -> "Limits":
        """With the step bounds of a checkpoint's contract where they are smaller."""
        return replace(
            self,
            max_step_translation=min(self.max_step_translation, action.max_translation),
            max_step_rotation=min(self.max_step_rotation, action.max_rotation),
        )


@dataclass(frozen=True)
class SupervisorConfig:
    """Options of the supervisor.

    on_violation: clip, a row outside the bounds is moved to the nearest allowed one; or reject, its chunk is refused.
    hold_s: time without the chunk that is due after which the arm holds. heartbeat_s: without a sign of life of the
        policy's process.
    stop_s: silence of either that is a fault.
    state_s, camera_s: silence of the arm's state and of a camera that is a fault.
    max_age_s: chunks whose observation is older are refused.
    clock_jump_s: difference between two clocks' progress that is a fault.
    """

    on_violation: Literal["clip", "reject"] = "clip"
    hold_s: float = 0.4
    heartbeat_s: float = 0.06
    stop_s: float = 2.0
    state_s: float = 0.1
    camera_s: float = 0.5
    max_age_s: float = 0.5
    clock_jump_s: float = 0.1


class Supervisor:
    """See the module's docstring.

    fault: the first thing that went wrong since the last reset, or None. counts: rows clipped, chunks rejected, ...
    """

    def __init__(self, limits: Limits, config: SupervisorConfig | None = None, cameras: tuple[str, ...] = ()):
        self.limits, self.config, self.cameras = limits, config or SupervisorConfig(), cameras
        self.status: Status = "idle"
        self.fault: Fault | None = None
        self.counts: Counter[str] = Counter()
        self._beats: dict[str, float] = {}
        self._clocks: tuple[float, float] | None = None
        self._first = True
        self._due = 0.0

    def start(self, now: float) -> None:
        """Arm. Ignored while a fault is latched."""
        if self.status == "idle":
            self.status, self._first, self._clocks = "running", True, None
            self._beats = {name: now for name in ("policy", "heartbeat", "state", *self.cameras)}
            self._due = now

    def stop(self) -> None:
        """Disarm; a fault stays."""
        if self.status != "fault":
            self.status = "idle"

    def reset(self) -> None:
        """Clear a fault; the arm stays disarmed."""
        self.fault = None
        self.status = "idle"

    def trip(self, code: str, field: str, expected: str, found: str, remedy: str = RESET) -> None:
        """Latch a fault; a later one is counted only."""
        self.counts[code] += 1
        if self.fault is None:
            self.fault = Fault(code, field, expected, found, remedy)
        self.status = "fault"

    def beat(self, name: str, stamp: float) -> None:
        """Something of "state", "heartbeat" or a camera has arrived that was captured at `stamp`."""
        self._beats[name] = max(stamp, self._beats.get(name, stamp))

    def expect(self, due: float) -> None:
        """The policy is to answer an observation of this time or later; before it, no chunk is missed."""
        self._due = due

    def poll(self, now: float, wall: float) -> Status:
        """Call this in every control cycle, with a second clock that nobody sets (or the other way round)."""
        if self._clocks is not None and self.status in ("running", "holding"):
            jump = (now - self._clocks[0]) - (wall - self._clocks[1])
            if abs(jump) > self.config.clock_jump_s:
                self.trip("CLOCK_JUMP", "clock", "time that runs steadily", f"a jump of {jump:+.3f} s")
        self._clocks = now, wall
        if self.status in ("running", "holding"):
            self._watch(now)
        return self.status

    def _watch(self, now: float) -> None:
        config = self.config
        for name in ("state", *self.cameras):
            limit = config.state_s if name == "state" else config.camera_s
            silent = now - self._beats[name]
            if silent > limit:
                code = "STATE_SILENT" if name == "state" else "CAMERA_SILENT"
                self.trip(code, name, f"something new every {limit:g} s", f"nothing for {silent:.3f} s")
                return
        chunk, life = now - max(self._beats["policy"], self._due), now - self._beats["heartbeat"]
        if max(chunk, life) > config.stop_s:
            name = "chunk" if chunk > life else "heartbeat"
            self.trip(
                "POLICY_SILENT", "policy", f"a {name} every {config.stop_s:g} s", f"none for {max(chunk, life):.3f} s"
            )
        else:
            lifeless = life > config.heartbeat_s
            holding = lifeless or chunk > config.hold_s
            if holding and self.status == "running":
                self.counts["held_without_heartbeat" if lifeless else "held_without_chunk"] += 1
            self.status = "holding" if holding else "running"

    def review(self, waypoints: Waypoints, tool: Pose, now: float) -> Waypoints | None:
        """What may be executed of a chunk; None for nothing. `tool`: where it is."""
        if self.status not in ("running", "holding"):
            return None
        rows = len(waypoints.times)
        shapes = (waypoints.positions.shape, waypoints.rotations.shape, waypoints.gripper_open.shape)
        if shapes != ((rows, 3), (rows, 4), (rows,)) or not rows:
            self.trip("CHUNK_SHAPE", "chunk", f"{rows} rows of 3, 4 and 1 numbers", str(shapes))
            return None
        anchor = waypoints.anchor
        numbers = (waypoints.times, waypoints.positions, waypoints.rotations, anchor.position, anchor.rotation)
        if not all(np.isfinite(part).all() for part in numbers):
            self.trip("CHUNK_NOT_FINITE", "chunk", "finite numbers", "NaN or infinity")
            return None
        lengths = np.linalg.norm(np.concatenate([waypoints.rotations, anchor.rotation[None]]), axis=1)
        if np.abs(lengths - 1).max() > 1e-2:
            self.trip("CHUNK_ROTATION", "chunk", "unit quaternions", f"one of length {lengths.min():.3f}")
            return None
        age = now - waypoints.stamp
        if not -0.01 <= age <= self.config.max_age_s:
            self.counts["rejected_age"] += 1
            return None
        if self._first and not self._near(waypoints, tool):
            return None
        allowed, violations = self._inside(waypoints)
        if violations and self.config.on_violation == "reject":
            self.counts["rejected_chunks"] += 1
            return None
        self.counts["clipped_rows"] += violations
        self._first = False
        self._beats["policy"] = now
        return allowed

    def _near(self, waypoints: Waypoints, tool: Pose) -> bool:
        """Whether the first target is near the tool; else a fault."""
        distance = float(np.linalg.norm(waypoints.positions[0] - tool.position))
        angle = _angle(waypoints.rotations[0], tool.rotation)
        near, straight = self.limits.start_distance, self.limits.start_angle
        if distance <= near and angle <= straight:
            return True
        wanted, found = f"within {near:g} m and {straight:g} rad of the tool", f"{distance:.3f} m and {angle:.3f} rad"
        self.trip("START_POSE", "first target", wanted, found, "Bring the arm to its start pose (home), then start.")
        return False

    def _inside(self, waypoints: Waypoints) -> tuple[Waypoints, int]:
        """The waypoints with every row within step bounds and workspace, and how many rows were not."""
        limits = self.limits
        low, high = np.array(limits.workspace_low), np.array(limits.workspace_high)
        position, rotation = waypoints.anchor.position, Rotation.from_quat(waypoints.anchor.rotation)
        wanted, wanted_rotation = position, rotation
        positions, rotations, violations = [], [], 0
        slack = 1 + 1e-6
        for target, quaternion in zip(waypoints.positions, waypoints.rotations, strict=True):
            step, turn = target - wanted, (Rotation.from_quat(quaternion) * wanted_rotation.inv()).as_rotvec()
            wanted, wanted_rotation = target, Rotation.from_quat(quaternion)
            bounded = np.clip(step, -limits.max_step_translation, limits.max_step_translation)
            bounded_turn = np.clip(turn, -limits.max_step_rotation, limits.max_step_rotation)
            before = position + bounded
            position = np.clip(before, low, high)
            rotation = Rotation.from_rotvec(bounded_turn) * rotation
            ok = (np.abs(step) <= limits.max_step_translation * slack).all()
            ok &= (np.abs(turn) <= limits.max_step_rotation * slack).all()
            violations += not (ok and (before >= low - 1e-9).all() and (before <= high + 1e-9).all())
            positions.append(position)
            rotations.append(rotation.as_quat(canonical=True))
        if not violations:
            return waypoints, 0
        return replace(waypoints, positions=np.array(positions), rotations=np.array(rotations)), violations

    def check_joints(self, joints: np.ndarray) -> None:
        """A fault if a joint `[7]` rad is nearer to its limit than the margin, or not finite."""
        lower = np.array(self.limits.joint_lower) + self.limits.joint_margin
        upper = np.array(self.limits.joint_upper) - self.limits.joint_margin
        inside = (joints >= lower) & (joints <= upper)
        if not inside.all() and self.status in ("running", "holding"):
            worst = int(np.flatnonzero(~inside)[0])
            wanted = f"{lower[worst]:.3f} to {upper[worst]:.3f} rad"
            self.trip("JOINT_MARGIN", f"joint {worst + 1}", wanted, f"{joints[worst]:.3f} rad")


class Slew:
    """Follows a reference as a critically damped spring does, within bounds of velocity and acceleration.

    A policy's references change their velocity at once; an arm driven with that swings. bandwidth: of the spring,
    rad/s. lead: share of the reference's velocity that is fed forward; the lag is 2 (1 - lead) / bandwidth s.
    """

    def __init__(self, limits: Limits, pose: Pose, bandwidth: float = 20.0, lead: float = 0.5):
        self.limits, self.bandwidth, self.lead = limits, bandwidth, lead
        self.pose = pose
        self.velocity, self.angular_velocity = np.zeros(3), np.zeros(3)
        self._acceleration, self._angular_acceleration = np.zeros(3), np.zeros(3)

    def follow(self, wanted: Reference, dt: float) -> Reference:
        """Move for `dt` s; `wanted` is the reference at the end of them."""
        turn = Rotation.from_quat(wanted.pose.rotation) * Rotation.from_quat(self.pose.rotation).inv()
        return self._move(
            self._spring(wanted.pose.position - self.pose.position, wanted.velocity, self.velocity),
            self._spring(turn.as_rotvec(), wanted.angular_velocity, self.angular_velocity),
            self.limits.max_acceleration, self.limits.max_jerk, dt, wanted.gripper_open,
        )  # fmt: skip

    def brake(self, dt: float, gripper_open: bool) -> Reference:
        """Move for `dt` s, slowing down as quickly as allowed, wherever that ends."""
        limits = self.limits
        return self._move(
            _braking(self.velocity, limits.brake_acceleration, limits.brake_jerk, dt),
            _braking(self.angular_velocity, limits.max_angular_acceleration, limits.max_angular_jerk, dt),
            limits.brake_acceleration, limits.brake_jerk, dt, gripper_open,
        )  # fmt: skip

    def place(self, pose: Pose, gripper_open: bool) -> Reference:
        """Be at rest at a pose: where an arm that was braked has come to rest."""
        self.pose = pose
        self.velocity, self.angular_velocity = np.zeros(3), np.zeros(3)
        self._acceleration, self._angular_acceleration = np.zeros(3), np.zeros(3)
        return Reference(pose, self.velocity, self.angular_velocity, gripper_open)

    def _spring(self, behind: np.ndarray, target: np.ndarray, velocity: np.ndarray) -> np.ndarray:
        """Acceleration `[3]`."""
        return self.bandwidth**2 * behind + 2 * self.bandwidth * (self.lead * target - velocity)

    def _move(
        self, linear: np.ndarray, angular: np.ndarray, strongest: float, jerk: float, dt: float, gripper_open: bool
    ) -> Reference:
        """With accelerations as near to those wanted as the bounds allow; `strongest` and `jerk` are linear ones."""
        limits = self.limits
        self._acceleration, self.velocity = _advance(
            linear, self._acceleration, self.velocity,
            jerk, strongest, limits.max_velocity, dt,
        )  # fmt: skip
        self._angular_acceleration, self.angular_velocity = _advance(
            angular, self._angular_acceleration, self.angular_velocity,
            limits.max_angular_jerk, limits.max_angular_acceleration, limits.max_angular_velocity, dt,
        )  # fmt: skip
        position = np.clip(self.pose.position + self.velocity * dt, limits.workspace_low, limits.workspace_high)
        rotation = Rotation.from_rotvec(self.angular_velocity * dt) * Rotation.from_quat(self.pose.rotation)
        self.pose = Pose(position, rotation.as_quat(canonical=True))
        return Reference(self.pose, self.velocity, self.angular_velocity, gripper_open)


def _advance(
    wanted: np.ndarray, acceleration: np.ndarray, velocity: np.ndarray,
    jerk: float, strongest: float, fastest: float, dt: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Acceleration and velocity `[3]` after `dt` s."""
    speed = float(np.linalg.norm(velocity))
    if speed > 0:  # at the greatest speed it has faded to 0
        excess = float(wanted @ velocity) / speed - _fading(max(0.0, fastest - speed), jerk, dt)
        wanted = wanted - max(0.0, excess) * velocity / speed
    now = acceleration + _shortened(_shortened(wanted, strongest) - acceleration, jerk * dt)
    after = _shortened(velocity + now * dt, fastest)
    return (after - velocity) / dt, after


def _braking(velocity: np.ndarray, strongest: float, jerk: float, dt: float) -> np.ndarray:
    """The acceleration `[3]` that ends in rest, faded to 0."""
    speed = float(np.linalg.norm(velocity))
    if speed < 1e-9:
        return np.zeros(3)
    return -velocity / speed * min(strongest, _fading(speed, jerk, dt), speed / dt)


def _fading(change: float, jerk: float, dt: float) -> float:
    """The acceleration that changes a speed by so much while it fades to 0 by `jerk * dt` in every step."""
    return float(np.sqrt((jerk * dt / 2) ** 2 + 2 * jerk * change)) - jerk * dt / 2


def _shortened(vector: np.ndarray, length: float) -> np.ndarray:
    norm = float(np.linalg.norm(vector))
    return vector if norm <= length else vector * (length / norm)


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    """Angle in rad between two rotations, quaternions xyzw."""
    return float((Rotation.from_quat(a) * Rotation.from_quat(b).inv()).magnitude())
