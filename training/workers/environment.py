"""The environment worker: steps its slots, stage by stage, and writes what happens into the rollout block."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training import envs
from training.envs.base import EpisodeRequest
from training.pipeline.bell import Bell, PipelineTimeout
from training.pipeline.block import RolloutBlock, RolloutShape
from vla.codec import Codec


@dataclass(frozen=True)
class EnvironmentOptions:
    """environment, settings: registered name and its options. variant: of the episodes.

    slots: first and last + 1 of this worker in the block. stages: groups of slots that take turns.
    seed: of the run. deadline_s: longest wait.
    """

    environment: str
    settings: dict[str, Any]
    variant: str
    slots: tuple[int, int]
    stages: int
    seed: int
    deadline_s: float


@dataclass
class EpisodeLog:
    """Finished episodes of an iteration; begun: episodes of the run so far in each slot `[n]`."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    successes: list[bool] = field(default_factory=list)
    begun: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    steps: int = 0
    step_s: float = 0.0
    wait_s: float = 0.0


def episode_seed(seed: int, slot: int, episode: int) -> int:
    """Seed of a slot's episode: a function of the run alone, whatever the schedule. Below 500 million."""
    return int(np.random.SeedSequence([seed, slot, episode]).generate_state(1)[0] % 400_000_000) + 2_000_000


class EnvironmentWorker:
    """Runs in a Ray actor of its own."""

    def __init__(
        self,
        index: int,
        options: EnvironmentOptions,
        codec: Codec,
        shape: RolloutShape,
        block: str,
        bells: str,
    ):
        self.index = index
        self.options = options
        self.codec = codec
        self.block = RolloutBlock(shape, block)
        first, last = options.slots
        self.stages = [list(part) for part in np.array_split(np.arange(last - first), options.stages)]
        self.env = envs.make(options.environment, last - first, **options.settings)
        self.episodes = np.zeros(last - first, np.int64)
        self.returns = np.zeros(last - first)
        self.lengths = np.zeros(last - first, np.int64)
        self.to_policy = Bell(Path(bells) / "policy")
        self.from_policy = Bell(Path(bells) / f"environment{index}")

    def ready(self) -> int:
        """The process id, once everything is set up."""
        return os.getpid()

    def _start(self, episodes: np.ndarray) -> None:
        """Begin a fresh episode in every slot, the next after `episodes` `[n]`, and show how it begins."""
        self.episodes = episodes.copy()
        for local in range(self.env.num_envs):
            self._reset(local)
        for stage, slots in enumerate(self.stages):
            self._show(0, slots)
            self.to_policy.ring(self.index, stage, 0)

    def rollout(self, begun: np.ndarray | None) -> EpisodeLog:
        """Fill the block: T decisions in every slot.

        begun: None to go on with the episodes, row 0 of which is decided already; or how many have begun in
            each slot `[n]`, to start the next ones.
        """
        log = EpisodeLog()
        fresh = begun is not None
        if fresh:
            self._start(begun)
        for decision in range(self.block.shape.decisions):
            for stage, slots in enumerate(self.stages):
                if decision > 0 or fresh:
                    began = time.perf_counter()
                    self._wait(stage, decision)
                    log.wait_s += time.perf_counter() - began
                began = time.perf_counter()
                self._step(decision, slots, log)
                self._show(decision + 1, slots)
                log.step_s += time.perf_counter() - began
                self.to_policy.ring(self.index, stage, decision + 1)
        for stage in range(len(self.stages)):  # the bootstrap's decision opens the next iteration
            self._wait(stage, self.block.shape.decisions)
        log.begun = self.episodes.copy()
        return log

    def _wait(self, stage: int, decision: int) -> None:
        message = self.from_policy.wait(self.options.deadline_s)
        if message is None:
            raise PipelineTimeout(
                f"environment worker {self.index}",
                (),
                self.options.deadline_s,
                f"policy, stage {stage}, decision {decision}",
            )
        if message[1:] != (stage, decision):
            raise RuntimeError(
                f"environment worker {self.index}: expected stage {stage}, decision {decision}, got {message}"
            )

    def _step(self, decision: int, slots: list[int], log: EpisodeLog) -> None:
        rows = np.asarray(slots) + self.options.slots[0]
        block = self.block
        boundary = block["boundary"][decision, rows]
        for local in np.asarray(slots)[boundary]:  # its value has been read: the episode is over at last
            self._reset(int(local))
        block["boundary"][decision + 1, rows] = False
        live = [s for s, b in zip(slots, boundary, strict=True) if not b]
        if not live:
            return
        global_rows = np.asarray(live) + self.options.slots[0]
        actions = self.codec.decode(block["action_tokens"][decision, global_rows])
        result = self.env.step(live, actions)
        for name in ("rewards", "executed", "terminated", "truncated"):
            block[name][decision, global_rows] = getattr(result, name)
        block["critic_states"][decision, global_rows, 1:] = result.critic_states[:, :-1]
        block["boundary"][decision + 1, global_rows] = result.truncated & ~result.terminated
        executed = result.executed.sum(1)
        self.returns[live] += (result.rewards * result.executed).sum(1)
        self.lengths[live] += executed
        log.steps += int(executed.sum())
        for local, terminated, truncated, success in zip(
            live, result.terminated, result.truncated, result.success, strict=True
        ):
            if terminated or truncated:
                log.returns.append(float(self.returns[local]))
                log.lengths.append(int(self.lengths[local]))
                log.successes.append(bool(success))
            if terminated:
                self._reset(local)

    def _reset(self, local: int) -> None:
        slot = self.options.slots[0] + local
        seed = episode_seed(self.options.seed, slot, int(self.episodes[local]))
        self.env.reset(local, EpisodeRequest(seed, self.options.variant))
        self.episodes[local] += 1
        self.returns[local] = self.lengths[local] = 0

    def _show(self, decision: int, slots: list[int]) -> None:
        rows = np.asarray(slots) + self.options.slots[0]
        inputs = self.codec.encode(self.env.observe(slots))
        self.block["images"][decision, rows] = inputs.images
        self.block["state"][decision, rows] = inputs.state
        self.block["tokens"][decision, rows] = inputs.tokens
        self.block["privileged"][decision, rows] = self.env.privileged(slots)
        self.block["critic_states"][decision, rows, 0] = self.env.critic_state(slots)
