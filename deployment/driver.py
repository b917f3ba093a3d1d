"""The driver: one thread that owns the arm and alone decides what reaches it.

Chunks, signs of life and requests come in from other threads; in every cycle the supervisor judges them, the executor
turns them into a reference, and the arm gets that reference, slewed. Whatever ends the motion (stop, a fault, silence),
the arm brakes on its present course within its bounds, holds, and is let go where it stands.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from deployment.executor import Executor, ExecutorConfig
from deployment.franka import ArmError, ArmState, FrankaArm
from deployment.reference import Pose, Reference, Waypoints
from deployment.supervisor import Limits, Slew, Status, Supervisor, SupervisorConfig
from deployment.timing import Timing
from vla.contract import ActionSemantics
from vla.errors import Fault, SimrealError

CONNECT_S = 15.0  # franky itself waits for ever for an arm that accepts the connection and says nothing
REQUEST_S = 10.0
AT_REST = 1e-3  # m/s and rad/s, of the reference
SETTLED, SETTLED_S = 0.02, 0.1  # rad/s of the arm's joints, s
SETTLE_S = 0.5  # after which an arm that does not settle on a reference at rest is let go nevertheless
BRAKING_S = 0.8  # for which a request waits for an arm that still brakes
LIFE_S = 0.5  # without a sign of life for so long, a policy or a camera is not there


class DriverError(SimrealError):
    """A request that can't be met now."""


@dataclass(frozen=True)
class DriverConfig:
    """dry_run: everything is computed and published, the arm is not moved."""

    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    dry_run: bool = False


@dataclass(frozen=True)
class Cycle:
    """What a control cycle has to tell.

    target: what the arm follows; where it is, if it follows nothing.
    commanded: where the policy's chunks want the tool, of which the target is the smooth and bounded version. This is
        what a policy knows as the commanded pose: in training, too, the arm lags behind it.
    due: capture time from which on an observation should be answered; None while the policy has nothing to do.
    """

    state: ArmState
    target: Reference
    commanded: Pose
    status: Status
    due: float | None
    homing: bool


