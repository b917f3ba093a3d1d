"""Standard ROS 2 messages <-> the dataclasses of `vla` and `deployment`. Units: m, rad, s; quaternions xyzw.

A chunk travels as a `MultiDOFJointTrajectory`: its stamp is the capture time of the observation, its first point the
anchor, the others its rows; joint 0 is the tool centre in the base frame, joint 1 the gripper, whose translation
along x is the opening that is asked for, as a share (1 open, 0 closed).
"""

from collections.abc import Iterable, Mapping

import numpy as np
from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped, Quaternion, Transform, Vector3
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image, JointState
from trajectory_msgs.msg import MultiDOFJointTrajectory, MultiDOFJointTrajectoryPoint

from deployment.chunks import read_chunk as read_chunk
from deployment.franka import ArmState
from deployment.reference import Waypoints
from vla.contract import Camera
from vla.errors import Fault
from vla.rig import Intrinsics
from vla.ros_messages import MessageError as MessageError
from vla.ros_messages import read_image as read_image
from vla.ros_messages import read_pose as read_pose
from vla.ros_messages import read_rgb as read_rgb
from vla.ros_messages import read_width as read_width
from vla.ros_messages import to_seconds as to_seconds
from vla.types import Pose

# REP-2003: sensors best effort, commands reliable and only the newest, what is told once also to whoever comes later
SENSOR = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT, history=HistoryPolicy.KEEP_LAST)
COMMAND = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, history=HistoryPolicy.KEEP_LAST)
REPORT = QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE, history=HistoryPolicy.KEEP_LAST)
LATCHED = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, history=HistoryPolicy.KEEP_LAST,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)  # fmt: skip
FINGERS = 2


def to_time(seconds: float) -> Time:
    nanoseconds = round(seconds * 1e9)
    return Time(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)


def pose_message(pose: Pose, stamp: float, frame: str) -> PoseStamped:
    message = PoseStamped()
    message.header.stamp, message.header.frame_id = to_time(stamp), frame
    position, rotation = message.pose.position, message.pose.orientation
    position.x, position.y, position.z = (float(v) for v in pose.position)
    rotation.x, rotation.y, rotation.z, rotation.w = (float(v) for v in pose.rotation)
    return message


def joint_message(state: ArmState, arm_id: str, fingers: bool) -> JointState:
    """Joint positions and velocities; the fingers, if any, stand at half the gripper's width each."""
    message = JointState()
    message.header.stamp, message.header.frame_id = to_time(state.stamp), f"{arm_id}_link0"
    count = FINGERS if fingers else 0
    message.name = [f"{arm_id}_joint{i + 1}" for i in range(7)] + [
        f"{arm_id}_finger_joint{i + 1}" for i in range(count)
    ]
    message.position = [*state.joints.tolist(), *[state.gripper_width / FINGERS] * count]
    message.velocity = [*state.joint_velocities.tolist(), *[0.0] * count]
    return message


def image_message(image: np.ndarray, stamp: float, frame: str) -> Image:
    message = Image()
    message.header.stamp, message.header.frame_id = to_time(stamp), frame
    message.height, message.width = image.shape[:2]
    message.encoding, message.step = "rgb8", 3 * image.shape[1]
    message.data = image.tobytes()
    return message


def camera_info(camera: Camera, stamp: float, frame: str) -> CameraInfo:
    """A pinhole camera with square pixels and the given vertical field of view."""
    message = CameraInfo()
    message.header.stamp, message.header.frame_id = to_time(stamp), frame
    message.height, message.width, message.distortion_model = camera.height, camera.width, "plumb_bob"
    focal = camera.height / 2 / np.tan(np.deg2rad(camera.fov_y_deg) / 2)
    x, y = camera.width / 2, camera.height / 2
    message.d = [0.0] * 5
    message.k = [focal, 0.0, x, 0.0, focal, y, 0.0, 0.0, 1.0]
    message.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    message.p = [focal, 0.0, x, 0.0, 0.0, focal, y, 0.0, 0.0, 0.0, 1.0, 0.0]
    return message


