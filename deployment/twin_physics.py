"""The twin's physics, for a process of its own: the arm that franky-sim simulates, at the table of the task."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any
from xml.etree import ElementTree

import numpy as np

from deployment import twin_board
from deployment.twin_board import Place
from vla import graphics
from vla.adapters.tabletop import CAMERAS
from vla.episodes import Phase
from vla.errors import SimrealError
from vla.rig import BoardSize
from vla.tasks import mjcf
from vla.tasks.put_on_plate import Episode, Placement, is_success

graphics.choose()  # mujoco reads it at its import, so what imports mujoco comes after it
import franky_sim  # noqa: E402
import mujoco  # noqa: E402
from franky_sim.mujoco_simulator import MujocoSimulator  # noqa: E402

from deployment.fci import CARTESIAN_REFLEX, Exchange  # noqa: E402

OBJECTS, RECEPTACLES = 4, 2  # slots: no variant has more
PARKED = (-1.0, 1.5)  # x and y in m of what an episode doesn't use
PACE_S = 1.0  # over which the pace is measured
HELD_S = 0.1  # the driver gives an arm up that has said nothing for a second
AT_OBJECT_M = 0.035  # from tool to object: there it can close around it
LIFTED_M = 0.01  # above where it stood
PREFIX = "robot0_"  # of the names that franky-sim gives to the parts of its first robot


@dataclass(frozen=True)
class CameraOptions:
    """What the cameras are like.

    size: width and height, px.
    rate_hz: frames per second.
    delay_s: from capture to publication.
    noise: standard deviation of a pixel's noise, of 255.
    gain: factor of the brightness.
    shift_m: displacement of the third-person camera along each axis, base frame.
    turn_deg: rotation of the third-person camera about its own x axis.
    drop: share of the frames that are lost.
    filmed: names of the cameras that are rendered.
    """

    size: int = 64
    rate_hz: float = 20.0
    delay_s: float = 0.0
    noise: float = 1.0
    gain: float = 1.0
    shift_m: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn_deg: float = 0.0
    drop: float = 0.0
    filmed: tuple[str, ...] = CAMERAS


@dataclass(frozen=True)
class PhysicsOptions:
    """How the world differs from the model of it, as factors.

    joint_friction: of the arm's joints. object_mass: of all objects. object_friction: of all objects and the pads.
    hand_force: of the gripper's fingers.
    """

    joint_friction: float = 1.0
    object_mass: float = 1.0
    object_friction: float = 1.0
    hand_force: float = 1.0


@dataclass(frozen=True)
class TwinConfig:
    """A twin. initial_joints: where the arm stands at first, rad. board: where a board is, to calibrate with."""

    cameras: CameraOptions = field(default_factory=CameraOptions)
    physics: PhysicsOptions = field(default_factory=PhysicsOptions)
    initial_joints: tuple[float, ...] = (0.0, -0.1008, 0.0, -2.4942, 0.0, 2.3933, -0.7854)
    seed: int = 0
    board: Place = "none"
    board_size: BoardSize = twin_board.SIZE


@dataclass(frozen=True)
class Verdict:
    """success: the task's own predicate. distance_m: from the object to the goal's centre. grasped: by both pads.

    where: how far a failure came since the scene was laid: reach (the tool never was at the object), grasp (never
    lifted it), carry (never over the goal with it) or place; "" for a success.
    """

    success: bool
    distance_m: float
    grasped: bool
    where: Phase = ""


class Shown:
    """The configuration that the cameras see, in memory that both processes share.

    pace: simulated over wall time. seconds: simulated so far. until: what has to be simulated before the physics waits.
    """

    SIZE = 128

    def __init__(self, context: Any):
        self._values = context.Array("d", self.SIZE + 3)
        self.pace = context.Value("d", 1.0, lock=False)
        self.seconds = context.Value("d", 0.0, lock=False)
        self.until = context.Value("d", math.inf, lock=False)

    def write(self, qpos: np.ndarray) -> None:
        """Skipped while it is being read: the next one comes with the next step."""
        lock = self._values.get_lock()
        if lock.acquire(block=False):
            try:
                values = np.frombuffer(self._values.get_obj())
                values[:3] = time.time(), self.seconds.value, len(qpos)
                values[3 : 3 + len(qpos)] = qpos
            finally:
                lock.release()

    def read(self) -> tuple[float, np.ndarray]:
        """When it was so, s, and the configuration; empty before the first one."""
        values = self._copy()
        return float(values[0]), values[3 : 3 + int(values[2])]

    def times(self) -> tuple[float, float]:
        """s of the host's clock, and what was simulated by then; (0, 0) before the first step."""
        values = self._copy()
        return float(values[0]), float(values[1])

    def _copy(self) -> np.ndarray:
        with self._values.get_lock():
            return np.frombuffer(self._values.get_obj()).copy()


