"""ROS parameters of the nodes: declared with description, range and default, read as plain Python values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node


@dataclass(frozen=True)
class Parameter:
    """low, high: bounds of a number. choices: what a text may be. fixed: can't be changed while the node runs."""

    name: str
    default: Any
    text: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    fixed: bool = True


def declare(node: Node, parameters: Sequence[Parameter]) -> None:
    """Declare them all; the values come from the command line, a launch file or the default."""
    for parameter in parameters:
        text = parameter.text + (f" One of: {', '.join(parameter.choices)}." if parameter.choices else "")
        descriptor = ParameterDescriptor(description=text, read_only=parameter.fixed)
        if parameter.low is not None and parameter.high is not None:
            if isinstance(parameter.default, int):
                descriptor.integer_range = [IntegerRange(from_value=int(parameter.low), to_value=int(parameter.high))]
            else:
                descriptor.floating_point_range = [
                    FloatingPointRange(from_value=float(parameter.low), to_value=float(parameter.high))
                ]
        node.declare_parameter(parameter.name, parameter.default, descriptor)
        value = node.get_parameter(parameter.name).value
        if parameter.choices and value not in parameter.choices:
            raise ValueError(f"{parameter.name} is {value!r}: choose one of {', '.join(parameter.choices)}")


def read(node: Node, name: str) -> Any:
    value = node.get_parameter(name).value
    return list(value) if isinstance(value, (list, tuple)) else value


ARM_ID = Parameter("arm_id", "fr3", "Robot preset: the file of configs/robot, and the prefix of its frames.",
                   choices=("fr3", "panda"))  # fmt: skip
CAMERAS = Parameter("cameras", ["third_person", "wrist"], "Cameras: namespaces of their image_raw and camera_info.")
