"""One store of cameras, three renderers: a known point is at the same pixel in the store's model and in each."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from calibration.alignment import point_error
from calibration.detection import View as Corners
from calibration.detection import detect
from calibration.rendering import corners, project
from calibration.rigid import inverse
from deployment import twin_board
from deployment.arm_geometry import ArmGeometry
from deployment.twin_view import View
from training.envs.base import EpisodeRequest
from training.envs.tabletop import NOMINAL_JOINTS, Tabletop, TabletopConfig
from training.envs.tabletop_render import mujoco
from vla.adapters.tabletop import CAMERAS, camera_pose
from vla.rig import CameraCalibration, Intrinsics, Measured, Mount, Store, Transform, now

SIZE, WITHIN_PX = 320, 1.0
MARKER_M = 0.003  # radius
MEASURED = Measured(now(), "test", 15, 0.3)
LENS = {  # pixels that aren't square, axes that are off the middle
    "third_person": Intrinsics("pinhole", 640, 640, 1010.0, 1040.0, 342.0, 301.0),
    "wrist": Intrinsics("pinhole", 640, 640, 430.0, 415.0, 300.0, 338.0),
}
POINTS = np.array([[x, y, z] for x in (0.45, 0.55) for y in (-0.07, 0.0, 0.06) for z in (0.02, 0.07)])  # m, in the base
required = os.environ.get("CI") == "true" and sys.version_info < (3, 13)  # as in pyproject.toml
needs_maniskill = pytest.mark.skipif(
    importlib.util.find_spec("mani_skill") is None and not required, reason="pip install 'simreal[maniskill]'"
)


def stored(camera: str) -> CameraCalibration:
    """Away from where the scene has it, and turned about all axes."""
    parent, pose = camera_pose(camera)
    moved = np.eye(4)
    moved[:3, :3] = Rotation.from_euler("xyz", [2.0, -3.0, 4.0], degrees=True).as_matrix()
    moved[:3, 3] = 0.012, -0.008, 0.015
    board = twin_board.pose("hand" if parent == "base" else "table", twin_board.SIZE)
    mount = Mount(parent, Transform.from_matrix(pose.matrix @ moved), MEASURED, board)
    return CameraCalibration(camera, LENS[camera], MEASURED, mount)


@pytest.fixture
def rig(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    for camera in CAMERAS:
        store.write(stored(camera))
    return store


def predicted(calibration: CameraCalibration, tool: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Pixels `[N, 2]` of points in the base, by the store alone. tool: its pose `[4, 4]` in the base."""
    mount = calibration.mount
    assert mount is not None
    there = mount.pose.matrix if mount.parent == "base" else tool @ mount.pose.matrix
    motion = inverse(there)
    return project(calibration.intrinsics.scaled(SIZE, SIZE), points @ motion[:3, :3].T + motion[:3, 3])


