"""The twin: a Franka simulated by franky-sim at its table, with cameras, for everything that is to run without an arm.

franky-sim speaks the arm's own network protocol, so the driver doesn't know the difference. The scene of put-on-plate
is drawn as in the training simulator, but the physics is another one: 1 kHz, torque control, friction in the joints.
The `shifted` preset changes physics and cameras further; it stands for a world that no one has modelled.
"""

import contextlib
import multiprocessing as mp
import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Any
from xml.etree import ElementTree

import numpy as np

from vla import graphics
from vla.adapters.tabletop import CAMERAS
from vla.errors import SimrealError
from vla.tasks import mjcf
from vla.tasks.put_on_plate import Episode, Placement, is_success

graphics.choose()  # mujoco reads it at its import, so what imports mujoco comes after it
import franky_sim  # noqa: E402
import mujoco  # noqa: E402
from franky_sim.mujoco_simulator import MujocoSimulator  # noqa: E402

OBJECTS, RECEPTACLES = 4, 2  # slots: no variant has more
PARKED = (-1.0, 1.5)  # x and y in m of what an episode doesn't use
START_S = 60  # at most, until a twin serves
EXCHANGE_S = 0.002  # between the states that the arm sends
PACE_EXCHANGES = 500  # over which the pace is measured
ANSWER_S = 0.01  # at most, that a step waits for the driver's torques
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
    """

    size: int = 64
    rate_hz: float = 20.0
    delay_s: float = 0.0
    noise: float = 1.0
    gain: float = 1.0
    shift_m: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn_deg: float = 0.0
    drop: float = 0.0


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
    """A twin. initial_joints: where the arm stands at first, rad."""

    cameras: CameraOptions = field(default_factory=CameraOptions)
    physics: PhysicsOptions = field(default_factory=PhysicsOptions)
    initial_joints: tuple[float, ...] = (0.0, -0.1008, 0.0, -2.4942, 0.0, 2.3933, -0.7854)
    seed: int = 0


SHIFTED = TwinConfig(
    CameraOptions(noise=4.0, gain=0.93, delay_s=0.03, shift_m=(0.008, -0.006, 0.005), turn_deg=0.8),
    PhysicsOptions(joint_friction=1.4, object_mass=1.6, object_friction=0.75, hand_force=0.7),
)


@dataclass(frozen=True)
class Frame:
    """An image: uint8 RGB `[H, W, 3]`; stamp: s, host clock at its capture."""

    camera: str
    stamp: float
    image: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """success: the task's own predicate. distance_m: from the object to the goal's centre. grasped: by both pads."""

    success: bool
    distance_m: float
    grasped: bool


class Twin:
    """The physics, in a process of its own: arm, objects, and the arm's network protocol.

    `shown` gets the configuration for the cameras. address: what the driver connects to, once started.
    """

    def __init__(self, config: TwinConfig, shown: "_Shown"):
        self.config, self.shown = config, shown
        self.address = ""
        self._episode: Episode | None = None
        self._pending: Episode | None = None
        self._over = False
        self._changed = Condition()

    def run(self, started: Callable[[str, Any], None]) -> None:
        """Serve until `stop`; `started` gets the address and the model that the cameras are to see."""
        with MujocoSimulator() as simulator:
            robot = simulator.add_robot(initial_q=self.config.initial_joints, initial_hand_width=0.08)
            self._furnish(simulator)
            simulator.register_post_step_callback(lambda _: self._after_step())
            with franky_sim.SimulationServer(simulator) as server:
                self._model, self._data = simulator.model, simulator.data
                self._finish_model()
                self.address = str(robot.hostname)
                started(self.address, self._model)
                self._serve(server)

    def stop(self) -> None:
        self._over = True

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
        goal = episode.receptacles[0]
        done = is_success(episode, position, speed, width, left or right)
        return Verdict(done, float(np.hypot(position[0] - goal.x, position[1] - goal.y)), left and right)

    def _serve(self, server: Any) -> None:
        """Physics of 1 kHz on the wall clock; after a delay it catches up by no more than 20 ms.

        The arm talks to its driver every 2 ms, which halves what a step costs. A step waits for the torques that
        answer the state before it, as an arm gets them from a realtime kernel: without one they come when they come,
        and a stiff controller with dead time oscillates.
        """
        arm, answered, simulator = server.robot_servers[0], [0], server.sim
        handle = arm._handle_udp_command

        def note(command: bytes) -> None:
            (answered[0],) = struct.unpack_from("<Q", command)  # number of the state that it answers
            handle(command)

        arm._handle_udp_command = note
        due = paced = time.perf_counter()
        exchanges = 0
        while not self._over:
            arm.process_commands()
            simulator._step()
            simulator.step()
            sent = arm._FrankaServer__message_id
            arm.send_state()
            limit = time.perf_counter() + ANSWER_S
            while arm.current_motion_id and answered[0] < sent and time.perf_counter() < limit:
                time.sleep(5e-5)
                arm._process_udp_commands()
            now = time.perf_counter()
            exchanges += 1
            if exchanges % PACE_EXCHANGES == 0:
                self.shown.pace.value, paced = PACE_EXCHANGES * EXCHANGE_S / (now - paced), now
            due = max(due + EXCHANGE_S, now - 0.02)
            time.sleep(max(0.0, due - time.perf_counter()))

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

    def _finish_model(self) -> None:
        model, options = self._model, self.config
        self._items = mujoco.MjModel.from_xml_string(mjcf.library())
        for look in range(mjcf.TABLES):
            start = model.tex_adr[model.texture(f"table{look}").id]
            pixels = mjcf.table_texture(look).reshape(-1)
            model.tex_data[start : start + pixels.size] = pixels
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
        """After every exchange: lay out what is asked for, show the cameras the configuration."""
        with self._changed:
            if self._pending is not None:
                dress(self._model, self._items, self._pending, self.config.physics, self._data)
                self._episode, self._pending = self._pending, None
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


def dress(model: Any, items: Any, episode: Episode, physics: PhysicsOptions, data: Any = None) -> None:
    """Give the model's slots the shapes and looks of an episode's items; with `data` lay them where they belong."""
    for kind, placements, count in (
        ("object", episode.objects, OBJECTS), ("receptacle", episode.receptacles, RECEPTACLES)
    ):  # fmt: skip
        for index in range(count):
            slot = f"{kind}{index}"
            parked = Placement(mjcf.ITEMS["red cube"], PARKED[0], PARKED[1] + 0.2 * index, 0.0)
            placement = placements[index] if index < len(placements) else parked
            mjcf.dress(model, items, slot, placement.item.name)
            if data is not None:
                mjcf.lay(model, data, slot, placement)
            body = model.body(slot)
            if kind == "object":
                body.mass[:] *= physics.object_mass
                body.inertia[:] *= physics.object_mass
                first = int(body.geomadr[0])
                model.geom_friction[first : first + mjcf.MAX_PARTS] *= physics.object_friction
    model.geom("table").matid[:] = model.material(f"table{episode.table}").id


class _Shown:
    """The configuration that the cameras see, in memory that both processes share."""

    SIZE = 128

    def __init__(self, context: Any):
        self._values = context.Array("d", self.SIZE + 2)
        self.pace = context.Value("d", 1.0, lock=False)

    def write(self, qpos: np.ndarray) -> None:
        """Skipped while it is being read: the next one comes in 2 ms."""
        lock = self._values.get_lock()
        if lock.acquire(block=False):
            try:
                values = np.frombuffer(self._values.get_obj())
                values[0], values[1] = time.time(), len(qpos)
                values[2 : 2 + len(qpos)] = qpos
            finally:
                lock.release()

    def read(self) -> tuple[float, np.ndarray]:
        """When it was so, s, and the configuration; empty before the first one."""
        with self._values.get_lock():
            values = np.frombuffer(self._values.get_obj()).copy()
        return float(values[0]), values[2 : 2 + int(values[1])]


class TwinProcess:
    """A twin whose physics runs in a process of its own; its cameras run in a thread of this one.

    on_frame: called with every frame, in that thread. address: what the driver connects to. failure: what broke the
    cameras off.
    """

    def __init__(self, config: TwinConfig | None = None, on_frame: Callable[[Frame], None] | None = None):
        context = mp.get_context("spawn")
        self.config = config or TwinConfig()
        self._ours, theirs = context.Pipe()
        self._shown = _Shown(context)
        self._lock = Lock()
        self._over = False
        self._frozen: set[str] = set()
        self._episode: Episode | None = None
        self._random = np.random.default_rng(self.config.seed)
        self.failure = ""
        self.process = context.Process(target=_serve_twin, args=(self.config, theirs, self._shown), daemon=True)
        self.process.start()
        if not self._ours.poll(START_S):
            self.process.kill()
            raise SimrealError(
                f"the twin did not start within {START_S} s", code="TWIN", remedy="`vla doctor` tests its rendering."
            )
        self.address: str
        self.address, self._model = self._receive()
        self._on_frame = on_frame
        self._cameras = Thread(target=self._run_cameras, name="cameras", daemon=True)
        if on_frame:
            self._cameras.start()

    @property
    def pace(self) -> float:
        """Simulated time over wall time; where it is much below 1, the machine is too slow for what the twin shows."""
        return float(self._shown.pace.value)

    def lay_out(self, episode: Episode) -> None:
        """Put the objects of an episode on the table."""
        self._ask("lay_out", episode)
        self._episode = episode

    def judge(self) -> Verdict:
        """Whether the task of the present episode is done."""
        verdict: Verdict = self._ask("judge")
        return verdict

    def freeze(self, *cameras: str) -> None:
        """These cameras publish their last image from now on; none thaws all."""
        self._frozen = set(cameras)

    def stop(self) -> None:
        """End the process."""
        self._over = True
        if self._cameras.ident is not None:
            self._cameras.join(2)
        if self.process.is_alive():
            with self._lock, contextlib.suppress(OSError):
                self._ours.send(("stop",))
            self.process.join(5)
        self.process.kill()

    def _ask(self, *request: Any) -> Any:
        with self._lock:
            try:
                self._ours.send(request)
                return self._receive()
            except (OSError, EOFError) as error:
                raise SimrealError("the twin's process has ended", code="TWIN", remedy="Start it again.") from error

    def _receive(self) -> Any:
        answer = self._ours.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _run_cameras(self) -> None:
        try:
            self._film()
        except Exception as error:  # without its cameras the twin is of no use
            self.failure = f"its cameras: {error}"

    def _film(self) -> None:
        """Both cameras, again and again."""
        options, model = self.config.cameras, self._model
        context = mujoco.GLContext(options.size, options.size)
        context.make_current()
        renderer = _Renderer(model, options.size)
        items = mujoco.MjModel.from_xml_string(mjcf.library())
        drawn: Episode | None = None
        last: dict[str, np.ndarray] = {}
        due = time.perf_counter()
        while not self._over:
            due = max(due + 1 / options.rate_hz, time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))
            stamp, qpos = self._shown.read()
            if not len(qpos):
                continue
            if self._episode is not drawn and self._episode is not None:
                drawn = self._episode
                dress(model, items, drawn, self.config.physics)
            renderer.place(qpos)
            images = {name: self._develop(renderer.image(name)) for name in CAMERAS}
            time.sleep(max(0.0, stamp + options.delay_s - time.time()))
            for name, image in images.items():
                last[name] = last[name] if name in self._frozen and name in last else image
                if self._random.random() >= options.drop and self._on_frame:
                    self._on_frame(Frame(name, stamp, last[name]))
        renderer.close()
        context.free()

    def _develop(self, image: np.ndarray) -> np.ndarray:
        """Brightness and noise of a real sensor."""
        options = self.config.cameras
        noisy = image * options.gain + self._random.normal(0.0, options.noise, image.shape)
        return np.clip(noisy + 0.5, 0, 255).astype(np.uint8)


def _serve_twin(config: TwinConfig, pipe: Any, shown: _Shown) -> None:
    """The process of a `TwinProcess`; it ends with its parent."""

    def answer() -> None:
        requests = {"lay_out": twin.lay_out, "judge": twin.judge}
        with contextlib.suppress(EOFError, OSError):
            while (request := pipe.recv())[0] != "stop":
                pipe.send(requests[request[0]](*request[1:]))
        twin.stop()

    def started(address: str, model: Any) -> None:
        pipe.send((address, model))
        Thread(target=answer, name="requests", daemon=True).start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this one in order
    with contextlib.suppress(OSError):  # only root may; an arm has a computer of its own
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    twin = Twin(config, shown)
    try:
        twin.run(started)
    except Exception as error:  # told to whoever started it
        pipe.send(SimrealError(f"the twin failed: {error}", code="TWIN", remedy="`vla doctor` tests its rendering."))


class _Renderer:
    """Images of a configuration `qpos`, in a copy of the simulation's data."""

    def __init__(self, model: Any, size: int):
        self._model, self._data = model, mujoco.MjData(model)
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = [1, 1, 1, 0, 0, 0]
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._view = mujoco.MjrRect(0, 0, size, size)
        self._pixels = np.zeros((size, size, 3), np.uint8)

    def place(self, qpos: np.ndarray) -> None:
        self._data.qpos[:] = qpos
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)

    def image(self, camera: str) -> np.ndarray:
        self._camera.fixedcamid = self._model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, self._data, self._option, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._view, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._view, self._context)
        return self._pixels[::-1].astype(np.float64)

    def close(self) -> None:
        self._context.free()