def calibrated_info(intrinsics: Intrinsics) -> CameraInfo:
    """camera_info of a calibrated camera, without stamp and frame."""
    message = CameraInfo(height=intrinsics.height, width=intrinsics.width)
    message.distortion_model = "plumb_bob" if intrinsics.model == "pinhole" else "equidistant"
    message.d = [float(v) for v in intrinsics.coefficients]
    k = [float(v) for v in intrinsics.matrix.ravel()]
    message.k, message.p = k, [*k[:3], 0.0, *k[3:6], 0.0, *k[6:], 0.0]
    message.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    return message


def read_camera(message: CameraInfo, like: Camera) -> Camera:
    """What a camera offers, from its intrinsics; name, role and tolerances as in the contract's."""
    focal = float(message.k[4])
    if not focal > 0:
        remedy = "Publish camera_info with the camera's intrinsics (k)."
        raise MessageError(Fault("CAMERA_INFO", like.name, "a focal length above 0", f"{focal:g}", remedy))
    fov = float(np.rad2deg(2 * np.arctan(message.height / 2 / focal)))
    return Camera(
        like.name, like.role, message.height, message.width, fov, like.position_tolerance_m, like.rotation_tolerance_deg
    )


def chunk_message(waypoints: Waypoints, arm_id: str) -> MultiDOFJointTrajectory:
    """See the module's docstring."""
    message = MultiDOFJointTrajectory()
    message.header.stamp, message.header.frame_id = to_time(waypoints.stamp), f"{arm_id}_link0"
    message.joint_names = [f"{arm_id}_hand_tcp", f"{arm_id}_gripper"]
    opening = [bool(waypoints.gripper_open[0]), *waypoints.gripper_open]
    times = [0.0, *(waypoints.times - waypoints.stamp)]
    positions = [waypoints.anchor.position, *waypoints.positions]
    rotations = [waypoints.anchor.rotation, *waypoints.rotations]
    message.points = [
        _point(*row) for row in zip(times, positions, rotations, opening, strict=True)
    ]  # fmt: skip
    return message


def _point(time: float, position: np.ndarray, rotation: np.ndarray, is_open: bool) -> MultiDOFJointTrajectoryPoint:
    x, y, z, w = (float(v) for v in rotation)
    tool = Transform(
        translation=Vector3(**dict(zip("xyz", map(float, position), strict=True))),
        rotation=Quaternion(x=x, y=y, z=z, w=w),
    )
    gripper = Transform(translation=Vector3(x=float(is_open)))
    nanoseconds = round(time * 1e9)
    since = Duration(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
    return MultiDOFJointTrajectoryPoint(transforms=[tool, gripper], time_from_start=since)


def status_message(name: str, source: str, fault: Fault | None, values: Mapping[str, object] = {}) -> DiagnosticStatus:
    """A component's health; a fault is told in words and part by part. source: who tells it."""
    message = DiagnosticStatus(name=name, hardware_id=source)
    message.level = DiagnosticStatus.ERROR if fault else DiagnosticStatus.OK
    message.message = str(fault) if fault else "ok"
    parts = {k: getattr(fault, k) for k in ("code", "field", "expected", "found", "remedy")} if fault else {}
    message.values = [KeyValue(key=k, value=str(v)) for k, v in {**parts, **values}.items()]
    return message


def read_fault(message: DiagnosticStatus) -> Fault | None:
    """The fault that `status_message` was given."""
    if message.level == DiagnosticStatus.OK:
        return None
    values = {v.key: v.value for v in message.values}
    return Fault(
        values.get("code", "POLICY_FAILED"), values.get("field", message.name), values.get("expected", "no fault"),
        values.get("found", message.message), values.get("remedy", "See the node's log."),
    )  # fmt: skip


def quantiles(values: Iterable[float], name: str) -> dict[str, str]:
    """p50 and p99 in ms of times in s, by name; nothing if there are none."""
    milliseconds = 1e3 * np.array(list(values), np.float64)
    if not len(milliseconds):
        return {}
    return {f"{name} {label}": f"{np.quantile(milliseconds, q):.2f}" for label, q in (("p50", 0.5), ("p99", 0.99))}
