"""One ManiSkill scene on the processor, and what can be asked of any.

ManiSkill's own `step` also reads (or renders) an observation. Here a control step is the simulation, success and reward
alone; `native` does the rest for whoever is about to decide.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from training.envs.base import GraphicsError
from vla import options
from vla.adapters import maniskill as adapter
from vla.errors import Fault, SimrealError
from vla.rig import CameraCalibration, RigError, Store, Transform

warnings.filterwarnings("ignore", "Failed to find system libvulkan")  # who renders is told by an error
try:
    import sapien
    import sapien.render
    from sapien.pysapien_pinocchio import PinocchioModel
    from sapien.wrapper import pinocchio_model

    # SAPIEN's own inverse kinematics, compiled. Where the package `pin` is installed (franky-sim needs it) SAPIEN would
    # take the same algorithm in Python, which is half of a control step's time.
    pinocchio_model.PinocchioModel = PinocchioModel

    import mani_skill.envs  # noqa: F401 - registers the tasks
    from mani_skill.utils.registration import REGISTERED_ENVS

    from training.envs.maniskill_tasks import put_on_plate  # noqa: F401 - registers it
    from training.envs.maniskill_tasks.suite import Suite
except ImportError as error:
    raise SimrealError(
        f"ManiSkill can't be imported: {error}", code="MISSING_MODULE", remedy="pip install 'simreal[maniskill]'"
    ) from error

GRAPHICS = "ManiSkill renders with Vulkan: `vla doctor` says what is missing. obs=state needs none of it."
MESA = """On the processor it renders with Mesa's driver lavapipe, of version 24 or later:
  Ubuntu 24.04:  sudo apt-get install libvulkan1 mesa-vulkan-drivers
  Debian 12:     sudo apt-get install -t bookworm-backports libvulkan1 mesa-vulkan-drivers
and where there are other drivers too: export VK_ICD_FILENAMES=/usr/share/vulkan/icd.d/lvp_icd.json (or the like).
obs=state needs none of it."""
NO_DRIVER = ("physical device", "IncompatibleDriver", "libvulkan")  # what SAPIEN says without it, or with an older one


@dataclass(frozen=True)
class ManiSkillConfig:
    """Options of the simulator.

    task: ManiSkill's id of it.
    obs: state, all that the task tells of its scene, and the joints; rgb, images, tool and gripper; or rgb+state, all.
    control_mode: ManiSkill's name of it.
    chunk: actions of a chunk.
    max_translation: bound of a control step in m, per axis, null for ManiSkill's own; joints have none.
    max_rotation: bound of a control step in rad, per axis or joint, null for the largest that it does not cut.
    reward: dense, ManiSkill's between 0 and 1 for every step; sparse, 1 for success; difference, how much the stages
    that a task counts (of put-on-plate 0.1 grasp + 0.1 held grasp + 1 success), or else the dense reward, have grown;
    dense_difference, how much stages and what is dense between them have grown.
    max_episode_steps: time limit in control steps, null for the task's own.
    instruction: sentence, null for the words of the task's id.
    robot: panda; panda_wristcam, with a camera at the wrist; or of put-on-plate widowx250s_put_on_plate.
    image_size: width and height of the cameras in px.
    render_backend: of rgb, cpu or gpu.
    backend: of the physics, cpu or gpu; put-on-plate has cpu only.
    objects, tables: of put-on-plate: training draws from the first so many of its 16 each; null for all.
    assets: folder of the task's meshes, null for the one that the variable SIMREAL_ASSETS names.
    calibration: store of a rig (`vla calibrate`): the cameras stand as calibrated; null for ManiSkill's own.
    """

    task: str = "PickCube-v1"
    obs: Literal["state", "rgb", "rgb+state"] = "state"
    control_mode: Literal["pd_ee_delta_pose", "pd_ee_target_delta_pose", "pd_joint_delta_pos"] = "pd_joint_delta_pos"
    chunk: int = 1
    max_translation: float | None = None
    max_rotation: float | None = None
    reward: Literal["dense", "sparse", "difference", "dense_difference"] = "dense"
    max_episode_steps: int | None = None
    instruction: str | None = None
    robot: Literal["panda", "panda_wristcam", "widowx250s_put_on_plate"] = "panda"
    image_size: int = 128
    render_backend: Literal["cpu", "gpu"] = "cpu"
    backend: Literal["cpu", "gpu"] = "cpu"
    objects: int | None = None
    tables: int | None = None
    assets: Path | None = None
    calibration: Path | None = None

    def __post_init__(self) -> None:
        can = self.backend == "cpu" and "rgb" in self.obs and self.robot in TOOLS
        if self.calibration is not None and not can:
            raise ValueError(f"calibration is for images: obs=rgb, backend=cpu, and a robot of {', '.join(TOOLS)}")

    @property
    def cameras(self) -> dict[str, CameraCalibration]:
        """As the store has them, by their role, at the size that is rendered; without those that have no pose."""
        if self.calibration is None:
            return {}
        store = Store(self.calibration.expanduser())
        found = [store.read(name) for name in store.cameras() if name in adapter.CAMERAS]
        size = self.image_size
        return {c.camera: replace(c, intrinsics=c.intrinsics.scaled(size, size)) for c in found if c.mount is not None}


TOOLS = {"panda": "panda_hand_tcp", "panda_wristcam": "panda_hand_tcp"}  # robot -> the link that is the tool centre
DIFFERENCES = ("difference", "dense_difference")
ONLY = "in_distribution"  # the variant of a task that has no others
OBS_MODES = {"state": "state_dict", "rgb": "rgb", "rgb+state": "rgb+state"}


def registered(config: ManiSkillConfig) -> Any:
    """ManiSkill's entry of the task; it has to know the reward."""
    if config.task not in REGISTERED_ENVS:
        raise SimrealError(
            f"ManiSkill has no task {config.task!r}", code="ENVIRONMENT",
            remedy=f"Correct env.settings.task: {options.nearest(config.task, [*REGISTERED_ENVS])}",
        )  # fmt: skip
    entry = REGISTERED_ENVS[config.task]
    if reward_mode(config) not in entry.cls.SUPPORTED_REWARD_MODES:
        raise SimrealError(
            f"{config.task} has no {config.reward} reward", code="ENVIRONMENT", remedy="Set env.settings.reward=sparse."
        )
    return entry


