"""The scene over a camera's image: where a calibrated camera sees it, and what is said where there is none."""

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from vla.errors import CodedError
from vla.rig import CameraCalibration, Intrinsics, Measured, Mount, Store, Transform
from vla.scene_picture import Viewpoint, draw, seen_from
from vla.tasks.put_on_plate import sample_episode
from vla.trial_protocol import View

NOMINAL = Viewpoint(View().position, View().rotation_xyzw, View().fov_y_deg)
POINTS = np.array([[0.45, 0.0, 0.0], [0.55, 0.15, 0.05], [0.40, -0.12, 0.02]])


def stored(folder: Path, lens: Intrinsics, parent: str = "base", days: float = 3.0) -> Path:
    made = (datetime.now(timezone.utc) - timedelta(days=days)).isoformat()
    found = Measured(made, "a test", 20, 0.2)
    pose = Transform((0.93, 0.01, 0.50), NOMINAL.rotation_xyzw)
    Store(folder).write(CameraCalibration("third_person", lens, found, Mount(parent, pose, found)))
    return folder


def test_a_calibrated_camera_is_taken_from_the_store(tmp_path: Path) -> None:
    lens = Intrinsics.from_fov(640, 480, 40.0)
    view = seen_from(NOMINAL, stored(tmp_path, lens), "third_person")
    assert view.position == (0.93, 0.01, 0.50) and view.said == "camera as calibrated, 3.0 days ago"
    # Without distortion it is a pinhole of the same field of view, at another place.
    pinhole = Viewpoint(view.position, view.rotation_xyzw, 40.0)
    assert np.allclose(view.project(POINTS, 640, 480), pinhole.project(POINTS, 640, 480), atol=1e-6)
    assert np.abs(view.project(POINTS, 640, 480) - NOMINAL.project(POINTS, 640, 480)).max() > 20
    assert np.allclose(view.project(POINTS, 320, 240), (view.project(POINTS, 640, 480) + 0.5) / 2 - 0.5)
    assert np.isnan(view.project(np.array([[2.0, 0.0, 0.5]]), 640, 480)).all()  # behind it


@pytest.mark.parametrize("model", ["pinhole", "fisheye"])
def test_the_lens_bends_what_is_drawn(tmp_path: Path, model: str) -> None:
    lens = Intrinsics.from_fov(640, 480, 40.0)
    bent = replace(lens, model=model, distortion=(-0.3, 0.0, 0.0, 0.0, 0.0)[: 5 if model == "pinhole" else 4])
    straight = seen_from(NOMINAL, stored(tmp_path / "a", lens), "third_person").project(POINTS, 640, 480)
    curved = seen_from(NOMINAL, stored(tmp_path / "b", bent), "third_person").project(POINTS, 640, 480)
    centre = np.array([lens.cx, lens.cy])
    away = np.linalg.norm(straight - centre, axis=1)
    assert (np.linalg.norm(curved - centre, axis=1)[away > 50] < away[away > 50] - 0.5).all()  # towards the middle


def test_without_a_pose_the_nominal_camera_is_said(tmp_path: Path) -> None:
    assert seen_from(NOMINAL, None, "third_person") is NOMINAL and "not calibrated" in NOMINAL.said
    store = stored(tmp_path / "rig", Intrinsics.from_fov(640, 480, 40.0), parent="tool")
    assert seen_from(NOMINAL, store, "third_person").said == "nominal camera: third_person moves with the tool"
    assert "has no calibration of left" in seen_from(NOMINAL, store, "left").said
    bare = replace(Store(store).read("third_person"), mount=None)
    Store(store).write(bare)
    assert seen_from(NOMINAL, store, "third_person").said.endswith("has no pose")


def test_the_picture_says_which_camera_it_was_drawn_for(tmp_path: Path) -> None:
    image, scene = np.zeros((480, 640, 3), np.uint8), sample_episode(95_001, "in_distribution")
    lens = Intrinsics.from_fov(640, 480, 34.0)
    view = seen_from(NOMINAL, stored(tmp_path, lens), "third_person")
    drawn, other = (np.asarray(draw(image, scene, each)) for each in (view, replace(view, said="")))
    corner = np.zeros((480, 640), bool)
    corner[450:, :420] = True
    assert (drawn != other).any(-1)[corner].any() and not (drawn != other).any(-1)[~corner].any()
    with pytest.raises(CodedError, match="CAMERA_SIZE"):
        draw(np.zeros((64, 64, 3), np.uint8), scene, view)  # another camera than was calibrated