def centre(mask: np.ndarray) -> np.ndarray:
    """`[2]`, the middle of what is seen of a marker; NaN if it is not."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.mean(), rows.mean()]) if len(rows) else np.full(2, np.nan)


def compare(expected: np.ndarray, found: np.ndarray, least: int) -> None:
    inside = ((expected > 4) & (expected < SIZE - 5)).all(1) & np.isfinite(found).all(1)
    assert inside.sum() >= least, f"{inside.sum()} of {len(expected)} points are seen"
    assert np.linalg.norm(expected - found, axis=1)[inside].max() < WITHIN_PX


@pytest.mark.parametrize("camera", CAMERAS)
def test_the_tabletop(rig: Store, camera: str) -> None:
    env = Tabletop(1, TabletopConfig(image_size=SIZE, calibration=rig.folder))
    env.reset(0, EpisodeRequest(3))
    env.observe([0])  # makes the renderer
    slot, tool = env.slots[0], np.eye(4)
    model, data = slot.model, slot.data
    tool[:3, :3], tool[:3, 3] = data.site_xmat[slot._tool].reshape(3, 3), data.site_xpos[slot._tool]
    parts = np.flatnonzero(model.geom_bodyid == model.body("object0").id)
    model.geom_type[parts[0]], model.geom_size[parts[0]] = mujoco.mjtGeom.mjGEOM_SPHERE, MARKER_M
    model.geom_pos[parts[0]], model.geom_rgba[parts[1:], 3] = 0.0, 0.0
    drawn, told = [], []
    for point in POINTS:
        data.joint("object0_joint").qpos[:3] = point
        mujoco.mj_forward(model, data)
        assert env._renderer is not None
        drawn.append(centre(env._renderer.mask(model, data, camera, int(parts[0]))))
        told.append((slot.pixel(camera, point) + 1) / 2 * SIZE - 0.5)  # what the critic knows
    env.close()
    expected = predicted(rig.read(camera), tool, POINTS)
    compare(expected, np.array(drawn), 6)
    compare(expected, np.array(told), 6)


@pytest.mark.parametrize("camera", CAMERAS)
def test_the_twin(rig: Store, camera: str) -> None:
    calibration, joints = rig.read(camera), NOMINAL_JOINTS
    assert calibration.mount is not None and calibration.mount.board is not None
    pose = ArmGeometry().pose(joints)
    tool = Transform(tuple(pose.position), tuple(pose.rotation)).matrix
    chain = tool if camera == "third_person" else inverse(tool)
    motion = inverse(calibration.mount.pose.matrix) @ chain @ calibration.mount.board.matrix
    lens = calibration.intrinsics.scaled(480, 480)
    expected = corners(lens, twin_board.SIZE, motion, 0.0, np.random.default_rng(0), border=0.0)
    shown = CameraCalibration(camera, lens, MEASURED, calibration.mount)
    view = View(shown, "hand" if camera == "third_person" else "table", twin_board.SIZE)
    seen: Corners = detect(view.image(joints), twin_board.SIZE)
    view.close()
    error, count = point_error(seen, expected)
    assert count >= 12 and error < WITHIN_PX


@needs_maniskill
@pytest.mark.parametrize("camera", CAMERAS)
def test_maniskill(rig: Store, camera: str, rendering: Callable[..., Any]) -> None:
    env = rendering(robot="panda_wristcam", image_size=SIZE, calibration=str(rig.folder))
    env.reset(0, EpisodeRequest(3))
    told = next(c for c in env.contract.cameras if c.name == camera)
    mount = stored(camera).mount
    assert mount is not None and told.pose == mount.pose and told.parent == mount.parent
    native, name = env.slots[0].env, {"third_person": "base_camera", "wrist": "hand_camera"}[camera]
    base, grip = (pose.sp.to_transformation_matrix() for pose in (native.agent.robot.pose, native.agent.tcp.pose))
    assert np.linalg.norm(base[:3, 3]) > 0.1  # its world is not the robot's frame
    tool = inverse(base) @ grip
    points = POINTS + np.array([0.08, 0.0, 0.05])  # before the arm
    if camera == "wrist":
        points = tool[:3, 3] + POINTS - POINTS.mean(0) - [0.0, 0.0, 0.05]
    builder = native.scene.create_actor_builder()
    builder.add_sphere_visual(radius=MARKER_M)
    marker = builder.build_kinematic("marker")
    drawn = []
    for point in points:
        marker.set_pose(type(native.agent.tcp.pose.sp)((base @ [*point, 1.0])[:3].tolist()))
        native.scene.update_render()
        native._sensors[name].capture()
        seen = native._sensors[name].get_obs(rgb=False, depth=False, position=False, segmentation=True)
        drawn.append(centre(np.asarray(seen["segmentation"][0, ..., 0]) == int(marker.per_scene_id[0])))
    env.close()
    compare(predicted(rig.read(camera), tool, points), np.array(drawn), 6)
