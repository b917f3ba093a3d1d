"""Messages: whatever is sent comes back, and what can't be read is said to be so."""

import io

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from PIL import Image as Pictures
from sensor_msgs.msg import CompressedImage
from vla_policy import messages

from deployment.executor import integrate
from deployment.franka import ArmState
from deployment.reference import Pose
from vla.adapters.tabletop import tabletop_contract
from vla.errors import Fault
from vla.types import ActionChunk

DOWN = np.array([0.5**0.5, 0.5**0.5, 0.0, 0.0])
POSE = Pose(np.array([0.46, -0.02, 0.22]), DOWN)


def test_a_chunk_comes_back_as_it_was() -> None:
    random = np.random.default_rng(0)
    actions = np.concatenate([random.normal(0, 0.005, (8, 6)), (np.arange(8) > 4)[:, None]], 1)
    sent = integrate(ActionChunk(actions, 1795280550.123456), POSE, 0.05)
    read = messages.read_chunk(messages.chunk_message(sent, "fr3"))
    assert read.stamp == pytest.approx(sent.stamp, abs=1e-6)
    assert np.allclose(read.times, sent.times, atol=1e-6)
    assert np.array_equal(read.positions, sent.positions) and np.array_equal(read.rotations, sent.rotations)
    assert np.array_equal(read.gripper_open, sent.gripper_open) and read.gripper_open.dtype == bool
    assert np.array_equal(read.anchor.position, POSE.position) and np.array_equal(read.anchor.rotation, DOWN)


def test_a_chunk_without_rows_or_gripper_is_refused() -> None:
    message = messages.chunk_message(integrate(ActionChunk(np.zeros((8, 7)), 1.0), POSE, 0.05), "fr3")
    short = messages.chunk_message(integrate(ActionChunk(np.zeros((8, 7)), 1.0), POSE, 0.05), "fr3")
    short.points = short.points[:1]
    message.points[3].transforms = message.points[3].transforms[:1]
    for broken in (message, short):
        with pytest.raises(messages.MessageError) as caught:
            messages.read_chunk(broken)
        assert caught.value.code == "CHUNK_SHAPE"


def test_times_keep_a_microsecond() -> None:
    for seconds in (0.0, 1.5, 1795280550.654321):
        assert messages.to_seconds(messages.to_time(seconds)) == pytest.approx(seconds, abs=1e-6)


def test_pose_and_gripper_come_back() -> None:
    read = messages.read_pose(messages.pose_message(POSE, 3.0, "fr3_link0"))
    assert np.array_equal(read.position, POSE.position) and np.array_equal(read.rotation, POSE.rotation)
    state = ArmState(3.0, np.arange(7.0), np.zeros(7), POSE, 0.06)
    joints = messages.joint_message(state, "fr3", True)
    assert (
        len(joints.name) == 9 and joints.name[0] == "fr3_joint1" and messages.read_width(joints) == pytest.approx(0.06)
    )
    assert len(messages.joint_message(state, "fr3", False).name) == 7


def test_images_come_back_and_colours_keep_their_order() -> None:
    image = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    message = messages.image_message(image, 2.0, "wrist_optical_frame")
    assert np.array_equal(messages.read_image(message)[0], image)
    message.encoding = "bgr8"
    read, encoding = messages.read_image(message)
    assert encoding == "rgb8" and np.array_equal(read, image[..., ::-1])
    message.encoding, message.step = "mono8", 64
    message.data = image[..., 0].tobytes()
    read, encoding = messages.read_image(message)
    assert encoding == "mono8" and read.shape == (48, 64, 1)
    message.data = message.data[:100]
    with pytest.raises(messages.MessageError) as caught:
        messages.read_image(message)
    assert caught.value.code == "IMAGE_SIZE"


def test_compressed_images_are_read() -> None:
    image = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Pictures.fromarray(image).save(file, "png")
    read, encoding = messages.read_image(CompressedImage(format="png", data=file.getvalue()))
    assert encoding == "rgb8" and np.array_equal(read, image)


def test_a_camera_comes_back_from_its_intrinsics() -> None:
    for camera in tabletop_contract(64, 8, 0.02, 0.06).cameras:
        read = messages.read_camera(messages.camera_info(camera, 0.0, "frame"), camera)
        assert (read.height, read.width) == (64, 64) and read.fov_y_deg == pytest.approx(camera.fov_y_deg)
    info = messages.camera_info(camera, 0.0, "frame")
    info.k[4] = 0.0
    with pytest.raises(messages.MessageError, match="intrinsics"):
        messages.read_camera(info, camera)


def test_a_fault_comes_back_in_parts() -> None:
    fault = Fault("CAMERA_FROZEN", "camera wrist", "images that change", "the same for 0.50 s", "Restart the camera.")
    message = messages.status_message("/policy_node", "host:1", fault)
    assert message.level == DiagnosticStatus.ERROR and messages.read_fault(message) == fault
    assert messages.read_fault(messages.status_message("/policy_node", "host:1", None, {"rate": 3})) is None
    foreign = messages.read_fault(DiagnosticStatus(level=DiagnosticStatus.WARN, name="x", message="hot"))
    assert foreign is not None and foreign.found == "hot"
