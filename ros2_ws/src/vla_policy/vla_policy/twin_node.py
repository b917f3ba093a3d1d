"""twin_node: a simulated arm at its table, with cameras, in place of the real ones. Nothing else in the graph knows."""

import json
from dataclasses import asdict, replace
from threading import Thread

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.publisher import Publisher
from sensor_msgs.msg import CameraInfo, Image, TimeReference
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger

from deployment.twin import SHIFTED, Frame, TwinConfig, TwinProcess, Verdict
from vla.adapters.tabletop import CAMERAS, tabletop_contract
from vla.errors import SimrealError
from vla.tasks.put_on_plate import ALL_VARIANTS, sample_episode
from vla_policy import messages, process
from vla_policy.names import PACE
from vla_policy.parameters import Parameter, declare, read
from vla_policy.robot import arm_config

JUDGE_HZ = 10.0
TIME_HZ = 50.0
PRESETS = {"nominal": TwinConfig(), "shifted": SHIFTED}
PARAMETERS = (
    Parameter("preset", "nominal", "Physics and cameras; shifted differs from what the policy was trained on.",
              choices=tuple(PRESETS)),
    Parameter("variant", "in_distribution", "Variant of the task that is laid out.", choices=ALL_VARIANTS, fixed=False),
    Parameter("seed", 90001, "Seed of the episode that is laid out.", 0, 2**31, fixed=False),
    Parameter("size", 64, "Width and height of the images, px.", 16, 1024),
    Parameter("rate_hz", 20.0, "Frames per second of each camera.", 1.0, 100.0),
    Parameter("delay_s", -1.0, "From capture to publication, s; below 0: the preset's.", -1.0, 2.0),
    Parameter("noise", -1.0, "Standard deviation of a pixel's noise, of 255; below 0: the preset's.", -1.0, 100.0),
    Parameter("drop", 0.0, "Share of the frames that are lost.", 0.0, 1.0),
    Parameter("frozen", [""], "Cameras that go on publishing their last image.", fixed=False),
    Parameter("missing", [""], "Cameras that publish nothing.", fixed=False),
    Parameter("board", "none", "A ChArUco board to calibrate with, in place of the task's objects.",
              choices=("none", "hand", "table")),
    Parameter("calibrate", [""], "With a board: the only cameras that film."),
    Parameter("stop_on_success", True, "Stop franka_node when the object is on the plate."),
    Parameter("arm_id", "fr3", "Robot preset, for its home position and its frames.", choices=("fr3", "panda")),
)  # fmt: skip


