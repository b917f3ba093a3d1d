"""Calibration of the twin through rclpy and franky, against its exact truth; and a policy's view of a moved camera."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deployment import twin_board
from vla.adapters.tabletop import CAMERAS, THIRD_PERSON_FOV_Y_DEG, WRIST_FOV_Y_DEG, camera_pose
from vla.rig import CameraCalibration, Intrinsics, Measured, Mount, Store, Transform, now

FOV = {"third_person": THIRD_PERSON_FOV_Y_DEG, "wrist": WRIST_FOV_Y_DEG}


@pytest.fixture(autouse=True)
def own_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from whatever else runs on this machine."""
    monkeypatch.setenv("ROS_DOMAIN_ID", str(100 + os.getpid() % 100))


def vla(*words: str, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vla", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def truth(camera: str, turn_deg: float = 0.0) -> CameraCalibration:
    """What a perfect calibration would find; the camera turned about its own y axis."""
    parent, pose = camera_pose(camera)
    turn = np.eye(4)
    c, s = np.cos(np.deg2rad(turn_deg)), np.sin(np.deg2rad(turn_deg))
    turn[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    measured = Measured(now(), "truth", 15, 0.3)
    board = twin_board.pose("hand" if parent == "base" else "table", twin_board.SIZE)
    mount = Mount(parent, Transform.from_matrix(pose.matrix @ turn), measured, board)
    lens = Intrinsics.from_fov(400, 400, FOV[camera])
    return CameraCalibration(camera, lens, measured, mount, None, "", twin_board.SIZE)


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("camera", CAMERAS)
def test_a_camera_of_the_twin_is_found_checked_and_aligned(tmp_path: Path, camera: str) -> None:
    common = (f"camera={camera}", f"store={tmp_path}", "use_sim=true")
    store = Store(tmp_path)
    done = vla("calibrate", "intrinsics", *common, "views=20", seconds=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lens, true = store.read(camera).intrinsics, Intrinsics.from_fov(400, 400, FOV[camera])
    assert lens.fx == pytest.approx(true.fx, rel=0.01) and abs(lens.cx - true.cx) < 3
    done = vla("calibrate", "handeye", *common, seconds=600)
    assert done.returncode == 0 and "good:" in done.stdout, done.stdout + done.stderr
    found, (_, pose) = store.read(camera).mount, camera_pose(camera)
    assert found is not None
    metres, degrees = found.pose.distance(pose)
    assert metres < 2e-3 and degrees < 0.2
    done = vla("calibrate", "check", *common, seconds=300)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
    done = vla("calibrate", "align", *common, seconds=300)
    assert done.returncode == 0 and (tmp_path / camera / "align/align.png").is_file(), done.stdout + done.stderr
    points = re.search(r"known points ([\d.]+) px", done.stdout)
    assert points is not None and float(points.group(1)) < 1.0
    turned = truth(camera, 3.0)
    store.write(turned)
    done = vla("calibrate", "check", *common, seconds=300)
    assert done.returncode == 1 and "camera_moved" in done.stdout, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_injected_delay_is_measured(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(truth("third_person"))
    done = vla("calibrate", "latency", f"store={tmp_path}", "use_sim=true", "delay_s=0.15", seconds=400)
    assert done.returncode == 0, done.stdout + done.stderr
    delay = store.read("third_person").delay
    assert delay is not None and abs(delay.arrival_s - delay.capture_s - 0.15) < 5e-3
    assert delay.arrival_95[0] < delay.arrival_s < delay.arrival_95[1]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_policy_refuses_a_camera_that_has_moved_and_takes_one_that_has_not(tmp_path: Path, bundle: Path) -> None:
    store = Store(tmp_path / "rig")
    store.write(truth("wrist"))
    store.write(truth("third_person", 3.0))
    words = (f"checkpoint={bundle}", "use_sim=true", f"logs={tmp_path}", f"calibration={store.folder}")
    done = vla("deploy", *words, seconds=400)
    told = (tmp_path / "policy_node.log").read_text()
    assert done.returncode == 2 and "CAMERA_POSE" in told and "3.0 deg" in told and "Traceback" not in told
    store.write(truth("third_person"))
    out = tmp_path / "trial.json"
    done = vla("deploy", *words, "trials=1", "trial_s=1", f"out={out}", seconds=400)
    assert done.returncode == 0 and out.is_file(), done.stdout + done.stderr
