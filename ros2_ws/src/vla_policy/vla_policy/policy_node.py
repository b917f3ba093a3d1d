"""policy_node: cameras and state in, chunks out. It may die, hang or lie: franka_node decides what reaches the arm."""

import os
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.wait_for_message import wait_for_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState
from std_msgs.msg import Header, String
from trajectory_msgs.msg import MultiDOFJointTrajectory

from deployment.inference import Inference, InferenceConfig
from deployment.reference import Waypoints
from deployment.remote import RemotePolicy
from vla.adapters.tabletop import EMBODIMENT, STATE
from vla.assembler import AssemblerConfig
from vla.contract import ActionSemantics, Camera, Instruction, PolicyContract
from vla.decision import Decision
from vla.errors import Fault, SimrealError
from vla.policy import Policy
from vla.rig import Store, as_calibrated
from vla.streams import Streams
from vla_policy import messages, process
from vla_policy.managed import ManagedNode
from vla_policy.parameters import ARM_ID, CAMERAS, Parameter, read
from vla_policy.robot import arm_config

HEARTBEAT_HZ = 100.0
PARAMETERS = (
    Parameter("checkpoint", "", "Folder of the checkpoint; not needed with server. Read when the node is configured.",
              fixed=False),
    Parameter("server", "", "Address of `vla serve`, such as ws://gpu:8765; empty: the policy runs in this node."),
    Parameter("token", "", "Token of the server; by default the environment variable SIMREAL_TOKEN."),
    Parameter("calibration", "", "Store of the cameras' calibrations; empty: none, and no pose is checked."),
    ARM_ID,
    CAMERAS,
    Parameter("transport", "raw", "Which topic of a camera is read.", choices=("raw", "compressed")),
    Parameter("wait_s", 30.0, "How long configuring waits for each camera_info, s.", 0.1, 600.0),
    Parameter("tolerance_s", 0.04, "Greatest difference of the capture times in an observation, s.", 0.001, 1.0),
    Parameter("frozen_s", 0.4, "A camera whose image stays the same for so long while the tool moves is at fault, s.",
              0.05, 10.0),
    Parameter("limit_s", 0.1, "A call of the policy that takes longer counts as hung, s.", 0.01, 10.0),
    Parameter("threads", 1, "Threads of torch.", 1, 256),
    Parameter("device", "cpu", "Where the policy runs in this node: cpu or cuda."),
    Parameter("speedup", "none", "Fixed shapes (CUDA graphs on a GPU), compiled or not.",
              choices=("none", "graph", "compile")),
    Parameter("autostart", True, "Configure and activate without being told to."),
)  # fmt: skip