class Physics:
    """Arm, objects, and the arm's network protocol.

    `shown` gets the configuration for the cameras. address: what the driver connects to, once started.
    """

    def __init__(self, config: TwinConfig, shown: Shown):
        self.config, self.shown = config, shown
        self.address = ""
        self._episode: Episode | None = None
        self._pending: Episode | None = None
        self._over = self._jammed = False
        self._reached: Phase = "reach"  # the furthest that a policy came in the present episode
        self._changed = Condition()

    def run(self, started: Callable[[str, Any], None]) -> None:
        """Serve until `stop`; `started` gets the address and the model that the cameras are to see."""
        with MujocoSimulator() as simulator:
            robot = simulator.add_robot(initial_q=self.config.initial_joints, initial_hand_width=0.08)
            self._robot = robot
            self._hand_goal, robot.set_hand_goal = robot.set_hand_goal, self._set_hand_goal
            self._furnish(simulator)
            simulator.register_post_step_callback(lambda _: self._after_step())
            with franky_sim.SimulationServer(simulator) as server:
                self._model, self._data = simulator.model, simulator.data
                self._finish_model()
                self._exchange = Exchange(server)
                self.address = str(robot.hostname)
                started(self.address, self._model)
                self._serve()

    def stop(self) -> None:
        self._over = True

    def jam(self, is_jammed: bool) -> None:
        """The fingers stay where they are, whatever they are told."""
        self._jammed = is_jammed

    def reflex(self) -> None:
        """The arm stops as if it had felt a collision, until the driver recovers it."""
        self._exchange.reflex(CARTESIAN_REFLEX)

    def lay_out(self, episode: Episode) -> None:
        """Put the objects of an episode on the table; returns when they are there."""
        with self._changed:
            self._pending = episode
            self._changed.wait_for(lambda: self._pending is None or self._over)

    def judge(self) -> Verdict:
        """Whether the task of the present episode is done."""
        with self._changed:
            if self._episode is None:
                return Verdict(False, float("nan"), False)
            data, episode = self._data, self._episode
            position = data.xpos[self._target].copy()
            speed = float(np.linalg.norm(data.joint("object0_joint").qvel[:3]))
            width = float(data.joint(f"{PREFIX}finger_joint1").qpos[0] + data.joint(f"{PREFIX}finger_joint2").qpos[0])
            left, right = self._touching()
            tool = data.site("tool").xpos.copy()
        goal = episode.receptacles[0]
        done = is_success(episode, position, speed, width, left or right)
        distance = float(np.hypot(position[0] - goal.x, position[1] - goal.y))
        self._note(episode, position, tool, left and right, distance)
        return Verdict(done, distance, left and right, "" if done else self._reached)

    def _note(self, episode: Episode, position: np.ndarray, tool: np.ndarray, grasped: bool, distance: float) -> None:
        """How far this trial came by now; twin_node asks ten times a second."""
        phases: tuple[Phase, ...] = ("reach", "grasp", "carry", "place")
        item = episode.objects[0].item
        phase = 0
        if grasped or np.linalg.norm(position - tool) < AT_OBJECT_M:
            phase = 1
        if grasped and position[2] > item.half_height + LIFTED_M:
            phase = 3 if distance < episode.receptacles[0].item.radius else 2
        self._reached = phases[max(phase, phases.index(self._reached))]

    def _serve(self) -> None:
        """Physics of 1 kHz on the wall clock; after a delay it catches up by no more than 20 ms.

        Whoever replays holds it up by `until`, for no longer than the arm's protocol allows.
        """
        simulated, shown = 0.0, self.shown
        due = paced = time.perf_counter()
        while not self._over:
            end = time.perf_counter() + HELD_S
            while shown.seconds.value >= shown.until.value - 1e-6 and time.perf_counter() < end:
                time.sleep(0.0002)
            seconds = self._exchange.advance()
            shown.seconds.value += seconds
            simulated += seconds
            now = time.perf_counter()
            if simulated >= PACE_S:
                self.shown.pace.value, paced, simulated = simulated / (now - paced), now, 0.0
            due = max(due + seconds, now - 0.02)
            time.sleep(max(0.0, due - time.perf_counter()))

    def _set_hand_goal(self, width: float, speed: float, force: float) -> None:
        """In place of franky-sim's: weaker fingers, or none."""
        if self._jammed:
            width = float(self._robot.hand_width)
        self._hand_goal(width, speed, force * self.config.physics.hand_force)

    def _furnish(self, simulator: Any) -> None:
        """Replace franky-sim's surroundings by those of the task, and simplify its arm."""
        scene, world = simulator.scene, simulator.worldbody
        for element in [e for e in world if e.tag in ("light", "geom")]:
            world.remove(element)
        for element in scene.findall("visual"):
            scene.remove(element)
        used = mjcf.simplify_arm(world)
        asset = scene.find("asset")
        for mesh in [m for m in asset.findall("mesh") if m.get("name") not in used]:
            asset.remove(mesh)
        mjcf.add_table_looks(asset)
        mjcf.add_graphics(scene)
        mjcf.add_surroundings(world)
        ElementTree.SubElement(world, "geom", name="floor", type="plane", size="5 5 0.1", pos="0 0 -0.1", group="3")
        mjcf.add_slots(world, OBJECTS, RECEPTACLES)
        if self.config.board != "none":
            twin_board.add(world, asset, self.config.board, self.config.board_size)

    def _finish_model(self) -> None:
        model, options = self._model, self.config
        self._items = mujoco.MjModel.from_xml_string(mjcf.all_items())
        for look in range(mjcf.TABLES):
            start = model.tex_adr[model.texture(f"table{look}").id]
            pixels = mjcf.table_texture(look).reshape(-1)
            model.tex_data[start : start + pixels.size] = pixels
        if options.board != "none":
            twin_board.paint(model, options.board_size)
        model.dof_frictionloss[:7] *= options.physics.joint_friction
        model.dof_damping[:7] *= options.physics.joint_friction
        self._pads = [model.geom(f"{PREFIX}{side}_finger_pad").id for side in ("left", "right")]
        model.geom_friction[self._pads] *= options.physics.object_friction
        self._target = model.body("object0").id
        camera = model.camera("third_person").id
        model.cam_pos[camera] += options.cameras.shift_m
        turn, quaternion = np.deg2rad(options.cameras.turn_deg) / 2, np.zeros(4)
        mujoco.mju_mulQuat(quaternion, model.cam_quat[camera], np.array([np.cos(turn), np.sin(turn), 0.0, 0.0]))
        model.cam_quat[camera] = quaternion

    def _after_step(self) -> None:
        """Lay out what is asked for, show the cameras the configuration."""
        with self._changed:
            if self._pending is not None:
                lay_out(self._model, self._data, self._items, self._pending, self.config.physics)
                self._episode, self._pending, self._reached = self._pending, None, "reach"
                self._changed.notify_all()
        self.shown.write(self._data.qpos)

    def _touching(self) -> tuple[bool, bool]:
        """Whether the left and the right pad touch the target."""
        first = int(self._model.body_geomadr[self._target])
        parts = range(first, first + mjcf.MAX_PARTS)
        touched = set()
        for a, b in self._data.contact.geom[: self._data.ncon].tolist():
            if a in parts or b in parts:
                touched |= {a, b}
        return self._pads[0] in touched, self._pads[1] in touched


