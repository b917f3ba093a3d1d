"""franky-sim's exchange with a driver, in fewer instructions.

franky-sim works out a state of forty fields in Python after every step, which takes longer than the step's millisecond.
While torques are commanded, a driver reads what is measured and nothing else: that is written here into the state that
franky-sim packed last. Standing still and on the way home its own code runs, once for two steps.
"""

import select
import struct
import time
from typing import Any

import numpy as np
from franky_sim.franka_robot_protocol import AutomaticErrorRecoveryCommand, MoveStatus, RobotCommand, RobotMode
from franky_sim.franka_robot_server import ControlMode
from franky_sim.franka_server import BaseCommand

STEP_S = 0.001
ANSWER_S = 0.01  # at most, that a step waits for the driver's torques

# Fields of the packed state that are measured, by their first float; see `FrankaRobotState.pack_state` of franky-sim.
POSE, TORQUE, COMMANDED, POSITION, DESIRED_POSITION, VELOCITY, DESIRED_VELOCITY, EXTERNAL = (
    0, 126, 133, 147, 154, 161, 168, 208
)  # fmt: skip
FLOATS = 215
ERRORS, REASON, MODE = -87, -46, -5  # bytes, from the end of the packed state
CARTESIAN_REFLEX = 7  # among libfranka's 41 errors


class Exchange:
    """Drives a `franky_sim.SimulationServer` of one robot, in place of its own loop.

    A step waits for the torques that answer the state before it, as an arm gets them from a realtime kernel: without
    one they come when they come, and a stiff controller with dead time oscillates.
    """

    def __init__(self, server: Any):
        self._arm, self._simulator = server.robot_servers[0], server.sim
        self._robot = self._arm.robot
        self._answered = 0  # number of the last state that the driver answered
        self._handle, self._arm._handle_udp_command = self._arm._handle_udp_command, self._note
        self._pack, self._arm._get_state_bytes = self._arm._get_state_bytes, self._state
        self._track, self._robot._post_step = self._robot._post_step, self._after_step
        self._template: bytearray | None = None  # of the state, while torques are commanded
        self._error: int | None = None  # that stopped the arm
        self._stop, self._arm.stop_motion = self._arm.stop_motion, self._stop_motion
        self._arm.recovered = self._recovered
        self._arm._FrankaServer__command_class_map[RobotCommand.kAutomaticErrorRecovery] = _Recovery

    def advance(self) -> float:
        """Hear the driver, simulate, tell it the state and wait for its answer; returns the simulated time in s."""
        arm, steps = self._arm, 1
        if self._error is not None and arm.current_motion_id:
            self._abort()
        arm.process_commands()
        if arm._FrankaRobotServer__control_mode is not ControlMode.TORQUE:
            if self._template is not None:  # the connection was cut
                self._forget()
            self._simulator._step()
            steps = 2
        elif self._template is None:
            self._template = bytearray(self._pack())
        self._simulator.step()
        sent = arm._FrankaServer__message_id
        arm.send_state()
        end = time.perf_counter() + ANSWER_S
        while arm.current_motion_id and self._answered < sent and (left := end - time.perf_counter()) > 0:
            select.select([arm._FrankaServer__udp_socket], [], [], left)
            arm._process_udp_commands()
        return steps * STEP_S

    def reflex(self, error: int) -> None:
        """From the next exchange on until the driver recovers it, the arm is stopped by this error."""
        self._error = error

    def _recovered(self) -> None:
        self._error = None

    def _abort(self) -> None:
        number = self._arm.current_motion_id
        self._arm.stop_motion(send_preemption_signal=False)
        self._arm.reset_current_motion_id()
        BaseCommand.send_response(self._arm._tcp_socket, RobotCommand.kMove, number, MoveStatus.kReflexAborted)

    def _stop_motion(self, send_preemption_signal: bool = True) -> None:
        """Before the arm holds where it is, franky-sim has to know where that is."""
        if self._template is not None:
            self._forget()
            self._track()
        self._stop(send_preemption_signal)

    def _note(self, command: bytes) -> None:
        (self._answered,) = struct.unpack_from("<Q", command)
        self._handle(command)

    def _forget(self) -> None:
        """Torques are no longer commanded: franky-sim begins anew to derive velocities from positions."""
        self._template = None
        for component in self._robot._tracked_state_components.values():
            for observer in component.observers.values():
                observer.clear()

    def _after_step(self) -> None:
        if self._template is None:
            self._track()

    def _state(self) -> bytes:
        if self._template is None:
            return self._with_error(bytearray(self._pack()))
        robot, values = self._robot, np.frombuffer(self._template, np.float32, FLOATS)
        measured = robot.inner_state
        values[POSE : POSE + 16] = robot.kinematics(measured.q).homogeneous.flatten(order="F")
        command = self._arm._FrankaRobotServer__current_control_command
        for field, starts in (
            (measured.q, (POSITION, DESIRED_POSITION)), (measured.dq, (VELOCITY, DESIRED_VELOCITY)),
            (measured.tau_j, (TORQUE, EXTERNAL)), (command.tau_J_d, (COMMANDED,)),
        ):  # fmt: skip
            for start in starts:
                values[start : start + 7] = field
        return bytes(self._template)

    def _with_error(self, state: bytearray) -> bytes:
        if self._error is not None:
            state[ERRORS + self._error] = state[REASON + self._error] = 1
            state[MODE] = RobotMode.kReflex
        return bytes(state)


class _Recovery(AutomaticErrorRecoveryCommand):
    """franky-sim's own says that all is well; this one makes it so."""

    def handle(self, server: Any) -> None:
        server.recovered()
        super().handle(server)
