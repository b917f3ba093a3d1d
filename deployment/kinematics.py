"""From references for the tool to references for the joints: damped least squares on the arm's own model.

The training simulator solves and follows joints in the same way, so the arm answers a policy's actions alike.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.spatial.transform import Rotation

from deployment.reference import Pose, Reference

DAMPING = 0.02  # of the least squares: what a singular arm gives up, in m and rad alike
POSTURE_RATE = 0.5  # 1/s, at which the free motion of the elbow goes back to its posture
MAX_SPEED = 2.0  # rad/s, of a joint; the slowest one of a Panda may move at 2.175


class Arm(Protocol):
    """The geometry of an arm."""

    def pose(self, joints: np.ndarray) -> Pose:
        """Of the tool centre in the robot base frame, for joint positions `[7]` rad."""

    def jacobian(self, joints: np.ndarray) -> np.ndarray:
        """`[6, 7]`: takes joint velocities to the tool's velocity (m/s, then rad/s), robot base frame."""


@dataclass(frozen=True)
class JointReference:
    """positions: `[7]` rad. velocities: `[7]` rad/s."""

    positions: np.ndarray
    velocities: np.ndarray


class InverseKinematics:
    """Follows a reference for the tool from `joints` on, by a damped least-squares step a call (Wampler 1986).

    It solves from its own last solution, not from the measured joints: no drift, and sag is not chased. posture: where
    the free motion of the elbow tends to, rad. lower, upper: bounds of the solution, rad.
    """

    def __init__(self, arm: Arm, joints: np.ndarray, posture: np.ndarray, lower: np.ndarray, upper: np.ndarray):
        self.arm, self.joints, self.posture, self.lower, self.upper = arm, joints.copy(), posture, lower, upper

    def follow(self, wanted: Reference, dt: float) -> JointReference:
        """The joints after `dt` s."""
        pose, jacobian = self.arm.pose(self.joints), self.arm.jacobian(self.joints)
        inverse = np.linalg.solve(jacobian @ jacobian.T + DAMPING**2 * np.eye(6), jacobian).T  # [7, 6]
        turn = Rotation.from_quat(wanted.pose.rotation) * Rotation.from_quat(pose.rotation).inv()
        error = np.concatenate([wanted.pose.position - pose.position, turn.as_rotvec()])
        free = POSTURE_RATE * dt * (self.posture - self.joints)
        step = inverse @ error + free - inverse @ (jacobian @ free)
        step = np.clip(step, -MAX_SPEED * dt, MAX_SPEED * dt)
        self.joints = np.clip(self.joints + step, self.lower, self.upper)
        velocities = inverse @ np.concatenate([wanted.velocity, wanted.angular_velocity])
        return JointReference(self.joints, np.clip(velocities, -MAX_SPEED, MAX_SPEED))