class PolicyNode(ManagedNode):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__("policy_node", PARAMETERS)
        self._inference: Inference | None = None
        self._actor: Any = None
        self._source = f"{socket.gethostname()}:{os.getpid()}"
        self._instruction = ""
        self._late: dict[str, float] = {}  # camera -> s that its stamps come after what they show
        self.create_subscription(String, "~/instruction", self._on_instruction, messages.LATCHED)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        inference = self._inference
        assert inference is not None
        sensor, latched = messages.SENSOR, messages.LATCHED
        kind: Any = Image if read(self, "transport") == "raw" else CompressedImage
        topic = "image_raw" if kind is Image else "image_raw/compressed"
        streams = Streams(inference, self._late)
        self._chunks = self.create_publisher(MultiDOFJointTrajectory, "chunk", messages.COMMAND)
        self._decisions = self.create_publisher(String, "decision", messages.REPORT)
        self._status = self.create_publisher(DiagnosticStatus, "policy_status", messages.SENSOR)
        self._made = [
            ("publisher", self._chunks),
            ("publisher", self._decisions),
            ("publisher", self._status),
            ("timer", self.create_timer(1 / HEARTBEAT_HZ, self._beat)),
            *(
                (
                    "subscription",
                    self.create_subscription(kind, f"{c}/{topic}", partial(streams.image, c), sensor),
                )
                for c in (camera.name for camera in inference.contract.cameras)
            ),
            ("subscription", self.create_subscription(JointState, "joint_states", streams.joints, sensor)),
            ("subscription", self.create_subscription(PoseStamped, "current_pose", streams.pose, sensor)),
            ("subscription", self.create_subscription(PoseStamped, "commanded_pose", streams.commanded, sensor)),
            ("subscription", self.create_subscription(Header, "due", self._due, latched)),
        ]
        inference.instruction = self._instruction
        inference.start()
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._end()
        if self._actor is not None:
            self._inference = self._new_inference()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._inference = self._actor = None
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        self._end()

    def configure(self) -> None:
        torch.set_num_threads(read(self, "threads"))
        server, folder = read(self, "server"), read(self, "checkpoint")
        if server:
            token = read(self, "token") or os.environ.get("SIMREAL_TOKEN", "")
            actor: Any = RemotePolicy(server, token)
        elif folder:
            loaded = Policy.load(Path(folder).expanduser(), None, "policy_node", device=read(self, "device"))
            actor = loaded.speed_up(read(self, "speedup"))
        else:
            raise SimrealError(
                "there is no policy", code="NO_CHECKPOINT", remedy="Set the parameter checkpoint, or server."
            )
        actor.contract.check(self._offered(actor.contract), self.get_name())
        self._actor = actor
        self._inference = self._new_inference()
        took = self._inference.warm_up()
        self.get_logger().info(f"ready: a call of the policy takes {1e3 * took:.0f} ms")

    def _new_inference(self) -> Inference:
        assembler = AssemblerConfig(tolerance_s=read(self, "tolerance_s"), frozen_s=read(self, "frozen_s"))
        config = InferenceConfig(assembler, read(self, "limit_s"))
        return Inference(self._actor, self._send, config, on_decision=self._tell)

    def _offered(self, contract: PolicyContract) -> PolicyContract:
        """The contract that the robot's cameras and its limits make possible."""
        cameras, names = [], read(self, "cameras")
        for camera in contract.cameras:
            if camera.name not in names:
                continue  # told as missing by the check
            topic = f"{camera.name}/camera_info"
            came, info = wait_for_message(
                CameraInfo, self, topic, qos_profile=messages.SENSOR, time_to_wait=read(self, "wait_s")
            )
            if not came or info is None:
                raise SimrealError(
                    f"nothing on {self.resolve_topic_name(topic)} for {read(self, 'wait_s'):g} s",
                    code="CAMERA_MISSING",
                    remedy=f"Start the camera {camera.name}, or remap its topics to this name.",
                )  # fmt: skip
            cameras.append(self._calibrated(messages.read_camera(info, camera)))
        limits = arm_config(read(self, "arm_id")).limits
        own = contract.action
        action = ActionSemantics(
            "delta_ee", "rotvec", "base", limits.max_step_translation, limits.max_step_rotation, own.rate_hz, own.chunk
        )
        instruction = Instruction(contract.instruction.template, contract.instruction.task_set)
        return PolicyContract(
            contract.version, EMBODIMENT, tuple(cameras), STATE, action, instruction, contract.statistics_hash
        )

    def _calibrated(self, camera: Camera) -> Camera:
        """With where the camera stands and how old that knowledge is; its images' stamps are put right by its delay."""
        folder = read(self, "calibration")
        if not folder:
            return camera
        found = Store(Path(folder)).read(camera.name)
        self._late[camera.name] = found.delay.capture_s if found.delay else 0.0
        return as_calibrated(camera, found)

    def _end(self) -> None:
        if self._inference is not None:
            self._inference.close()
        self._destroy_made()

    def _beat(self) -> None:
        inference = self._inference
        if inference is not None and inference.lives():
            self._status.publish(
                messages.status_message(self.get_fully_qualified_name(), self._source, inference.fault())
            )

    def _send(self, waypoints: Waypoints) -> None:
        self._chunks.publish(messages.chunk_message(waypoints, read(self, "arm_id")))

    def _tell(self, decision: Decision) -> None:
        self._decisions.publish(String(data=replace(decision, late=self._late).to_json()))

    def _due(self, message: Header) -> None:
        if self._inference is not None:
            self._inference.due(messages.to_seconds(message.stamp) if message.frame_id == "due" else None)

    def _on_instruction(self, message: String) -> None:
        self._instruction = message.data
        if self._inference is not None:
            self._inference.instruction = message.data

    def health(self) -> tuple[str, Fault | None, dict[str, object]]:
        inference = self._inference
        values: dict[str, object] = {"instruction": self._instruction}
        if inference is not None:
            values.update(messages.quantiles(list(inference.seconds), "inference ms"))
        return self._source, inference.fault() if inference is not None and self._made else None, values


def main(arguments: list[str]) -> int:
    return process.run(PolicyNode, arguments)
