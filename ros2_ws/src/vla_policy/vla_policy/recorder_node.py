"""recorder_node: every episode in a file of its own, from the moment the policy acts until the arm is at rest again.

It decodes nothing but the status and the instruction: messages are written as they come, images compressed.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.srv import GetParameters
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.task import Future
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState, TimeReference
from std_msgs.msg import Bool, Header, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import MultiDOFJointTrajectory

from deployment.recorder import Recorder, Stream
from vla import rig, schema
from vla.contract import PolicyContract
from vla.episodes import EpisodeError, Label
from vla.errors import Fault, SimrealError
from vla_policy import messages, process
from vla_policy.definitions import definition, offered
from vla_policy.managed import ManagedNode
from vla_policy.parameters import CAMERAS, Parameter, read
from vla_policy.pictures import compressed

ACTING = ("running", "holding")
AFTER_S = 1.2  # for which an episode goes on: the arm brakes, and /diagnostics says why
SILENT_S = 5.0  # without joint_states the driver is gone
WATCH_HZ = 10.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, see malloc.h
PARAMETERS = (
    Parameter("folder", "", "Where the episodes are written; it is made if it is not there."),
    Parameter("checkpoint", "", "Checkpoint that acts, whose contract and provenance go into every file; or contract.",
              fixed=False),
    Parameter("contract", "", "A contract.json, where the checkpoint lies on another machine."),
    Parameter("calibration", "", "Store of the cameras' calibrations, which go into every file; empty: none."),
    CAMERAS,
    Parameter("transport", "raw", "Which topic of a camera is read.", choices=("raw", "compressed")),
    Parameter("images", "auto", "How raw images are compressed: png without loss; auto: png up to 256 x 256 pixels.",
              choices=("auto", "png", "jpeg")),
    Parameter("reserve_mb", 256, "Space that is left free on the disk, MiB.", 0, 2**20),
    Parameter("stop_on_failure", True, "Stop franka_node when an episode can't be recorded."),
    Parameter("autostart", True, "Configure and activate without being told to."),
)  # fmt: skip


def _keep_memory() -> None:
    """Let glibc keep the memory of an image for the next one.

    To give 0.9 MB back and get them anew with every copy of a raw image took a quarter of what recording costs.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 256 * 2**20)


@dataclass(frozen=True)
class Topic:
    """What is recorded. react: what the message means to this node."""

    name: str
    kind: Any
    qos: QoSProfile
    react: Callable[[bytes], None] | None = None


