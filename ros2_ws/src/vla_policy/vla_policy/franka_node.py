"""franka_node: the driver of the arm as a node, with its supervisor. It alone decides what reaches the arm."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.wait_for_message import wait_for_message
from sensor_msgs.msg import CameraInfo, JointState
from std_msgs.msg import Header, String
from trajectory_msgs.msg import MultiDOFJointTrajectory

from deployment.driver import Cycle, Driver, DriverConfig
from deployment.executor import ExecutorConfig
from deployment.franka import FrankaArm
from deployment.lead import lead
from deployment.supervisor import SupervisorConfig
from vla.contract import ActionSemantics, PolicyContract
from vla.errors import Fault, SimrealError
from vla.rig import Delay, Store
from vla_policy import messages, process
from vla_policy.managed import ManagedNode
from vla_policy.names import LATENCY, PERIOD
from vla_policy.parameters import ARM_ID, CAMERAS, Parameter, read
from vla_policy.robot import arm_config

START_S = 120.0  # at most, until everything that `start` needs is there
PARAMETERS = (
    Parameter("checkpoint", "", "Checkpoint whose contract gives rate, chunk and step bounds; or contract."),
    Parameter("contract", "", "A contract.json, where the checkpoint lies on another machine."),
    Parameter("robot_ip", "", "Address of the arm; empty: what the twin publishes as robot_address."),
    ARM_ID,
    Parameter("load_gripper", True, "Whether the arm has a Franka Hand."),
    CAMERAS,
    Parameter("dry_run", False, "Compute and publish everything, but do not move the arm."),
    Parameter("start", False, "Go home and start as soon as the policy and the cameras are there."),
    Parameter("mode", "asynchronous", "How chunks become motion.", choices=("asynchronous", "plain", "synchronous")),
    Parameter("execute", 6, "Rows of a chunk after which the next one is to take over.", 1, 100),
    Parameter("blend_s", 0.15, "Longest time in which a new chunk takes over, s.", 0.01, 1.0),
    Parameter("dwell_s", 0.4, "How long the tool waits where the gripper opens or closes, s; 0: not.",
              0.0, 5.0),
    Parameter("calibration", "", "Store of the cameras' calibrations, with the arm's measured delay; empty: none."),
    Parameter("on_violation", "clip", "What becomes of rows beyond the bounds.", choices=("clip", "reject")),
    Parameter("hold_s", 0.4, "Time without the chunk that is due after which the arm holds, s.", 0.05, 10.0),
    Parameter("heartbeat_s", 0.06, "Silence of the policy's process after which the arm holds, s.", 0.03, 1.0),
    Parameter("stop_s", 2.0, "Silence of the policy that is a fault, s.", 0.1, 60.0),
    Parameter("camera_s", 0.5, "Silence of a camera that is a fault, s.", 0.05, 10.0),
    Parameter("max_age_s", 0.5, "Chunks whose observation is older are refused, s.", 0.05, 5.0),
    Parameter("autostart", True, "Configure and activate without being told to."),
)  # fmt: skip


class FrankaNode(ManagedNode):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__("franka_node", PARAMETERS)
        self._driver: Driver | None = None
        self._active = False
        self._told: tuple[str, float | None] = ("", None)
        self._over = Event()
        self._status = self.create_publisher(String, "~/status", messages.LATCHED)
        for name in ("start", "stop", "reset_fault", "home"):
            process.offer(self, name, lambda name=name: self._request(name))

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        sensor, command, latched = messages.SENSOR, messages.COMMAND, messages.LATCHED
        self._joints = self.create_publisher(JointState, "joint_states", sensor)
        self._pose = self.create_publisher(PoseStamped, "current_pose", sensor)
        self._target = self.create_publisher(PoseStamped, "target_pose", sensor)
        self._commanded = self.create_publisher(PoseStamped, "commanded_pose", sensor)
        self._due = self.create_publisher(Header, "due", latched)
        self._made = [
            *(("publisher", p) for p in (self._joints, self._pose, self._target, self._commanded, self._due)),
            ("subscription", self.create_subscription(MultiDOFJointTrajectory, "chunk", self._chunk, command)),
            ("subscription", self.create_subscription(DiagnosticStatus, "policy_status", self._policy, sensor)),
            *(
                ("subscription", self.create_subscription(CameraInfo, f"{c}/camera_info", self._saw(c), sensor))
                for c in read(self, "cameras")
            ),
        ]
        self._active = True
        if read(self, "start"):
            Thread(target=self._start_by_itself, daemon=True).start()
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self._driver is not None:
            self._driver.stop()
        self._active = False
        self._destroy_made()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._close_driver()
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Brake and let go of the arm."""
        self._over.set()
        self._close_driver()

    def configure(self) -> None:
        self._active = False
        action = self._action()
        robot = arm_config(read(self, "arm_id"))
        address = read(self, "robot_ip") or self._twin_address()
        ahead = lead(action, self._measured())
        config = DriverConfig(
            ExecutorConfig(
                read(self, "mode"), read(self, "execute"), read(self, "blend_s"), dwell_s=read(self, "dwell_s"),
                lead_s=ahead.seconds,
            ),
            SupervisorConfig(
                on_violation=read(self, "on_violation"), hold_s=read(self, "hold_s"),
                heartbeat_s=read(self, "heartbeat_s"), stop_s=read(self, "stop_s"), camera_s=read(self, "camera_s"),
                max_age_s=read(self, "max_age_s"),
            ),
            read(self, "dry_run"),
        )  # fmt: skip
        if config.executor.execute > action.chunk:
            config = replace(config, executor=replace(config.executor, execute=action.chunk))
        load_gripper = read(self, "load_gripper")
        self._driver = Driver(
            lambda: FrankaArm(address, robot, load_gripper), action, robot.limits.tightened(action), config,
            tuple(read(self, "cameras")), self._publish, robot.rate_hz,
        )  # fmt: skip
        self._driver.open()
        self.get_logger().info(f"connected to the arm at {address}; {ahead.text}")

    def _measured(self) -> Delay | None:
        folder = read(self, "calibration")
        return Store(Path(folder).expanduser()).motion(read(self, "cameras")) if folder else None

    def _action(self) -> ActionSemantics:
        folder, file = read(self, "checkpoint"), read(self, "contract")
        if not folder and not file:
            raise SimrealError(
                "there is no contract", code="NO_CHECKPOINT", remedy="Set the parameter checkpoint, or contract."
            )
        return PolicyContract.read(Path(file or folder).expanduser()).action

    def _twin_address(self) -> str:
        came, address = wait_for_message(
            String, self, "robot_address", qos_profile=messages.LATCHED, time_to_wait=START_S
        )
        if not came or address is None:
            topic = self.resolve_topic_name("robot_address")
            raise SimrealError(
                f"nothing on {topic} for {START_S:g} s", code="NO_ROBOT_IP",
                remedy="Set robot_ip to the arm's address, or start the twin (use_sim:=true).",
            )  # fmt: skip
        return str(address.data)

    def _start_by_itself(self) -> None:
        """Home, then start; again and again until everything is there."""
        end, told = time.monotonic() + START_S, ""
        homed = False
        while not self._over.wait(0.2) and time.monotonic() < end:
            driver = self._driver
            if driver is None:
                return
            try:
                if not homed:
                    driver.home()
                    homed = True
                self.get_logger().info(driver.start())
                return
            except SimrealError as error:
                if str(error) != told:
                    told = str(error)
                    self.get_logger().info(f"not yet: {told}")
        if not self._over.is_set():
            self.get_logger().error(f"not started within {START_S:g} s: {told}")

    def _request(self, name: str) -> str:
        driver = self._driver
        if driver is None or not self._active:
            raise SimrealError("the node is not active", code="INACTIVE", remedy="Configure and activate it first.")
        requests: dict[str, Callable[[], str]] = {
            "start": driver.start, "stop": driver.stop, "reset_fault": driver.reset, "home": driver.home,
        }  # fmt: skip
        answer = requests[name]()
        self.get_logger().info(f"{name}: {answer}")
        return answer

    def _publish(self, cycle: Cycle) -> None:
        """In the driver's thread."""
        if not self._active:
            return
        state, frame = cycle.state, f"{read(self, 'arm_id')}_link0"
        self._joints.publish(messages.joint_message(state, read(self, "arm_id"), read(self, "load_gripper")))
        self._pose.publish(messages.pose_message(state.pose, state.stamp, frame))
        self._target.publish(messages.pose_message(cycle.target.pose, state.stamp, frame))
        self._commanded.publish(messages.pose_message(cycle.commanded, state.stamp, frame))
        status = "homing" if cycle.homing else cycle.status
        if (status, cycle.due) != self._told:
            if status != self._told[0]:
                self._status.publish(String(data=status))
                self._log(status)
            self._told = status, cycle.due
            header = Header(frame_id="due" if cycle.due is not None else "")
            if cycle.due is not None:
                header.stamp = messages.to_time(cycle.due)
            self._due.publish(header)

    def _log(self, status: str) -> None:
        fault = self._driver.supervisor.fault if self._driver is not None else None
        if status == "fault":
            self.get_logger().error(str(fault))
        else:
            self.get_logger().info(status)

    def _chunk(self, message: MultiDOFJointTrajectory) -> None:
        assert self._driver is not None
        try:
            self._driver.take(messages.read_chunk(message))
        except messages.MessageError as error:
            self._driver.refuse(error.faults[0])

    def _policy(self, message: DiagnosticStatus) -> None:
        assert self._driver is not None
        self._driver.heartbeat(message.hardware_id, messages.read_fault(message))

    def _saw(self, camera: str) -> Callable[[CameraInfo], None]:
        def saw(message: CameraInfo) -> None:
            assert self._driver is not None
            self._driver.saw(camera, messages.to_seconds(message.header.stamp))

        return saw

    def health(self) -> tuple[str, Fault | None, dict[str, object]]:
        driver, values, fault = self._driver, {}, None
        if driver is not None:
            if driver.ended and not self._over.is_set():
                self.failed = f"the driver has ended: {driver.ended}"
            fault = driver.supervisor.fault
            values = {"status": driver.supervisor.status, **driver.supervisor.counts}
            values.update(messages.quantiles(driver.timing.latency, LATENCY))
            values.update(messages.quantiles(driver.timing.period_error, PERIOD))
            for label, fresh in zip((LATENCY, PERIOD), driver.timing.fresh(), strict=True):
                values[f"{label} samples"] = " ".join(f"{1e3 * s:.2f}" for s in fresh)
        return str(read(self, "arm_id")), fault, values

    def _close_driver(self) -> None:
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()


def main(arguments: list[str]) -> int:
    # Through shared memory a process that hangs can hold up one that sends to it: not this one. It has no images.
    os.environ.setdefault("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")
    process.go_first()
    return process.run(FrankaNode, arguments)
