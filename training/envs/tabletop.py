"""Put-on-plate on an FR3 in MuJoCo: the embedded simulator.

20 Hz delta end-effector control as on the arm: the commanded tool pose is integrated, one
damped-least-squares step of inverse kinematics turns it into joint targets, a joint impedance follows them.
Control delay and gains are drawn per episode. The FR3 model comes from the `franky-sim` package; its
collision meshes are drawn, which is 20 times faster than the visual ones. Nothing is rendered outside
`observe`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from training.envs import tabletop_delays as delays
from training.envs.base import EpisodeRequest, StepResult
from training.envs.progress import GRASP_REWARD, progress_reward
from training.envs.tabletop_delays import PIECES as PIECES
from training.envs.tabletop_render import Renderer, blend, mujoco, noise_image
from training.envs.tabletop_scene import TIMESTEP, robot_scene
from vla import options
from vla.adapters import tabletop as adapter
from vla.contract import PolicyContract
from vla.rig import CameraCalibration, Store, trained_with
from vla.tasks import mjcf
from vla.tasks.expert import Privileged
from vla.tasks.put_on_plate import (
    CONTROLS,
    MAX_STEPS,
    RATE_HZ,
    VARIANTS,
    Episode,
    is_success,
    sample_episode,
    training_sentences,
)
from vla.types import Observation

SUBSTEPS = round(1.0 / RATE_HZ / TIMESTEP)
NOMINAL_JOINTS = np.array([0.0, 0.05, 0.0, -2.35, 0.0, 2.40, -0.7853])
IK_DAMPING = 0.03
TOOL_LOW, TOOL_HIGH = (0.36, -0.18, 0.08), (0.64, 0.18, 0.28)  # m, tool positions of scattered layouts
# Target, goal and measured tool position, as seen from the commanded tool position, in units of 0.1 m; then
# target and goal in the image of each camera, -1..1, NaN out of sight. All of order one, as losses want it.
PRIVILEGED = 17
# Object and goal as seen from the tool, lag of the tool behind its command (0.1 m), height of tool and object, velocity
# of the object and of the command (0.1 m a step, m/s), gripper opening (0.1 m), sizes (0.1 m), grasped now, ever and
# lifted, tilt (rad), what is left of the time.
CRITIC = 27


@dataclass(frozen=True)
class TabletopConfig:
    """Options of the simulator.

    image_size: width and height of both cameras in px.
    chunk: actions of a chunk.
    max_translation: bound of a control step in m, per axis.
    max_rotation: bound of a control step in rad, per axis.
    reward: sparse, how much 0.1 grasp + 0.1 held grasp + 1 success have grown; dense adds how much nearer the tool
    came to the object and the grasped object to the goal, which shows sooner what a chunk was worth.
    calibration: store of a rig (`vla calibrate`): its cameras stand as calibrated, and the arm is as late as measured;
    null for the task's own cameras and delays.
    delay_spread_s: with a calibration, how far delays are drawn around what was measured, for each episode, in s: that
    of the arm behind its commands, and that of each camera's image beside the state.
    """

    image_size: int = 64
    chunk: int = 8
    max_translation: float = 0.02
    max_rotation: float = 0.05
    reward: Literal["sparse", "dense"] = "sparse"
    calibration: Path | None = None
    delay_spread_s: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.delay_spread_s <= 0.1:
            raise ValueError(f"delay_spread_s is {self.delay_spread_s:g}: expected 0 to 0.1 s")

    @property
    def cameras(self) -> list[CameraCalibration]:
        """As the store has them."""
        if self.calibration is None:
            return []
        store = Store(self.calibration.expanduser())
        found = [store.read(name) for name in store.cameras() if name in adapter.CAMERAS]
        return [replace(c, intrinsics=c.intrinsics.scaled(self.image_size, self.image_size)) for c in found]


def _scene_model(objects: int, receptacles: int, cameras: Sequence[CameraCalibration] = ()) -> mujoco.MjModel:
    """The robot with empty slots for `objects` free and `receptacles` fixed items, and cameras as calibrated."""
    root = robot_scene()
    world = root.find("worldbody")
    assert world is not None
    mjcf.add_slots(world, objects, receptacles)
    model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
    for look in range(mjcf.TABLES):
        texture = model.texture(f"table{look}").id
        start = model.tex_adr[texture]
        data = mjcf.table_texture(look).reshape(-1)
        model.tex_data[start : start + data.size] = data
    for camera in cameras:
        if camera.mount is not None:
            mjcf.place_camera(model, camera.camera, camera.mount.parent, camera.mount.pose, camera.intrinsics)
    return model


class _Slot:
    """One environment: its own model (items, gains and looks are written into it) and its own data."""

    def __init__(self, models: dict[tuple[int, int], mujoco.MjModel], items: mujoco.MjModel, config: TabletopConfig):
        self._templates = models
        self._own: dict[tuple[int, int], tuple[mujoco.MjModel, mujoco.MjData]] = {}
        self._items = items
        self._config = config
        self._cameras = config.cameras
        self._scratch: dict[int, mujoco.MjData] = {}
        self.episode: Episode | None = None
        self.success = False

    def reset(self, episode: Episode) -> None:
        """Build the episode: dress the slots, draw gains, delay and light, solve the start pose."""
        key = (len(episode.objects), len(episode.receptacles))
        if key not in self._own:
            if key not in self._templates:
                self._templates[key] = _scene_model(*key, self._cameras)
            model = copy.copy(self._templates[key])
            self._own[key] = (model, mujoco.MjData(model))
        self.model, self.data = self._own[key]
        self.episode = episode
        model, data = self.model, self.data
        template = self._templates[key]
        rng = np.random.default_rng([episode.seed, 77])
        mujoco.mj_resetData(model, data)
        for index, placement in enumerate(episode.objects):
            mjcf.dress(model, self._items, f"object{index}", placement.item.name)
            mjcf.lay(model, data, f"object{index}", placement)
        for index, placement in enumerate(episode.receptacles):
            mjcf.dress(model, self._items, f"receptacle{index}", placement.item.name)
            mjcf.lay(model, data, f"receptacle{index}", placement)
        model.geom("table").matid[:] = model.material(f"table{episode.table}").id
        gain = rng.uniform(0.8, 1.2)
        model.actuator_gainprm[:7] = template.actuator_gainprm[:7]
        model.actuator_biasprm[:7] = template.actuator_biasprm[:7]
        model.actuator_gainprm[:7, 0] *= gain
        model.actuator_biasprm[:7, 1] *= gain
        model.actuator_biasprm[:7, 2] *= rng.uniform(0.4, 0.7)  # the asset's damping lags by 0.1 s
        light = rng.uniform(0.85, 1.15)
        model.vis.headlight.ambient[:] = template.vis.headlight.ambient * light
        self.late = delays.draw(self._cameras, self._config.delay_spread_s, rng)
        if self.late.lag_s is not None:
            model.actuator_biasprm[:7, 2] = model.actuator_biasprm[:7, 1] * self.late.lag_s
        self._tool = model.site("tool").id
        self._target_body = model.body("object0").id
        self._pads = {model.geom("left_finger_pad").id, model.geom("right_finger_pad").id}
        first = int(model.body("object0").geomadr[0])
        self._target_geoms = set(range(first, first + mjcf.MAX_PARTS))
        data.qpos[:7] = NOMINAL_JOINTS
        data.qpos[7:9] = 0.04
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        self._down = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
        turn = np.zeros(4)
        _rotation_vector_to_quaternion(turn, np.asarray(episode.start_rotation))
        matrix = np.zeros(9)
        mujoco.mju_quat2Mat(matrix, turn)
        self.command_position = np.asarray(episode.start_position, dtype=np.float64).copy()
        self.command_rotation = matrix.reshape(3, 3) @ self._down
        for _ in range(12):
            data.qpos[:7] += self._joint_step(data.qpos[:7], limit=0.5)
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
        self.target_joints = data.qpos[:7].copy()
        data.ctrl[:7] = self.target_joints
        data.ctrl[7] = 255
        self.last_step = np.zeros(3)
        self.pending = [self.target_joints.copy() for _ in range(self.late.pieces)]
        self.past = delays.Past(self.late.oldest, data.qpos)
        mujoco.mj_forward(model, data)
        self.step_count = 0
        self.frame_count = 0
        self.was_grasped = self.was_grasped_twice = self.success = False
        self.grasped_steps = 0
        self.reward_level = self._progress(False)

    def _joint_step(self, joints: np.ndarray, limit: float) -> np.ndarray:
        """One damped-least-squares step `[7]` rad from `joints` towards the commanded pose (Wampler 1986)."""
        model, data = self.model, self.data
        error = np.zeros(6)
        error[:3] = self.command_position - data.site_xpos[self._tool]
        # Half the sum of the cross products of current and wanted axes (Luh et al. 1980), read off one product.
        turn = self.command_rotation @ data.site_xmat[self._tool].reshape(3, 3).T
        error[3:] = 0.5 * (turn[2, 1] - turn[1, 2]), 0.5 * (turn[0, 2] - turn[2, 0]), 0.5 * (turn[1, 0] - turn[0, 1])
        jacobian = np.zeros((6, model.nv))
        mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], self._tool)
        j = jacobian[:, :7]
        return np.clip(j.T @ np.linalg.solve(j @ j.T + IK_DAMPING**2 * np.eye(6), error), -limit, limit)

    def control_step(self, command: adapter.TabletopCommand) -> None:
        """Advance by one control step: integrate the command, solve the joints, follow them."""
        model, data, config = self.model, self.data, self._config
        episode = self.episode
        assert episode is not None
        move = episode.disturbance
        if move.move_at_step == self.step_count and not self.was_grasped and move.move_to is not None:
            joint = data.joint("object0_joint")
            joint.qpos[:3] = [*move.move_to, episode.objects[0].item.half_height]
            joint.qvel[:] = 0.0
        self.last_step = np.clip(command.delta_translation, -config.max_translation, config.max_translation)
        self.command_position = self.command_position + self.last_step
        self.command_position[2] = max(self.command_position[2], 0.012)
        turn, matrix = np.zeros(4), np.zeros(9)
        rotation = np.clip(command.delta_rotation, -config.max_rotation, config.max_rotation)
        _rotation_vector_to_quaternion(turn, rotation)
        mujoco.mju_quat2Mat(matrix, turn)
        self.command_rotation = matrix.reshape(3, 3) @ self.command_rotation
        # Kinematics at the commanded joints, not the measured ones: no drift, and gravity sag is not chased.
        measured = data.qpos[:7].copy()
        data.qpos[:7] = self.target_joints
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        goal = self.target_joints + self._joint_step(self.target_joints, limit=0.15)
        data.qpos[:7] = measured
        previous = self.target_joints
        self.target_joints = np.clip(goal, model.jnt_range[:7, 0], model.jnt_range[:7, 1])
        data.ctrl[7] = 255 if command.gripper_open else 0
        for piece in range(1, PIECES + 1):
            self.pending.append(previous + (self.target_joints - previous) * (piece / PIECES))
            data.ctrl[:7] = self.pending.pop(0)
            mujoco.mj_step(model, data, nstep=SUBSTEPS // PIECES)
            self.past.add(data.qpos)
        self.step_count += 1

    def touching(self) -> tuple[bool, bool]:
        """Whether the left and the right pad touch the target."""
        touched = set()
        for pair in self.data.contact.geom[: self.data.ncon]:
            a, b = int(pair[0]), int(pair[1])
            if a in self._target_geoms and b in self._pads:
                touched.add(b)
            elif b in self._target_geoms and a in self._pads:
                touched.add(a)
        left, right = sorted(self._pads)
        return left in touched, right in touched

    def gripper_width(self) -> float:
        return float(self.data.qpos[7] + self.data.qpos[8])

    def judge(self) -> float:
        """Reward of the last control step, see `TabletopConfig`."""
        assert self.episode is not None
        left, right = self.touching()
        grasped = left and right
        self.grasped_steps = self.grasped_steps + 1 if grasped else 0
        position = self.data.xpos[self._target_body]
        lifted = position[2] > self.episode.objects[0].item.half_height + 0.02
        self.was_grasped = self.was_grasped or grasped
        self.was_grasped_twice = self.was_grasped_twice or (self.grasped_steps >= 3 and lifted)
        speed = float(np.linalg.norm(self.data.joint("object0_joint").qvel[:3]))
        self.success = is_success(self.episode, position, speed, self.gripper_width(), left or right)
        level = GRASP_REWARD * self.was_grasped + GRASP_REWARD * self.was_grasped_twice + 1.0 * self.success
        level += self._progress(grasped)
        reward, self.reward_level = level - self.reward_level, level
        return reward

    def _progress(self, grasped: bool) -> float:
        """What the dense reward adds: 0.5 for the tool at the object, 0.5 for the held object at the goal."""
        if self._config.reward == "sparse":
            return 0.0
        assert self.episode is not None
        goal = self.episode.receptacles[0]
        target = self.data.xpos[self._target_body]
        distance = float(np.linalg.norm(target - self.data.site_xpos[self._tool]))
        away = float(np.hypot(target[0] - goal.x, target[1] - goal.y))
        return progress_reward(distance, away, grasped, self.success)

    def expert_view(self) -> Privileged:
        episode = self.episode
        assert episode is not None
        goal = episode.receptacles[0]
        quaternion, tilt = np.zeros(4), np.zeros(3)
        mujoco.mju_mat2Quat(quaternion, (self._down @ self.command_rotation.T).reshape(-1))
        mujoco.mju_quat2Vel(tilt, quaternion, 1.0)
        return Privileged(
            target=self.data.xpos[self._target_body].copy(),
            goal=np.array([goal.x, goal.y, goal.item.half_height]),
            goal_top=2 * goal.item.half_height,
            half_height=episode.objects[0].item.half_height,
            commanded=self.command_position.copy(),
            measured=self.data.site_xpos[self._tool].copy(),
            tilt=tilt,
            width=self.gripper_width(),
        )

    def privileged(self) -> np.ndarray:
        assert self.episode is not None
        goal = self.episode.receptacles[0]
        target, place = self.data.xpos[self._target_body], np.array([goal.x, goal.y, goal.item.half_height])
        pixels = [self.pixel(camera, point) for camera in adapter.CAMERAS for point in (target, place)]
        positions = np.stack([target, place, self.data.site_xpos[self._tool]]) - self.command_position
        return np.concatenate([positions.ravel() / 0.1, *pixels]).astype(np.float32)

    def critic_state(self) -> np.ndarray:
        assert self.episode is not None
        data, goal, target = self.data, self.episode.receptacles[0], self.episode.objects[0].item
        tool, position = data.site_xpos[self._tool], data.xpos[self._target_body]
        joint = data.joint("object0_joint")
        quaternion, tilt = np.zeros(4), np.zeros(3)
        mujoco.mju_mat2Quat(quaternion, (self._down @ self.command_rotation.T).reshape(-1))
        mujoco.mju_quat2Vel(tilt, quaternion, 1.0)
        lengths = (
            *(position - tool), *((goal.x, goal.y, goal.item.half_height) - tool), *(self.command_position - tool),
            tool[2], position[2], *self.last_step, self.gripper_width(), target.radius, target.half_height,
        )  # fmt: skip
        flags = (self.grasped_steps > 0, self.was_grasped, self.was_grasped_twice)
        others = (*joint.qvel[:3], *flags, *tilt, 1 - self.step_count / MAX_STEPS)
        return np.array([*(length / 0.1 for length in lengths), *others], np.float32)

    def pixel(self, camera: str, point: np.ndarray) -> np.ndarray:
        """Image coordinates `[2]` of a point (x right, y down, -1..1 at the borders); NaN if outside."""
        number = self.model.camera(camera).id
        x, y, z = self.data.cam_xmat[number].reshape(3, 3).T @ (point - self.data.cam_xpos[number])
        if z > -1e-3:
            return np.full(2, np.nan)
        if (sensor := self.model.cam_sensorsize[number]).any():  # as calibrated: the axis may be off the middle
            focal, off = self.model.cam_intrinsic[number, :2], self.model.cam_intrinsic[number, 2:]
            uv = 2 * (focal * np.array([x, -y]) / -z - off) / sensor
        else:
            uv = np.array([x, -y]) / (-z * np.tan(np.deg2rad(self.model.cam_fovy[number]) / 2))
        return uv if np.abs(uv).max() <= 1.0 else np.full(2, np.nan)

    def earlier(self, pieces: int) -> mujoco.MjData:
        """Where everything was so many pieces of a control step ago; 0: the present state itself."""
        if not pieces:
            return self.data
        if id(self.model) not in self._scratch:
            self._scratch[id(self.model)] = mujoco.MjData(self.model)
        data = self._scratch[id(self.model)]
        data.qpos[:] = self.past.before(pieces)
        mujoco.mj_kinematics(self.model, data)
        mujoco.mj_camlight(self.model, data)
        return data


def _rotation_vector_to_quaternion(result: np.ndarray, vector: np.ndarray) -> None:
    angle = float(np.linalg.norm(vector))
    axis = vector / angle if angle > 1e-12 else np.array([0.0, 0.0, 1.0])
    mujoco.mju_axisAngle2Quat(result, axis, angle)


class Tabletop:
    """`VectorEnv` of put-on-plate episodes; `privileged` is described at `PRIVILEGED`."""

    privileged_size = PRIVILEGED
    critic_size = CRITIC
    axes = VARIANTS
    controls = CONTROLS
    instructions = tuple(training_sentences())
    max_steps = MAX_STEPS

    def __init__(self, num_envs: int, config: TabletopConfig | None = None):
        self.config = config or TabletopConfig()
        self.num_envs = num_envs
        self.contract: PolicyContract = adapter.tabletop_contract(
            image_size=self.config.image_size,
            chunk=self.config.chunk,
            max_translation=self.config.max_translation,
            max_rotation=self.config.max_rotation,
            rate_hz=RATE_HZ,
        )
        cameras = self.config.cameras
        self.contract = self._as_calibrated(self.contract, cameras)
        models: dict[tuple[int, int], mujoco.MjModel] = {(2, 1): _scene_model(2, 1, cameras)}
        items = mujoco.MjModel.from_xml_string(mjcf.all_items())
        self.slots = [_Slot(models, items, self.config) for _ in range(num_envs)]
        self._renderer: Renderer | None = None
        self._spectator: Renderer | None = None

    def _as_calibrated(self, contract: PolicyContract, found: Sequence[CameraCalibration]) -> PolicyContract:
        """What is trained with the store's cameras demands them; and what is trained knows how late its arm was."""
        stored = {camera.camera: camera for camera in found}
        action = replace(contract.action, motion_s=delays.trained_s(found, self.config.delay_spread_s))
        return replace(contract, cameras=trained_with(contract.cameras, stored), action=action)

    def reset(self, index: int, request: EpisodeRequest) -> None:
        self.slots[index].reset(sample_episode(request.seed, request.variant))

    def lay_out(self, index: int, episode: Episode) -> None:
        """Start an episode of one's own making."""
        self.slots[index].reset(episode)

    def scatter(self, index: int, request: EpisodeRequest) -> None:
        """As in `Scattered`."""
        position = np.random.default_rng([request.seed, 12]).uniform(TOOL_LOW, TOOL_HIGH)
        episode = sample_episode(request.seed, request.variant)
        self.lay_out(index, replace(episode, start_position=tuple(float(v) for v in position)))

    def step(self, indices: Sequence[int], actions: np.ndarray) -> StepResult:
        """As in `VectorEnv`; an episode that was over before is left alone and says so again."""
        count, chunk = actions.shape[:2]
        if count != len(indices):
            raise ValueError(f"{count} rows of actions for {len(indices)} environments: pass one row for each")
        # All are checked before the first is executed: a refused batch changes nothing.
        commands = [[adapter.command(action) for action in row] for row in actions]
        rewards = np.zeros((count, chunk), np.float32)
        executed = np.zeros((count, chunk), bool)
        terminated, truncated = np.zeros(count, bool), np.zeros(count, bool)
        critic_states = np.zeros((count, chunk, CRITIC), np.float32)
        for row, index in enumerate(indices):
            slot = self.slots[index]
            if slot.episode is None:
                raise ValueError(f"environment {index} plays no episode: reset it before its first step")
            for t in range(chunk):
                if slot.success or slot.step_count >= MAX_STEPS:
                    break
                slot.control_step(commands[row][t])
                rewards[row, t] = slot.judge()
                executed[row, t] = True
                critic_states[row, t] = slot.critic_state()
            terminated[row] = slot.success
            truncated[row] = not slot.success and slot.step_count >= MAX_STEPS
        return StepResult(rewards, executed, terminated, truncated, terminated.copy(), critic_states)

    def observe(self, indices: Sequence[int]) -> list[Observation]:
        return [self._observe(self.slots[index]) for index in indices]

    def _observe(self, slot: _Slot) -> Observation:
        episode = slot.episode
        assert episode is not None
        images = {name: self._image(slot, name) for name in ("third_person", "wrist")}
        slot.frame_count += 1
        quaternion, seen = np.zeros(4), slot.earlier(slot.late.state)
        mujoco.mju_mat2Quat(quaternion, seen.site_xmat[slot._tool])
        native = {
            **images,
            "eef_pos": seen.site_xpos[slot._tool].copy(),
            "eef_quat_wxyz": quaternion,
            "commanded_pos": slot.command_position.copy(),
            "gripper_width": float(seen.qpos[7] + seen.qpos[8]),
            "time": slot.data.time,
        }
        return adapter.observation(native, episode.instruction)

    def _image(self, slot: _Slot, camera: str) -> np.ndarray:
        episode = slot.episode
        assert episode is not None
        if self._renderer is None:
            self._renderer = Renderer(slot.model, self.config.image_size)
        seen = slot.earlier(slot.late.images.get(camera, 0))
        image = self._renderer.image(slot.model, seen, camera)
        mix = episode.disturbance
        if mix.noise_mix or mix.texture_mix:
            noise = noise_image([episode.seed, slot.frame_count, camera == "wrist"], self.config.image_size)
            if mix.noise_mix:
                image = blend(image, noise, mix.noise_mix)
            else:
                table = self._renderer.mask(slot.model, seen, camera, slot.model.geom("table").id)
                image = np.where(table[..., None], blend(image, noise, mix.texture_mix), image)
        return image

    def privileged(self, indices: Sequence[int]) -> np.ndarray:
        return np.stack([self.slots[index].privileged() for index in indices])

    def critic_state(self, indices: Sequence[int]) -> np.ndarray:
        return np.stack([self.slots[index].critic_state() for index in indices])

    def picture(self, index: int, size: int = 192) -> np.ndarray:
        """As in `VectorEnv`."""
        slot = self.slots[index]
        if self._spectator is None or self._spectator.size != size:
            self._spectator = Renderer(slot.model, size)
        return self._spectator.image(slot.model, slot.data, "third_person")

    def expert_view(self, index: int) -> Privileged:
        """As in `Demonstrable`."""
        return self.slots[index].expert_view()

    def close(self) -> None:
        for renderer in (self._renderer, self._spectator):
            if renderer is not None:
                renderer.close()
        self._renderer = self._spectator = None


def make(num_envs: int, **settings: Any) -> Tabletop:
    """The entry of the registry; settings are the fields of `TabletopConfig`."""
    return Tabletop(num_envs, options.read(TabletopConfig, settings))
