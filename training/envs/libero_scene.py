"""A LIBERO task, compiled once and reset many times, and the process in which such tasks run.

The dynamics are those of LIBERO and robosuite to the last bit, with less done for them: robosuite computes the whole
dynamics three times in each of the 25 substeps of a control step, and reads all observables, images included. Here
they are computed once and nothing is read; `native` and `image` do that for whoever is about to decide. They show what
robosuite's observables do, to the last bit, which it samples 2 ms before a control step ends.
"""

import ctypes
import gc
import importlib.util
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from training.envs.base import GraphicsError
from training.envs.libero_grasp import Grasp
from training.envs.libero_process import serve
from training.envs.libero_teaching import Teaching
from vla import graphics

graphics.choose()
SETTLING = 10  # control steps before the first action, while things fall into place
STAY_OPEN = np.array([0, 0, 0, 0, 0, 0, -1.0])
SUBSTEPS = 25  # of 2 ms
SEEN = 23  # the substep, from 0, in which robosuite samples what it shows after a control step
WRITTEN = ("body_pos", "body_quat", "site_rgba")  # what an episode changes in a compiled scene


def _quiet_robosuite() -> None:
    """Without its log file, which stands in /tmp and belongs to whoever ran it first, and without its advice."""
    folder = importlib.util.find_spec("robosuite").submodule_search_locations[0]  # type: ignore[union-attr, index]
    spec = importlib.util.spec_from_file_location("robosuite.macros", os.path.join(folder, "macros.py"))
    assert spec is not None and spec.loader is not None
    macros: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL, macros.CONSOLE_LOGGING_LEVEL = None, "ERROR"
    sys.modules["robosuite.macros"] = macros


_quiet_robosuite()
import libero.libero  # noqa: E402
import mujoco  # noqa: E402
import robosuite  # noqa: E402
from libero.libero.envs import TASK_MAPPING, bddl_utils  # noqa: E402
from robosuite.utils.errors import RandomizationError  # noqa: E402

from training.envs.libero_control import Control  # noqa: E402 - as all above, imports MuJoCo, which reads MUJOCO_GL
from training.envs.libero_meshes import coarsen  # noqa: E402