class Driver:
    """See the module's docstring.

    connect: makes the connection; called in the driver's thread. limits: those of the robot, tightened by the
    contract. cameras: whose silence is a fault. on_cycle: called in the driver's thread, `publish_hz` times a second.
    """

    def __init__(
        self, connect: Callable[[], FrankaArm], action: ActionSemantics, limits: Limits, config: DriverConfig,
        cameras: tuple[str, ...], on_cycle: Callable[[Cycle], None], rate_hz: float = 200.0, publish_hz: float = 100.0,
        clock: Callable[[], float] = time.time,
    ):  # fmt: skip
        self.action, self.limits, self.config, self.clock = action, limits, config, clock
        self.supervisor = Supervisor(limits, config.supervisor, cameras)
        self.timing = Timing(rate_hz, 1.0 / action.rate_hz)
        self.tick = 1.0 / rate_hz
        self._every = max(1, round(rate_hz / publish_hz))
        self._connect, self._on_cycle = connect, on_cycle
        self._arm: FrankaArm | None = None
        self._requests: SimpleQueue[tuple[Callable[[], str], Future[str]]] = SimpleQueue()
        self._chunks: SimpleQueue[Waypoints] = SimpleQueue()
        self._alive: dict[str, float] = {}  # camera or policy -> when it last showed itself
        self._policies: dict[str, Fault | None] = {}
        self._executor: Executor | None = None
        self._slew: Slew | None = None  # while the arm is under control
        self._target: Reference | None = None
        self._commanded: Pose | None = None
        self._state: ArmState | None = None
        self._homing = self._held = self._let_go = self._over = False
        self._rested = self._settled = 0.0  # s for which the reference, and the arm, have been at rest
        self._last = 0.0
        self._thread = Thread(target=self._run, name="driver", daemon=True)
        self._connected: Future[None] = Future()
        self.ended = ""  # what broke the thread off

    # Called from other threads

    def open(self) -> None:
        """Connect to the arm and begin to tell its state."""
        self._thread.start()
        try:
            self._connected.result(CONNECT_S)
        except Late as error:
            raise ArmError(
                f"the arm did not answer within {CONNECT_S:g} s", code="ROBOT_UNREACHABLE",
                remedy="Check cable and address, unlock the joints and activate FCI in Desk.",
            ) from error  # fmt: skip

    def close(self) -> None:
        """Brake, let go of the arm, end the thread."""
        self._over = True
        if self._thread.ident is not None:
            self._thread.join(REQUEST_S)

    def start(self) -> str:
        """Take control and let the policy act. Raises SimrealError, which says why not."""
        return self._ask(self._start)

    def stop(self) -> str:
        """Brake and let go; the policy no longer acts."""
        return self._ask(self._stop)

    def home(self) -> str:
        """Set off for the home position."""
        return self._ask(self._home)

    def reset(self) -> str:
        """Recover the arm from its error and clear the fault; the arm stays where it is."""
        return self._ask(self._reset)

    def take(self, waypoints: Waypoints) -> None:
        """Hand over a chunk, checked in the next cycle."""
        self._chunks.put(waypoints)

    def refuse(self, fault: Fault) -> None:
        """What the policy sends can't be followed; a fault, if it is to act."""
        if self.supervisor.status in ("running", "holding"):
            self.supervisor.trip(fault.code, fault.field, fault.expected, fault.found, fault.remedy)

    def saw(self, camera: str, stamp: float) -> None:
        """A camera has captured an image at `stamp`."""
        self._alive[camera] = stamp
        self.supervisor.beat(camera, stamp)

    def heartbeat(self, policy: str, fault: Fault | None) -> None:
        """A policy's process lives; `fault` is what keeps it from acting. Two policies at once are a fault."""
        now = self.clock()
        self._alive[policy] = now
        self._policies[policy] = fault
        self.supervisor.beat("heartbeat", now)
        names = self._living_policies(now)
        if fault is not None:
            self.refuse(fault)
        elif len(names) > 1:
            self.refuse(Fault(*_two_policies(names)))

    # In the driver's thread

    def _ask(self, request: Callable[[], str]) -> str:
        """An arm that still brakes is waited for."""
        end = time.monotonic() + BRAKING_S
        while True:
            try:
                return self._ask_once(request)
            except DriverError as error:
                if error.code != "BRAKING" or time.monotonic() > end:
                    raise
            time.sleep(0.02)

    def _ask_once(self, request: Callable[[], str]) -> str:
        answer: Future[str] = Future()
        self._requests.put((request, answer))
        try:
            return answer.result(REQUEST_S)
        except Late as error:
            raise DriverError(
                f"the driver did not answer within {REQUEST_S:g} s", code="DRIVER_BUSY", remedy="Look at /diagnostics."
            ) from error

    def _run(self) -> None:
        try:
            self._arm = self._connect()
        except BaseException as error:
            self._connected.set_exception(error)
            return
        due, number = time.perf_counter(), 1
        try:
            self._cycle(publish=True)
            self._connected.set_result(None)
            while not self._over:
                self._cycle(number % self._every == 0)
                number += 1
                due = max(due + self.tick, time.perf_counter() - self.tick)
                time.sleep(max(0.0, due - time.perf_counter()))
            self._come_to_rest()
        except Exception as error:  # a mistake in here: without its driver the arm stops
            self.ended = f"{type(error).__name__}: {error}"
            if not self._connected.done():
                self._connected.set_exception(error)
            raise
        finally:
            self._arm.close()

    def _cycle(self, publish: bool) -> None:
        now, steady = self.clock(), time.monotonic()
        self.timing.cycle(steady)
        self._answer()
        arm = self._arm
        try:
            assert arm is not None
            self._state = state = arm.state()
        except ArmError as error:
            self._fail(error)
            if self._state is not None:  # the last one that is known, by its stamp
                still = Reference(self._state.pose, np.zeros(3), np.zeros(3), self._open(self._state))
                self._on_cycle(Cycle(self._state, still, still.pose, self.supervisor.status, None, False))
            time.sleep(0.1)
            return
        self.supervisor.beat("state", state.stamp)
        self.supervisor.check_joints(state.joints)
        if self._slew is not None and arm.gripper is not None and arm.gripper.error:
            remedy = "Free the fingers, then reset_fault."
            self.supervisor.trip("GRIPPER", "gripper", "fingers that open and close", arm.gripper.error, remedy)
        if self._homing:
            try:
                self._homing = arm.homing()
            except ArmError as error:
                self._fail(error)
        self._take_chunks(state, now)
        if self._executor is not None and self.supervisor.status == "running":
            self.supervisor.expect(self._executor.due())
        status = self.supervisor.poll(now, steady)
        if self._slew is not None:
            self._steer(arm, self._slew, state, status, now)
        self._last = now
        if publish:
            still = Reference(state.pose, np.zeros(3), np.zeros(3), self._open(state))
            target, commanded = still, still.pose
            if self._slew is not None and self._target is not None and self._commanded is not None:
                target, commanded = self._target, self._commanded
            acting = self._executor is not None and self._slew is not None and status in ("running", "holding")
            due = self._executor.due() if acting and self._executor is not None else None
            self._on_cycle(Cycle(state, target, commanded, self.supervisor.status, due, self._homing))
            if self._let_go:  # told first
                self._release()

    def _steer(self, arm: FrankaArm, slew: Slew, state: ArmState, status: Status, now: float) -> None:
        """The next reference: the executor's while the policy acts, else as quickly as allowed to rest."""
        assert self._executor is not None and self._target is not None
        dt = min(max(now - self._last, 0.2 * self.tick), 4 * self.tick)
        resting = False
        if status == "running":
            self._held, self._rested, self._settled = False, 0.0, 0.0
            wanted = self._executor.reference(now + self.tick)
            self._target = slew.follow(wanted, dt)
            self._commanded = self._executor.reference_then(now + self.tick).pose
        else:
            self._target = slew.brake(dt, self._target.gripper_open)
            if _at_rest(self._target):
                self._rested += dt
                # For a while: where an arm turns back, it is at rest for a moment.
                self._settled = self._settled + dt if np.abs(state.joint_velocities).max() < SETTLED else 0.0
                settled = self._settled > SETTLED_S or self._rested > SETTLE_S
                self._let_go = status != "holding" and settled
                if settled and status == "holding" and not self._held:
                    self._executor.hold(slew.pose, self._target.gripper_open, now)
                    self._held = True
                resting = not settled
            self._commanded = slew.pose
        if not self.config.dry_run:
            try:
                if resting:
                    self._target = slew.place(arm.rest(), self._target.gripper_open)
                else:
                    arm.follow(self._target, dt)
            except ArmError as error:
                self._fail(error)

    def _take_chunks(self, state: ArmState, now: float) -> None:
        while True:
            try:
                waypoints = self._chunks.get_nowait()
            except Empty:
                return
            allowed = self.supervisor.review(waypoints, state.pose, now)
            if allowed is None or self._executor is None:
                continue
            arrival = self._executor.accept(allowed, now)
            self.supervisor.counts["chunks"] += 1
            self.supervisor.counts["dropped_rows"] += arrival.dropped
            self.supervisor.counts["late_chunks"] += not arrival.used
            self.timing.arrived(arrival.delay_s)

    def _answer(self) -> None:
        """Meet the requests of other threads."""
        while True:
            try:
                request, answer = self._requests.get_nowait()
            except Empty:
                return
            try:
                answer.set_result(request())
            except Exception as error:  # it belongs to whoever asked
                answer.set_exception(error)

    def _start(self) -> str:
        now, arm = self.clock(), self._arm
        if self.supervisor.fault is not None:
            raise DriverError(f"a fault is latched: {self.supervisor.fault}", code="FAULT", remedy="Call reset_fault.")
        if self.supervisor.status != "idle":
            return "it runs already"
        if self._slew is not None:
            raise DriverError("the arm still brakes", code="BRAKING", remedy="Try again in a moment.")
        if self._homing:
            raise DriverError("the arm is on its way home", code="HOMING", remedy="Start when it has arrived.")
        for camera in self.supervisor.cameras:
            if now - self._alive.get(camera, 0.0) > LIFE_S:
                raise DriverError(
                    f"camera {camera} sends nothing", code="CAMERA_SILENT", remedy="Check the camera and its topic."
                )
        policies = self._living_policies(now)
        if len(policies) != 1:
            if policies:
                raise DriverError(str(Fault(*_two_policies(policies))), code="TWO_POLICIES", remedy="Stop one of them.")
            raise DriverError("no policy is there", code="NO_POLICY", remedy="Start policy_node and see what it says.")
        fault = self._policies[policies[0]]
        if fault is not None:
            raise DriverError(f"the policy is not ready: {fault}", code=fault.code, remedy=fault.remedy)
        assert arm is not None
        state = arm.state()
        if state.errors:
            raise DriverError(
                f"the arm reports: {'; '.join(state.errors)}", code="ROBOT_ERROR", remedy="Call reset_fault."
            )
        pose = state.pose if self.config.dry_run else arm.begin()
        self._begin(pose, self._open(state), now)
        return "dry run: the policy acts, the arm is not moved" if self.config.dry_run else "the policy acts"

    def _begin(self, pose: Pose, gripper_open: bool, now: float) -> None:
        self._slew = Slew(self.limits, pose)
        self._target, self._commanded = Reference(pose, np.zeros(3), np.zeros(3), gripper_open), pose
        self._executor = Executor(self.action, pose, gripper_open, now, self.config.executor)
        self._held, self._let_go, self._last = False, False, now
        self._rested = self._settled = 0.0
        while not self._chunks.empty():  # of an earlier time
            self._chunks.get_nowait()
        self.supervisor.start(now)

    def _stop(self) -> str:
        self.supervisor.stop()
        if self._homing:
            self._homing = False
            assert self._arm is not None
            self._arm.halt()
        return "stopping" if self._slew is not None else "stopped"

    def _home(self) -> str:
        if self.supervisor.fault is not None:
            raise DriverError(f"a fault is latched: {self.supervisor.fault}", code="FAULT", remedy="Call reset_fault.")
        if self._slew is not None:
            raise DriverError("the policy acts", code="RUNNING", remedy="Call stop first.")
        if self.config.dry_run:
            return "dry run: the arm is not moved"
        assert self._arm is not None
        self._arm.start_home()
        self._homing = True
        return "on the way home"

    def _reset(self) -> str:
        if self._slew is not None:
            raise DriverError("the arm still brakes", code="BRAKING", remedy="Try again in a moment.")
        fault = self.supervisor.fault
        assert self._arm is not None
        if fault is not None and fault.code == "ROBOT_SILENT":
            self._arm.close()
            self._arm = self._connect()
        try:
            errors = self._arm.recover()
        except ArmError as error:
            if error.code != "ROBOT_SILENT":  # after another fault: the latched one does not say so
                raise
            self._arm.close()
            self._arm = self._connect()
            errors = self._arm.recover()
        self.supervisor.reset()
        told = [str(fault)] if fault else []
        return "; ".join([*told, *errors]) or "there was no fault"

    def _fail(self, error: ArmError) -> None:
        """The arm is no longer under control."""
        self.supervisor.trip(error.code, "arm", "an arm that follows", str(error.args[0]), error.remedy)
        self._slew, self._homing, self._let_go = None, False, False

    def _release(self) -> None:
        self._slew, self._let_go = None, False
        if self._arm is not None and not self.config.dry_run:
            self._arm.end()

    def _come_to_rest(self) -> None:
        """Brake before the connection ends."""
        self.supervisor.stop()
        end = time.perf_counter() + 2.0
        while self._slew is not None and time.perf_counter() < end:
            self._cycle(publish=True)
            time.sleep(self.tick)

    def _living_policies(self, now: float) -> list[str]:
        return [name for name in self._policies if now - self._alive[name] < LIFE_S]

    def _open(self, state: ArmState) -> bool:
        arm = self._arm
        return arm is None or arm.gripper is None or state.gripper_width > 0.5 * arm.config.gripper_open


def _two_policies(names: list[str]) -> tuple[str, str, str, str, str]:
    return "TWO_POLICIES", "policy", "one policy_node", ", ".join(sorted(names)), "Stop all but one, then reset_fault."


def _at_rest(target: Reference) -> bool:
    velocities: Any = (target.velocity, target.angular_velocity)
    return all(float(np.linalg.norm(v)) < AT_REST for v in velocities)