def lay_out(model: Any, data: Any, items: Any, episode: Episode, physics: PhysicsOptions) -> None:
    """Give the model's slots the shapes and looks of an episode's items, and lay them where they belong."""
    for kind, placements, count in (
        ("object", episode.objects, OBJECTS), ("receptacle", episode.receptacles, RECEPTACLES)
    ):  # fmt: skip
        for index in range(count):
            slot = f"{kind}{index}"
            parked = Placement(mjcf.ITEMS["red cube"], PARKED[0], PARKED[1] + 0.2 * index, 0.0)
            placement = placements[index] if index < len(placements) else parked
            mjcf.dress(model, items, slot, placement.item.name)
            mjcf.lay(model, data, slot, placement)
            body = model.body(slot)
            if kind == "object":
                body.mass[:] *= physics.object_mass
                body.inertia[:] *= physics.object_mass
                first = int(body.geomadr[0])
                model.geom_friction[first : first + mjcf.MAX_PARTS] *= physics.object_friction
    model.geom("table").matid[:] = model.material(f"table{episode.table}").id


def serve(config: TwinConfig, pipe: Any, shown: Shown) -> None:
    """The process of a `TwinProcess`; it ends with its parent."""

    def answer() -> None:
        requests = {"lay_out": physics.lay_out, "judge": physics.judge, "jam": physics.jam, "reflex": physics.reflex}
        try:
            with contextlib.suppress(EOFError, OSError):
                while (request := pipe.recv())[0] != "stop":
                    pipe.send(requests[request[0]](*request[1:]))
        finally:
            physics.stop()  # also after a request that broke: nobody could end this process any more

    def started(address: str, model: Any) -> None:
        pipe.send((address, model))
        Thread(target=answer, name="requests", daemon=True).start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this one in order
    with contextlib.suppress(OSError):  # only root may; an arm has a computer of its own
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    physics = Physics(config, shown)
    try:
        physics.run(started)
    except Exception as error:  # told to whoever started it
        pipe.send(SimrealError(f"the twin failed: {error}", code="TWIN", remedy="`vla doctor` tests its rendering."))
