"""Inverse kinematics on the model that the arm hands out (here franky-sim's)."""

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from deployment.franka import ArmConfig, FrankaArm, Geometry
from deployment.kinematics import MAX_SPEED, InverseKinematics
from deployment.reference import Pose, Reference
from deployment.twin import TwinProcess

TICK = 0.005
LOWER, UPPER = np.full(7, -3.0), np.full(7, 4.0)


@pytest.fixture(scope="module")
def geometry(twin: TwinProcess, robot: ArmConfig) -> Iterator[Geometry]:
    arm = FrankaArm(twin.address, robot, load_gripper=False)
    raw = arm.robot.state
    yield Geometry(arm.robot.model, raw.F_T_EE, raw.EE_T_K)
    arm.close()


@pytest.fixture
def home(robot: ArmConfig) -> np.ndarray:
    return np.array(robot.home)


def still(pose: Pose) -> Reference:
    return Reference(pose, np.zeros(3), np.zeros(3), True)


def distance(a: Pose, b: Pose) -> tuple[float, float]:
    """In m and rad."""
    turn = Rotation.from_quat(a.rotation) * Rotation.from_quat(b.rotation).inv()
    return float(np.linalg.norm(a.position - b.position)), float(turn.magnitude())


def test_the_jacobian_is_the_derivative_of_the_pose(geometry: Geometry, home: np.ndarray) -> None:
    for joint in range(7):
        near = home + 1e-5 * np.eye(7)[joint]
        a, b = geometry.pose(home), geometry.pose(near)
        turn = (Rotation.from_quat(b.rotation) * Rotation.from_quat(a.rotation).inv()).as_rotvec()
        rate = np.concatenate([b.position - a.position, turn]) / 1e-5
        assert np.allclose(geometry.jacobian(home)[:, joint], rate, atol=1e-3)


def test_it_reaches_a_pose_and_follows_a_velocity(geometry: Geometry, home: np.ndarray) -> None:
    inverse, start = InverseKinematics(geometry, home, home, LOWER, UPPER), geometry.pose(home)
    turned = Rotation.from_rotvec([0.1, -0.2, 0.3]) * Rotation.from_quat(start.rotation)
    goal = Pose(start.position + np.array([0.1, -0.15, -0.1]), turned.as_quat())
    for _ in range(200):
        found = inverse.follow(still(goal), TICK)
    assert distance(geometry.pose(found.positions), goal) < (2e-4, 1e-3) and not found.velocities.any()

    velocity = np.array([0.1, 0.05, -0.1])
    for number in range(1, 61):
        moved = Pose(goal.position + number * TICK * velocity, goal.rotation)
        found = inverse.follow(Reference(moved, velocity, np.zeros(3), True), TICK)
    assert distance(geometry.pose(found.positions), moved) < (2e-3, 5e-3)
    tool = geometry.jacobian(found.positions) @ found.velocities
    assert np.allclose(tool, [*velocity, 0, 0, 0], atol=5e-3)


def test_joints_stay_within_speed_and_range(geometry: Geometry, home: np.ndarray) -> None:
    low, high = home - 0.2, home + 0.2
    inverse = InverseKinematics(geometry, home, home, low, high)
    far = Pose(np.array([0.9, 0.6, 0.9]), geometry.pose(home).rotation)
    last = home
    for _ in range(100):
        found = inverse.follow(still(far), TICK)
        assert (np.abs(found.positions - last) <= MAX_SPEED * TICK + 1e-9).all()
        assert (found.positions >= low).all() and (found.positions <= high).all()
        last = found.positions
    assert (np.isclose(last, low) | np.isclose(last, high)).any()


def test_the_free_elbow_goes_back_to_its_posture(geometry: Geometry, home: np.ndarray) -> None:
    null = np.linalg.svd(geometry.jacobian(home))[2][-1]
    start = home + 0.3 * null
    pose = geometry.pose(start)
    inverse = InverseKinematics(geometry, start, home, LOWER, UPPER)
    for _ in range(1000):
        found = inverse.follow(still(pose), TICK)
    assert distance(geometry.pose(found.positions), pose) < (1e-3, 5e-3)
    assert np.linalg.norm(found.positions - home) < 0.3 * np.linalg.norm(start - home)
