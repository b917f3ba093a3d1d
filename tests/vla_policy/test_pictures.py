"""Recorded images and definitions: made from bytes, read by ROS itself."""

import io

import numpy as np
import pytest
from PIL import Image as Pictures
from rclpy.serialization import deserialize_message, serialize_message
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from sensor_msgs.msg import CompressedImage
from vla_policy import messages
from vla_policy.definitions import definition
from vla_policy.messages import MessageError
from vla_policy.pictures import compressed


def scene(height: int, width: int) -> np.ndarray:
    """Smooth, as what a camera sees: `[H, W, 3]`."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)]
    return np.stack([128 + 100 * wave for wave in waves], -1).astype(np.uint8)


def through(image: np.ndarray, encoding: str, **settings: str) -> tuple[CompressedImage, np.ndarray]:
    """The compressed message, read by rclpy, and its pixels in the file's order."""
    message = messages.image_message(scene(8, 8), 12.25, "wrist_optical_frame")
    message.height, message.width = image.shape[:2]
    message.encoding, message.step, message.data = encoding, image[0].nbytes, image.tobytes()
    made = deserialize_message(compressed(serialize_message(message), **settings), CompressedImage)
    assert made.header == message.header
    return made, np.asarray(Pictures.open(io.BytesIO(bytes(made.data))))


@pytest.mark.parametrize("frame", range(1, 9))
def test_small_images_keep_every_pixel_whatever_the_names_length(frame: int) -> None:
    image = scene(31, 47)
    message = messages.image_message(image, 3.5, "f" * frame)
    made = deserialize_message(compressed(serialize_message(message)), CompressedImage)
    assert made.header.frame_id == "f" * frame and made.format == "rgb8; png compressed bgr8"
    assert np.array_equal(messages.read_image(made)[0], image)


def test_colours_keep_their_order_and_grey_stays_grey() -> None:
    image = scene(31, 47)
    made, pixels = through(np.ascontiguousarray(image[..., ::-1]), "bgr8")
    assert np.array_equal(pixels, image) and made.format == "bgr8; png compressed bgr8"
    made, pixels = through(image[..., 0].copy(), "mono8")
    assert np.array_equal(pixels, image[..., 0]) and made.format == "mono8; png compressed"


def test_large_images_are_jpeg_unless_told_otherwise() -> None:
    image = scene(480, 640)
    made, pixels = through(image, "rgb8")
    assert "jpeg" in made.format and len(made.data) < image.nbytes / 10
    assert np.abs(pixels.astype(int) - image).mean() < 3
    assert np.array_equal(through(image, "rgb8", wanted="png")[1], image)


def test_what_is_no_image_of_8_bits_is_refused() -> None:
    depth = messages.image_message(scene(8, 8), 1.0, "depth")
    depth.encoding = "16UC1"
    short = messages.image_message(scene(8, 8), 1.0, "short")
    short.data = short.data[:20]
    whole = serialize_message(messages.image_message(scene(8, 8), 1.0, "x"))
    for data in (serialize_message(depth), serialize_message(short), whole[:30], b"", b"\0\0" + whole[2:]):
        with pytest.raises(MessageError) as caught:
            compressed(data)
        assert caught.value.code == "IMAGE_ENCODING"


@pytest.mark.parametrize(
    "kind",
    ["sensor_msgs/msg/CameraInfo", "trajectory_msgs/msg/MultiDOFJointTrajectory", "diagnostic_msgs/msg/DiagnosticArray",
     "std_msgs/msg/String"],
)  # fmt: skip
def test_definitions_are_whole(kind: str) -> None:
    """The text defines the same type as rosbags' own Jazzy definitions, as told by its hash."""
    jazzy, ours = get_typestore(Stores.ROS2_JAZZY), get_typestore(Stores.EMPTY)
    ours.register(get_types_from_msg(definition(kind), kind))
    assert ours.hash_rihs01(kind) == jazzy.hash_rihs01(kind)
