"""The tabletop with a store's cameras and delays."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.latency import Signal, lag
from training.envs import tabletop_delays as delays
from training.envs.base import EpisodeRequest
from training.envs.tabletop import Tabletop, TabletopConfig
from training.envs.tabletop_render import mujoco
from vla.adapters import tabletop as adapter
from vla.rig import CameraCalibration, Delay, Intrinsics, Measured, Mount, RigError, Store, Transform, now

MEASURED = Measured(now(), "test", 15, 0.5)
SHIFT_M = 0.01  # of the camera to its right, over a pixel
FREQUENCY_HZ, STEP_S = 0.5, 0.05


def stored(motion_s: float, camera: str = "third_person") -> CameraCalibration:
    parent, pose = adapter.camera_pose(camera)
    x, y, z = pose.translation_m
    shifted = Transform((x, y + SHIFT_M, z), pose.rotation_xyzw)
    late = Delay(0.0, (0.0, 0.0), 0.03, (0.02, 0.04), motion_s, (motion_s, motion_s), MEASURED)
    lens = Intrinsics.from_fov(400, 400, 34.0)
    return CameraCalibration(camera, lens, MEASURED, Mount(parent, shifted, MEASURED), late)


def swing(env: Tabletop, seed: int, steps: int = 150) -> tuple[Signal, Signal]:
    """Where the tool was wanted and where it was while it swung sideways by 20 mm, as `vla calibrate latency` does."""
    env.reset(0, EpisodeRequest(seed))
    slot = env.slots[0]
    away = 0.02 * np.sin(2 * np.pi * FREQUENCY_HZ * STEP_S * np.arange(steps + 1))
    rows = []
    for step in np.diff(away):
        slot.control_step(adapter.command(np.array([0.0, step, 0.0, 0.0, 0.0, 0.0, 1.0])))
        rows.append((slot.data.time, slot.command_position[1], slot.data.site_xpos[slot._tool][1]))
    times, wanted, found = np.array(rows[20:]).T
    return Signal(times, wanted), Signal(times, found)


def test_a_store_places_the_cameras(tmp_path: Path) -> None:
    Store(tmp_path).write(stored(0.1))
    images = []
    for config in (TabletopConfig(), TabletopConfig(calibration=tmp_path)):
        env = Tabletop(1, config)
        env.reset(0, EpisodeRequest(3))
        images.append(env.observe([0])[0].images)
        contract = env.contract
        env.close()
    assert contract.cameras[0].pose == stored(0.1).mount.pose
    assert np.array_equal(images[0]["wrist"], images[1]["wrist"])
    before, after = (i["third_person"].astype(int) for i in images)
    assert not np.array_equal(before, after)
    # The camera went to the right by 1 cm: what it sees went to the left, by a little over a pixel.
    assert np.abs(before[:, 1:] - after[:, :-1]).mean() < np.abs(before - after).mean()


def test_a_store_of_other_proportions_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).write(replace(stored(0.1), intrinsics=Intrinsics.from_fov(640, 480, 34.0)))
    with pytest.raises(RigError, match="crop"):
        Tabletop(1, TabletopConfig(calibration=tmp_path))


@pytest.mark.parametrize("motion_s", [0.06, 0.12, 0.18])
def test_the_arm_is_as_late_as_measured(tmp_path: Path, motion_s: float) -> None:
    Store(tmp_path).write(stored(motion_s))
    env = Tabletop(1, TabletopConfig(calibration=tmp_path, delay_spread_s=0.0))
    assert env.contract.action.motion_s == pytest.approx(motion_s)
    found = lag(*swing(env, 3), FREQUENCY_HZ).seconds
    env.close()
    assert found == pytest.approx(motion_s, abs=0.004)


def test_without_a_store_the_contract_tells_the_mean_of_what_is_drawn() -> None:
    env = Tabletop(1)
    found = [lag(*swing(env, seed), FREQUENCY_HZ).seconds for seed in range(12)]
    env.close()
    assert env.contract.action.motion_s == pytest.approx(np.mean(found), abs=3 * np.std(found) / 12**0.5)
    assert np.std(found) > 0.008  # drawn


def test_delays_are_drawn_around_the_measured_ones() -> None:
    cameras = [stored(0.12), stored(0.14, "wrist")]
    drawn = [delays.draw(cameras, 0.02, np.random.default_rng(seed)) for seed in range(400)]
    arm = np.array([d.pieces * delays.PIECE_S + d.lag_s + delays.FIXED_S for d in drawn])
    assert abs(arm.mean() - 0.13) < 0.002 and arm.min() > 0.109 and arm.max() < 0.151 and np.ptp(arm) > 0.035
    assert len({d.pieces for d in drawn}) >= 5
    beside = np.array([[d.images[c.camera] - d.state for c in cameras] for d in drawn]) * delays.PIECE_S
    assert np.abs(beside.mean(0)).max() < 0.002 and np.abs(beside).max() == pytest.approx(0.02)
    assert abs(np.corrcoef(beside.T)[0, 1]) < 0.15  # each camera by itself
    assert all(min(*d.images.values(), d.state) == 0 for d in drawn)
    still = delays.draw(cameras, 0.0, np.random.default_rng(0))
    assert still.oldest == 0
    quick = delays.draw([stored(0.0)], 0.0, np.random.default_rng(0))  # quicker than this arm can be
    assert quick.pieces == 0 and quick.lag_s == pytest.approx(delays.DAMPED_S[0])


def test_an_old_image_shows_what_was_before(tmp_path: Path) -> None:
    Store(tmp_path).write(stored(0.1))
    env = Tabletop(1, TabletopConfig(calibration=tmp_path, delay_spread_s=0.0))
    env.reset(0, EpisodeRequest(3))
    slot, away = env.slots[0], np.array([0.02, 0.02, 0.0, 0.0, 0.0, 0.0, 1.0])
    for _ in range(4):
        slot.control_step(adapter.command(away))
    mujoco.mj_forward(slot.model, slot.data)  # a step leaves poses as they were before its last sub-step
    (before,) = env.observe([0])
    slot.past = delays.Past(delays.PIECES, slot.data.qpos)
    slot.late = delays.Delays(0, None, {"third_person": delays.PIECES}, delays.PIECES)  # older by a control step
    slot.control_step(adapter.command(away * [1, 1, 1, 1, 1, 1, 0]))  # closes the gripper, too
    (late,) = env.observe([0])
    slot.late = delays.Delays(0, None, {})
    (present,) = env.observe([0])
    env.close()
    for camera, old in (("third_person", True), ("wrist", False)):
        assert np.array_equal(late.images[camera], before.images[camera]) == old
    assert np.array_equal(late.images["wrist"], present.images["wrist"])
    for part in ("eef_position", "gripper_width"):
        assert np.allclose(late.state[part], before.state[part], atol=1e-9)
        assert not np.allclose(present.state[part], before.state[part], atol=1e-4)
    assert np.array_equal(late.state["commanded_position"], present.state["commanded_position"])
