"""What a recording holds beside the messages: the definitions of their types, and their quality of service."""

import importlib
import re
from functools import cache
from pathlib import Path

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from vla.errors import SimrealError

PLAIN = {
    "bool", "byte", "char", "string", "wstring", "float32", "float64",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
}  # fmt: skip
FOR_EVER = "{sec: 9223372036, nsec: 854775807}"


@cache
def definition(kind: str) -> str:
    """The text of a message's type (sensor_msgs/msg/Image) and of all that it is made of, as recordings hold it."""
    parts, needed = [_text(kind)], _parts(kind)
    for name in needed:  # grows
        package, _, message = name.split("/")
        parts.append(f"{'=' * 80}\nMSG: {package}/{message}\n{_text(name)}")
        needed += [part for part in _parts(name) if part not in needed]
    return "\n".join(parts)


def offered(qos: QoSProfile) -> str:
    """A profile as rosbag2 stores it; without deadlines, which nobody here has."""
    reliable = "reliable" if qos.reliability == ReliabilityPolicy.RELIABLE else "best_effort"
    durable = "transient_local" if qos.durability == DurabilityPolicy.TRANSIENT_LOCAL else "volatile"
    return (
        f"- history: keep_last\n  depth: {qos.depth}\n  reliability: {reliable}\n  durability: {durable}\n"
        f"  deadline: {FOR_EVER}\n  lifespan: {FOR_EVER}\n  liveliness: automatic\n"
        f"  liveliness_lease_duration: {FOR_EVER}\n  avoid_ros_namespace_conventions: false\n"
    )


def _parts(kind: str) -> list[str]:
    """The types of a message's fields, as far as they are messages, each once."""
    found: list[str] = []
    for line in _text(kind).splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        name = re.split(r"[\[<]", words[0])[0]
        if name in PLAIN:
            continue
        package, _, message = name.rpartition("/")
        whole = f"{(package or kind).split('/')[0]}/msg/{message}"
        if whole not in found:
            found.append(whole)
    return found


@cache
def _text(kind: str) -> str:
    """The .msg file, from beside the Python package of the messages: so it is in a ROS installation and in wheels."""
    package, _, message = kind.split("/")
    module = Path(str(importlib.import_module(package).__file__))
    for parent in module.parents:
        file = parent / "share" / package / "msg" / f"{message}.msg"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise SimrealError(
        f"there is no definition of {kind} above {module}", code="NO_DEFINITION",
        remedy=f"Install {package} with its share folder: recordings hold the types of their messages.",
    )  # fmt: skip
