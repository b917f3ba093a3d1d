"""Intrinsics and coverage against known cameras."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from calibration import coverage, intrinsics, rendering
from calibration.detection import View, detect
from calibration.intrinsics import IntrinsicsError
from vla.rig import BoardSize, Intrinsics

PINHOLE = Intrinsics("pinhole", 640, 480, 600.0, 602.0, 322.0, 238.0, (0.08, -0.15, 0.001, -0.0005, 0.0))
FISHEYE = Intrinsics("fisheye", 640, 480, 300.0, 301.0, 322.0, 238.0, (0.05, -0.01, 0.002, -0.001))
BOARD = BoardSize()
SIZE = (640, 480)
Views = Callable[..., list[View]]


@pytest.fixture
def views() -> Views:
    """views(camera, count, seed, tilt): corners with 0.3 px of noise, of boards that fill most of the image."""

    def make(camera: Intrinsics = PINHOLE, count: int = 30, seed: int = 0, tilt: float = 35.0) -> list[View]:
        rng, found = np.random.default_rng(seed), []
        while len(found) < count:
            angle, lean = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.2) * tilt
            near = camera.fx / 600 * rng.uniform(0.17, 0.26)
            middle = (rng.uniform(160, 480), rng.uniform(120, 360))
            tilts = (lean * np.cos(angle), lean * np.sin(angle))
            pose = rendering.look_at(near, tilts, rng.uniform(-180, 180), middle, camera, BOARD)
            view = rendering.corners(camera, BOARD, pose, 0.3, rng)
            if len(view) >= 12:
                found.append(view)
        return found

    return make


@pytest.mark.parametrize("camera", [PINHOLE, FISHEYE])
def test_a_known_camera_is_found_and_its_error_told(views: Views, camera: Intrinsics) -> None:
    found = intrinsics.calibrate(views(camera, 40), BOARD, SIZE, camera.model)
    got = found.intrinsics
    assert got.fx == pytest.approx(camera.fx, rel=4e-3) and got.fy == pytest.approx(camera.fy, rel=4e-3)
    assert abs(got.cx - camera.cx) < 1.6 and abs(got.cy - camera.cy) < 1.6
    for value, truth, sigma in zip((got.fx, got.fy, got.cx, got.cy), (camera.fx, camera.fy, camera.cx, camera.cy),
                                   found.sigma, strict=True):  # fmt: skip
        assert abs(value - truth) < 4 * sigma
    assert found.train_px == pytest.approx(0.42, abs=0.05) and found.test_px == pytest.approx(0.45, abs=0.08)


def test_a_lens_is_taken_for_an_ordinary_one_as_far_as_the_views_say_nothing_else(views: Views) -> None:
    """Tangential distortion: found from tilted boards; of those that hardly tilt no large one is made up."""
    found = intrinsics.calibrate(views(count=40), BOARD, SIZE).intrinsics.distortion
    assert found[2] == pytest.approx(0.001, abs=4e-4) and found[3] == pytest.approx(-0.0005, abs=4e-4)
    plain = replace(PINHOLE, distortion=(0.08, -0.15, 0.0, 0.0, 0.0))
    got = intrinsics.calibrate(views(plain, 12, tilt=14.0), BOARD, SIZE).intrinsics
    assert np.abs(got.distortion[2:4]).max() < 3e-4 and np.hypot(got.cx - plain.cx, got.cy - plain.cy) < 4.0


def test_views_and_corners_that_do_not_fit_are_left_out(views: Views) -> None:
    taken = views(count=25)
    rng = np.random.default_rng(3)
    taken[3] = View(taken[3].ids, taken[3].corners + rng.normal(0, 4.0, taken[3].corners.shape))  # a bent board
    spoiled = taken[7].corners.copy()
    spoiled[0] += 15.0
    taken[7] = View(taken[7].ids, spoiled)
    found = intrinsics.calibrate(taken, BOARD, SIZE)
    assert 3 in found.left_out and 3 not in found.used and found.corners_left_out >= 1
    assert found.intrinsics.fx == pytest.approx(PINHOLE.fx, rel=6e-3)


def test_too_few_views_and_parallel_boards_are_refused(views: Views) -> None:
    with pytest.raises(IntrinsicsError, match="TOO_FEW_VIEWS"):
        intrinsics.calibrate(views(count=5), BOARD, SIZE)
    with pytest.raises(IntrinsicsError, match="NO_TILT"):
        intrinsics.calibrate(views(count=12, tilt=1.0), BOARD, SIZE)


def test_a_board_of_other_squares_shows_in_the_views(views: Views) -> None:
    rng = np.random.default_rng(0)
    taken = [View(v.ids, v.corners + rng.normal(0, 30.0, v.corners.shape)) for v in views(count=12)]
    found = intrinsics.calibrate(taken, BOARD, SIZE)  # nothing fits: the error says so
    assert found.test_px > 10.0


def test_coverage_names_what_is_missing_until_nothing_is(views: Views) -> None:
    nothing = coverage.cover([], BOARD, SIZE)
    assert not nothing.complete and len(nothing.missing) == 24
    rng = np.random.default_rng(1)
    poses = [rendering.look_at(0.4, (5.0, 5.0), 0.0, (x, y), PINHOLE, BOARD) for x in (80, 160) for y in (90, 240, 390)]
    left = coverage.cover([rendering.corners(PINHOLE, BOARD, pose, 0.3, rng) for pose in poses], BOARD, SIZE)
    assert left.missing and all(column >= 3 for _, column in left.missing) and "right" in left.advice()[0]
    assert any("tilt" in advice for advice in left.advice())
    rng, everywhere = np.random.default_rng(2), views(count=40, seed=6)
    for x in (60, 230, 410, 590):
        for y in (50, 180, 300, 440):
            pose = rendering.look_at(0.45, tuple(rng.uniform(-30, 30, 2)), 0.0, (x, y), PINHOLE, BOARD)
            everywhere.append(rendering.corners(PINHOLE, BOARD, pose, 0.3, rng))
    done = coverage.cover(everywhere, BOARD, SIZE)
    assert done.complete, done.advice()


def test_the_picture_of_the_coverage_is_green_where_views_are() -> None:
    rng = np.random.default_rng(0)
    pose = rendering.look_at(0.5, (20.0, 0.0), 0.0, (150.0, 120.0), PINHOLE, BOARD)
    image = rendering.render(PINHOLE, BOARD, pose, rng)
    view = detect(image, BOARD)
    shown = coverage.draw(image, [view], coverage.cover([view], BOARD, SIZE), view)
    assert shown.shape == (480, 640, 3)
    right, left = shown[200:400, 560:].mean((0, 1)), shown[130:200, 120:200].mean((0, 1))
    assert right[0] > right[1] + 10 and left[1] > left[0] + 10


def test_intrinsics_scale_with_the_image() -> None:
    half = PINHOLE.scaled(320, 240)
    points = np.array([[0.05, -0.02, 0.4], [-0.1, 0.05, 0.6]])
    whole = rendering.project(PINHOLE, points)
    assert np.allclose((whole + 0.5) / 2 - 0.5, rendering.project(half, points))
    assert half.fov_y_deg == pytest.approx(PINHOLE.fov_y_deg)
    with pytest.raises(Exception, match="CAMERA_SIZE"):
        PINHOLE.scaled(64, 64)
    assert replace(PINHOLE, distortion=()).coefficients.shape == (5,)
