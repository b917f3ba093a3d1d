"""The executor: what it drops, how smoothly chunks take over, and that it ends where the policy meant."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from deployment.executor import Executor, ExecutorConfig, Mode, integrate
from deployment.lead import lead
from deployment.reference import Curve, Pose, Reference
from vla.contract import ActionSemantics
from vla.errors import SimrealError
from vla.rig import Delay, Measured
from vla.types import ActionChunk

ACTION = ActionSemantics("delta_ee", "rotvec", "base", 0.02, 0.05, 20.0, 8)
HOME = Pose(np.array([0.5, 0.0, 0.2]), np.array([1.0, 0.0, 0.0, 0.0]))
STEP = 0.05


def chunk(stamp: float, seed: int | None = None, gripper: float = 1.0) -> ActionChunk:
    """Straight along x and turning about z, or a random walk."""
    actions = np.tile([0.01, 0.0, 0.0, 0.0, 0.0, 0.02, gripper], (8, 1))
    if seed is not None:
        actions[:, :6] = np.random.default_rng(seed).uniform(-1, 1, (8, 6)) * ([0.02] * 3 + [0.05] * 3)
    return ActionChunk(actions, stamp)


def executor(mode: Mode = "asynchronous", **options: float) -> Executor:
    return Executor(ACTION, HOME, True, 0.0, ExecutorConfig(mode, **options))


def give(made: Executor, what: ActionChunk, now: float) -> int:
    return made.accept(made.waypoints(what), now).dropped


def turn_between(a: Pose, b: Pose) -> np.ndarray:
    return (Rotation.from_quat(b.rotation) * Rotation.from_quat(a.rotation).inv()).as_rotvec()


def test_rows_whose_time_has_passed_are_dropped() -> None:
    made = executor()
    assert give(made, chunk(0.0), 0.001) == 0
    assert give(made, chunk(0.2), 0.32) == 2
    assert give(made, chunk(0.2), 0.299) == 1
    before = made.reference(1.0)
    late = made.accept(made.waypoints(chunk(0.3)), 0.75)
    assert (late.dropped, late.used, late.delay_s) == (8, False, pytest.approx(0.45))
    assert made.reference(1.0) is not before and np.array_equal(made.reference(1.0).pose.position, before.pose.position)


def test_a_chunk_ends_where_the_policy_meant_whatever_the_delay() -> None:
    for delay in (0.0, 0.06, 0.17, 0.33):
        made = executor()
        give(made, chunk(0.0, seed=3), delay)
        wanted = integrate(chunk(0.0, seed=3), HOME, STEP)
        for time, position, rotation in zip(wanted.times, wanted.positions, wanted.rotations, strict=True):
            if time >= delay + 0.15:  # taken over
                reached = made.reference(time).pose
                assert np.allclose(reached.position, position, atol=1e-9)
                assert np.linalg.norm(turn_between(reached, Pose(position, rotation))) < 1e-9
        end = made.reference(wanted.times[-1] + 1.0)
        assert np.allclose(end.pose.position, wanted.positions[-1]) and not end.velocity.any()


@pytest.mark.parametrize("seed", range(3))
def test_position_and_velocity_are_continuous_and_agree(seed: int) -> None:
    """Random chunks with random delays, so each takes over in full motion."""
    random, made = np.random.default_rng(seed), executor()
    arrivals = []
    for number, stamp in enumerate(np.arange(0.0, 2.0, 0.2)):
        arrivals.append((stamp + random.uniform(0.02, 0.3), stamp, number))
    arrivals.sort()
    newest = 0.0
    references: list[Reference] = []
    tick = 0.001
    times = np.arange(0.0, 2.6, tick)
    for now in times:
        while arrivals and arrivals[0][0] <= now:
            at, stamp, number = arrivals.pop(0)
            before = made.reference(at)
            dropped = give(made, chunk(stamp, seed=100 * seed + number), at)
            assert (dropped == 8) == (stamp < newest)  # overtaken by the answer to a later observation
            newest = max(newest, stamp)
            after = made.reference(at)
            assert np.allclose(before.pose.position, after.pose.position, atol=1e-9)
            assert np.linalg.norm(turn_between(before.pose, after.pose)) < 1e-9
            assert np.allclose(before.velocity, after.velocity, atol=1e-9)
            assert np.allclose(before.angular_velocity, after.angular_velocity, atol=1e-9)
        references.append(made.reference(now))
    position = np.array([r.pose.position for r in references])
    velocity = np.array([r.velocity for r in references])
    angular = np.array([r.angular_velocity for r in references])
    assert np.abs(np.diff(position, axis=0) / tick - (velocity[1:] + velocity[:-1]) / 2).max() < 1e-2
    turned = np.array([turn_between(a.pose, b.pose) for a, b in pairwise(references)])
    assert np.abs(turned / tick - (angular[1:] + angular[:-1]) / 2).max() < 4e-2
    assert np.abs(np.diff(velocity, axis=0)).max() < 0.1  # no jump: at most 100 m/s2 for a millisecond


def test_a_chunk_that_goes_on_with_the_motion_changes_nothing() -> None:
    """Answers to later observations of the same steady motion: the reference goes straight on."""
    made = executor()
    give(made, chunk(0.0), 0.0)
    for stamp, now in ((0.2, 0.29), (0.4, 0.49), (0.6, 0.69)):
        give(made, chunk(stamp), now)
    speeds = [made.reference_then(t).velocity for t in np.arange(0.2, 0.9, 0.01)]
    assert np.allclose(speeds, [0.2, 0.0, 0.0], atol=0.02)


def test_an_observation_is_answered_from_where_the_tool_was_to_be_then() -> None:
    made = executor()
    give(made, chunk(0.0), 0.0)
    give(made, chunk(0.2), 0.3)
    assert np.allclose(made.reference_then(0.25).pose.position, [0.55, 0, 0.2], atol=2e-3)
    anchor = made.waypoints(chunk(0.25)).anchor
    assert np.allclose(anchor.position, made.reference_then(0.25).pose.position)
    assert np.allclose(made.reference_then(-5.0).pose.position, HOME.position)


def test_the_next_chunk_is_asked_for_in_time_for_its_delay() -> None:
    made = executor(execute=6, delay_s=0.1)
    assert made.due() <= 0.0
    give(made, chunk(0.0), 0.02)
    assert made.due() > 0.19 and made.due() <= 0.21  # 6 rows end at 0.3
    for number in range(10):
        made.delay.add(0.2 + 0.001 * number)
    assert made.due() <= 0.1 and made.due() > 0.08


LATE_S = 0.08  # by which an arm moves later than the one in training


def test_a_late_arm_is_told_earlier_and_the_policy_sees_what_it_saw_in_training() -> None:
    """The same chunks: with a lead, everything the arm is told is earlier, and where the tool is wanted is the same."""
    made, leading = executor(), executor(lead_s=LATE_S)
    for stamp, seed, delay in ((0.0, 1, 0.03), (0.2, 2, 0.1), (0.4, 3, 0.07)):
        give(leading, chunk(stamp, seed), stamp + delay)
        give(made, chunk(stamp, seed), stamp + delay + LATE_S)
        for now in np.arange(stamp + delay, stamp + delay + 0.09, 0.01):
            told, wanted = leading.reference(now), made.reference(now + LATE_S)
            assert np.array_equal(told.pose.position, wanted.pose.position)
            assert np.array_equal(told.velocity, wanted.velocity)
    for time in np.arange(0.0, 0.5, 0.01):
        then, wanted = leading.reference_then(time), made.reference_then(time)
        assert np.array_equal(then.pose.position, wanted.pose.position)
    assert leading.waypoints(chunk(0.45)).anchor.position == pytest.approx(made.waypoints(chunk(0.45)).anchor.position)


def test_a_lead_drops_rows_that_can_not_be_told_in_time_and_asks_earlier() -> None:
    made, leading = executor(delay_s=0.1), executor(delay_s=0.1, lead_s=LATE_S)
    assert give(made, chunk(0.0), 0.06) == 1 and give(leading, chunk(0.0), 0.06) == 2
    assert leading.due() == pytest.approx(made.due() - LATE_S)
    late = leading.accept(leading.waypoints(chunk(0.05)), 0.38)  # its last row, 0.45, should have been told
    assert not late.used and made.accept(made.waypoints(chunk(0.05)), 0.38).used


def test_a_lead_does_not_close_the_gripper_before_the_arm_is_there() -> None:
    actions = chunk(0.0).actions.copy()
    actions[3:, 6] = 0.0
    made = executor(lead_s=LATE_S)
    give(made, ActionChunk(actions, 0.0), 0.04)
    assert made.reference(0.149).gripper_open and not made.reference(0.151).gripper_open


def test_a_lead_is_for_chunks_that_are_placed_in_time() -> None:
    for mode in ("plain", "synchronous"):
        made, leading = executor(mode), executor(mode, lead_s=LATE_S)
        for one in (made, leading):
            give(one, chunk(0.0), 0.1)
        assert np.array_equal(made.reference(0.3).pose.position, leading.reference(0.3).pose.position)
        assert made.due() == leading.due()
    with pytest.raises(ValueError, match="0 or more"):
        executor(lead_s=-0.01)


def test_the_lead_is_what_the_arm_is_later_than_in_training() -> None:
    measured = Measured("2026-01-01T00:00:00+00:00", "test", 100, 0.0)
    late = Delay(0.0, (0.0, 0.0), 0.0, (0.0, 0.0), 0.12, (0.11, 0.13), measured)
    trained = replace(ACTION, motion_s=0.07)
    assert lead(trained, late).seconds == pytest.approx(0.05) and "120 ms" in lead(trained, late).text
    assert lead(replace(ACTION, motion_s=0.15), late).seconds == 0.0  # an arm that is early waits
    assert lead(trained, None).seconds == 0.0 and "vla calibrate latency" in lead(trained, None).text
    assert lead(ACTION, late).seconds == 0.0 and "does not say" in lead(ACTION, late).text
    with pytest.raises(SimrealError, match="400 ms after a command") as caught:
        lead(trained, replace(late, motion_s=0.4))
    assert caught.value.code == "MOTION_DELAY"


def test_plain_chunks_begin_on_arrival_with_their_first_row() -> None:
    made = executor("plain")
    give(made, chunk(0.0), 0.1)
    start = made.reference(0.1).pose.position
    assert np.allclose(made.reference(0.5).pose.position, start + np.array([0.08, 0, 0]))
    give(made, chunk(0.2), 0.5)  # answers an older observation, and is executed from here on
    assert np.allclose(made.reference(0.9).pose.position, start + np.array([0.16, 0, 0]))


def test_synchronous_chunks_wait_for_the_end_of_the_one_before() -> None:
    made = executor("synchronous")
    give(made, chunk(0.0), 0.08)
    assert made.due() > 0.47 and made.due() <= 0.481
    assert not made.reference(0.49).velocity.any()


def test_the_gripper_closes_with_its_row() -> None:
    actions = chunk(0.0).actions.copy()
    actions[3:, 6] = 0.0
    made = executor()
    give(made, ActionChunk(actions, 0.0), 0.04)
    assert made.reference(0.149).gripper_open and not made.reference(0.151).gripper_open
    assert not made.reference(9.0).gripper_open


def test_the_tool_waits_for_the_gripper_and_the_next_chunk_waits_with_it() -> None:
    actions = chunk(0.0).actions.copy()
    actions[3:6, 6] = 0.0  # closes at 0.15 s, opens three rows later
    made, waiting = executor(dwell_s=0.0, delay_s=0.1), executor(dwell_s=0.4, delay_s=0.1)
    for one in (made, waiting):
        give(one, ActionChunk(actions, 0.0), 0.0)
    assert waiting.due() == pytest.approx(made.due() + 0.4)
    for time in (0.05, 0.1, 0.15):
        assert np.allclose(waiting.reference(time).pose.position, made.reference(time).pose.position, atol=1e-3)
    for time in (0.16, 0.3, 0.54):
        held = waiting.reference(time)
        assert not held.gripper_open and np.allclose(
            held.pose.position, HOME.position + np.array([0.03, 0, 0]), atol=1e-9
        )
        assert np.linalg.norm(held.velocity) < 1e-9
    assert waiting.reference(0.72).gripper_open and not made.reference(0.29).gripper_open
    assert np.allclose(waiting.reference(2.0).pose.position, made.reference(2.0).pose.position)

    after = chunk(0.6, gripper=0.0)  # the gripper was told to close before this was seen: no second pause
    give(waiting, after, 0.65)
    way = waiting.reference(9.0).pose.position - waiting.reference_then(0.6).pose.position
    assert np.allclose(way, [0.08, 0, 0])
    assert waiting.due() == pytest.approx(0.6 + 6 * STEP - 0.1, abs=0.06)


def test_hold_forgets_everything() -> None:
    made = executor()
    give(made, chunk(0.0), 0.0)
    made.hold(HOME, False, 0.2)
    held = made.reference(0.3)
    assert np.array_equal(held.pose.position, HOME.position)
    assert not held.velocity.any() and not held.gripper_open


def test_a_curve_does_not_overshoot_its_waypoints() -> None:
    wild = integrate(chunk(0.0, seed=7), HOME, STEP)
    wild = replace(wild, positions=np.array([[0.5 + 0.1 * (k % 2), 0.0, 0.2] for k in range(8)]))
    x = [Curve(wild).at(t).pose.position[0] for t in np.arange(0, 0.4, 0.001)]
    assert min(x) > 0.5 - 1e-9 and max(x) < 0.6 + 1e-9
