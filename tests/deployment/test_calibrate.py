"""`vla calibrate` from the first view to the check, on the twin's images of an arm that is where it is told to be.

No driver, no ROS, no clock: poses, images, detection, mathematics and store are the real ones. Through ROS and the
driver the same is in tests/e2e/test_calibrate.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deployment import calibrate, twin_board
from deployment.arm_geometry import ArmGeometry
from deployment.calibrate import CalibrateConfig
from deployment.calibration_poses import Way
from deployment.calibration_run import Motion
from deployment.franka import ArmConfig
from deployment.kinematics import InverseKinematics
from deployment.reference import Pose, Reference
from deployment.twin_view import View
from vla.adapters.tabletop import CAMERAS, THIRD_PERSON_FOV_Y_DEG, WRIST_FOV_Y_DEG, camera_pose
from vla.rig import CameraCalibration, Intrinsics, Measured, Mount, Store, Transform, now

LENS = {
    "third_person": Intrinsics.from_fov(400, 400, THIRD_PERSON_FOV_Y_DEG),
    "wrist": Intrinsics.from_fov(400, 400, WRIST_FOV_Y_DEG),
}
TICK = 0.1  # s, on the way to a pose
CAPTURE_S, ARRIVAL_S, MOTION_S = 0.031, 0.094, 0.072  # injected
MEASURED = Measured(now(), "truth", 15, 0.3)


def truth(camera: str, turn_deg: float = 0.0) -> CameraCalibration:
    """What a perfect calibration finds; the camera turned about its own y axis."""
    parent, pose = camera_pose(camera)
    c, s = np.cos(np.deg2rad(turn_deg)), np.sin(np.deg2rad(turn_deg))
    turn = np.eye(4)
    turn[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    board = twin_board.pose("hand" if parent == "base" else "table", twin_board.SIZE)
    mount = Mount(parent, Transform.from_matrix(pose.matrix @ turn), MEASURED, board)
    return CameraCalibration(camera, LENS[camera], MEASURED, mount, None, "", twin_board.SIZE)


class Model:
    """Meets `deployment.calibration_run.Station`: the arm is where it is told to be, at once."""

    def __init__(self, camera: str, robot: ArmConfig):
        self._arm, self._joints, self._limits = ArmGeometry(), np.array(robot.home), robot.limits
        self._home, self._noise = np.array(robot.home), np.random.default_rng(0)
        self._view = View(truth(camera), "hand" if camera == "third_person" else "table", twin_board.SIZE)
        self._stamp = 0.0

    def close(self) -> None:
        self._view.close()

    def look(self) -> tuple[float, np.ndarray]:
        self._stamp += 0.1
        noisy = self._view.image(self._joints) + self._noise.normal(0.0, 1.0, (400, 400, 3))
        return self._stamp, np.clip(noisy + 0.5, 0, 255).astype(np.uint8)

    def tool(self, stamp: float) -> np.ndarray:
        pose = self._arm.pose(self._joints)
        return Transform(tuple(pose.position), tuple(pose.rotation)).matrix

    def joints(self) -> np.ndarray:
        return self._joints

    def go(self, pose: Pose) -> None:
        way = Way(self._arm.pose(self._joints), pose)
        bounds = np.array(self._limits.joint_lower), np.array(self._limits.joint_upper)
        solver = InverseKinematics(self._arm, self._joints, self._home, *bounds)
        for time in np.arange(0.0, way.seconds + 5 * TICK, TICK):
            solver.follow(Reference(way.at(time), np.zeros(3), np.zeros(3), True), TICK)
        self._joints = solver.joints

    def shake(self, seconds: float, frequency_hz: float, amplitude_m: float) -> Motion:
        centre, times = self._arm.pose(self._joints), np.arange(0.0, seconds, 0.01)

        def where(time: float) -> np.ndarray:
            away = amplitude_m * np.sin(2 * np.pi * frequency_hz * time)
            return centre.position + np.array([0.0, away, 0.0])

        frames = []
        for time in np.arange(0.0, seconds, 0.25):
            self.go(Pose(where(time - MOTION_S), centre.rotation))
            frames.append((time + CAPTURE_S, time + ARRIVAL_S, self.look()[1]))
        wanted = np.array([where(t) for t in times])
        moved = np.array([where(t - MOTION_S) for t in times])
        return Motion((times, wanted), (times, moved), frames)


class Bench:
    """A store, and the steps on it."""

    def __init__(self, folder: Path, camera: str, robot: ArmConfig):
        self.store, self.camera, self._robot = Store(folder), camera, robot

    def run(self, what: calibrate.What, **options: int) -> int:
        config = CalibrateConfig(what, store=self.store.folder, camera=self.camera, use_sim=True, **options)

        @contextmanager
        def station(_: CalibrateConfig) -> Iterator[Model]:
            made = Model(self.camera, self._robot)
            yield made
            made.close()

        return calibrate.run(config, station)

    def picture(self, name: str) -> np.ndarray:
        return np.asarray(Image.open(self.store.folder / self.camera / name))


@pytest.fixture(params=CAMERAS)
def bench(request: pytest.FixtureRequest, tmp_path: Path, robot: ArmConfig) -> Bench:
    return Bench(tmp_path, request.param, robot)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_lens_and_pose_are_found(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    camera, true = bench.camera, truth(bench.camera)
    assert bench.run("intrinsics", views=14) == 0
    lens = bench.store.read(camera).intrinsics
    assert lens.fx == pytest.approx(true.intrinsics.fx, rel=0.01) and abs(lens.cx - true.intrinsics.cx) < 3
    assert bench.run("handeye", views=12) == 0, capsys.readouterr().out
    mount = bench.store.read(camera).mount
    assert mount is not None and true.mount is not None and mount.parent == true.mount.parent
    metres, degrees = mount.pose.distance(true.mount.pose)
    assert metres < 2e-3 and degrees < 0.2
    assert bench.picture("intrinsics/views.png").shape[1] == bench.picture("handeye/views.png").shape[1]
    for step in ("intrinsics", "handeye"):
        assert np.ptp(bench.picture(f"{step}/residuals.png")) > 100


@pytest.mark.slow
def test_a_check_passes_where_the_camera_stands_and_fails_if_it_is_turned_by_three_degrees(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.store.write(truth(bench.camera))
    assert bench.run("check") == 0 and "passed (good)" in capsys.readouterr().out
    bench.store.write(truth(bench.camera, 3.0))
    assert bench.run("check") == 1
    told = capsys.readouterr().out
    assert "FAILED (camera_moved)" in told and "3.0 deg" in told and "vla calibrate handeye" in told


@pytest.mark.slow
def test_the_simulator_lies_on_the_images_and_a_turned_one_does_not(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = []
    for turn_deg in (0.0, 3.0):
        bench.store.write(truth(bench.camera, turn_deg))
        assert bench.run("align") == 0
        words = capsys.readouterr().out.split()
        scores.append((float(words[words.index("IoU") + 1].strip(";")), float(words[words.index("points") + 1])))
    (overlap, points), (turned, away) = scores
    assert overlap > 0.95 and points < 0.5 and turned < overlap - 0.05
    assert not away < 5  # px; NaN: the board has left the image
    assert bench.picture("align/align.png").shape == (400, 1200, 3)


@pytest.mark.slow
def test_injected_delays_are_measured_within_5_ms(tmp_path: Path, robot: ArmConfig) -> None:
    bench = Bench(tmp_path, "third_person", robot)
    bench.store.write(truth("third_person"))
    assert bench.run("latency", seconds=8) == 0
    delay = bench.store.read("third_person").delay
    assert delay is not None
    for found, true in ((delay.capture_s, CAPTURE_S), (delay.arrival_s, ARRIVAL_S), (delay.motion_s, MOTION_S)):
        assert abs(found - true) < 5e-3
