"""The arm: a Franka driven by franky, real or simulated by franky-sim alike.

One impedance tracker lives as long as the arm is under control and is fed with references; the gripper has a thread
of its own, since its commands block. Errors of the robot are told in words. Nothing here decides what is safe: the
supervisor does.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import franky
import numpy as np

from deployment.kinematics import InverseKinematics
from deployment.reference import Pose, Reference
from deployment.supervisor import Limits
from vla.errors import SimrealError

STOP_S = 5.0  # at most, until the arm is at rest
REACH_MARGIN = 0.02  # rad: the arm is led to joints this far inside the range whose end is a fault
MAX_ACCELERATION = 15.0  # rad/s2, of a joint
TORQUE_STEP = 2.5  # Nm, of the commanded torque in a millisecond; libfranka's filter (100 Hz) lets 39% of it pass
SLIDING = 0.02  # rad/s: a joint at this speed has most of its Coulomb friction
GRIPPER_S = 5.0  # after which a command counts as stuck
WIDTH_S = 3.0  # without the gripper's width: an error. An arm that goes silent takes its hand along, and is told before
GRASP_MARGIN = 1.0  # m, on either side of the commanded width: whatever the fingers close on counts


class ArmError(SimrealError):
    """The arm can't be reached, refuses, or has stopped."""


@dataclass(frozen=True)
class ArmConfig:
    """A robot and how it is driven; a file of configs/robot.

    arm_id: fr3 or panda.
    limits: what the arm may do.
    home: joint positions that trials begin from, rad.
    friction_coulomb: friction of each joint, Nm.
    friction_viscous: the same, Nm s/rad.
    motor_inertia: of each joint's motor behind its gear, which the arm's own model leaves out, kg m2.
    feed_forward: share of the torque that the reference's motion takes (inertia and friction) that the tracker is
        given beforehand; 0 leaves all of it to the springs, and the arm behind its reference.
    rate_hz: of the reference that the tracker is fed with.
    stiffness: of each joint, Nm/rad.
    damping: of each joint, Nm s/rad.
    error_clip: greatest distance of a joint from its reference that the spring pulls with, rad: what bounds the force
        on whatever holds the arm up, and the speed at which it catches up.
    collision_torque: contact torque of a joint at which the arm stops, Nm.
    collision_force: contact force at which the arm stops, N.
    home_speed: share of the arm's greatest velocity, acceleration and jerk on the way home.
    gripper_speed: m/s.
    gripper_force: N.
    gripper_open: width of the open gripper, m.
    realtime: enforce a realtime kernel, as a real arm needs, or ignore it.
    """

    arm_id: str
    limits: Limits
    home: tuple[float, ...]
    friction_coulomb: tuple[float, ...] = (0.0,) * 7
    friction_viscous: tuple[float, ...] = (0.0,) * 7
    motor_inertia: tuple[float, ...] = (0.0,) * 7
    feed_forward: float = 1.0
    rate_hz: float = 200.0
    stiffness: tuple[float, ...] = (600.0, 600.0, 600.0, 600.0, 250.0, 150.0, 50.0)
    damping: tuple[float, ...] = (50.0, 50.0, 50.0, 50.0, 30.0, 25.0, 15.0)
    error_clip: float = 0.05
    collision_torque: float = 30.0
    collision_force: float = 40.0
    home_speed: float = 0.15
    gripper_speed: float = 0.1
    gripper_force: float = 30.0
    gripper_open: float = 0.08
    realtime: Literal["enforce", "ignore"] = "ignore"


@dataclass(frozen=True)
class ArmState:
    """Measured state. stamp: s, host clock when it was read. joints, joint_velocities: `[7]` rad, rad/s.

    pose: of the tool centre. gripper_width: m. errors: what the robot reports, in words; empty while all is well.
    """

    stamp: float
    joints: np.ndarray
    joint_velocities: np.ndarray
    pose: Pose
    gripper_width: float
    errors: tuple[str, ...] = ()


WORDS = {
    "joint_reflex": "a joint felt more torque than allowed: the arm hit something or is held",
    "cartesian_reflex": "the tool felt more force than allowed: it hit something or is held",
    "self_collision_avoidance_violation": "the arm would have hit itself",
    "joint_position_limits_violation": "a joint moved past its range: unlock the arm in Desk and guide it back by hand",
    "cartesian_position_limits_violation": "the tool left the space set in Desk",
    "joint_velocity_violation": "a joint moved too fast",
    "cartesian_velocity_violation": "the tool moved too fast",
    "communication_constraints_violation": "too many packets came late: use a realtime kernel and a direct cable",
    "controller_torque_discontinuity": "the commanded torque jumped",
    "force_control_safety_violation": "the force control exceeded its safety bound",
    "power_limit_violation": "the motion needed more power than allowed",
    "tau_j_range_violation": "a torque sensor is out of its range",
    "instability_detected": "the arm began to oscillate: lower the stiffness",
}


