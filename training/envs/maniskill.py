"""Tasks of ManiSkill with its Panda, simulated by PhysX on the processor; the same request gives the same episode.

Tasks of this project (`maniskill_tasks`) have variants and an expert; any other one that is registered has one variant.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from training.envs.base import EpisodeRequest, StepResult
from training.envs.maniskill_gpu import BatchedManiSkill
from training.envs.maniskill_scene import ONLY, ManiSkillConfig, Scene, check_variant, registered, time_limit
from training.envs.maniskill_tasks.suite import Suite
from vla import options
from vla.adapters import maniskill as adapter
from vla.contract import PolicyContract
from vla.errors import SimrealError
from vla.rig import trained_with
from vla.tasks.expert import Privileged
from vla.types import Observation


class ManiSkill:
    """`VectorEnv` of a ManiSkill task. A success with dense rewards, which would go on, counts as cut by the time."""

    @torch.inference_mode()  # a tenth of the time of all its small tensors
    def __init__(self, num_envs: int, config: ManiSkillConfig | None = None):
        self.config = config = config or ManiSkillConfig()
        self.num_envs, self.max_steps = num_envs, time_limit(config)
        gc.freeze()  # ManiSkill collects garbage with every scene; it need not look at all that is loaded by now
        self.slots = [Scene(config, visual="rgb" in config.obs) for _ in range(num_envs)]
        self._shown: Scene | None = None  # renders what a state-based scene looks like
        first = self.slots[0]
        suite: type[Suite] | None = None if first.suite is None else type(first.suite)
        sentence = config.instruction or adapter.sentence(config.task)
        self.axes: Mapping[str, tuple[str, ...]] = {ONLY: (ONLY,)} if suite is None else suite.axes
        self.controls: tuple[str, ...] = () if suite is None else suite.controls
        self.instructions: tuple[str, ...] = (sentence,) if suite is None else suite.instructions
        self.privileged_size = 0 if first.suite is None else first.suite.privileged_size
        self.critic_size = 0 if suite is None else suite.critic_size
        self._variants = (*(v for axis in self.axes.values() for v in axis), *self.controls)
        first.reset(0, ONLY)
        self.semantics = adapter.action_semantics(
            config.control_mode, config.chunk, first.env.control_freq, config.max_translation, config.max_rotation
        )
        self.contract: PolicyContract = adapter.maniskill_contract(first.native(), self.semantics, first.fov_y_deg())
        self.contract = replace(self.contract, cameras=trained_with(self.contract.cameras, first.cameras))
        first.info = None

    @torch.inference_mode()
    def reset(self, index: int, request: EpisodeRequest) -> None:
        check_variant(self.config.task, request.variant, self._variants)
        self.slots[index].reset(request.seed, request.variant)

    @torch.inference_mode()
    def step(self, indices: Sequence[int], actions: np.ndarray) -> StepResult:
        """As in `VectorEnv`; an episode that was over before is left alone and says so again."""
        count, chunk = actions.shape[:2]
        if count != len(indices):
            raise ValueError(f"{count} rows of actions for {len(indices)} environments: pass one row for each")
        # All are checked before the first is executed: a refused batch changes nothing.
        commands = [[adapter.command(action, self.semantics) for action in row] for row in actions]
        slots = [self.slots[index] for index in indices]
        rewards = np.zeros((count, chunk), np.float32)
        executed = np.zeros((count, chunk), bool)
        critic_states = np.zeros((count, chunk, self.critic_size), np.float32)
        for row, slot in enumerate(slots):
            for t in range(chunk):
                if self._over(slot):
                    break
                rewards[row, t] = slot.control_step(commands[row][t])
                executed[row, t] = True
                if slot.suite is not None:
                    critic_states[row, t] = slot.suite.critic_state(1 - slot.steps / self.max_steps)
        success, over = (np.array([f(slot) for slot in slots]) for f in (lambda slot: slot.success, self._over))
        ended = np.array([slot.failure for slot in slots]) | (success & (self.config.reward != "dense"))
        return StepResult(rewards, executed, ended, over & ~ended, success, critic_states)

    def _over(self, slot: Scene) -> bool:
        if slot.info is None:
            raise ValueError("an environment plays no episode: reset it before its first step")
        return slot.success or slot.failure or slot.steps >= self.max_steps

    @torch.inference_mode()
    def observe(self, indices: Sequence[int]) -> list[Observation]:
        slots = [self.slots[index] for index in indices]
        return [adapter.observation(slot.native(), self._sentence(slot)) for slot in slots]

    def _sentence(self, slot: Scene) -> str:
        return self.instructions[0] if slot.suite is None else slot.suite.instruction

    @torch.inference_mode()
    def privileged(self, indices: Sequence[int]) -> np.ndarray:
        rows = [slot.suite.privileged() for slot in map(self.slots.__getitem__, indices) if slot.suite is not None]
        return np.array(rows, np.float32).reshape(len(indices), self.privileged_size)

    @torch.inference_mode()
    def critic_state(self, indices: Sequence[int]) -> np.ndarray:
        slots = [self.slots[index] for index in indices]
        rows = [s.suite.critic_state(1 - s.steps / self.max_steps) for s in slots if s.suite is not None]
        return np.array(rows, np.float32).reshape(len(indices), self.critic_size)

    @torch.inference_mode()
    def picture(self, index: int, size: int = 192) -> np.ndarray:
        """A third-person image for people `[size, size, 3]` uint8; no policy sees it."""
        slot = self.slots[index]
        if not slot.visual:  # has no renderer: another scene is brought into its state
            if self._shown is None:
                self._shown = Scene(replace(self.config, obs="rgb"), visual=True)
            slot = self._shown.mirror(slot)
        return slot.picture(size)

    def close(self) -> None:
        for slot in (*self.slots, *filter(None, [self._shown])):
            slot.env.close()


class ManiSkillSuite(ManiSkill):
    """One of this project's tasks, which the scripted expert can do."""

    @torch.inference_mode()
    def expert_view(self, index: int) -> Privileged:
        """What the scripted expert is told about environment `index`."""
        return self._suite(index).expert_view()

    @torch.inference_mode()
    def scatter(self, index: int, request: EpisodeRequest) -> None:
        """Start the episode with the tool at a random place over the table."""
        self.reset(index, request)
        self._suite(index).scatter(np.random.default_rng([request.seed, 12]))

    def _suite(self, index: int) -> Suite:
        suite = self.slots[index].suite
        assert suite is not None
        return suite


def make(num_envs: int, **settings: Any) -> ManiSkill | BatchedManiSkill:
    """What `vla` calls; settings are the fields of `ManiSkillConfig`."""
    config = options.read(ManiSkillConfig, settings)
    of_suite = issubclass(registered(config).cls, Suite)
    if config.backend == "cpu":
        return (ManiSkillSuite if of_suite else ManiSkill)(num_envs, config)
    if of_suite:
        raise SimrealError(
            f"{config.task} builds the scene of each episode, which a simulation on a GPU does for all at once only",
            code="ENVIRONMENT", remedy="Set env.settings.backend=cpu; render_backend=gpu is free.",
        )  # fmt: skip
    return BatchedManiSkill(num_envs, config)