class RecorderNode(ManagedNode):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__("recorder_node", PARAMETERS)
        _keep_memory()
        self._recorder: Recorder | None = None
        self._status = self._instruction = ""
        self._outcome = ""
        self._ends: float | None = None  # when the episode, which is over, is closed; monotonic
        self._heard = 0.0
        self._told = ""
        self._stop = self.create_client(Trigger, "franka_node/stop")
        self._twin = self.create_client(GetParameters, "twin_node/get_parameters")

    def configure(self) -> None:
        if not read(self, "folder"):
            raise SimrealError("there is no folder", code="NO_FOLDER", remedy="Set the parameter folder.")
        folder = Path(read(self, "folder")).expanduser().absolute()
        reserve = read(self, "reserve_mb") << 20
        streams = [self._stream(topic) for topic in self._topics()]
        self._recorder = Recorder(folder, streams, self._attachments(), self.get_namespace(), reserve)
        self.get_logger().info(f"every episode goes to {folder}")

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        for index, topic in enumerate(self._topics()):
            take = partial(self._take, index, topic.react)
            subscription = self.create_subscription(topic.kind, topic.name, take, topic.qos, raw=True)
            self._made.append(("subscription", subscription))
        judged = self.create_subscription(String, "~/label", self._on_label, messages.REPORT)
        self._made.append(("subscription", judged))
        self._made.append(("timer", self.create_timer(1 / WATCH_HZ, self._watch)))
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._destroy_made()
        self._break_off("the recorder was deactivated")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Write what is left."""
        self._break_off("the recorder was stopped")
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()

    def _topics(self) -> list[Topic]:
        state, latched = _deep(200), messages.LATCHED
        raw = read(self, "transport") == "raw"
        images = [
            Topic(f"{c}/image_raw", Image, _deep(20)) if raw
            else Topic(f"{c}/image_raw/compressed", CompressedImage, _deep(50))
            for c in read(self, "cameras")
        ]  # fmt: skip
        return [
            *images,
            *(Topic(f"{c}/camera_info", CameraInfo, _deep(50)) for c in read(self, "cameras")),
            Topic("joint_states", JointState, state, self._on_joints),
            *(Topic(name, PoseStamped, state) for name in ("current_pose", "target_pose", "commanded_pose")),
            Topic("due", Header, latched),
            Topic("chunk", MultiDOFJointTrajectory, _deep(20, ReliabilityPolicy.RELIABLE)),
            Topic("decision", String, _deep(50, ReliabilityPolicy.RELIABLE)),
            Topic("policy_status", DiagnosticStatus, state),
            Topic("policy_node/instruction", String, latched, self._on_instruction),
            Topic("franka_node/status", String, latched, self._on_status),
            Topic("twin_node/success", Bool, latched, self._on_success),
            Topic("twin_node/time", TimeReference, state),
            Topic("/diagnostics", DiagnosticArray, _deep(50, ReliabilityPolicy.RELIABLE), self._on_diagnostics),
        ]

    def _stream(self, topic: Topic) -> Stream:
        name, kind, encode = topic.name, topic.kind, None
        if kind is Image:
            name, kind = f"{name}/compressed", CompressedImage
            encode = partial(compressed, wanted=read(self, "images"))
        package, _, _ = kind.__module__.partition(".")
        text = f"{package}/msg/{kind.__name__}"
        latched = topic.qos.durability == DurabilityPolicy.TRANSIENT_LOCAL
        metadata = {"offered_qos_profiles": offered(topic.qos)}
        return Stream(self.resolve_topic_name(name), text, definition(text), encode, latched, metadata)

    def _attachments(self) -> dict[str, str]:
        folder, file = read(self, "checkpoint"), read(self, "contract")
        if not folder and not file:
            raise SimrealError(
                "there is no contract", code="NO_CHECKPOINT", remedy="Set the parameter checkpoint, or contract."
            )
        found = {"contract.json": PolicyContract.read(Path(file or folder).expanduser()).to_json()}
        provenance = Path(folder).expanduser() / "provenance.json"
        if folder and provenance.is_file():
            found["provenance.json"] = provenance.read_text(encoding="utf-8")
        if read(self, "calibration"):
            found["calibration.json"] = rig.attachment(Path(read(self, "calibration")), read(self, "cameras"))
        return found

    def _take(self, index: int, react: Callable[[bytes], None] | None, message: bytes) -> None:
        recorder = self._recorder
        if recorder is None:
            return
        recorder.take(index, message)
        if react is not None:
            react(message)

    def _on_status(self, message: bytes) -> None:
        recorder, self._status = self._recorder, deserialize_message(message, String).data
        assert recorder is not None
        if self._status in ACTING:
            if not recorder.recording or self._ends is not None:
                self._begin(recorder)
        elif recorder.recording and self._ends is None:
            self._ends = time.monotonic() + AFTER_S
            if self._status == "fault":
                self._judge("fault")

    def _begin(self, recorder: Recorder) -> None:
        self._ends, self._heard, self._outcome = None, time.monotonic(), ""
        recorder.begin(self._instruction)
        if self._twin.service_is_ready():
            asked = self._twin.call_async(GetParameters.Request(names=["seed", "variant"]))
            asked.add_done_callback(self._on_twin)

    def _on_twin(self, answer: Future) -> None:
        seed, variant = answer.result().values
        if self._recorder is not None:
            self._recorder.describe(seed=seed.integer_value, variant=variant.string_value)

    def _on_instruction(self, message: bytes) -> None:
        self._instruction = deserialize_message(message, String).data
        if self._recorder is not None:
            self._recorder.describe(instruction=self._instruction)

    def _on_joints(self, message: bytes) -> None:
        self._heard = time.monotonic()

    def _on_success(self, message: bytes) -> None:
        if deserialize_message(message, Bool).data and self._ends is None:
            self._judge("success")

    def _on_diagnostics(self, message: bytes) -> None:
        """Why franka_node is at fault."""
        if self._status != "fault" or self._recorder is None or not self._recorder.recording:
            return
        for status in deserialize_message(message, DiagnosticArray).status:
            if status.name == self.resolve_topic_name("franka_node") and status.level != DiagnosticStatus.OK:
                self._recorder.describe(note=status.message)

    def _on_label(self, message: String) -> None:
        """A verdict on the present episode, or on the last one if it is over."""
        if self._recorder is None:
            return
        try:
            verdict = schema.load(Label, message.data, "label", EpisodeError)
        except EpisodeError as error:
            self.get_logger().error(str(error))
            return
        self._outcome = verdict.outcome or self._outcome
        self._recorder.label(verdict)

    def _judge(self, outcome: str) -> None:
        """What became of the episode; what is known first counts."""
        if self._recorder is not None and self._recorder.recording and not self._outcome:
            self._outcome = outcome
            self._recorder.describe(outcome=outcome)

    def _break_off(self, note: str) -> None:
        recorder = self._recorder
        if recorder is None or not recorder.recording:
            return
        if self._ends is None and not self._outcome:
            recorder.describe(outcome="interrupted", note=note)
        self._ends = None
        recorder.end()

    def _watch(self) -> None:
        recorder, now = self._recorder, time.monotonic()
        if recorder is None:
            return
        if self._ends is not None and now > self._ends:
            self._ends = None
            recorder.end()
        if recorder.recording and now - self._heard > SILENT_S:
            self._break_off(f"no joint_states for {SILENT_S:g} s")
        fault = str(recorder.fault or "")
        if fault != self._told:
            self._told = fault
            if fault:
                self.get_logger().error(fault)
        if recorder.broken and recorder.recording:
            if read(self, "stop_on_failure"):
                if not self._stop.service_is_ready():
                    return  # again in the next round
                self.get_logger().error("the episode is not recorded: franka_node is stopped")
                self._stop.call_async(Trigger.Request())
            recorder.end()
            self._ends = None

    def health(self) -> tuple[str, Fault | None, dict[str, object]]:
        recorder = self._recorder
        if recorder is None:
            return "", None, {}
        values: dict[str, object] = {
            "recording": recorder.recording, "episodes": recorder.episodes, "last file": recorder.file,
            "messages": recorder.messages, "dropped": recorder.dropped,
            "waiting MB": f"{recorder.waiting_bytes / 1e6:.1f}",
        }  # fmt: skip
        return str(recorder.folder), recorder.fault, values


def _deep(depth: int, reliability: ReliabilityPolicy = ReliabilityPolicy.BEST_EFFORT) -> QoSProfile:
    """As the publishers', but with room for what comes while the process waits for its turn."""
    return QoSProfile(depth=depth, reliability=reliability, history=HistoryPolicy.KEEP_LAST)


def main(arguments: list[str]) -> int:
    process.stand_back()
    return process.run(RecorderNode, arguments)
