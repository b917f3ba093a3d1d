"""Publishes what a robot with two cameras does, at its rates, as a process of its own; says what it has sent.

python benchmarks/robot_streams.py SECONDS HEIGHT WIDTH END TRANSPORT: the policy acts for so long, then the status
becomes END. The images are raw or compressed, as a camera's driver does it.
"""

import json
import struct
import sys
import time
from threading import Thread

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from vla_policy import messages
from vla_policy.pictures import compressed

from vla.errors import Fault

CAMERAS = ("third_person", "wrist")
FAULT = Fault("POLICY_SILENT", "policy", "a sign of life", "none for 2 s", "Restart policy_node.")
HZ = 100
BEFORE_S, AFTER_S = 1.0, 2.0  # for which it publishes, too


class Robot(Node):
    """Its streams, each message stamped with when it was sent; `sent`: topic -> stamps in ns while the policy acted."""

    def __init__(self, height: int, width: int, transport: str):
        super().__init__("robot", namespace="left")
        sensor, latched = messages.SENSOR, messages.LATCHED
        self.status = self.create_publisher(String, "franka_node/status", latched)
        self.instruction = self.create_publisher(String, "policy_node/instruction", latched)
        self.diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.streams = {"joint_states": self.create_publisher(JointState, "joint_states", sensor)}
        for name in ("current_pose", "target_pose", "commanded_pose"):
            self.streams[name] = self.create_publisher(PoseStamped, name, sensor)
        kind, name = (Image, "image_raw") if transport == "raw" else (CompressedImage, "image_raw/compressed")
        self.images = {c: self.create_publisher(kind, f"{c}/{name}", sensor) for c in CAMERAS}
        self.infos = {c: self.create_publisher(CameraInfo, f"{c}/camera_info", sensor) for c in CAMERAS}
        y, x = np.mgrid[:height, :width]
        noise = np.random.default_rng(0).normal(0, 3, (height, width, 3))
        waves = np.stack([128 + 60 * np.sin(x / 37), 128 + 80 * np.cos(y / 51), 100 + 60 * np.sin((x + y) / 19)], -1)
        picture = messages.image_message(np.clip(waves + noise, 0, 255).astype(np.uint8), 0.0, "optical")
        joints = JointState(name=[f"fr3_joint{i}" for i in range(1, 8)], position=[0.1] * 7, velocity=[0.0] * 7)
        if transport == "compressed":
            picture = deserialize_message(compressed(serialize_message(picture), "jpeg"), CompressedImage)
        kinds = {"picture": picture, "joints": joints, "pose": PoseStamped(), "info": CameraInfo()}
        self.data = {name: bytearray(serialize_message(message)) for name, message in kinds.items()}
        self.sent: dict[str, list[int]] = {}
        self.acting = False
        self.create_service(Trigger, "franka_node/stop", self.stop)

    def stop(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        print("stop was called", flush=True)
        self.act("idle")
        response.success = True
        return response

    def act(self, status: str) -> None:
        self.acting = status == "running"
        self.status.publish(String(data=status))

    def step(self, number: int) -> None:
        """What is due in the cycle of this number; cameras at 30 Hz, in turn."""
        for name, publisher in self.streams.items():
            self._send(publisher, "joints" if name == "joint_states" else "pose", name)
        for index, camera in enumerate(CAMERAS):
            if (number + 2 * index) % 10 in (0, 3, 6):
                self._send(self.images[camera], "picture", f"{camera}/image_raw/compressed")
                self._send(self.infos[camera], "info", f"{camera}/camera_info")
        if number % HZ == 0:
            status = messages.status_message("/left/franka_node", "fr3", None if self.acting else FAULT)
            assert status.level == (DiagnosticStatus.OK if self.acting else DiagnosticStatus.ERROR)
            self.diagnostics.publish(DiagnosticArray(status=[status]))

    def _send(self, publisher: Publisher, message: str, topic: str) -> None:
        """Serialised once, stamped each time: an ordinary driver costs less than Python does."""
        now = time.time_ns()
        struct.pack_into("<iI", self.data[message], 4, *divmod(now, 10**9))
        publisher.publish(bytes(self.data[message]))
        if self.acting:
            self.sent.setdefault(topic, []).append(now)


def main(seconds: float, height: int, width: int, end: str, transport: str) -> None:
    rclpy.init()
    robot = Robot(height, width, transport)
    executor = SingleThreadedExecutor()
    executor.add_node(robot)
    heard = [*robot.streams.values(), *robot.images.values(), robot.status]
    answering = Thread(target=executor.spin)
    answering.start()
    while min(p.get_subscription_count() for p in heard) < 1:  # until the recorder is there
        time.sleep(0.02)
    robot.instruction.publish(String(data="put the red cube on the plate"))
    began, number = time.monotonic(), 0
    while (passed := time.monotonic() - began) < BEFORE_S + seconds + AFTER_S:
        if number == round(BEFORE_S * HZ):
            print("acts", flush=True)
            robot.act("running")
        if passed > BEFORE_S + seconds and robot.acting:
            robot.act(end)
        robot.step(number)
        number += 1
        time.sleep(max(0.0, began + number / HZ - time.monotonic()))
    print(json.dumps(robot.sent), flush=True)
    executor.shutdown()
    answering.join()
    rclpy.shutdown()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