def in_words(errors: Any) -> tuple[str, ...]:
    """The names of libfranka's error flags that are set, with what they mean."""
    names = [n for n in dir(errors) if not n.startswith("_") and getattr(errors, n) is True]
    return tuple(f"{name}: {WORDS[name]}" if name in WORDS else name.replace("_", " ") for name in names)


@dataclass
class Gripper:
    """Opens and closes in a thread of its own; of commands that come while it moves, the last one counts."""

    hand: Any
    config: ArmConfig
    width: float = field(init=False)
    _failures: dict[str, str] = field(default_factory=dict, init=False)
    _wanted: bool | None = field(default=None, init=False)
    _done: bool | None = field(default=None, init=False)
    _over: bool = field(default=False, init=False)
    _begun: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.width = float(self.hand.width)
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gripper", daemon=True)
        self._watch = threading.Thread(target=self._read, name="gripper width", daemon=True)
        self._thread.start()
        self._watch.start()

    def command(self, is_open: bool) -> None:
        """Ask for open or closed; returns at once."""
        with self._change:
            if is_open != self._wanted:
                self._wanted, self._begun = is_open, time.monotonic()
                self._change.notify()

    @property
    def busy(self) -> bool:
        """Whether a command is not finished yet."""
        return self._wanted != self._done

    @property
    def error(self) -> str:
        """What does not work, or nothing."""
        stuck = self.busy and time.monotonic() - self._begun > GRIPPER_S
        return "; ".join([*self._failures.values(), *(["the gripper does not finish its motion"] if stuck else [])])

    def forget(self) -> None:
        """Forget what went wrong, and what was commanded: the next command is carried out in any case."""
        with self._change:
            self._failures.clear()
            self._wanted = self._done = None

    def shut_down(self) -> None:
        """End the threads; the fingers stay where they are."""
        with self._change:
            self._over = True
            self._change.notify()
        self._thread.join(5)
        self._watch.join(5)
        self.hand = None  # ends the connection; a hand serves one at a time, too

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._over or self._wanted != self._done)
                if self._over:
                    return
                wanted = self._wanted
            try:
                failure = self._carry_out(bool(wanted))
            except Exception as error:  # whatever the hand's network protocol raises
                failure = str(error)
            if failure:
                self._failures["move"] = f"the gripper did not {'open' if wanted else 'close'}: {failure}"
            else:
                self._failures.pop("move", None)
            with self._change:
                self._done = wanted

    def _carry_out(self, is_open: bool) -> str:
        """Open or close; why it failed."""
        width, speed = self.config.gripper_open, self.config.gripper_speed
        if is_open:
            done = self.hand.move(width, speed)
        else:
            done = self.hand.grasp(0.0, speed, self.config.gripper_force, GRASP_MARGIN, GRASP_MARGIN)
        found = float(self.hand.width)
        if not done or (found < 0.5 * width if is_open else found > 0.95 * width):
            return f"it stands at {1e3 * found:.0f} mm"
        return ""

    def _read(self) -> None:
        told = time.monotonic()
        while not self._over:
            try:
                self.width = float(self.hand.width)
                told = time.monotonic()
                self._failures.pop("width", None)
            except Exception as error:
                if time.monotonic() - told > WIDTH_S:
                    self._failures["width"] = f"the gripper does not tell its width: {error}"
            time.sleep(0.01)


@dataclass(frozen=True)
class Geometry:
    """The arm's own model, with the tool that it is set up for."""

    model: Any
    flange_to_tool: Any
    tool_to_stiffness: Any

    def pose(self, joints: np.ndarray) -> Pose:
        frame = self.model.pose(franky.Frame.EndEffector, joints, self.flange_to_tool, self.tool_to_stiffness)
        return Pose(np.array(frame.translation), np.array(frame.quaternion))

    def jacobian(self, joints: np.ndarray) -> np.ndarray:
        frame = franky.Frame.EndEffector
        return np.array(self.model.zero_jacobian(frame, joints, self.flange_to_tool, self.tool_to_stiffness))


