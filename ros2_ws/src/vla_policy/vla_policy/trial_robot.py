"""The robot, or its twin, as a session of trials sees it: through the services and topics of the nodes."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from deployment.operator import Run
from vla.episodes import PART, Label, files
from vla.errors import SimrealError
from vla.trial_protocol import Slot
from vla_policy import messages
from vla_policy.conductor import Conductor

SWITCH_S = 120.0  # at most, to load another checkpoint
CHANGE = (
    Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_CLEANUP, Transition.TRANSITION_CONFIGURE,
    Transition.TRANSITION_ACTIVATE,
)  # fmt: skip


class TrialRobot:
    """checkpoints: letter -> bundle. acting: the letter whose bundle the nodes were started with.

    camera: whose image the operator sees. record: folder of the episodes. twin: whether it lays scenes and judges.
    """

    def __init__(self, conductor: Conductor, checkpoints: Mapping[str, str], acting: str, camera: str,
                 record: Path | None, twin: bool):  # fmt: skip
        self._conductor, self._checkpoints, self._acting = conductor, checkpoints, acting
        self._record, self._twin, self._camera = record, twin, camera
        node = conductor.node
        self._nodes = ["policy_node", *["recorder_node"] * (record is not None)]
        self._change = {name: node.create_client(ChangeState, f"{name}/change_state") for name in self._nodes}
        self._set = {name: node.create_client(SetParameters, f"{name}/set_parameters") for name in self._nodes}
        self._instruction = node.create_publisher(String, "policy_node/instruction", messages.LATCHED)
        self._image: Image | None = None
        self._width: float | None = None  # of the gripper, m
        node.create_subscription(Image, f"{camera}/image_raw", self._on_image, messages.SENSOR)
        node.create_subscription(JointState, "joint_states", self._on_joints, messages.SENSOR)
        self._files: set[str] = set()

    def use(self, letter: str) -> None:
        """Another checkpoint for the policy, and for what the recorder writes of it."""
        if letter == self._acting:
            return
        clients = (*self._change.values(), *self._set.values())
        self._conductor.until(lambda: all(c.service_is_ready() for c in clients), SWITCH_S, "the nodes' services")
        self._acting = ""  # what acts is unknown until the new one does
        value = Parameter("checkpoint", value=self._checkpoints[letter]).to_parameter_msg()
        for name in self._nodes:
            for transition in CHANGE[:2]:
                self._transit(name, transition)
            request = SetParameters.Request(parameters=[value])
            answer: Any = self._conductor.call(self._set[name], request, f"{name}/set_parameters", SWITCH_S)
            if not answer.results[0].successful:
                raise SimrealError(f"{name} refuses policy {letter}: {answer.results[0].reason}", code="SWITCH")
            for transition in CHANGE[2:]:
                self._transit(name, transition)
        self._acting = letter

    def home(self) -> None:
        self._conductor.recover()

    def lay_out(self, slot: Slot, instruction: str) -> None:
        if self._twin:
            self._conductor.configure(seed=slot.seed, variant=slot.variant)
            self._conductor.demand("twin_node/lay_out")
            time.sleep(0.3)  # frames of the new scene
        else:
            self._instruction.publish(String(data=instruction))

    def image(self) -> np.ndarray | None:
        newest = self._image
        return None if newest is None else messages.read_rgb(newest, self._camera)

    def run(self, limit_s: float, stopped: Callable[[], bool]) -> Run:
        self._files = self._names()
        success, seconds, fault = self._conductor.act(limit_s, stopped)
        if not self._twin:
            return Run(seconds, fault, width_m=self._width)
        verdict = json.loads(self._conductor.demand("twin_node/judge"))
        where = "" if success else verdict["where"] or "place"  # on the plate only after the time was over
        return Run(seconds, fault, success, where, verdict["distance_m"], self._width)

    def label(self, label: Label) -> None:
        self._conductor.tell(label)

    def recording(self) -> str:
        new = sorted(self._names() - self._files)
        return new[-1] if new else ""

    def _names(self) -> set[str]:
        """Of the recorded episodes, also of one that is being written."""
        if self._record is None or not self._record.is_dir():
            return set()
        return {file.name.removesuffix(PART) for file in files(self._record)}

    def _transit(self, name: str, transition: int) -> None:
        request = ChangeState.Request(transition=Transition(id=transition))
        answer: Any = self._conductor.call(self._change[name], request, f"{name}/change_state", SWITCH_S)
        if not answer.success:
            raise SimrealError(
                f"{name} can't change to another checkpoint", code="SWITCH",
                remedy="Its log says why. Then give the same command: the trials go on where they stopped.",
            )  # fmt: skip

    def _on_image(self, message: Image) -> None:
        self._image = message

    def _on_joints(self, message: JointState) -> None:
        if any("finger" in name for name in message.name):
            self._width = messages.read_width(message)
