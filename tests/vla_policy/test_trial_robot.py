"""What a session of trials gets of a camera, through rclpy."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import Image
from vla_policy import messages
from vla_policy.trial_robot import TrialRobot


@pytest.fixture
def node() -> Iterator[Any]:
    context = Context()
    rclpy.init(context=context)
    made = rclpy.create_node("conductor", context=context)
    yield made
    made.destroy_node()
    rclpy.shutdown(context=context)


def watching(node: Any) -> TrialRobot:
    conductor: Any = SimpleNamespace(node=node)  # all that it takes to see
    return TrialRobot(conductor, {}, "A", "third_person", None, twin=False)


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "mono8"])
def test_the_operators_picture_is_rgb(node: Any, encoding: str, until: Callable[..., bool]) -> None:
    robot = watching(node)
    assert robot.image() is None
    publisher = node.create_publisher(Image, "third_person/image_raw", messages.SENSOR)
    shown = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    message = messages.image_message(shown, 1.0, "optical_frame")
    if encoding == "mono8":
        shown = shown[..., :1].repeat(3, -1)
        message.data, message.step = shown[..., 0].tobytes(), 64
    message.encoding = encoding
    executor = SingleThreadedExecutor(context=node.context)
    executor.add_node(node)

    def arrived() -> bool:
        publisher.publish(message)
        executor.spin_once(timeout_sec=0.05)
        return robot.image() is not None

    assert until(arrived)
    executor.shutdown()
    seen = robot.image()
    assert seen is not None and np.array_equal(seen, shown[..., ::-1] if encoding == "bgr8" else shown)


def test_a_camera_without_colours_is_told_what_to_publish(node: Any) -> None:
    robot = watching(node)
    robot._on_image(Image(height=2, width=2, step=4, encoding="16UC1", data=bytes(8)))
    with pytest.raises(messages.MessageError, match="IMAGE_ENCODING") as caught:
        robot.image()
    assert "third_person" in str(caught.value)