class FrankaArm:
    """The connection to one arm. `clock` gives the time in s that states are stamped with."""

    def __init__(self, address: str, config: ArmConfig, load_gripper: bool = True,
                 clock: Callable[[], float] = time.time):  # fmt: skip
        self.config, self.address, self.clock = config, address, clock
        realtime = {"enforce": franky.RealtimeConfig.Enforce, "ignore": franky.RealtimeConfig.Ignore}[config.realtime]
        self._own = os.sched_getscheduler(0), os.sched_getparam(0)
        try:
            self.robot = franky.Robot(address, realtime_config=realtime)
        except franky.IncompatibleVersionException as error:
            raise ArmError(
                f"the arm at {address} speaks another version of the control interface: {error}", code="ROBOT_VERSION",
                remedy="Install the release of franky-control that fits the arm's system version, see its README.",
            ) from error  # fmt: skip
        except franky.NetworkException as error:
            raise ArmError(
                f"no Franka answers at {address}: {error}", code="ROBOT_UNREACHABLE",
                remedy="Check cable and address, unlock the joints and activate FCI in Desk.",
            ) from error  # fmt: skip
        finally:
            # libfranka gives the thread that connects the highest priority, if it may. The control thread needs it,
            # which `_move` starts; Python does not, and whatever else is started from here would inherit it.
            self._realtime = os.sched_getscheduler(0), os.sched_getparam(0)
            os.sched_setscheduler(0, *self._own)
        self.robot.set_collision_behavior(config.collision_torque, config.collision_force)
        self.gripper = Gripper(self._hand(), config) if load_gripper else None
        self._motion: Any = None
        self._ending = False
        self._inverse: InverseKinematics | None = None
        self._velocities = np.zeros(7)  # wanted last, rad/s

    def _hand(self) -> Any:
        try:
            return franky.Gripper(self.address)
        except franky.NetworkException as error:
            raise ArmError(
                f"the arm at {self.address} has no gripper: {error}", code="GRIPPER_UNREACHABLE",
                remedy="Switch the hand on in Desk, or start with load_gripper=false.",
            ) from error  # fmt: skip

    @property
    def under_control(self) -> bool:
        """Whether the tracker is running."""
        return self._motion is not None and bool(self.robot.is_in_control)

    def state(self) -> ArmState:
        """The newest state; in control that costs microseconds, else up to 2 ms. Raises ArmError if none comes."""
        now, raw = self.clock(), self._read()
        tool = raw.O_T_EE
        return ArmState(
            now, np.array(raw.q), np.array(raw.dq), Pose(np.array(tool.translation), np.array(tool.quaternion)),
            self.gripper.width if self.gripper else 0.0, in_words(raw.current_errors),
        )  # fmt: skip

    def _read(self) -> Any:
        """The robot's state as franky gives it."""
        try:
            return self.robot.state
        except (franky.Exception, franky.NetworkException, RuntimeError) as error:
            self._motion = None
            raise ArmError(
                f"the arm at {self.address} no longer answers: {error}", code="ROBOT_SILENT",
                remedy="Check cable, power and FCI in Desk, then start again.",
            ) from error  # fmt: skip

    def begin(self) -> Pose:
        """Take control and hold the present pose, which is returned."""
        self._wait()
        config = self.config
        motion = franky.JointImpedanceTrackingMotion(
            stiffness=np.array(config.stiffness), damping=np.array(config.damping),
            lower_joint_limits=np.array(config.limits.joint_lower),
            upper_joint_limits=np.array(config.limits.joint_upper), max_delta_tau=TORQUE_STEP,
        )  # fmt: skip
        raw = self._read()
        joints, margin = np.array(raw.q), config.limits.joint_margin + REACH_MARGIN
        motion.set_reference(franky.JointReference(q=joints, dq=np.zeros(7)))
        self._inverse = InverseKinematics(
            Geometry(self.robot.model, raw.F_T_EE, raw.EE_T_K), joints, np.array(config.home),
            np.array(config.limits.joint_lower) + margin, np.array(config.limits.joint_upper) - margin,
        )  # fmt: skip
        self._velocities = np.zeros(7)
        self._move(motion)
        self._motion = motion
        return Pose(np.array(raw.O_T_EE.translation), np.array(raw.O_T_EE.quaternion))

    def follow(self, reference: Reference, dt: float) -> None:
        """Hand the tracker the reference for `dt` s from now, and the gripper its command.

        Raises ArmError if control was lost.
        """
        if not self.under_control or self._inverse is None:
            raise self._lost()
        wanted, raw = self._inverse.follow(reference, dt), self._read()
        clip, measured = self.config.error_clip, np.array(raw.q)
        joints = np.clip(wanted.positions, measured - clip, measured + clip)
        torques = self._torques(raw, wanted.velocities, dt)
        self._motion.set_reference(franky.JointReference(q=joints, dq=wanted.velocities, tau_ff=torques))
        if self.gripper:
            self.gripper.command(reference.gripper_open)

    def rest(self) -> Pose:
        """Hold where the joints come to rest, in place of the end of a reference that they overshoot.

        Their springs slow them down; a joint that its spring would pull back is held where it is, so that it does not
        creep. Returns the tool's pose for the joints that are held. Raises ArmError if control was lost.
        """
        if not self.under_control or self._inverse is None:
            raise self._lost()
        raw, held = self._read(), self._inverse.joints
        measured = np.array(raw.q)
        turned = (held - measured) * np.array(raw.dq) > 0
        held = np.where(turned, measured, held)
        self._inverse.joints, self._velocities = held, np.zeros(7)
        self._motion.set_reference(franky.JointReference(q=held, dq=np.zeros(7)))
        return self._inverse.arm.pose(held)

    def _torques(self, raw: Any, velocities: np.ndarray, dt: float) -> np.ndarray:
        """What it takes to move the joints as wanted, `[7]` Nm: inertia and friction; the arm adds the rest itself.

        Of the wanted motion, not the measured one: so it can't make the arm swing (Siciliano et al. 2009, 8.5.1).
        """
        config = self.config
        accelerations = np.clip((velocities - self._velocities) / dt, -MAX_ACCELERATION, MAX_ACCELERATION)
        self._velocities = velocities
        friction = np.array(config.friction_coulomb) * np.tanh(velocities / SLIDING)
        friction += np.array(config.friction_viscous) * velocities
        inertia = self.robot.model.mass(raw) + np.diag(config.motor_inertia)
        return np.asarray(config.feed_forward * (inertia @ accelerations + friction))

    def end(self) -> None:
        """Begin to give control back, which takes a moment; harmless if nothing is controlled."""
        if self._motion is None:
            return
        self._motion, self._ending = None, True
        if self.robot.is_in_control:
            self._move(franky.TorqueStopMotion())

    def _wait(self) -> None:
        """Until control is given back, if `end` has begun to."""
        if self._ending:
            self._ending = False
            with contextlib.suppress(franky.ControlException, franky.NetworkException):  # told when control was lost
                self.robot.join_motion(timeout=STOP_S)

    def start_home(self, joints: Sequence[float] | None = None) -> None:
        """Open the gripper and set off for the home position, or for other joint positions, slowly."""
        self.end()
        self.recover()
        if self.gripper:
            self.gripper.command(True)
        factor = franky.RelativeDynamicsFactor(self.config.home_speed)
        target = np.array(self.config.home if joints is None else joints)
        self._move(franky.JointMotion(target, relative_dynamics_factor=factor))

    def _move(self, motion: Any) -> None:
        """Start a motion; a control thread that begins with it inherits realtime priority."""
        os.sched_setscheduler(0, *self._realtime)
        try:
            self.robot.move(motion, asynchronous=True)
        finally:
            os.sched_setscheduler(0, *self._own)

    def homing(self) -> bool:
        """Whether it is still on its way home. Raises ArmError if it was stopped."""
        if self.robot.is_in_control:
            return True
        try:
            self.robot.join_motion(timeout=0.0)  # raises what ended the motion, if it did not end by itself
        except franky.Exception as error:
            raise self._lost(error) from error
        return False

    def halt(self) -> None:
        """Break off a motion home."""
        self.robot.stop()
        with contextlib.suppress(franky.Exception):  # the motion tells that it was broken off
            self.robot.join_motion(timeout=STOP_S)

    def recover(self) -> tuple[str, ...]:
        """Clear the errors of robot and gripper, if there are any; returns what they were."""
        self._wait()
        errors = in_words(self._read().current_errors)
        if self.gripper and self.gripper.error:
            errors = (*errors, self.gripper.error)
            self.gripper.forget()
        if self.robot.has_errors and not self.robot.recover_from_errors():
            raise ArmError(
                f"the arm does not recover: {'; '.join(errors) or 'it does not say why'}", code="ROBOT_ERROR",
                remedy="Free the arm, release the user stop, clear the error in Desk.",
            )  # fmt: skip
        return errors

    def _lost(self, error: Exception | None = None) -> ArmError:
        """Why the arm is no longer under control."""
        self._motion = None
        if error is None:
            try:
                self.robot.join_motion(timeout=STOP_S)
            except Exception as found:  # whatever ended the motion
                error = found
        raw = self._read()
        words = in_words(raw.current_errors) or in_words(raw.last_motion_errors)
        reason = "; ".join(words) or str(error or "the motion ended")
        return ArmError(
            f"the arm stopped: {reason}", code="REFLEX",
            remedy="Free the arm, then reset_fault: it recovers from the error and holds where it is.",
        )  # fmt: skip

    def close(self) -> None:
        """Stop and let go."""
        try:
            self.end()
            self._wait()
        finally:
            if self.gripper:
                self.gripper.shut_down()
            del self.robot  # ends the connection; an arm serves one at a time