class Scene:
    """One task. Its reset is the one of the published evaluations, without compiling the scene again."""

    def __init__(self, bddl: str, antialiasing: bool, mesh_edge: float | None):
        np.random.seed(0)
        problem = bddl_utils.get_problem_info(bddl)["problem_name"]
        self.env: Any = TASK_MAPPING[problem](
            bddl, robots=["Panda"], controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            gripper_types="default", initialization_noise=None, use_camera_obs=False, has_renderer=False,
            has_offscreen_renderer=False, control_freq=20, ignore_done=True, hard_reset=False,
        )  # fmt: skip
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        if not antialiasing:
            self.model.vis.quality.offsamples = 0
        if mesh_edge is not None:
            coarsen(self.model, mesh_edge)
        self.compiled = {name: getattr(self.model, name).copy() for name in WRITTEN}
        self.seen = mujoco.MjData(self.model)  # the moment that is shown
        self.images: dict[int, _Images] = {}

    def reset(self, state: np.ndarray | None, seed: int) -> None:
        """state: the initial one, None for one that is drawn. seed: of what is drawn, fixtures in any case."""
        env = self.env
        np.random.seed(seed % 2**32)
        for name, values in self.compiled.items():
            getattr(self.model, name)[:] = values
        for robot in env.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)  # which robosuite keeps from before
        while True:
            try:
                env.reset()
                break
            except RandomizationError:  # things did not fit on the table: drawn again, as LIBERO does
                continue
        if state is not None:
            env.sim.set_state_from_flattened(state)
        env.sim.forward()
        env._check_success()
        env._post_process()
        self.control = Control(env)
        self.grasp: Grasp | None = None
        for _ in range(SETTLING):
            self.control_step(STAY_OPEN)

    def grasp_of(self, goal: tuple[str, str]) -> Grasp:
        """How the thing of a goal is grasped, chosen when it is asked for the first time in an episode."""
        if self.grasp is None:
            self.grasp = Grasp(self.env, *goal)
        return self.grasp

    def control_step(self, action: np.ndarray) -> bool:
        """Execute an action of LIBERO's `[7]`; whether the task is done."""
        data, seen, (robot,) = self.data, self.seen, self.env.robots
        for substep in range(SUBSTEPS):
            if substep == SEEN:  # positions of bodies are those before a substep, positions of joints those after it
                seen.time, seen.qpos[:] = data.time, data.qpos
            mujoco.mj_step1(self.model, data)
            self.control.apply(action, substep == 0)
            mujoco.mj_step2(self.model, data)
            if substep == SEEN:
                self.seen_fingers = data.qpos[robot._ref_gripper_joint_pos_indexes].copy()
        self.seen_sites = self.model.site_rgba.copy()  # a stove's light, which the end of the step may switch
        done = bool(self.env._check_success())
        self.env._post_process()
        return done

    def native(self, present: bool = False) -> dict[str, Any]:
        """What the adapter takes, without the images; present: of the present moment, not of the one that is shown."""
        data, (robot,) = self.data, self.env.robots
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes].copy()
        if not present:
            data, fingers = self._seen(), self.seen_fingers
        w, x, y, z = data.body(robot.robot_model.eef_name).xquat
        return {
            "base_pos": data.body(robot.robot_model.root_body).xpos.copy(),
            "robot0_eef_pos": data.site_xpos[robot.eef_site_id].copy(),
            "robot0_eef_quat": np.array([x, y, z, w]),
            "robot0_gripper_qpos": fingers,
            "time": float(data.time),
        }

    def _seen(self) -> mujoco.MjData:
        """The scene at the moment that is shown."""
        for stage in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            stage(self.model, self.seen)
        return self.seen

    def look(self, cameras: Sequence[str], size: int) -> dict[str, np.ndarray]:
        """robosuite's images of the moment that is shown, uint8 RGB `[size, size, 3]` with the lowest row first."""
        data, sites = self._seen(), self.model.site_rgba.copy()
        self.model.site_rgba[:] = self.seen_sites
        images = {f"{camera}_image": self._images(size).draw(data, camera) for camera in cameras}
        self.model.site_rgba[:] = sites
        return images

    def picture(self, camera: str, size: int) -> np.ndarray:
        """An image of the present moment, for people."""
        return self._images(size).draw(self.data, camera)[::-1].copy()

    def _images(self, size: int) -> "_Images":
        if size not in self.images:
            self.images[size] = _Images(self.model, size)
        return self.images[size]

    def close(self) -> None:
        for images in self.images.values():
            images.close()
        self.env.close()


class _Images:
    """Off-screen images of a scene, with robosuite's choice of what is drawn. All scenes share a GL context."""

    gl: Any = None
    drawn = 0  # images so far

    def __init__(self, model: mujoco.MjModel, size: int):
        try:
            if _Images.gl is None:
                _Images.gl = mujoco.GLContext(size, size)
            _Images.gl.make_current()
            model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
            model.vis.global_.offheight = max(model.vis.global_.offheight, size)
            self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # whatever the GL loader raises
            raise GraphicsError(
                f"LIBERO can't render (MUJOCO_GL={os.environ['MUJOCO_GL']}): {error}", code="GRAPHICS",
                remedy=graphics.REMEDY,
            ) from error  # fmt: skip
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.model = model
        self.scene = mujoco.MjvScene(model, maxgeom=1000)
        self.option = mujoco.MjvOption()
        self.option.geomgroup[0] = 0  # collision meshes
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.view = mujoco.MjrRect(0, 0, size, size)
        self.pixels = np.zeros((size, size, 3), np.uint8)

    def draw(self, data: mujoco.MjData, camera: str) -> np.ndarray:
        _Images.drawn += 1
        self.camera.fixedcamid = self.model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, self.option, None, self.camera, everything, self.scene)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)  # another size may have been drawn
        mujoco.mjr_render(self.view, self.scene, self.context)
        mujoco.mjr_readPixels(self.pixels, None, self.view, self.context)
        return self.pixels.copy()

    def close(self) -> None:
        self.context.free()


