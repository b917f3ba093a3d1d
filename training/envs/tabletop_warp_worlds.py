"""The episodes of put-on-plate in many worlds at once: commands, rewards and what a critic is told, as tensors.

Rules, numbers and their order are those of `tabletop`, written for a batch. All worlds have the same number of objects
and receptacles. Tensors are `[n, ...]`, one row for each world, in m, rad, s, robot base frame.
"""

from dataclasses import dataclass

import numpy as np
import torch

from training.envs.progress import GRASP_REWARD
from training.envs.tabletop import CRITIC, NOMINAL_JOINTS, PIECES, SUBSTEPS, TabletopConfig
from training.envs.tabletop_warp_arm import JOINTS, Arm, rotation_vector, turn_by
from training.envs.tabletop_warp_physics import Physics
from vla.adapters import tabletop as adapter
from vla.tasks.expert import Privileged
from vla.tasks.put_on_plate import MAX_STEPS, Episode

MAX_DELAY = 3  # pieces of a control step
DOWN = ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, -1.0))


@dataclass(frozen=True)
class Played:
    """What a chunk did in all worlds, see `StepResult`."""

    rewards: torch.Tensor
    executed: torch.Tensor
    critic_states: torch.Tensor


class Worlds:
    """`count` worlds with as many objects and receptacles as a kind of episode has."""

    def __init__(self, count: int, objects: int, receptacles: int, config: TabletopConfig, device: torch.device):
        self.count, self.config, self.device = count, config, device
        self.physics = Physics(count, objects, receptacles, device)
        self.arm = Arm(self.physics.host, device)
        self.episodes: list[Episode | None] = [None] * count
        self.frames = [0] * count  # images of the present episode, which number the noise
        self._waiting: dict[int, Episode] = {}
        self._down = torch.tensor(DOWN, dtype=torch.float64, device=device)
        nominal = torch.as_tensor(NOMINAL_JOINTS, device=device)
        # Of the episode.
        self.goal, self.goal_radius, self.half_height, self.radius = self._zeros(3), *(self._zeros() for _ in range(3))
        self.table, self.delay, self.move_at = (self._zeros(dtype=torch.long) for _ in range(3))
        self.light, self.move_to = self._zeros(), self._zeros(2)
        # Of its course.
        self.command_position, self.last_step = self._zeros(3), self._zeros(3)
        self.command_rotation = self._down.repeat(count, 1, 1)
        self.target_joints = nominal.repeat(count, 1)
        self.recent = self.target_joints[:, None].repeat(1, MAX_DELAY, 1)  # the last joint targets of the pieces
        self.step_count, self.grasped_steps = (self._zeros(dtype=torch.long) for _ in range(2))
        self.was_grasped, self.held, self.success = (self._zeros(dtype=torch.bool) for _ in range(3))
        self.touch, self.level = self._zeros(2, dtype=torch.bool), self._zeros()

    def _zeros(self, *size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.zeros(self.count, *size, dtype=dtype, device=self.device)

    # ---- the state, as the rules want it

    @property
    def tool(self) -> torch.Tensor:
        """Measured tool centre `[n, 3]`."""
        return self.physics.state["site_xpos"][:, self.physics.tool].double()

    @property
    def target(self) -> torch.Tensor:
        """Centre of the target `[n, 3]`."""
        return self.physics.state["xpos"][:, self.physics.target].double()

    @property
    def target_velocity(self) -> torch.Tensor:
        """`[n, 3]` m/s."""
        first = self.physics.target_dof
        return self.physics.state["qvel"][:, first : first + 3].double()

    @property
    def width(self) -> torch.Tensor:
        """Gripper opening `[n]`."""
        return self.physics.state["qpos"][:, JOINTS : JOINTS + 2].double().sum(-1)

    @property
    def over(self) -> torch.Tensor:
        """Bool `[n]`: success or the time limit has been reached."""
        return self.success | (self.step_count >= MAX_STEPS)

    # ---- episodes

    def begin(self, world: int, episode: Episode) -> None:
        """Note an episode; all that were noted are laid out together by `lay_out`, which whoever looks calls first."""
        self._waiting[world] = self.episodes[world] = episode
        self.frames[world] = 0

    def lay_out(self) -> None:
        """Start the noted episodes: dress the slots, draw gains, delay and light, solve the start poses."""
        if not self._waiting:
            return
        worlds, episodes = list(self._waiting), list(self._waiting.values())
        self._waiting = {}
        draws = [np.random.default_rng([e.seed, 77]) for e in episodes]  # in the order of `tabletop`
        stiffness = np.array([rng.uniform(0.8, 1.2) for rng in draws])
        damping = np.array([rng.uniform(0.4, 0.7) for rng in draws])
        self._write(worlds, self.light, [rng.uniform(0.85, 1.15) for rng in draws])
        self._write(worlds, self.delay, [rng.integers(0, MAX_DELAY + 1) for rng in draws])
        goals = [e.receptacles[0] for e in episodes]
        self._write(worlds, self.goal, [(g.x, g.y, g.item.half_height) for g in goals])
        self._write(worlds, self.goal_radius, [g.item.radius for g in goals])
        self._write(worlds, self.half_height, [e.objects[0].item.half_height for e in episodes])
        self._write(worlds, self.radius, [e.objects[0].item.radius for e in episodes])
        self._write(worlds, self.table, [e.table for e in episodes])
        moves = [e.disturbance for e in episodes]
        self._write(worlds, self.move_at, [-1 if d.move_to is None or d.move_at_step is None else d.move_at_step
                                           for d in moves])  # fmt: skip
        self._write(worlds, self.move_to, [d.move_to or (0.0, 0.0) for d in moves])
        at = torch.as_tensor(worlds, device=self.device)
        for flag in (self.last_step, self.step_count, self.grasped_steps, self.was_grasped, self.held, self.success):
            flag[at] = 0
        self.touch[at] = False
        self._start_poses(at, episodes)
        kept = self.physics.kept()
        self.physics.dress(worlds, episodes)
        self.physics.set_servo(worlds, stiffness, damping)
        self._start_state(at, episodes)
        self.physics.forward()
        begun = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        begun[at] = True
        self.physics.restore(kept, begun)
        self.level[at] = self._progress(torch.zeros_like(begun))[at]

    def _write(self, worlds: list[int], tensor: torch.Tensor, rows: list) -> None:
        values = torch.as_tensor(np.array(rows), dtype=tensor.dtype)
        tensor[torch.as_tensor(worlds, device=self.device)] = values.to(self.device)

    def _start_poses(self, at: torch.Tensor, episodes: list[Episode]) -> None:
        position, turns = (
            torch.as_tensor(np.array(rows), dtype=torch.float64, device=self.device)
            for rows in ([e.start_position for e in episodes], [e.start_rotation for e in episodes])
        )
        rotation = turn_by(turns) @ self._down
        joints = torch.as_tensor(NOMINAL_JOINTS, device=self.device).repeat(len(episodes), 1)
        for _ in range(12):
            joints = joints + self.arm.step(joints, position, rotation, limit=0.5)
        self.command_position[at], self.command_rotation[at] = position, rotation
        self.target_joints[at], self.recent[at] = joints, joints[:, None].repeat(1, MAX_DELAY, 1)

    def _start_state(self, at: torch.Tensor, episodes: list[Episode]) -> None:
        def pose(placement) -> list[float]:
            half = placement.yaw / 2
            return [placement.x, placement.y, placement.item.half_height, np.cos(half), 0, 0, np.sin(half)]

        state = self.physics.state
        for name in ("qpos", "qvel", "qacc_warmstart", "ctrl", "time"):
            state[name][at] = 0
        free, fixed = (
            torch.as_tensor(np.array([[pose(p) for p in row] for row in rows]), dtype=torch.float32).to(self.device)
            for rows in ([e.objects for e in episodes], [e.receptacles for e in episodes])
        )
        state["qpos"][at, :JOINTS] = state["ctrl"][at, :JOINTS] = self.target_joints[at].float()
        state["qpos"][at, JOINTS : JOINTS + 2], state["ctrl"][at, JOINTS] = 0.04, 255.0
        state["qpos"][at, JOINTS + 2 :] = free.reshape(len(episodes), -1)
        state["mocap_pos"][at], state["mocap_quat"][at] = fixed[..., :3], fixed[..., 3:]

    # ---- a control step

    def play(self, actions: torch.Tensor, named: torch.Tensor) -> Played:
        """Execute chunks `[n, C, 7]` in the `named` worlds (bool `[n]`), each up to the end of its episode."""
        self.lay_out()
        chunk = actions.shape[1]
        rewards = torch.zeros(self.count, chunk, dtype=torch.float32, device=self.device)
        executed = torch.zeros(self.count, chunk, dtype=torch.bool, device=self.device)
        critic_states = torch.zeros(self.count, chunk, CRITIC, dtype=torch.float32, device=self.device)
        for t in range(chunk):
            going = named & ~self.over
            if not going.any():
                break
            self._control_step(actions[:, t], going)
            rewards[:, t] = self._judge(going)
            executed[:, t] = going
            critic_states[:, t] = self.critic_state() * going[:, None]
        return Played(rewards, executed, critic_states)

    def _control_step(self, action: torch.Tensor, going: torch.Tensor) -> None:
        """Advance the worlds that are `going`: integrate the command, solve the joints, follow them."""
        config, physics, state = self.config, self.physics, self.physics.state
        kept = physics.kept()
        moved = going & (self.move_at == self.step_count) & ~self.was_grasped
        place = torch.cat([self.move_to, self.half_height[:, None]], -1).float()
        first = JOINTS + 2
        state["qpos"][:, first : first + 3] = torch.where(moved[:, None], place, state["qpos"][:, first : first + 3])
        velocity = state["qvel"][:, physics.target_dof : physics.target_dof + 6]
        velocity.masked_fill_(moved[:, None], 0.0)
        step = action[:, :3].clamp(-config.max_translation, config.max_translation)
        rotation = turn_by(action[:, 3:6].clamp(-config.max_rotation, config.max_rotation)) @ self.command_rotation
        position = self.command_position + step
        position[:, 2].clamp_(min=0.012)
        self._follow(going, position, rotation)
        self.last_step = torch.where(going[:, None], step, self.last_step)
        grip = torch.where(action[:, 6] > adapter.GRIPPER_THRESHOLD, 255.0, 0.0)
        state["ctrl"][:, JOINTS] = grip.float()
        pieces = torch.arange(PIECES, device=self.device) + MAX_DELAY
        late = (pieces - self.delay[:, None])[..., None].expand(-1, -1, JOINTS)
        followed = torch.gather(self._targets, 1, late).float()
        for piece in range(PIECES):
            state["ctrl"][:, :JOINTS] = followed[:, piece]
            physics.advance(SUBSTEPS // PIECES)
        physics.restore(kept, going)
        self.touch = torch.where(going[:, None], physics.touching(), self.touch)
        self.step_count += going

    def _follow(self, going: torch.Tensor, position: torch.Tensor, rotation: torch.Tensor) -> None:
        """Take up the command in the worlds that are `going`; joint targets of the past and this step's pieces."""
        self.command_position = torch.where(going[:, None], position, self.command_position)
        self.command_rotation = torch.where(going[:, None, None], rotation, self.command_rotation)
        before = self.target_joints
        goal = before + self.arm.step(before, self.command_position, self.command_rotation, limit=0.15)
        goal = torch.minimum(torch.maximum(goal, self.arm.lower), self.arm.upper)
        shares = torch.arange(1, PIECES + 1, device=self.device, dtype=torch.float64) / PIECES
        pieces = before[:, None] + (goal - before)[:, None] * shares[:, None]
        self._targets = torch.cat([self.recent, pieces], 1)
        self.recent = torch.where(going[:, None, None], self._targets[:, PIECES:], self.recent)
        self.target_joints = torch.where(going[:, None], goal, before)

    def _judge(self, going: torch.Tensor) -> torch.Tensor:
        """Rewards `[n]` of the last control step, see `TabletopConfig`; 0 where none was made."""
        grasped = self.touch.all(-1)
        steps = torch.where(grasped, self.grasped_steps + 1, 0)
        self.grasped_steps = torch.where(going, steps, self.grasped_steps)
        lifted = self.target[:, 2] > self.half_height + 0.02
        self.was_grasped |= going & grasped
        self.held |= going & (self.grasped_steps >= 3) & lifted
        self.success = torch.where(going, self.resting(), self.success)
        level = GRASP_REWARD * self.was_grasped + GRASP_REWARD * self.held + 1.0 * self.success
        level = level + self._progress(grasped)
        reward = torch.where(going, level - self.level, 0.0)
        self.level = torch.where(going, level, self.level)
        return reward.float()

    def resting(self) -> torch.Tensor:
        """`put_on_plate.is_success` of all worlds, bool `[n]`."""
        offset = self.target - self.goal
        on_goal = torch.hypot(offset[:, 0], offset[:, 1]) < self.goal_radius * 0.85
        lowest = self.target[:, 2] - self.half_height
        still = self.target_velocity.norm(dim=-1) < 0.15
        resting = ((lowest - 2 * self.goal[:, 2]).abs() < 0.012) & still
        return on_goal & resting & ~self.touch.any(-1) & (self.width > 0.03)

    def _progress(self, grasped: torch.Tensor) -> torch.Tensor:
        """What the dense reward adds `[n]`, as `tabletop` does it."""
        if self.config.reward == "sparse":
            return torch.zeros_like(self.level)
        distance = (self.target - self.tool).norm(dim=-1)
        reach = 1 - 0.5 * torch.tanh(6 * distance) - 0.5 * torch.tanh(40 * distance)
        offset = self.target - self.goal
        carried = (1 - torch.tanh(5 * torch.hypot(offset[:, 0], offset[:, 1]))) * grasped
        one = torch.ones_like(reach)
        return 0.5 * torch.where(grasped | self.success, one, reach) + 0.5 * torch.where(self.success, one, carried)

    # ---- what others are told

    def tilt(self) -> torch.Tensor:
        """Rotation vectors `[n, 3]` that turn the commanded orientation upright."""
        return rotation_vector(self._down @ self.command_rotation.transpose(1, 2))

    def critic_state(self) -> torch.Tensor:
        """float32 `[n, CRITIC]`, see `tabletop.CRITIC`."""
        tool, target = self.tool, self.target
        lengths = torch.cat([
            target - tool, self.goal - tool, self.command_position - tool, tool[:, 2:], target[:, 2:], self.last_step,
            torch.stack([self.width, self.radius, self.half_height], -1),
        ], -1)  # fmt: skip
        flags = torch.stack([self.grasped_steps > 0, self.was_grasped, self.held], -1)
        left = 1 - self.step_count[:, None] / MAX_STEPS
        return torch.cat([lengths / 0.1, self.target_velocity, flags, self.tilt(), left], -1).float()

    def privileged(self) -> torch.Tensor:
        """float32 `[n, PRIVILEGED]`, see `tabletop.PRIVILEGED`."""
        target, tool = self.target, self.tool
        positions = [p - self.command_position for p in (target, self.goal, tool)]
        pixels = [self._pixel(camera, point) for camera in adapter.CAMERAS for point in (target, self.goal)]
        return torch.cat([torch.cat(positions, -1) / 0.1, *pixels], -1).float()

    def _pixel(self, camera: str, point: torch.Tensor) -> torch.Tensor:
        """Image coordinates `[n, 2]` of points (x right, y down, -1..1 at the borders); NaN if outside."""
        number, state = self.physics.host.camera(camera).id, self.physics.state
        turned = state["cam_xmat"][:, number].double().transpose(1, 2)
        seen = (turned @ (point - state["cam_xpos"][:, number].double())[..., None])[..., 0]
        scale = np.tan(np.deg2rad(self.physics.host.cam_fovy[number]) / 2)
        depth = -seen[:, 2].clamp(max=-1e-3) * scale
        uv = torch.stack([seen[:, 0], -seen[:, 1]], -1) / depth[:, None]
        inside = (seen[:, 2] <= -1e-3) & (uv.abs().amax(-1) <= 1.0)
        return torch.where(inside[:, None], uv, torch.nan)

    def expert_view(self, world: int) -> Privileged:
        goal = self.goal[world].cpu().numpy().copy()
        return Privileged(
            target=self.target[world].cpu().numpy(),
            goal=goal,
            goal_top=float(2 * goal[2]),
            half_height=float(self.half_height[world]),
            commanded=self.command_position[world].cpu().numpy().copy(),
            measured=self.tool[world].cpu().numpy(),
            tilt=self.tilt()[world].cpu().numpy(),
            width=float(self.width[world]),
        )
