"""Standard ROS 2 messages written without ROS, for episodes that come from another store."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from mcap_ros2._dynamic import serialize_dynamic  # private, but it is what mcap_ros2's own writer calls

_SEPARATOR = "=" * 80
_PARTS = {
    "std_msgs/Header": "builtin_interfaces/Time stamp\nstring frame_id",
    "builtin_interfaces/Time": "int32 sec\nuint32 nanosec",
    "geometry_msgs/Pose": "Point position\nQuaternion orientation",
    "geometry_msgs/Point": "float64 x\nfloat64 y\nfloat64 z",
    "geometry_msgs/Quaternion": "float64 x\nfloat64 y\nfloat64 z\nfloat64 w",
    "geometry_msgs/Vector3": "float64 x\nfloat64 y\nfloat64 z",
    "geometry_msgs/Transform": "Vector3 translation\nQuaternion rotation",
    "geometry_msgs/Twist": "Vector3 linear\nVector3 angular",
    "builtin_interfaces/Duration": "int32 sec\nuint32 nanosec",
    "trajectory_msgs/MultiDOFJointTrajectoryPoint": "geometry_msgs/Transform[] transforms\n"
    "geometry_msgs/Twist[] velocities\ngeometry_msgs/Twist[] accelerations\n"
    "builtin_interfaces/Duration time_from_start",
}
_STAMPED = ("std_msgs/Header", "builtin_interfaces/Time")
_POSE = ("geometry_msgs/Pose", "geometry_msgs/Point", "geometry_msgs/Quaternion")
_CHUNK = (
    "trajectory_msgs/MultiDOFJointTrajectoryPoint", "geometry_msgs/Transform", "geometry_msgs/Twist",
    "geometry_msgs/Vector3", "geometry_msgs/Quaternion", "builtin_interfaces/Duration",
)  # fmt: skip
_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "std_msgs/msg/String": ("string data", ()),
    "std_msgs/msg/Header": (_PARTS["std_msgs/Header"], ("builtin_interfaces/Time",)),
    "sensor_msgs/msg/TimeReference": (
        "std_msgs/Header header\nbuiltin_interfaces/Time time_ref\nstring source", _STAMPED,
    ),
    "sensor_msgs/msg/CompressedImage": ("std_msgs/Header header\nstring format\nuint8[] data", _STAMPED),
    "sensor_msgs/msg/JointState": (
        "std_msgs/Header header\nstring[] name\nfloat64[] position\nfloat64[] velocity\nfloat64[] effort", _STAMPED,
    ),
    "trajectory_msgs/msg/MultiDOFJointTrajectory": (
        "std_msgs/Header header\nstring[] joint_names\nMultiDOFJointTrajectoryPoint[] points", (*_STAMPED, *_CHUNK),
    ),
    "geometry_msgs/msg/PoseStamped": ("std_msgs/Header header\ngeometry_msgs/Pose pose", (*_STAMPED, *_POSE)),
}  # fmt: skip


@cache
def definition(kind: str) -> str:
    """Of a type (sensor_msgs/msg/JointState) and all that it is made of, as recordings hold it."""
    text, parts = _KINDS[kind]
    return "\n".join([text, *(f"{_SEPARATOR}\nMSG: {part}\n{_PARTS[part]}" for part in parts)])


def encode(kind: str, fields: Mapping[str, Any]) -> bytes:
    """A message in CDR; nested messages are mappings."""
    return bytes(_encoder(kind)(dict(fields)))


@cache
def _encoder(kind: str) -> Any:
    return serialize_dynamic(kind, definition(kind))[kind]


def header(stamp: float, frame: str = "") -> dict[str, Any]:
    """stamp: s since 1970."""
    nanoseconds = round(stamp * 1e9)
    return {"stamp": {"sec": nanoseconds // 10**9, "nanosec": nanoseconds % 10**9}, "frame_id": frame}