class Worker:
    """One environment. assets: folder; image_size: of the cameras in px; scenes: compiled ones that are kept.

    antialiasing: of all images. mesh_edge: length in m, if they are to be drawn coarsely.
    """

    def __init__(self, assets: str, image_size: int, scenes: int, antialiasing: bool, mesh_edge: float | None):
        libero.libero._assets_path_cache = assets
        self.image_size, self.kept, self.antialiasing, self.mesh_edge = image_size, scenes, antialiasing, mesh_edge
        self.scenes: OrderedDict[str, Scene] = OrderedDict()
        self.scene: Any = None
        self.teaching: Any = None

    def reset(
        self, bddl: str, state: np.ndarray | None, seed: int, taught: tuple[tuple[str, str], int, bool] | None
    ) -> None:
        """Begin an episode of the task `bddl`; taught: goal, limit and is_dense of `Teaching`, None for none."""
        if bddl not in self.scenes:
            self.scene = None  # its memory, before the next one takes as much
            while len(self.scenes) >= self.kept:
                self.scenes.popitem(last=False)[1].close()
                _give_back_memory()
            self.scenes[bddl] = Scene(bddl, self.antialiasing, self.mesh_edge)
        self.scenes.move_to_end(bddl)
        self.scene = self.scenes[bddl]
        self.scene.reset(state, seed)
        self.teaching = Teaching(self.scene, *taught) if taught else None

    def step(self, actions: np.ndarray) -> tuple[bool, list[float], list[np.ndarray]]:
        """Execute LIBERO's actions `[C, 7]` until the task is done.

        Whether it is, and of each that was executed the reward and what a critic is told after it.
        """
        rewards, told = [], []
        for action in actions:
            done = self.scene.control_step(action)
            reward, state = self.teaching.judge(done) if self.teaching else (float(done), np.zeros(0, np.float32))
            rewards.append(reward)
            told.append(state)
            if done:
                break
        return done, rewards, told

    def critic_state(self) -> np.ndarray:
        """What a critic is told now."""
        return self.teaching.state()

    def replay(self, actions: np.ndarray) -> None:
        """Execute actions of an episode that has been played before."""
        self.step(actions)

    def observe(self, cameras: tuple[str, ...]) -> dict[str, Any]:
        """What the adapter takes."""
        return self.scene.native() | self.scene.look(cameras, self.image_size)

    def picture(self, camera: str, size: int) -> np.ndarray:
        """An image for people, uint8 RGB `[size, size, 3]`."""
        return self.scene.picture(camera, size)

    def expert_view(self, goal: tuple[str, str]) -> dict[str, Any]:
        """What the expert is told, as the fields of `Privileged`, in the frame of the robot's base."""
        return self.scene.grasp_of(goal).view(self.scene.native(present=True))

    def privileged(self, goal: tuple[str, str], cameras: tuple[str, ...]) -> np.ndarray:
        """See `training.envs.libero.PRIVILEGED`."""
        return self.scene.grasp_of(goal).privileged(self.scene.native(present=True), cameras)

    def state(self) -> np.ndarray:
        """Time, positions and velocities of the whole simulation."""
        return np.asarray(self.scene.env.sim.get_state().flatten())

    def drawn(self) -> int:
        """Images so far."""
        return _Images.drawn

    def memory(self) -> int:
        """Resident bytes."""
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _give_back_memory() -> None:
    """A scene is a heap of small objects with cycles; glibc keeps what they leave unless it is told."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), Worker)
