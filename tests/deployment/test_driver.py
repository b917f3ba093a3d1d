"""The driver on the twin: real franky, real franky-sim. What moves the arm, and everything that must stop it."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deployment.driver import Cycle, Driver, DriverConfig
from deployment.executor import integrate
from deployment.franka import ArmConfig, ArmError, FrankaArm
from deployment.reference import Pose, Waypoints
from deployment.twin import TwinConfig, TwinProcess
from vla.contract import ActionSemantics
from vla.errors import Fault, SimrealError
from vla.types import ActionChunk

ACTION = ActionSemantics("delta_ee", "rotvec", "base", 0.02, 0.06, 20.0, 8)
FAULT = Fault("CAMERA_FROZEN", "camera wrist", "images that change", "the same", "Restart the camera.")


class Rig:
    """A driver, its cycles, and a policy's process as far as the driver can tell."""

    def __init__(self, address: str, robot: ArmConfig, config: DriverConfig | None = None):
        self.cycles: list[Cycle] = []
        limits = robot.limits.tightened(ACTION)
        self.driver = Driver(
            lambda: FrankaArm(address, robot), ACTION, limits, config or DriverConfig(), ("wrist",), self.cycles.append
        )
        self.driver.open()
        self.alive("policy")

    def alive(self, policy: str = "policy", fault: Fault | None = None) -> None:
        self.driver.saw("wrist", time.time())
        self.driver.heartbeat(policy, fault)

    def live(self, seconds: float, step: Callable[[], Any] = lambda: None) -> None:
        """Heartbeats for some time, and `step` with each of them."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.alive()
            step()
            time.sleep(0.02)

    def chunk(self, velocity: tuple[float, float, float] = (0.0, 0.0, 0.0), **changes: Any) -> Waypoints:
        """Rows that go on from where the tool is to be now, at so many m/s."""
        cycle = self.cycles[-1]
        actions = np.tile([*np.array(velocity) * 0.05, 0.0, 0.0, 0.0, 1.0], (8, 1))
        return replace(integrate(ActionChunk(actions, cycle.state.stamp), cycle.commanded, 0.05), **changes)

    def move(self, seconds: float, velocity: tuple[float, float, float]) -> None:
        """What a policy that sends a chunk every 0.2 s makes of the arm."""
        last = [0.0]

        def step() -> None:
            if time.monotonic() - last[0] > 0.2:
                last[0] = time.monotonic()
                self.driver.take(self.chunk(velocity))

        self.live(seconds, step)

    def at(self) -> np.ndarray:
        return self.cycles[-1].state.pose.position

    def wait(self, status: str, seconds: float = 10.0) -> None:
        """Until that status."""
        begun = time.monotonic()
        while self.cycles[-1].status != status:
            assert time.monotonic() - begun < seconds, f"{self.cycles[-1].status}, not {status}"
            time.sleep(0.002)

    def still(self, seconds: float = 2.0) -> bool:
        """Whether the reference comes to rest within that time, and the arm with it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            before = self.at()  # franky-sim's idle arm reports velocities although it stands still
            time.sleep(0.1)
            if np.linalg.norm(self.cycles[-1].target.velocity) < 1e-3 and np.linalg.norm(self.at() - before) < 5e-4:
                return True
        return False


@pytest.fixture
def rig(twin: TwinProcess, robot: ArmConfig) -> Iterator[Rig]:
    made = Rig(twin.address, robot)
    if np.linalg.norm(made.at() - [0.46, 0.0, 0.22]) > 0.05:
        made.driver.home()
        time.sleep(0.1)
        while made.cycles[-1].homing:
            time.sleep(0.05)
    made.alive()
    yield made
    made.driver.close()


def refusal(request: Callable[[], str]) -> str:
    with pytest.raises(SimrealError) as caught:
        request()
    assert caught.value.remedy
    return caught.value.code


def test_chunks_move_the_arm_and_stop_lets_it_go(rig: Rig) -> None:
    begun = rig.at()
    assert rig.driver.start() == "the policy acts" and rig.driver.start() == "it runs already"
    rig.move(1.2, (0.0, 0.1, 0.0))
    moved = rig.at() - begun
    assert 0.07 < moved[1] < 0.13 and abs(moved[0]) < 0.01 and abs(moved[2]) < 0.01
    assert refusal(rig.driver.home) == "RUNNING"
    rig.driver.stop()
    rig.wait("idle")
    assert rig.still()
    time.sleep(0.5)
    assert rig.driver.stop() == "stopped"
    assert rig.driver.supervisor.counts["chunks"] >= 5 and not rig.driver.supervisor.fault
    assert max(rig.driver.timing.latency) < 0.5