class TwinNode(Node):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__("twin_node")
        declare(self, PARAMETERS)
        self.failed = ""
        preset = PRESETS[read(self, "preset")]
        delay, noise = read(self, "delay_s"), read(self, "noise")
        cameras = replace(
            preset.cameras, size=read(self, "size"), rate_hz=read(self, "rate_hz"), drop=read(self, "drop"),
            delay_s=preset.cameras.delay_s if delay < 0 else delay, noise=preset.cameras.noise if noise < 0 else noise,
        )  # fmt: skip
        robot = arm_config(read(self, "arm_id"))
        if only := tuple(name for name in read(self, "calibrate") if name):
            cameras = replace(cameras, filmed=only)
        self._config = replace(preset, cameras=cameras, initial_joints=robot.home, board=read(self, "board"))
        self._twin: TwinProcess | None = None
        offered = tabletop_contract(cameras.size, 1, 1.0, 1.0)
        self._infos = {
            camera.name: messages.camera_info(camera, 0.0, f"{camera.name}_optical_frame") for camera in offered.cameras
        }
        sensor = messages.SENSOR
        self._images: dict[str, Publisher] = {
            c: self.create_publisher(Image, f"{c}/image_raw", sensor) for c in CAMERAS
        }
        self._cameras = {c: self.create_publisher(CameraInfo, f"{c}/camera_info", sensor) for c in CAMERAS}
        self._address = self.create_publisher(String, "robot_address", messages.LATCHED)
        self._instruction = self.create_publisher(String, "policy_node/instruction", messages.LATCHED)
        self._success = self.create_publisher(Bool, "~/success", messages.LATCHED)
        self._time = self.create_publisher(TimeReference, "~/time", sensor)
        self._stop = self.create_client(Trigger, "franka_node/stop")
        self._succeeded: bool | None = None
        for name, request in (("lay_out", self._lay_out), ("judge", self._judge)):
            process.offer(self, name, request)
        Thread(target=self._run, daemon=True).start()
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(1 / JUDGE_HZ, self._watch)
        self.create_timer(1 / TIME_HZ, self._tell_time)
        self.create_timer(1.0, self._diagnose)

    def close(self) -> None:
        if self._twin is not None:
            self._twin.stop()

    def _run(self) -> None:
        """Start the twin, tell where the arm is, lay out the first scene."""
        try:
            self._twin = TwinProcess(self._config, self._publish)
        except Exception as error:  # of whatever kind: without it the node is of no use
            self.failed = str(error)
            return
        self._address.publish(String(data=self._twin.address))
        self.get_logger().info(f"the arm answers at {self._twin.address}")
        self._lay_out()

    def _lay_out(self) -> str:
        episode = sample_episode(read(self, "seed"), read(self, "variant"))
        if self._config.board != "none":
            episode = replace(episode, objects=(), receptacles=())  # the table is cleared
        self._present().lay_out(episode)
        self._tell(False)
        self._instruction.publish(String(data=episode.instruction))
        self.get_logger().info(f"{episode.variant} {episode.seed}: {episode.instruction}")
        return episode.instruction

    def _judge(self) -> str:
        return json.dumps(asdict(self._present().judge()))

    def _present(self) -> TwinProcess:
        if self._twin is None:
            raise SimrealError("the twin is still starting", code="TWIN_STARTING", remedy="Try again in a moment.")
        return self._twin

    def _watch(self) -> None:
        """Tell as soon as the task is done."""
        twin = self._twin
        if twin is None:
            return
        if twin.failure or not twin.process.is_alive():
            self.failed = (
                f"the twin failed: {twin.failure or 'its process has ended'}. `vla doctor` tests its rendering."
            )
            return
        twin.freeze(*(name for name in read(self, "frozen") if name))
        if self._succeeded is not False or self._config.board != "none":
            return
        verdict: Verdict = twin.judge()
        if verdict.success:
            self._tell(True)
            self.get_logger().info("success: the object is where it belongs")
            if read(self, "stop_on_success") and self._stop.service_is_ready():
                self._stop.call_async(Trigger.Request())

    def _diagnose(self) -> None:
        values = {PACE: f"{self._twin.pace:.3f}" if self._twin else "0", "success": self._succeeded}
        name = str(self.get_fully_qualified_name())
        message = DiagnosticArray(status=[messages.status_message(name, "twin", None, values)])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)

    def _tell_time(self) -> None:
        """How much was simulated by when: on a busy machine that is less than what has passed."""
        if self._twin is None:
            return
        stamp, simulated = self._twin.times
        message = TimeReference(time_ref=messages.to_time(simulated), source="twin")
        message.header.stamp = messages.to_time(stamp)
        self._time.publish(message)

    def _tell(self, success: bool) -> None:
        self._succeeded = success
        self._success.publish(Bool(data=success))

    def _publish(self, frame: Frame) -> None:
        """In the cameras' thread."""
        if frame.camera in read(self, "missing"):
            return
        optical = f"{frame.camera}_optical_frame"
        self._images[frame.camera].publish(messages.image_message(frame.image, frame.stamp, optical))
        info = self._infos[frame.camera]
        info.header.stamp = messages.to_time(frame.stamp)
        self._cameras[frame.camera].publish(info)


def main(arguments: list[str]) -> int:
    return process.run(TwinNode, arguments)
