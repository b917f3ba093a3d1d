"""Put-on-plate with the 25 scanned objects in ManiSkill: `task=PutOnPlate25-v1`.

The world is the frame of the robot's base, the table top z = 0. As published, the table is seen as a photograph behind
robot and things, from the same camera beside the arm, and things fall a little and settle before the episode begins.
An episode's scene has its own things only.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs.pose import Pose
from mani_skill.utils.structs.types import SimConfig
from scipy.spatial.transform import Rotation

from training.envs.maniskill_tasks import assets
from training.envs.maniskill_tasks.pictures import compose
from training.envs.maniskill_tasks.reading import force, pixel, place, rotation, speed, wxyz
from training.envs.maniskill_tasks.robots import ROBOTS, check_model, look_as_its_box
from training.envs.maniskill_tasks.suite import Suite
from training.envs.progress import GRASP_REWARD, progress_reward
from vla.errors import SimrealError
from vla.rig import Intrinsics
from vla.tasks.expert import Manner, Privileged
from vla.tasks.put_on_plate import CONTROLS, MAX_STEPS, VARIANTS, Episode, Placement, TaskSet, sample_episode
from vla.tasks.put_on_plate_25 import OBJECTS, RECEPTACLES, SCANS, Grid, Scan, is_success

DROP = 0.012  # m above the table where things are let go: no receptacle is thicker
SETTLE_S = (0.4, 2.0)  # at least, at most
TABLE_HALF = (0.6, 0.7, 0.025)  # m
FOV_Y = 2 * math.atan(240 / 623.588)  # rad, of the middle of the published 640 x 480 px
# The published camera, beside the middle of the things, in the frame of a base that faces them.
CAMERA_OFFSET, CAMERA_TURN = (-0.307, -0.188, 0.36), (0.8992917, -0.09263245, 0.35892478, 0.23209205)
HELD_STEPS = 5
POSITIONS, PIXELS = 9, 4  # privileged, as in the tabletop: positions; and for each camera where target and goal are
CRITIC = 27  # as in the tabletop; the tilt is what the hand still has to turn for the grasp
SCATTER = ((-0.12, -0.14, 0.06), (0.12, 0.14, 0.26))  # m from the middle, where the tool may be put
FALLEN = -0.02  # m: what is below has rolled off the table, and falls for ever
FAR, FAST = 1.0, 2.0  # m and m/s, at most what the critic is told
GRASP_YAW = 2.0  # rad, the largest turn of the hand for a grasp


@register_env("PutOnPlate25-v1", max_episode_steps=MAX_STEPS)
class PutOnPlate(Suite):
    SUPPORTED_ROBOTS = [*ROBOTS]  # noqa: RUF012 - as in ManiSkill
    SUPPORTED_REWARD_MODES = ("sparse", "normalized_dense", "none")
    axes = VARIANTS
    controls = CONTROLS
    instructions = tuple(SCANS.sentences())
    critic_size = CRITIC

    def __init__(
        self, *args: Any, folder: Path | None = None, objects: int | None = None, tables: int | None = None,
        robot_uids: str = "panda", **kwargs: Any,
    ):  # fmt: skip
        models = [scan.model for scan in (*OBJECTS, *RECEPTACLES)]
        self.assets = assets.find(folder, models, len(SCANS.tables + SCANS.unseen_tables))
        if "rgb" in kwargs["obs_mode"]:  # what is robot or thing is needed to put the table behind it
            kwargs["obs_mode"] += "+segmentation"
        check_model(robot_uids)
        self.arm = ROBOTS[robot_uids]
        self.tasks = _fewer(self.arm.tasks, objects, tables)
        self.privileged_size = POSITIONS + PIXELS * (1 if self.arm.wrist is None else 2)
        grid = self.tasks.layout
        assert isinstance(grid, Grid)
        self.middle = grid.center
        offset = np.array([*self.middle, 0.0]) + CAMERA_OFFSET
        self.eye = sapien.Pose(offset.tolist(), list(CAMERA_TURN))
        self.lens = Intrinsics.from_fov(128, 128, math.degrees(FOV_Y))
        super().__init__(*args, robot_uids=robot_uids, **kwargs)

    @property
    def _default_sim_config(self) -> SimConfig:
        return self.arm.rates

    @property
    def _default_sensor_configs(self) -> list[CameraConfig]:
        return [CameraConfig("base_camera", self.eye, 128, 128, fov=FOV_Y)]

    def episode_options(self, seed: int, variant: str) -> dict[str, Any]:
        return {"episode": sample_episode(seed, variant, self.tasks)}

    def see_from(self, eye: sapien.Pose, lens: Intrinsics) -> None:
        self.eye, self.lens = eye, lens

    # The scene

    def _load_agent(self, options: dict[str, Any], *_: Any, **__: Any) -> None:
        super()._load_agent(options, sapien.Pose())
        if self.arm.wrist is not None and self.scene.can_render():
            look_as_its_box(self.agent.robot.links_map["camera_link"])

    def _load_lighting(self, options: dict[str, Any]) -> None:
        self.scene.set_ambient_light([0.3, 0.3, 0.3])
        for way, light in (([0, 0, -1], 2.2), ([-1, -0.5, -1], 0.7), ([1, 1, -1], 0.7)):
            self.scene.add_directional_light(way, [light] * 3)

    def _load_scene(self, options: dict[str, Any]) -> None:
        self.episode: Episode = options.get("episode") or sample_episode(0, tasks=self.tasks)
        self.instruction = self.episode.instruction
        builder = self.scene.create_actor_builder()
        builder.add_box_collision(half_size=TABLE_HALF)
        if self.scene.can_render():  # the wrist's camera sees it
            look = assets.picture(self.assets.table(self.episode.table), 8, 6)[3:].mean((0, 1)) / 255
            builder.add_box_visual(half_size=TABLE_HALF, material=[*(look**2.2), 1.0])
        builder.initial_pose = sapien.Pose([*self.middle, -TABLE_HALF[2]])
        self.table = builder.build_static("table")
        self.objects = [self._build(p, f"object{i}") for i, p in enumerate(self.episode.objects)]
        self.receptacles = [self._build(p, f"receptacle{i}") for i, p in enumerate(self.episode.receptacles)]

    def _build(self, placement: Placement, name: str) -> Any:
        item = placement.item
        assert isinstance(item, Scan)
        collision = self.assets.mesh(item.model, "collision")
        material = sapien.physx.PhysxMaterial(1.0, 1.0, 0.0)
        builder = self.scene.create_actor_builder()
        builder.add_multiple_convex_collisions_from_file(str(collision), density=item.density, material=material)
        if self.scene.can_render():
            builder.add_visual_from_file(str(self.assets.mesh(item.model, "textured") or collision))
        builder.initial_pose = self._resting(placement.x, placement.y, placement.yaw, item)
        return builder.build(name)

    @staticmethod
    def _resting(x: float, y: float, yaw: float, item: Any) -> sapien.Pose:
        height = item.half_height + (DROP if item in OBJECTS else 0.001)
        return sapien.Pose([x, y, height], [math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)])

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict[str, Any]) -> None:
        self.held_steps = 0
        self.was_grasped = self.was_held = False
        self.yaw = 0.0  # of the hand, for the grasp
        self._stand(torch.from_numpy(self.arm.rest)[None].float())
        self._settle()
        self._reach(self.episode.start_position)

    def _reach(self, position: Sequence[float]) -> None:
        """Put the tool there, turned as the episode begins, the gripper open."""
        turn = Rotation.from_rotvec(self.episode.start_rotation) * self.arm.down
        arm = self.agent.controller.controllers["arm"]
        wanted = Pose.create_from_pq(*(torch.tensor(v)[None].float() for v in (position, wxyz(turn))))
        joints = arm.kinematics.compute_ik(wanted, self.agent.robot.qpos.clone())
        self._stand(torch.cat([joints, torch.from_numpy(self.arm.rest)[None, self.arm.arm :].float()], 1))
        self.heading = np.array(position)  # of the tool, as commanded before the last step

    def scatter(self, random: np.random.Generator) -> None:
        self._reach((np.array([*self.middle, 0.0]) + random.uniform(*SCATTER)).tolist())
        self.agent.controller.reset()

    def _stand(self, qpos: torch.Tensor) -> None:
        """Put the robot there, at rest and told to stay."""
        self.agent.reset(qpos)
        self.agent.robot.set_joint_drive_targets(qpos, self.agent.robot.active_joints)

    def _settle(self) -> None:
        """Let the things come to rest, the arm away from them."""
        least, most = (round(seconds * self.sim_freq) for seconds in SETTLE_S)
        things = [*self.objects, *self.receptacles]
        for step in range(most):
            self.scene.step()
            if step >= least and step % 20 == 0 and max(speed(thing) for thing in things) < 1e-3:
                break

    # What happens

    def _before_control_step(self) -> None:
        self.heading, _ = self._commanded()
        move = self.episode.disturbance
        if move.move_to is not None and int(self._elapsed_steps[0]) == move.move_at_step and not self.was_grasped:
            placement = self.episode.objects[0]
            pose = self._resting(*move.move_to, placement.yaw, placement.item)
            self.objects[0].set_pose(pose)
            for stop in (self.objects[0].set_linear_velocity, self.objects[0].set_angular_velocity):
                stop(torch.zeros(3))

    def _after_control_step(self) -> None:
        self.touching = [force(self.scene, finger, self.objects[0]) > 0 for finger in self._fingers()]
        grasped = bool(self.agent.is_grasping(self.objects[0]))
        self.held_steps = self.held_steps + 1 if grasped else 0
        self.was_grasped |= grasped
        self.was_held |= self.held_steps >= HELD_STEPS

    def evaluate(self) -> dict[str, Any]:
        if int(self._elapsed_steps[0]) == 0:
            return {"success": torch.tensor([False])}
        offset = place(self.objects[0]) - place(self.receptacles[0])
        moves = speed(self.objects[0])
        success = is_success(self.episode, offset, self._pressed(), moves, self.width(), any(self.touching))
        return {"success": torch.tensor([success])}

    def _pressed(self) -> bool:
        """Whether the target presses on the goal, with the published force."""
        return force(self.scene, self.objects[0], self.receptacles[0]) > 0.03

    def width(self) -> float:
        """Opening of the gripper, m."""
        return float(self.agent.robot.qpos[0, self.arm.arm :].sum())

    def _fingers(self) -> tuple[Any, Any]:
        return self.agent.finger1_link, self.agent.finger2_link

    def level(self, info: dict[str, Any], progress: bool) -> float:
        success, grasped = bool(info["success"]), self.held_steps > 0
        stages = GRASP_REWARD * self.was_grasped + GRASP_REWARD * self.was_held + 1.0 * success
        if not progress:
            return stages
        target, goal = self._grasp_place(), place(self.receptacles[0])
        distance = float(np.linalg.norm(target - self._tool()))
        return stages + progress_reward(distance, float(np.hypot(*(target - goal)[:2])), grasped, success)

    def compute_normalized_dense_reward(self, obs: Any, action: Any, info: dict[str, Any]) -> torch.Tensor:
        return torch.tensor([self.level(info, True) / (2 * GRASP_REWARD + 2.0)])

    # What is seen

    def _get_obs_extra(self, info: dict[str, Any]) -> dict[str, torch.Tensor]:
        obs: dict[str, torch.Tensor] = {"tcp_pose": self.agent.tcp.pose.raw_pose}
        if self.obs_mode_struct.use_state:
            target, goal, tool = self.objects[0].pose, self.receptacles[0].pose, self.agent.tcp.pose
            obs |= {
                "obj_pose": target.raw_pose, "goal_pose": goal.raw_pose, "tcp_to_obj_pos": target.p - tool.p,
                "obj_to_goal_pos": goal.p - target.p, "is_grasped": torch.tensor([float(self.held_steps > 0)]),
            }  # fmt: skip
        return obs

    def _get_obs_sensor_data(self, apply_texture_transforms: bool = True) -> dict[str, Any]:
        sensors = super()._get_obs_sensor_data(apply_texture_transforms)
        for name, shown in sensors.items():
            image, ids = (shown[key][0].numpy() for key in ("rgb", "segmentation"))
            if name == "base_camera":
                shown["rgb"] = torch.from_numpy(self._compose(image, ids[..., 0]))[None]
        return sensors

    def _compose(self, image: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The camera's image in front of the table's photograph, with the variant's noise."""
        seen = (ids != 0) & (ids != int(self.table.per_scene_id[0]))
        mix = self.episode.disturbance
        pattern = int(np.random.default_rng([self.episode.seed, 78]).integers(1, 17))  # the first one is plain
        return compose(image, seen, self.assets, self.episode.table, pattern, mix.texture_mix, mix.noise_mix)

    def picture(self, size: int) -> np.ndarray:
        scene = self.scene.sub_scenes[0]
        camera = scene.add_camera("picture", size, size, math.radians(self.lens.fov_y_deg), 0.01, 100.0)
        camera.entity.set_pose(self.eye)
        self.scene.update_render()
        camera.take_picture()
        image, ids = camera.get_picture("Color")[..., :3], camera.get_picture("PositionSegmentation")[..., 3]
        scene.remove_camera(camera)
        return self._compose(image, ids)

    # What is known of it

    def _tool(self) -> np.ndarray:
        return np.asarray(self.agent.tcp.pose.p[0], np.float64)

    def _commanded(self) -> tuple[np.ndarray, Rotation]:
        """Position and rotation of the tool that the controller follows."""
        arm = self.agent.controller.controllers["arm"]
        pose = arm._target_pose if arm.config.use_target and arm._target_pose is not None else self.agent.tcp.pose
        return np.asarray(pose.p[0], np.float64), rotation(pose)

    def _grasp_place(self) -> np.ndarray:
        item = self.episode.objects[0].item
        assert isinstance(item, Scan)
        return place(self.objects[0]) + rotation(self.objects[0].pose).apply(item.grasp)

    def _wanted_yaw(self, present: float) -> float:
        """How the hand is to be turned for the grasp: across the object, from `present` with the least turn; rad."""
        item = self.episode.objects[0].item
        assert isinstance(item, Scan)
        half = item.parts[0].size
        is_long = max(half[:2]) > 1.1 * min(half[:2])
        axis = [0.0, 1.0, 0.0] if item.grasp_yaw else [1.0, 0.0, 0.0]
        x, y, _ = rotation(self.objects[0].pose).apply(axis)  # along the object, which may have rolled
        along = math.atan2(y, x)
        symmetry = math.pi if is_long else math.pi / 2
        turns = (along + k * symmetry for k in range(-4, 5))
        return min((turn for turn in turns if abs(turn) < GRASP_YAW), key=lambda turn: abs(turn - present))

    def _tilt(self, turn: Rotation) -> np.ndarray:
        """What the tool, as commanded, still has to turn for the grasp; rotation vector `[3]`, rad."""
        if not self.held_steps:
            self.yaw = self._wanted_yaw(float((turn * self.arm.down.inv()).as_euler("xyz")[2]))
        left: np.ndarray = (Rotation.from_euler("z", self.yaw) * self.arm.down * turn.inv()).as_rotvec()
        return left

    def expert_view(self) -> Privileged:
        item, goal = self.episode.objects[0].item, self.episode.receptacles[0].item
        assert isinstance(item, Scan)
        commanded, turn = self._commanded()
        tilt = self._tilt(turn)
        box = goal.parts[0]
        center = place(self.receptacles[0]) + rotation(self.receptacles[0].pose).apply(box.offset)
        return Privileged(
            target=self._grasp_place(),
            goal=center,
            goal_top=float(center[2] + box.size[2]),
            half_height=item.half_height + item.grasp[2],
            commanded=commanded,
            measured=self._tool(),
            tilt=tilt,
            width=self.width(),
            aligned=bool(np.linalg.norm(tilt) < 0.15),
            manner=Manner(lowest=self.arm.lowest),
            resting=self._pressed(),
        )

    def privileged(self) -> np.ndarray:
        view = self.expert_view()
        points = [p if p[2] > FALLEN else np.full(3, np.nan) for p in (view.target, view.goal)]
        positions = np.stack([*points, view.measured]) - view.commanded
        pixels = [pixel(self.eye, self.lens, point) for point in points]
        if self.arm.wrist is not None:
            pixels += self._at_the_wrist(self.arm.wrist, points)
        return np.concatenate([positions.ravel() / 0.1, *pixels]).astype(np.float32)

    def _at_the_wrist(self, name: str, points: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Image coordinates as of `pixel`; NaN in a scene that has no cameras."""
        if not self.scene.can_render():
            return [np.full(2, np.nan)] * len(points)
        camera = self._sensors[name].camera
        pose, matrix = camera.get_global_pose().sp, camera.get_intrinsic_matrix()[0].numpy()
        fx, fy, cx, cy = (float(matrix[place]) for place in ((0, 0), (1, 1), (0, 2), (1, 2)))
        lens = Intrinsics("pinhole", camera.width, camera.height, fx, fy, cx - 0.5, cy - 0.5)
        return [pixel(pose, lens, point) for point in points]

    def critic_state(self, left: float) -> np.ndarray:
        item = self.episode.objects[0].item
        target, goal, tool = self._grasp_place(), place(self.receptacles[0]), self._tool()
        commanded, turn = self._commanded()
        lengths = (
            *(target - tool), *(goal - tool), *(commanded - tool), tool[2], target[2], *(commanded - self.heading),
            self.width(), item.radius, item.half_height,
        )  # fmt: skip
        flags = (self.held_steps > 0, self.was_grasped, self.was_held)
        velocity = self.objects[0].linear_velocity[0].tolist()
        others = (*np.clip(velocity, -FAST, FAST), *flags, *self._tilt(turn), left)
        return np.array([*np.clip(lengths, -FAR, FAR) / 0.1, *others], np.float32)


def _fewer(tasks: TaskSet, objects: int | None, tables: int | None) -> TaskSet:
    """With the first so many objects and tables of training."""
    for name, least, wanted, there in (
        ("objects", tasks.several + 1, objects, len(tasks.objects)), ("tables", 1, tables, len(tasks.tables)),
    ):  # fmt: skip
        if wanted is not None and not least <= wanted <= there:
            raise SimrealError(
                f"env.settings.{name}={wanted}",
                code="ENVIRONMENT",
                remedy=f"Choose {least} to {there}, or null for all.",
            )
    return replace(tasks, objects=tasks.objects[:objects], tables=tasks.tables[:tables])