def test_an_arm_that_is_stopped_does_not_creep_back(rig: Rig) -> None:
    returned: list[float] = []
    for direction in (1, -1) * 4:  # a cycle that the machine is late with makes it return further, so again
        rig.driver.start()
        rig.move(0.5, (0.0, 0.4 * direction, 0.05 * direction))
        begun = len(rig.cycles)
        rig.driver.stop()
        assert rig.still()
        way = direction * np.array([cycle.state.pose.position[1] for cycle in rig.cycles[begun:]])
        assert way[-1] - way[0] > 0.01  # it was moving
        returned.append(float(way.max() - way[-1]))
        if returned[-1] < 3.5e-4:
            return
    pytest.fail(f"pulled back to the end of its reference it returns by 5e-4 m and more: {returned}")


def test_start_is_refused_without_policy_or_camera(twin: TwinProcess, rig: Rig) -> None:
    time.sleep(0.6)
    assert refusal(rig.driver.start) == "CAMERA_SILENT"
    rig.driver.saw("wrist", time.time())
    assert refusal(rig.driver.start) == "NO_POLICY"
    rig.alive(fault=FAULT)
    assert refusal(rig.driver.start) == "CAMERA_FROZEN"
    rig.alive()
    rig.alive("another")
    assert refusal(rig.driver.start) == "TWO_POLICIES"


def test_a_policy_that_dies_makes_the_arm_hold_and_then_stop(rig: Rig) -> None:
    rig.driver.start()
    rig.move(0.6, (0.0, 0.1, 0.0))
    rig.wait("holding")
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        rig.driver.saw("wrist", time.time())
        time.sleep(0.02)
    held = rig.at()
    assert rig.still() and rig.cycles[-1].status == "holding"
    rig.move(0.6, (0.0, 0.1, 0.0))  # it is back
    assert rig.cycles[-1].status == "running" and rig.at()[1] - held[1] > 0.02
    while rig.cycles[-1].status != "fault":
        rig.driver.saw("wrist", time.time())
        time.sleep(0.02)
    fault = rig.driver.supervisor.fault
    assert fault is not None and fault.code == "POLICY_SILENT" and rig.still()
    rig.alive()
    assert refusal(rig.driver.start) == "FAULT"
    assert "POLICY_SILENT" in rig.driver.reset() and rig.driver.start() == "the policy acts"


def test_a_camera_that_goes_silent_is_a_fault(rig: Rig) -> None:
    rig.driver.start()
    rig.move(0.3, (0.0, 0.0, 0.05))
    begun = time.monotonic()
    while rig.cycles[-1].status != "fault" and time.monotonic() - begun < 2.0:
        rig.driver.heartbeat("policy", None)
        rig.driver.take(rig.chunk())
        time.sleep(0.05)
    fault = rig.driver.supervisor.fault
    assert fault is not None and fault.code == "CAMERA_SILENT" and rig.still()
    rig.driver.reset()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"positions": np.full((8, 3), np.nan)}, "CHUNK_NOT_FINITE"),
        ({"rotations": np.zeros((8, 4))}, "CHUNK_ROTATION"),
        ({"positions": np.zeros((3, 3))}, "CHUNK_SHAPE"),
        ({"anchor": Pose(np.array([np.inf, 0, 0]), np.array([0, 0, 0, 1.0]))}, "CHUNK_NOT_FINITE"),
    ],
)
def test_a_policy_that_lies_is_a_fault_and_moves_nothing(rig: Rig, changes: dict[str, Any], code: str) -> None:
    rig.driver.start()
    rig.live(0.2, lambda: rig.driver.take(rig.chunk()))
    before = rig.at()
    rig.driver.take(rig.chunk(**changes))
    rig.wait("fault")
    fault = rig.driver.supervisor.fault
    assert fault is not None and fault.code == code
    assert rig.still() and np.linalg.norm(rig.at() - before) < 0.003
    rig.driver.reset()


def test_what_the_policy_reports_and_a_second_policy_stop_the_arm(rig: Rig) -> None:
    for cause, code in (
        (lambda: rig.alive(fault=FAULT), "CAMERA_FROZEN"),
        (lambda: rig.alive("another"), "TWO_POLICIES"),
        (lambda: rig.driver.refuse(Fault("CHUNK_SHAPE", "chunk", "8", "3", "See the log.")), "CHUNK_SHAPE"),
    ):
        rig.driver.start()
        rig.move(0.3, (0.0, 0.05, 0.0))
        cause()
        rig.wait("fault")
        fault = rig.driver.supervisor.fault
        assert fault is not None and fault.code == code and rig.still()
        time.sleep(0.6)  # until the other one counts as gone
        rig.driver.reset()
        rig.alive()


