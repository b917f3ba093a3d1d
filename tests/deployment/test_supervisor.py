"""The supervisor: what it lets through, what it clips or refuses, and what stops the arm."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from deployment.executor import integrate
from deployment.reference import Curve, Pose, Reference, Waypoints
from deployment.supervisor import Limits, Slew, Supervisor, SupervisorConfig
from vla.contract import ActionSemantics
from vla.types import ActionChunk

LIMITS = Limits(
    workspace_low=(0.1, -0.4, 0.0), workspace_high=(0.8, 0.4, 0.6), max_step_translation=0.02, max_step_rotation=0.05,
    max_velocity=0.7, max_acceleration=8.0, max_jerk=300.0, brake_acceleration=10.0, brake_jerk=500.0,
    max_angular_velocity=1.5, max_angular_acceleration=20.0, max_angular_jerk=1500.0,
    joint_lower=(-2.7,) * 7, joint_upper=(2.7,) * 7,
)  # fmt: skip
HOME = Pose(np.array([0.5, 0.0, 0.2]), np.array([1.0, 0.0, 0.0, 0.0]))
ACTION = ActionSemantics("delta_ee", "rotvec", "base", 0.01, 0.5, 20.0, 8)


def supervisor(**options: object) -> Supervisor:
    made = Supervisor(LIMITS, SupervisorConfig(**options), cameras=("wrist",))  # fmt: skip
    made.start(0.0)
    return made


def waypoints(stamp: float = 0.0, step: tuple[float, ...] = (0.01, 0.0, 0.0), anchor: Pose = HOME) -> Waypoints:
    return integrate(ActionChunk(np.tile([*step, 0.0, 0.0, 0.01, 1.0], (8, 1)), stamp), anchor, 0.05)


def test_a_chunk_within_the_bounds_passes_as_it_is() -> None:
    made, chunk = supervisor(), waypoints()
    assert made.review(chunk, HOME, 0.1) is chunk
    assert not made.counts["clipped_rows"] and made.status == "running"


def test_rows_beyond_the_bounds_are_clipped_and_counted() -> None:
    made = supervisor()
    allowed = made.review(waypoints(step=(0.05, 0.0, 0.0)), HOME, 0.1)
    assert allowed is None and made.fault is not None and made.fault.code == "START_POSE"  # 5 cm in the first row
    made = supervisor()
    chunk = waypoints()
    jump = replace(chunk, positions=chunk.positions + np.outer(np.arange(8) >= 4, [0.0, 0.1, 0.0]))
    allowed = made.review(jump, HOME, 0.1)
    assert allowed is not None and made.counts["clipped_rows"] == 1
    steps = np.diff(np.concatenate([[HOME.position], allowed.positions]), axis=0)
    assert np.abs(steps).max() <= 0.02 + 1e-9 and np.allclose(allowed.positions[4:, 1], 0.02)
    turned = replace(chunk, rotations=np.tile(Rotation.from_rotvec([np.pi, 0, 0.15]).as_quat(), (8, 1)))
    allowed = made.review(turned, HOME, 0.1)
    assert allowed is not None and made.counts["clipped_rows"] == 2


def test_the_tool_stays_in_the_workspace() -> None:
    made, low = supervisor(), Pose(np.array([0.5, 0.0, 0.05]), HOME.rotation)
    allowed = made.review(waypoints(step=(0.0, 0.0, -0.01), anchor=low), low, 0.1)
    assert allowed is not None
    assert allowed.positions[:, 2].min() == 0.0 and made.counts["clipped_rows"] == 3


def test_reject_refuses_the_whole_chunk_and_the_silence_that_follows_holds_and_stops() -> None:
    made = supervisor(on_violation="reject")
    assert made.review(waypoints(), HOME, 0.0) is not None
    bad = waypoints(0.05, step=(0.021, 0.0, 0.0))
    now = 0.1
    assert made.review(bad, HOME, now) is None and made.counts["rejected_chunks"] == 1
    seen = []
    for now in np.arange(0.0, 2.5, 0.01):
        for name in ("state", "wrist", "heartbeat"):
            made.beat(name, now)
        seen.append(made.poll(now, now))
    order = list(dict.fromkeys(seen))
    assert order == ["running", "holding", "fault"]
    assert seen.index("holding") == pytest.approx(41, abs=1) and seen.index("fault") == pytest.approx(201, abs=1)
    assert made.fault is not None and made.fault.code == "POLICY_SILENT"


def test_no_chunk_is_missed_before_it_is_due() -> None:
    made = supervisor()
    made.review(waypoints(), HOME, 0.0)
    made.expect(0.8)
    seen = []
    for now in np.arange(0.0, 1.5, 0.01):
        for name in ("state", "wrist", "heartbeat"):
            made.beat(name, now)
        seen.append(made.poll(now, now))
    assert seen.index("holding") == pytest.approx(121, abs=1)
    assert made.counts["held_without_chunk"] == 1 and not made.counts["held_without_heartbeat"]


BAD: list[tuple[str, Callable[[Waypoints], Waypoints]]] = [
    ("CHUNK_NOT_FINITE", lambda c: replace(c, positions=c.positions * np.nan)),
    ("CHUNK_NOT_FINITE", lambda c: replace(c, rotations=np.full((8, 4), np.inf))),
    ("CHUNK_SHAPE", lambda c: replace(c, positions=c.positions[:, :2])),
    ("CHUNK_SHAPE", lambda c: replace(c, gripper_open=c.gripper_open[:3])),
    ("CHUNK_SHAPE", lambda c: replace(c, times=c.times[:0])),
    ("START_POSE", lambda c: replace(c, positions=c.positions + 0.05)),
    ("START_POSE", lambda c: replace(c, rotations=np.tile([0.0, 1.0, 0.0, 0.0], (8, 1)))),
]


@pytest.mark.parametrize(("code", "spoil"), BAD)
def test_a_policy_that_lies_is_a_fault_that_latches(code: str, spoil: Callable[[Waypoints], Waypoints]) -> None:
    made = supervisor()
    assert made.review(spoil(waypoints()), HOME, 0.1) is None
    assert made.status == "fault" and made.fault is not None and made.fault.code == code and made.fault.remedy
    made.start(0.2)
    made.stop()
    assert made.poll(0.2, 0.2) == "fault" and made.review(waypoints(), HOME, 0.2) is None
    made.trip("LATER", "x", "y", "z")
    assert made.fault.code == code and made.counts["LATER"] == 1
    made.reset()
    assert made.status == "idle" and made.fault is None and made.review(waypoints(), HOME, 0.2) is None
    made.start(0.3)
    assert made.review(waypoints(0.3), HOME, 0.3) is not None


def test_old_chunks_and_chunks_from_the_future_are_refused() -> None:
    made = supervisor()
    assert made.review(waypoints(0.0), HOME, 0.51) is None
    assert made.review(waypoints(1.0), HOME, 0.9) is None
    assert made.counts["rejected_age"] == 2 and made.status == "running"


@pytest.mark.parametrize(("silent", "code", "after"), [("wrist", "CAMERA_SILENT", 0.5), ("state", "STATE_SILENT", 0.1)])
def test_silence_of_a_camera_or_of_the_arm_is_a_fault(silent: str, code: str, after: float) -> None:
    made = supervisor()
    now = 0.0
    while made.poll(now, now) != "fault":
        now += 0.005
        for name in {"wrist", "state"} - {silent}:
            made.beat(name, now)
        assert now < 1.0
    assert made.fault is not None and made.fault.code == code and now == pytest.approx(after, abs=0.01)


@pytest.mark.parametrize("jump", [0.3, -0.3])
def test_a_jump_of_the_clock_disarms(jump: float) -> None:
    made = supervisor()
    made.poll(0.0, 100.0)
    assert made.poll(0.01, 100.01) == "running"
    assert made.poll(0.02 + jump, 100.02) == "fault"
    assert made.fault is not None and made.fault.code == "CLOCK_JUMP"


def test_a_joint_near_its_limit_is_a_fault() -> None:
    made = supervisor()
    made.check_joints(np.full(7, 2.59))
    assert made.status == "running"
    made.check_joints(np.array([0, 0, 0, -2.61, 0, 0, 0]))
    assert made.fault is not None and (made.fault.code, made.fault.field) == ("JOINT_MARGIN", "joint 4")
    other = supervisor()
    other.check_joints(np.array([0, np.nan, 0, 0, 0, 0, 0]))
    assert other.status == "fault"


def test_a_checkpoint_tightens_limits_and_never_loosens_them() -> None:
    limits = LIMITS.tightened(ACTION)
    assert limits.max_step_translation == 0.01 and limits.max_step_rotation == 0.05
    assert limits.workspace_low == LIMITS.workspace_low


def test_slew_follows_with_the_lag_that_it_says_and_comes_to_rest() -> None:
    curve, slew, dt = Curve(waypoints()), Slew(LIMITS, HOME, bandwidth=20.0, lead=0.5), 0.005
    for now in np.arange(0.0, 0.8, dt):
        reached = slew.follow(curve.at(now + dt), dt)
        if 0.33 < now < 0.35:  # 0.2 m/s for long enough
            assert reached.pose.position[0] == pytest.approx(curve.at(now + dt - 0.05).pose.position[0], abs=1.5e-3)
    assert np.allclose(slew.pose.position, curve.at(9).pose.position, atol=1e-4) and np.abs(slew.velocity).max() < 1e-2


@pytest.mark.parametrize("away", [(0.2, 0.1, 0.3), (0.0, -0.3, 0.0), (0.001, 0.0, 0.0)])
def test_slew_bounds_a_jump_and_arrives_without_overshoot(away: tuple[float, ...]) -> None:
    target = Pose(
        HOME.position + away, (Rotation.from_rotvec([0, 0, 1.0]) * Rotation.from_quat(HOME.rotation)).as_quat()
    )
    wanted, slew, dt = Reference(target, np.zeros(3), np.zeros(3), True), Slew(LIMITS, HOME), 0.005
    before, change, farthest = np.zeros(3), np.zeros(3), 0.0
    for _ in range(400):
        slew.follow(wanted, dt)
        assert np.linalg.norm(slew.velocity - before - change) <= 1.1 * LIMITS.max_jerk * dt**2 + 1e-9
        change = slew.velocity - before
        assert np.linalg.norm(slew.velocity) <= LIMITS.max_velocity + 1e-9
        assert np.linalg.norm(slew.velocity - before) <= LIMITS.max_acceleration * dt + 1e-9
        assert np.linalg.norm(slew.angular_velocity) <= LIMITS.max_angular_velocity + 1e-9
        before = slew.velocity
        way = np.array(away)
        farthest = max(farthest, float((slew.pose.position - HOME.position) @ way / np.linalg.norm(way)))
    assert farthest <= np.linalg.norm(away) + 2e-3
    assert np.allclose(slew.pose.position, target.position, atol=1e-4)


def test_brake_stops_within_the_way_that_the_bounds_allow() -> None:
    slew, dt, speed = Slew(LIMITS, HOME), 0.005, 0.6
    slew.velocity = np.array([speed, 0.0, 0.0])
    begun, before, change = slew.pose.position[0], slew.velocity, np.zeros(3)
    for _ in range(40):
        slew.brake(dt, True)
        assert np.linalg.norm(slew.velocity - before - change) <= LIMITS.brake_jerk * dt**2 + 1e-9
        before, change = slew.velocity, slew.velocity - before
    assert np.abs(slew.velocity).max() < 1e-9
    way = speed / 2 * (speed / LIMITS.brake_acceleration + LIMITS.brake_acceleration / LIMITS.brake_jerk)  # an S curve
    assert slew.pose.position[0] - begun == pytest.approx(way, abs=4e-3)