def reward_mode(config: ManiSkillConfig) -> str:
    """ManiSkill's name of the reward, or of what it is the difference."""
    return "sparse" if config.reward == "sparse" else "normalized_dense"


def time_limit(config: ManiSkillConfig) -> int:
    """Control steps of an episode."""
    limit: int | None = config.max_episode_steps or registered(config).max_episode_steps
    if not limit:
        raise SimrealError(
            f"{config.task} has no time limit of its own", code="ENVIRONMENT",
            remedy="Set env.settings.max_episode_steps.",
        )  # fmt: skip
    return limit


def check_variant(task: str, variant: str, known: Sequence[str]) -> None:
    """Refuse a variant that the task has not."""
    if variant not in known:
        raise SimrealError(
            f"{task} has no variant {variant!r}", code="ENVIRONMENT",
            remedy=f"Correct the variant: {options.nearest(variant, known)}",
        )  # fmt: skip


def by_role(by_name: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What belongs to each camera that a policy may see, by its role."""
    return [(role, by_name[name]) for role, name in adapter.CAMERAS.items() if name in by_name]


class _Material:
    """In place of SAPIEN's, which asks for a graphics device even in a scene that nobody looks at."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """Scenes that are built meanwhile need no graphics device."""
    places = (sapien.render, sapien.pysapien.render)
    real = sapien.render.RenderMaterial
    for place in places:
        place.RenderMaterial = _Material
    try:
        yield
    finally:
        for place in places:
            place.RenderMaterial = real


class Scene:
    """One environment: a scene of its own, since PhysX on the processor has one for each."""

    def __init__(self, config: ManiSkillConfig, visual: bool):
        self.visual, self.config = visual, config
        own = registered(config)
        of_suite = issubclass(own.cls, Suite)
        if not of_suite and (config.objects, config.tables) != (None, None):
            raise SimrealError(
                f"{config.task} is not drawn from objects and tables", code="ENVIRONMENT",
                remedy="Leave env.settings.objects and .tables out.",
            )  # fmt: skip
        drawn = {"folder": config.assets, "objects": config.objects, "tables": config.tables}
        try:
            with self._building():
                self.env: Any = own.make(
                    obs_mode=OBS_MODES[config.obs], control_mode=config.control_mode,
                    reward_mode=reward_mode(config),
                    robot_uids=config.robot, sim_backend="physx_cpu",
                    render_backend=config.render_backend if visual else "none",
                    sensor_configs={"width": config.image_size, "height": config.image_size},
                    **(drawn if of_suite else {}),
                )  # fmt: skip
        except RuntimeError as error:
            if not visual:
                raise
            driver = config.render_backend == "cpu" and any(words in str(error) for words in NO_DRIVER)
            remedy = MESA if driver else GRAPHICS
            raise GraphicsError(f"ManiSkill can't render: {error}", code="GRAPHICS", remedy=remedy) from error
        self.suite: Suite | None = self.env if of_suite else None
        self.env._flatten_raw_obs = lambda obs: obs  # the adapter takes them by their names
        self.cameras = config.cameras if visual else {}
        for role, camera in self.cameras.items():
            self._place(adapter.CAMERAS[role], camera)
        self.steps = 0
        self.success = self.failure = False
        self.info: dict[str, Any] | None = None  # of the present state; None before the first episode
        self.seen: dict[str, Any] | None = None  # the present state's observation, once somebody has asked for it

    def _place(self, name: str, camera: CameraCalibration) -> None:
        """Have every scene from the next one on built with a camera as calibrated."""
        env, mount, lens = self.env, camera.mount, camera.intrinsics
        assert mount is not None
        configs = env._sensor_configs
        if name not in configs:
            return  # this robot has none
        moves = configs[name].mount is not None or configs[name].entity_uid is not None
        if moves != (mount.parent == "tool"):
            remedy = "Calibrate it as what it is: mode=eye_to_hand for one that stands, eye_in_hand for one on the arm."
            what = f"one that hangs on the {mount.parent}"
            where = f"camera {camera.camera}"
            raise RigError(Fault("CAMERA_PARENT", where, "a camera as the scene has it", what, remedy))
        local = sapien_pose(mount.pose)
        placed = local if moves else env.agent.robot.pose.sp * local
        # Principal points count from the border of the first pixel here, from its middle in the store.
        matrix = lens.matrix + np.array([[0.0, 0.0, 0.5], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
        env._custom_sensor_configs[name] = {
            "pose": [*placed.p.tolist(), *placed.q.tolist()], "fov": None, "intrinsic": matrix, "mount": None,
            "entity_uid": TOOLS[self.config.robot] if moves else None,
        }  # fmt: skip
        if self.suite is not None and not moves:
            self.suite.see_from(placed, lens)

    def _building(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.visual else _unseen()

    def reset(self, seed: int, variant: str) -> None:
        """Build the scene and begin the episode.

        In a scene that has been used, PhysX takes contacts in another order, and reports those of the episode before.
        """
        env = self.env
        self.request = (seed, variant)
        told = {} if self.suite is None else self.suite.episode_options(seed, variant)
        env.get_obs = lambda info: None  # nobody has asked for it yet
        with self._building():
            _, self.info = env.reset(seed=seed, options={"reconfigure": True, **told})
        del env.get_obs
        self.steps, self.success, self.failure, self.seen = 0, False, False, None
        self.base_pose = _plain(env.agent.robot.pose.raw_pose)
        self.level = 0.0
        if self.config.reward in DIFFERENCES:
            self.level = self._level(torch.zeros(1, env.single_action_space.shape[0]))

    def control_step(self, action: np.ndarray) -> float:
        """Execute ManiSkill's action `[D]`; the reward."""
        env = self.env
        given = env._step_action(torch.from_numpy(action)[None])
        env._elapsed_steps += 1
        self.steps += 1
        self.info, self.seen = env.get_info(), None
        self.success, self.failure = (bool(self.info.get(key, False)) for key in ("success", "fail"))
        before, self.level = self.level, self._level(given)
        return self.level - before if self.config.reward in DIFFERENCES else self.level

    def _level(self, action: torch.Tensor) -> float:
        """What the reward is, or of what it is the difference."""
        if self.suite is not None and self.config.reward in DIFFERENCES:
            return self.suite.level(self.info or {}, progress=self.config.reward == "dense_difference")
        return float(self.env.get_reward(obs={}, action=action, info=self.info))

    def native(self) -> dict[str, Any]:
        """What the adapter takes."""
        if self.seen is None:
            self.seen = self.env.get_obs(self.info)
        agent, extra = self.seen["agent"], {k: _plain(v) for k, v in self.seen["extra"].items()}
        tcp_pose = extra.pop("tcp_pose", None)
        native = {
            "base_pose": self.base_pose,
            "tcp_pose": _plain(self.env.agent.tcp.pose.raw_pose) if tcp_pose is None else tcp_pose,
            "qpos": _plain(agent["qpos"]),
            "qvel": _plain(agent["qvel"]),
            "time": self.steps / self.env.control_freq,
            "images": {role: _plain(shown["rgb"]) for role, shown in by_role(self.seen.get("sensor_data", {}))},
            "extra": extra if "state" in self.config.obs else None,
        }
        if "target" in self.config.control_mode:
            native["commanded_pos"] = _plain(self.env.agent.controller.controllers["arm"]._target_pose.p)
        return native

    def mirror(self, other: "Scene") -> "Scene":
        """Take the place of a scene of the same task."""
        self.reset(*other.request)
        self.env.set_state_dict(other.env.get_state_dict())
        return self

    def picture(self, size: int) -> np.ndarray:
        """uint8 `[size, size, 3]`, as people see it."""
        if self.suite is not None:
            return self.suite.picture(size)
        with Image.fromarray(_plain(self.env.render_rgb_array())) as image:
            return np.asarray(image.resize((size, size), Image.Resampling.BOX))

    def fov_y_deg(self) -> dict[str, float]:
        """Field of view of every camera, by its role."""
        configs = self.env._sensor_configs if self.visual else {}
        return {role: math.degrees(fov_y(config)) for role, config in by_role(configs)}


def sapien_pose(pose: Transform) -> sapien.Pose:
    """Of a camera: SAPIEN's look along x, with y to the left and z up, ours along z, with y down."""
    there = pose.matrix
    there[:3, :3] = np.stack([there[:3, 2], -there[:3, 0], -there[:3, 1]], 1)
    return sapien.Pose(there)


def fov_y(config: Any) -> float:
    """Of a camera, rad."""
    return config.fov or 2 * math.atan(config.height / 2 / float(np.asarray(config.intrinsic)[1, 1]))


def _plain(value: Any) -> np.ndarray:
    """Of the only environment, without the dimension of environments."""
    return np.asarray(value)[0]
