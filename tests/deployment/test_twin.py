"""The driver against the twin: real franky, real franky-sim, in processes of their own."""

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from threading import Thread

import numpy as np
import pytest

from deployment.franka import ArmConfig, ArmError, FrankaArm
from deployment.reference import Pose, Reference
from deployment.twin import CameraOptions, Frame, TwinConfig, TwinProcess
from vla.errors import SimrealError
from vla.tasks.put_on_plate import sample_episode

TICK = 0.005


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return []


@pytest.fixture(scope="module")
def twin(frames: list[Frame]) -> Iterator[TwinProcess]:
    made = TwinProcess(TwinConfig(CameraOptions(noise=0.0)), frames.append)
    yield made
    made.stop()


@pytest.fixture
def arm(twin: TwinProcess, robot: ArmConfig) -> Iterator[FrankaArm]:
    made = FrankaArm(twin.address, robot)
    yield made
    made.close()


def drive(arm: FrankaArm, seconds: float, where: Callable[[float], Reference]) -> list[float]:
    """Feed references at 200 Hz; distances in m of the tool from them."""
    begun, distances, number = time.perf_counter(), [], 0
    while (now := time.perf_counter() - begun) < seconds:
        wanted = where(now)
        distances.append(float(np.linalg.norm(arm.state().pose.position - wanted.pose.position)))
        arm.follow(wanted, TICK)
        number += 1
        time.sleep(max(0.0, begun + number * TICK - time.perf_counter()))
    return distances


def still(pose: Pose, gripper_open: bool = True) -> Reference:
    return Reference(pose, np.zeros(3), np.zeros(3), gripper_open)


def test_the_arm_holds_follows_and_stops(arm: FrankaArm) -> None:
    pose = arm.begin()
    assert arm.under_control and not arm.state().errors
    assert max(drive(arm, 0.5, lambda t: still(pose))) < 0.003

    def down(t: float) -> Reference:
        way = min(t, 0.5) * 0.1
        speed = 0.1 if t < 0.5 else 0.0
        moved = Pose(pose.position - np.array([0, 0, way]), pose.rotation)
        return Reference(moved, np.array([0, 0, -speed]), np.zeros(3), True)

    distances = drive(arm, 1.5, down)
    assert max(distances) < 0.05 and distances[-1] < 0.006
    arm.end()
    assert not arm.under_control
    arm.end()


def test_gripper_commands_coalesce_to_the_last(arm: FrankaArm) -> None:
    gripper = arm.gripper
    assert gripper is not None
    begun = time.perf_counter()
    for is_open in (False, True, False, True, False):
        gripper.command(is_open)
    assert time.perf_counter() - begun < 0.05
    end = time.monotonic() + 10
    while gripper.busy and time.monotonic() < end:
        time.sleep(0.02)
    assert not gripper.busy and not gripper.error
    assert gripper.width < 0.01
    gripper.command(True)
    while (gripper.busy or gripper.width < 0.07) and time.monotonic() < end:
        time.sleep(0.02)
    assert gripper.width > 0.07


def test_home_is_where_the_configuration_says(arm: FrankaArm, robot: ArmConfig) -> None:
    arm.start_home()
    while arm.homing():
        time.sleep(0.02)
    time.sleep(0.5)
    assert np.abs(arm.state().joints - robot.home).max() < 0.02


def test_cameras_send_frames_with_capture_times(twin: TwinProcess, frames: list[Frame]) -> None:
    twin.lay_out(sample_episode(90_001))
    frames.clear()
    time.sleep(1.5)
    for camera in ("third_person", "wrist"):
        own = [frame for frame in list(frames) if frame.camera == camera]
        stamps = np.array([frame.stamp for frame in own])
        assert len(own) >= 15 and (np.diff(stamps) > 0).all() and abs(time.time() - stamps[-1]) < 0.3
        assert own[0].image.shape == (64, 64, 3) and own[0].image.std() > 5


def test_a_frozen_camera_goes_on_publishing_its_last_image(twin: TwinProcess, frames: list[Frame]) -> None:
    twin.freeze("wrist")
    time.sleep(0.3)
    before = {frame.camera: frame.image for frame in list(frames)}
    twin.lay_out(sample_episode(90_007))
    frames.clear()
    time.sleep(0.6)
    seen = {camera: [frame.image for frame in list(frames) if frame.camera == camera] for camera in before}
    assert len(seen["wrist"]) > 4 and all(np.array_equal(image, before["wrist"]) for image in seen["wrist"])
    assert not np.array_equal(seen["third_person"][-1], before["third_person"])
    twin.freeze()


def test_the_task_is_not_done_when_it_begins(twin: TwinProcess) -> None:
    episode = sample_episode(90_003)
    twin.lay_out(episode)
    time.sleep(0.2)
    verdict = twin.judge()
    goal, target = episode.receptacles[0], episode.objects[0]
    assert not verdict.success and not verdict.grasped
    assert verdict.distance_m == pytest.approx(np.hypot(goal.x - target.x, goal.y - target.y), abs=0.01)


def test_an_address_without_a_robot_is_an_error(robot: ArmConfig) -> None:
    with pytest.raises(ArmError, match=r"127\.77\.0\.1") as caught:
        FrankaArm("127.77.0.1", robot)
    assert caught.value.code == "ROBOT_UNREACHABLE" and "FCI" in caught.value.remedy


def test_an_arm_of_another_version_is_an_error(robot: ArmConfig) -> None:
    def refuse(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            number = struct.unpack("<III", connection.recv(64)[:12])[1]
            connection.sendall(struct.pack("<IIIHH4x", 0, number, 20, 1, 3))  # incompatible: it speaks version 3
            connection.recv(64)

    own = os.sched_getscheduler(0)
    with socket.create_server(("127.77.0.2", 1337)) as server:
        Thread(target=refuse, args=(server,), daemon=True).start()
        with pytest.raises(ArmError, match="another version") as caught:
            FrankaArm("127.77.0.2", robot)
    assert caught.value.code == "ROBOT_VERSION" and "franky-control" in caught.value.remedy
    assert os.sched_getscheduler(0) == own  # libfranka had raised this thread's


def test_an_arm_that_goes_silent_is_an_error_at_the_next_command(robot: ArmConfig) -> None:
    mortal = TwinProcess(TwinConfig())
    arm = FrankaArm(mortal.address, robot)
    try:
        pose = arm.begin()
        drive(arm, 0.2, lambda t: still(pose))
        mortal.process.kill()
        mortal.process.join()
        with pytest.raises(ArmError) as caught:
            drive(arm, 5.0, lambda t: still(pose))
        assert caught.value.code in ("ROBOT_SILENT", "REFLEX") and caught.value.remedy
        with pytest.raises(SimrealError, match="has ended"):
            mortal.judge()
    finally:
        arm.close()
