"""Hand-eye calibration: the closed forms against OpenCV's, the refinement against the truth, and the diagnosis."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration import closed_form, diagnosis, handeye, scenes
from calibration.detection import View
from calibration.diagnosis import diagnose
from calibration.rigid import distance, exponential, inverse, logarithm
from calibration.samples import HandEyeError, Mode, prepare
from vla.rig import Transform

DATA = Path(__file__).parent / "data" / "hand_eye_opencv.json"  # made with OpenCV 4.14


@pytest.mark.parametrize("name", closed_form.METHODS)
def test_the_closed_forms_are_those_of_opencv(name: str) -> None:
    for given in json.loads(DATA.read_text())["sets"]:
        hand, board = np.array(given["hand"]), np.array(given["board"])
        found = closed_form.METHODS[name](*closed_form.pairs(hand, board))
        assert np.abs(found - np.array(given["found"][name])).max() < 1e-9


@pytest.mark.parametrize("mode", ["eye_to_hand", "eye_in_hand"])
def test_a_camera_is_found_to_a_millimetre(mode: Mode) -> None:
    errors, z = [], []
    for seed in range(6):
        rng = np.random.default_rng([seed, 9])
        scene = scenes.make(rng, mode)
        seen = prepare(scene.samples, scene.intrinsics, scene.size, mode)
        found = handeye.calibrate(seen, rng=rng)
        errors.append(distance(found.camera, scene.camera))
        z.append(logarithm(inverse(found.camera) @ scene.camera) / found.sigma)
        assert found.held_out_px < 2.0 and found.held_out_mm < 2.0 and set(found.methods) == set(closed_form.METHODS)
    metres, degrees = np.median(errors, axis=0)
    assert metres < 1e-3 and degrees < 0.1
    assert 0.5 < np.sqrt(np.mean(np.square(z))) < 1.7  # the errors are as large as it says
    assert np.allclose(handeye.base_offset(found, found.board), np.eye(4))


@pytest.mark.parametrize("mode", ["eye_to_hand", "eye_in_hand"])
def test_what_the_lens_is_uncertain_by_is_in_the_doubt_about_the_pose(mode: Mode) -> None:
    off, z, z_without = (1.5, 1.5, 3.0, 3.0), [], []
    for seed in range(8):
        rng = np.random.default_rng([seed, 10])
        scene = scenes.make(rng, mode)
        true = scene.intrinsics
        fx, fy, cx, cy = np.array([true.fx, true.fy, true.cx, true.cy]) + rng.normal(0, off)
        lens = replace(true, fx=fx, fy=fy, cx=cx, cy=cy)
        found = handeye.calibrate(prepare(scene.samples, lens, scene.size, mode), rng=rng)
        doubt = handeye.lens_doubt(scene.samples, lens, off, scene.size, mode, found)
        error = logarithm(inverse(found.camera) @ scene.camera)
        z.append(error / np.hypot(found.sigma, doubt))
        z_without.append(error / found.sigma)
    assert 0.5 < np.sqrt(np.mean(np.square(z))) < 1.7 < np.sqrt(np.mean(np.square(z_without)))


def test_without_noise_the_truth_is_found_and_a_wrong_scale_too() -> None:
    rng, still = np.random.default_rng(0), handeye.RobotNoise(1e-9, 1e-9)
    scene = scenes.make(rng, pixel_noise=1e-4, noise=still, scale=1.02)
    seen = prepare(scene.samples, scene.intrinsics, scene.size, "eye_to_hand")
    found = handeye.calibrate(seen, with_scale=True)
    assert found.scale == pytest.approx(1.02, abs=1e-5)
    assert distance(found.camera, scene.camera)[0] < 1e-5


def test_an_outlier_counts_nothing() -> None:
    scene, _ = scenes.faulty("outlier", np.random.default_rng(4))
    seen = prepare(scene.samples, scene.intrinsics, scene.size, "eye_to_hand")
    found = handeye.calibrate(seen)
    assert (found.weights == 0).sum() == 1 and distance(found.camera, scene.camera)[0] < 3e-3


@pytest.mark.parametrize("mode", ["eye_to_hand", "eye_in_hand"])
@pytest.mark.parametrize("kind", scenes.FAULTS)
def test_a_bad_set_gets_the_right_diagnosis(kind: str, mode: Mode) -> None:
    for seed in range(2):
        scene, expected = scenes.faulty(kind, np.random.default_rng([seed, 8]), mode)
        told = diagnose(scene.samples, scene.intrinsics, scene.size, mode, expected=Transform.from_matrix(expected))
        assert told.kind == kind, told.text
        assert kind == "good" or told.remedy


def test_a_slipped_board_stale_poses_and_a_swapped_camera_are_told() -> None:
    rng = np.random.default_rng(3)
    slipped = scenes.make(rng, board_moves=(7, exponential(np.array([0.0, 0.02, 0.01, 0.004, 0.003, 0.0]))))
    told = diagnose(slipped.samples, slipped.intrinsics, slipped.size, "eye_to_hand")
    assert told.kind == "board_slipped" and told.views[0] == 7
    scene = scenes.make(rng, count=16)
    stale = [replace(a, tool=b.tool) for a, b in zip(scene.samples[1:], scene.samples, strict=False)]
    assert diagnose(stale, scene.intrinsics, scene.size, "eye_to_hand").kind == "stale"
    other = scenes.make(rng, "eye_in_hand", count=16)
    assert diagnose(other.samples, other.intrinsics, other.size, "eye_to_hand").kind == "mode"
    loose = scenes.make(rng, noise=handeye.RobotNoise(2e-3, np.deg2rad(0.5)))
    assert diagnose(loose.samples, loose.intrinsics, loose.size, "eye_to_hand").kind == "noisy"


def test_too_few_poses_and_views_of_another_camera_are_refused() -> None:
    scene = scenes.make(np.random.default_rng(0))
    with pytest.raises(HandEyeError, match="TOO_FEW_POSES"):
        prepare(scene.samples[:4], scene.intrinsics, scene.size, "eye_to_hand")
    wavy = 12 * np.sin(np.arange(48.0))[:, None]
    bent = [replace(s, view=View(s.view.ids, s.view.corners + wavy[s.view.ids])) for s in scene.samples]
    with pytest.raises(HandEyeError, match="VIEW_MISFIT"):
        prepare(bent, scene.intrinsics, scene.size, "eye_to_hand")


def test_rotation_spread_is_measured_about_two_axes() -> None:
    planar = scenes.make(np.random.default_rng(1), planar=True)
    seen = prepare(planar.samples, planar.intrinsics, planar.size, "eye_to_hand")
    first, second = diagnosis.rotation_spread(seen)
    assert first > 15 and second < 1
