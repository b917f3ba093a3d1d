"""What the standard messages of ROS 2 say, whoever has decoded them: rclpy in a node, or the episode store.

Imports no ROS: a message is any object with the fields of its definition.
"""

import io
from typing import Any

import numpy as np
from PIL import Image as Pictures

from vla.errors import CodedError, Fault
from vla.types import Pose


class MessageError(CodedError):
    """A message that can't be read."""


def to_seconds(time: Any) -> float:
    """builtin_interfaces/Time."""
    return float(time.sec) + 1e-9 * float(time.nanosec)


def read_pose(message: Any) -> Pose:
    """geometry_msgs/PoseStamped."""
    p, q = message.pose.position, message.pose.orientation
    return Pose(np.array([p.x, p.y, p.z]), np.array([q.x, q.y, q.z, q.w]))


def read_width(message: Any) -> float:
    """sensor_msgs/JointState: the gripper's width in m; 0 without one."""
    return float(sum(p for name, p in zip(message.name, message.position, strict=True) if "finger" in name))


def read_image(message: Any) -> tuple[np.ndarray, str]:
    """sensor_msgs/Image or CompressedImage: the pixels `[H, W, C]` and their encoding.

    bgr8 becomes rgb8, other encodings stay as they are.
    """
    if hasattr(message, "format"):
        try:
            return np.asarray(Pictures.open(io.BytesIO(bytes(message.data))).convert("RGB")), "rgb8"
        except OSError as error:
            remedy = "Check the camera's driver."
            raise MessageError(Fault("IMAGE_FORMAT", "image", "a PNG or JPEG file", str(error), remedy)) from error
    flat = np.frombuffer(message.data, np.uint8)
    channels = message.step // message.width if message.width else 0
    if flat.size != message.height * message.step or not channels:
        found = f"{flat.size} bytes for {message.height} x {message.width}, step {message.step}"
        raise MessageError(Fault("IMAGE_SIZE", "image", "height x step bytes", found, "Check the camera's driver."))
    rows = flat.reshape(message.height, message.step)[:, : message.width * channels]
    image = rows.reshape(message.height, message.width, channels)
    return (image[..., ::-1].copy(), "rgb8") if message.encoding == "bgr8" else (image, message.encoding)


def read_rgb(message: Any, camera: str) -> np.ndarray:
    """sensor_msgs/Image or CompressedImage of a camera: uint8 RGB `[H, W, 3]`, of grey ones, too."""
    image, encoding = read_image(message)
    if encoding not in ("rgb8", "mono8"):
        remedy = "Publish rgb8, bgr8 or mono8."
        raise MessageError(Fault("IMAGE_ENCODING", camera, "rgb8, bgr8 or mono8", encoding, remedy))
    return np.repeat(image, 3, -1) if encoding == "mono8" else image
