"""The twin: a Franka simulated by franky-sim at its table, with cameras, for everything that is to run without an arm.

franky-sim speaks the arm's own network protocol, so the driver doesn't know the difference. The scene of put-on-plate
is drawn as in the training simulator, but the physics is another one: 1 kHz, torque control, friction in the joints.
The `shifted` preset changes physics and cameras further; it stands for a world that no one has modelled.
"""

import contextlib
import math
import multiprocessing as mp
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any

import numpy as np

from deployment.twin_physics import CameraOptions, PhysicsOptions, Shown, TwinConfig, Verdict, lay_out, serve
from vla import graphics
from vla.errors import SimrealError
from vla.tasks import mjcf
from vla.tasks.put_on_plate import Episode

graphics.choose()  # mujoco reads it at its import
import mujoco  # noqa: E402

START_S = 60  # at most, until a twin serves
ADVANCE_S = 30.0  # at most, for a part of a second that is simulated

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


class TwinProcess:
    """A twin whose physics runs in a process of its own; its cameras run in a thread of this one.

    on_frame: called with every frame, in that thread. address: what the driver connects to. failure: what broke the
    cameras off.
    """

    def __init__(self, config: TwinConfig | None = None, on_frame: Callable[[Frame], None] | None = None):
        context = mp.get_context("spawn")
        self.config = config or TwinConfig()
        self._ours, theirs = context.Pipe()
        self._shown = Shown(context)
        self._lock = Lock()
        self._over = False
        self._frozen: set[str] = set()
        self._episode: Episode | None = None
        self._random = np.random.default_rng(self.config.seed)
        self.failure = ""
        self.process = context.Process(target=serve, args=(self.config, theirs, self._shown), daemon=True)
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

    @property
    def times(self) -> tuple[float, float]:
        """s of the host's clock, and what was simulated by then."""
        return self._shown.times()

    def hold(self) -> None:
        """From now on, simulate what `advance` asks for and no more."""
        self._shown.until.value = self._shown.seconds.value

    def advance(self, seconds: float) -> None:
        """Simulate so much more, and wait for it; a fraction of a step is left for the next time."""
        self._shown.until.value += seconds
        until, end = self._shown.until.value, time.monotonic() + ADVANCE_S
        while self._shown.seconds.value < until - 1e-6:
            if not self.process.is_alive() or time.monotonic() > end:
                raise SimrealError("the twin does not go on", code="TWIN", remedy="`vla doctor` tests it.")
            time.sleep(0.0002)

    def release(self) -> None:
        """Simulate as the time passes."""
        self._shown.until.value = math.inf

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

    def jam(self, is_jammed: bool) -> None:
        """The fingers stay where they are, whatever they are told."""
        self._ask("jam", is_jammed)

    def reflex(self) -> None:
        """The arm stops as if it had felt a collision, until the driver recovers it."""
        self._ask("reflex")

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
                with contextlib.suppress(OSError, EOFError):
                    while self._ours.poll():  # it told why, or answered before
                        self._receive()
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
        renderer = Renderer(model, options.size, options.size)
        items = mujoco.MjModel.from_xml_string(mjcf.all_items())
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
                lay_out(model, renderer.data, items, drawn, self.config.physics)
            renderer.place(qpos)
            images = {name: self._develop(renderer.image(name)) for name in options.filmed}
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


class Renderer:
    """Images of a configuration `qpos`, in a copy of the simulation's data."""

    def __init__(self, model: Any, width: int, height: int):
        self._model, self.data = model, mujoco.MjData(model)
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = [1, 1, 1, 0, 0, 0]
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._view = mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.zeros((height, width, 3), np.uint8)

    def place(self, qpos: np.ndarray) -> None:
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self._model, self.data)
        mujoco.mj_camlight(self._model, self.data)

    def image(self, camera: str) -> np.ndarray:
        self._camera.fixedcamid = self._model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, self.data, self._option, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._view, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._view, self._context)
        return self._pixels[::-1].astype(np.float64)

    def close(self) -> None:
        self._context.free()
