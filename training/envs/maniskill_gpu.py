"""Tasks of ManiSkill on a GPU: one batched simulation for all environments, whose tensors stay there until `observe`.

PhysX steps all scenes together, whoever asks; those that are not meant, or whose episodes are over, are put back to
where they were. So let a worker step all its environments at once. Episodes are not the same bit for bit there: PhysX
on a GPU adds up in any order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.envs.base import EpisodeRequest, StepResult
from training.envs.maniskill_scene import (
    DIFFERENCES,
    OBS_MODES,
    ONLY,
    ManiSkillConfig,
    by_role,
    check_variant,
    fov_y,
    registered,
    reward_mode,
    time_limit,
)
from vla.adapters import maniskill as adapter
from vla.contract import PolicyContract
from vla.errors import SimrealError
from vla.types import Observation


class BatchedManiSkill:
    """`VectorEnv` of one of ManiSkill's own tasks. backend: ManiSkill's name; the tests step one on the processor."""

    privileged_size = 0
    critic_size = 0
    controls: tuple[str, ...] = ()
    axes: Mapping[str, tuple[str, ...]] = {ONLY: (ONLY,)}

    @torch.inference_mode()
    def __init__(self, num_envs: int, config: ManiSkillConfig, backend: str = "physx_cuda"):
        if backend == "physx_cuda" and not torch.cuda.is_available():
            raise SimrealError(
                "backend=gpu: PyTorch finds no GPU",
                code="GPU",
                remedy="Set env.settings.backend=cpu; `vla doctor` says what PyTorch finds.",
            )
        visual = "rgb" in config.obs
        self.config, self.num_envs, self.max_steps = config, num_envs, time_limit(config)
        self.env: Any = registered(config).make(
            num_envs=num_envs, obs_mode=OBS_MODES[config.obs], control_mode=config.control_mode,
            reward_mode=reward_mode(config), robot_uids=config.robot, sim_backend=backend,
            render_backend=config.render_backend if visual else "none",
            sensor_configs={"width": config.image_size, "height": config.image_size},
        )  # fmt: skip
        self.env._flatten_raw_obs = lambda obs: obs  # the adapter takes them by their names
        self.instructions: tuple[str, ...] = (config.instruction or adapter.sentence(config.task),)
        self.device: torch.device = self.env.device
        self.playing = torch.zeros(num_envs, dtype=torch.bool, device=self.device)
        self.success, self.failure = torch.zeros_like(self.playing), torch.zeros_like(self.playing)
        self.steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self.level = torch.zeros(num_envs, device=self.device)
        self.begun = np.zeros(num_envs, bool)
        self.last = torch.zeros(num_envs, self.env.single_action_space.shape[0], device=self.device)
        self.info: dict[str, Any] = self.env.get_info()
        self.seen: dict[str, Any] | None = None  # on the host, once somebody has asked for it
        self.semantics = adapter.action_semantics(
            config.control_mode, config.chunk, self.env.control_freq, config.max_translation, config.max_rotation
        )
        fovs = {role: math.degrees(fov_y(c)) for role, c in by_role(self.env._sensor_configs if visual else {})}
        self.contract: PolicyContract = adapter.maniskill_contract(self._native(0), self.semantics, fovs)

    @torch.inference_mode()
    def reset(self, index: int, request: EpisodeRequest) -> None:
        """Of this environment alone: what a task draws depends on the seed, not on the others."""
        check_variant(self.config.task, request.variant, [ONLY])
        env, row = self.env, torch.tensor([index], device=self.device)
        env.get_obs = lambda info: None  # nobody has asked for it yet
        env.reset(seed=[request.seed] * self.num_envs, options={"env_idx": row})
        del env.get_obs
        self.info, self.seen = env.get_info(), None
        self.begun[index] = True
        self.playing[row], self.success[row], self.failure[row], self.steps[row] = True, False, False, 0
        self.last[row] = 0
        self.level[row] = self._level(self.last)[row]

    @torch.inference_mode()
    def step(self, indices: Sequence[int], actions: np.ndarray) -> StepResult:
        """As in `VectorEnv`; an episode that was over before is left alone and says so again."""
        count, chunk = actions.shape[:2]
        if count != len(indices):
            raise ValueError(f"{count} rows of actions for {len(indices)} environments: pass one row for each")
        if not self.begun[list(indices)].all():
            raise ValueError("an environment plays no episode: reset it before its first step")
        commands = np.array([[adapter.command(action, self.semantics) for action in row] for row in actions])
        rows = torch.tensor(list(indices), device=self.device)
        given = torch.from_numpy(commands).to(self.device)
        meant = torch.zeros_like(self.playing)
        meant[rows] = True
        rewards, executed = [], []
        for t in range(chunk):
            active = meant & self.playing
            reward = self._control_step(active, rows, given[:, t])
            rewards.append(reward[rows])
            executed.append(active[rows])
        over = ~self.playing[rows]
        ended = self.failure[rows] | (self.success[rows] & (self.config.reward != "dense"))
        told = (torch.stack(rewards, 1).float(), torch.stack(executed, 1), ended, over & ~ended, self.success[rows])
        reward, done, terminated, truncated, success = (part.cpu().numpy() for part in told)
        return StepResult(reward, done, terminated, truncated, success, np.zeros((count, chunk, 0), np.float32))

    def _control_step(self, active: torch.Tensor, rows: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Step the `active` environments `[N]`; the rewards `[N]` on the device, 0 for the others."""
        env = self.env
        if not bool(active.any()):
            return torch.zeros_like(self.level)
        idle = torch.nonzero(~active)[:, 0]
        before = env.get_state() if len(idle) else None
        action = self.last * 0  # a move of nothing, and whatever the gripper was told
        action[:, -1] = self.last[:, -1]
        action[rows] = torch.where(active[rows, None], given, action[rows])
        self.last = action
        env._step_action(action)
        env._elapsed_steps += active.to(env._elapsed_steps.dtype)
        if before is not None:
            env.set_state(before[idle], idle)
            if env.gpu_sim_enabled:
                env.scene._gpu_apply_all()
                env.scene.px.gpu_update_articulation_kinematics()
                env.scene._gpu_fetch_all()
        self.steps += active
        self.info, self.seen = env.get_info(), None
        for flag, key in ((self.success, "success"), (self.failure, "fail")):
            if key in self.info:
                flag |= active & self.info[key].to(torch.bool)
        self.playing &= ~(active & (self.success | self.failure | (self.steps >= self.max_steps)))
        level = torch.where(active, self._level(action), self.level)
        reward, self.level = level - self.level if self.config.reward in DIFFERENCES else level * active, level
        return reward

    def _level(self, action: torch.Tensor) -> torch.Tensor:
        """What the reward is, or of what it is the difference, `[N]`."""
        reward: torch.Tensor = self.env.get_reward(obs={}, action=action, info=self.info)
        return reward.to(self.level.dtype)

    @torch.inference_mode()
    def observe(self, indices: Sequence[int]) -> list[Observation]:
        return [adapter.observation(self._native(index), self.instructions[0]) for index in indices]

    def _native(self, index: int) -> dict[str, Any]:
        """What the adapter takes; the first who asks brings all of it to the host."""
        if self.seen is None:
            obs = self.env.get_obs(self.info)
            robot = self.env.agent
            shown = {role: data["rgb"] for role, data in by_role(obs.get("sensor_data", {}))}
            target = "target" in self.config.control_mode
            controller = robot.controller.controllers["arm"] if target else None
            self.seen = _on_host({
                "base_pose": robot.robot.pose.raw_pose, "tcp_pose": robot.tcp.pose.raw_pose,
                "qpos": obs["agent"]["qpos"], "qvel": obs["agent"]["qvel"], "images": shown,
                "time": self.steps / self.env.control_freq,
                "extra": {k: v for k, v in obs["extra"].items() if k != "tcp_pose"},
                **({"commanded_pos": controller._target_pose.p} if controller is not None else {}),
            })  # fmt: skip
        native = _row(self.seen, index)
        return native if "state" in self.config.obs else native | {"extra": None}

    def privileged(self, indices: Sequence[int]) -> np.ndarray:
        return np.zeros((len(indices), 0), np.float32)

    def critic_state(self, indices: Sequence[int]) -> np.ndarray:
        return np.zeros((len(indices), 0), np.float32)

    @torch.inference_mode()
    def picture(self, index: int, size: int = 192) -> np.ndarray:
        """A third-person image for people `[size, size, 3]` uint8; no policy sees it."""
        image = Image.fromarray(self.env.render_rgb_array()[index].cpu().numpy())
        return np.asarray(image.resize((size, size), Image.Resampling.BOX))

    def close(self) -> None:
        self.env.close()


def _on_host(tree: Any) -> Any:
    return {k: _on_host(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.cpu().numpy()


def _row(tree: Any, index: int) -> Any:
    return {k: _row(v, index) for k, v in tree.items()} if isinstance(tree, dict) else tree[index]
