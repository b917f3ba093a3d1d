"""Poses of the tool for a calibration: well spread in place and rotation, and each reached safely from the last.

Safe: inside the limits' workspace with a margin, on a straight way, with every joint clear of its range. Whether the
board is in the image is only known on the spot; a pose without it is passed over.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from deployment.arm_geometry import ArmGeometry
from deployment.kinematics import InverseKinematics
from deployment.reference import Pose, Reference
from deployment.supervisor import Limits

SPEED, TURN_RATE = 0.08, 0.4  # m/s and rad/s at most, on the way
TICK = 0.02  # s, of the way's inverse kinematics
MISS_M, MISS_RAD = 0.004, 0.02  # of the inverse kinematics: beyond, a pose is out of reach
SPARE_RAD = 0.08  # beyond the margin at which the driver stops
CANDIDATES = 30  # that are tried for each pose
LENS_DEG = (38.0, 38.0, 60.0)  # turns that show a lens: of a board that is hardly tilted no principal point follows


@dataclass(frozen=True)
class Region:
    """Where poses lie: corners of a box in m around `middle`, and how far the tool turns along each axis, deg."""

    middle: Pose
    low: tuple[float, float, float] = (-0.08, -0.12, -0.04)
    high: tuple[float, float, float] = (0.08, 0.12, 0.08)
    turn_deg: tuple[float, float, float] = (22.0, 22.0, 40.0)


class Way:
    """A straight way between two poses that begins and ends at rest (minimum jerk, Flash and Hogan 1985)."""

    def __init__(self, start: Pose, end: Pose):
        self._start, self._end = start, end
        self._base = Rotation.from_quat(start.rotation)
        self._turn = (Rotation.from_quat(end.rotation) * self._base.inv()).as_rotvec()
        length, angle = np.linalg.norm(end.position - start.position), np.linalg.norm(self._turn)
        self.seconds = float(max(1.875 * length / SPEED, 1.875 * angle / TURN_RATE, 0.3))

    def at(self, seconds: float) -> Pose:
        s = float(np.clip(seconds / self.seconds, 0.0, 1.0))
        share = s**3 * (10 - 15 * s + 6 * s**2)
        position = self._start.position + share * (self._end.position - self._start.position)
        return Pose(position, (Rotation.from_rotvec(share * self._turn) * self._base).as_quat(canonical=True))


class Reach:
    """Whether the arm gets from where it is to a pose; remembers where it is then."""

    def __init__(self, joints: np.ndarray, home: np.ndarray, limits: Limits):
        self._arm, self._joints, self._home, self._limits = ArmGeometry(), joints, home, limits
        margin = limits.joint_margin + SPARE_RAD
        self._lower, self._upper = np.array(limits.joint_lower) + margin, np.array(limits.joint_upper) - margin

    def go(self, pose: Pose) -> bool:
        """Try it on the model; a pose that can't be reached changes nothing."""
        inside = np.array(self._limits.workspace_low) + 0.02, np.array(self._limits.workspace_high) - 0.02
        if (pose.position < inside[0]).any() or (pose.position > inside[1]).any():
            return False
        way = Way(self._arm.pose(self._joints), pose)
        # The driver's own bounds are wider: a joint that stops here is too near to its range.
        solver = InverseKinematics(self._arm, self._joints, self._home, self._lower, self._upper)
        for time in np.arange(0.0, way.seconds + 10 * TICK, TICK):
            wanted = way.at(time)
            solver.follow(Reference(wanted, np.zeros(3), np.zeros(3), True), TICK)
            found = self._arm.pose(solver.joints)
            turn = Rotation.from_quat(found.rotation) * Rotation.from_quat(wanted.rotation).inv()
            if np.linalg.norm(found.position - wanted.position) > 5 * MISS_M or turn.magnitude() > 5 * MISS_RAD:
                return False
        if np.linalg.norm(found.position - pose.position) > MISS_M or turn.magnitude() > MISS_RAD:
            return False
        self._joints = solver.joints
        return True


def propose(region: Region, reach: Reach, count: int, rng: np.random.Generator) -> Iterator[Pose]:
    """Up to `count` poses, each as far as possible from those before it in place and rotation (farthest of some)."""
    down, chosen = Rotation.from_quat(region.middle.rotation), []
    size = np.array(region.high) - np.array(region.low)
    while len(chosen) < count:
        candidates = []
        for _ in range(CANDIDATES):
            place, turn = rng.uniform(0, 1, 3), rng.uniform(-1, 1, 3)
            candidates.append(np.concatenate([place, turn]))
        if chosen:
            apart = [min(float(np.linalg.norm(c - other)) for other in chosen) for c in candidates]
            candidates = [candidates[i] for i in np.argsort(apart)[::-1]]
        for candidate in candidates:
            turn = Rotation.from_rotvec(np.deg2rad(np.array(region.turn_deg)) * candidate[3:])
            position = region.middle.position + np.array(region.low) + candidate[:3] * size
            pose = Pose(position, (turn * down).as_quat(canonical=True))
            if reach.go(pose):
                chosen.append(candidate)
                yield pose
                break
        else:
            return