def test_a_reflex_is_told_in_words_and_recovered_from(twin: TwinProcess, rig: Rig) -> None:
    rig.driver.start()
    rig.move(0.3, (0.0, 0.05, 0.0))
    twin.reflex()
    rig.wait("fault")
    fault = rig.driver.supervisor.fault
    assert fault is not None and fault.code == "REFLEX" and "the tool felt more force than allowed" in fault.found
    assert rig.still()
    assert refusal(rig.driver.start) == "FAULT"
    assert "cartesian_reflex" in rig.driver.reset()
    rig.alive()
    rig.driver.start()
    before = rig.at()
    rig.move(0.6, (0.0, -0.1, 0.0))
    assert rig.cycles[-1].status == "running" and rig.at()[1] < before[1] - 0.02


def test_fingers_that_do_not_move_are_a_fault(twin: TwinProcess, rig: Rig) -> None:
    rig.driver.start()
    rig.move(0.2, (0.0, 0.0, 0.0))
    twin.jam(True)
    try:
        rig.live(0.1, lambda: rig.driver.take(rig.chunk(gripper_open=np.zeros(8, bool))))
        rig.wait("fault")
        fault = rig.driver.supervisor.fault
        assert fault is not None and fault.code == "GRIPPER" and "did not close" in fault.found
    finally:
        twin.jam(False)
    assert "did not close" in rig.driver.reset()
    rig.alive()
    rig.driver.start()
    rig.move(0.3, (0.0, 0.0, 0.0))
    assert rig.cycles[-1].status == "running"


def test_a_dry_run_computes_and_does_not_move(twin: TwinProcess, robot: ArmConfig) -> None:
    rig = Rig(twin.address, robot, DriverConfig(dry_run=True))
    try:
        time.sleep(0.1)
        rig.alive()
        before = rig.at()
        assert "dry run" in rig.driver.start()
        rig.move(0.6, (0.0, 0.0, 0.05))
        assert np.linalg.norm(rig.at() - before) < 0.001
        assert rig.cycles[-1].target.pose.position[2] - before[2] > 0.01
    finally:
        rig.driver.close()


def test_no_arm_is_an_error_at_once(robot: ArmConfig) -> None:
    driver = Driver(
        lambda: FrankaArm("127.77.0.1", robot), ACTION, robot.limits, DriverConfig(), (), lambda cycle: None
    )
    with pytest.raises(ArmError) as caught:
        driver.open()
    assert caught.value.code == "ROBOT_UNREACHABLE"
    driver.close()


def test_an_arm_that_went_silent_after_another_fault_is_there_again_after_the_reset(robot: ArmConfig) -> None:
    """As on a machine that stands still for seconds: first the cameras are missed, then the connection is lost."""
    sleeper = TwinProcess(TwinConfig(initial_joints=robot.home))
    rig = Rig(sleeper.address, robot)
    try:
        rig.live(0.2)
        rig.driver.start()
        rig.live(0.2)
        rig.wait("fault")  # no chunk came, or no camera
        fault = rig.driver.supervisor.fault
        assert fault is not None and fault.code != "ROBOT_SILENT"
        os.kill(sleeper.process.pid or 0, signal.SIGSTOP)
        time.sleep(4.0)
        os.kill(sleeper.process.pid or 0, signal.SIGCONT)
        end = time.monotonic() + 15
        while True:  # as a conductor does it
            try:
                assert fault.code in rig.driver.reset()
                break
            except SimrealError:
                assert time.monotonic() < end, "it is not there again"
                time.sleep(0.1)
        rig.live(0.3)
        assert rig.driver.start() == "the policy acts"
    finally:
        rig.driver.close()
        sleeper.stop()


def test_an_arm_that_goes_silent_is_a_fault(robot: ArmConfig) -> None:
    mortal = TwinProcess(TwinConfig(initial_joints=robot.home))
    rig = Rig(mortal.address, robot)
    try:
        time.sleep(0.1)
        rig.alive()
        rig.driver.start()
        rig.move(0.3, (0.0, 0.05, 0.0))
        mortal.process.kill()
        mortal.process.join()
        end = time.monotonic() + 10
        while rig.driver.supervisor.fault is None and time.monotonic() < end:
            rig.alive()
            time.sleep(0.02)
        fault = rig.driver.supervisor.fault
        assert fault is not None and fault.code in ("ROBOT_SILENT", "REFLEX") and fault.remedy
        rig.wait("fault")
        assert rig.cycles[-1].due is None
    finally:
        rig.driver.close()
