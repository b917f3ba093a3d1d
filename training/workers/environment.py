"""The environment worker of the synchronous schedules: steps its slots, stage by stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training import envs
from training.algorithms.rewards import RewardForm
from training.pipeline.bell import Bell, PipelineTimeout
from training.pipeline.block import RolloutBlock, RolloutShape
from training.pipeline.status import Doing
from training.workers.episodes import EpisodeLog, Episodes
from training.workers.watched import Watched
from vla.codec import Codec


@dataclass(frozen=True)
class EnvironmentOptions:
    """environment, settings: registered name and its options. variant: of the episodes.

    slots: first and last + 1 of this worker in the block. stages: groups of slots that take turns.
    seed: of the run. deadline_s: longest wait. policy: number of the policy worker that decides for it.
    first: slot of the first column of its host's block. form: of the rewards. group_size: of whole episodes.
    """

    environment: str
    settings: dict[str, Any]
    variant: str
    slots: tuple[int, int]
    stages: int
    seed: int
    deadline_s: float
    form: RewardForm
    policy: int = 0
    first: int = 0
    group_size: int = 1


class EnvironmentWorker(Watched):
    """Runs in a Ray actor of its own."""

    kind: type[Episodes] = Episodes

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
        self.block = RolloutBlock(shape, block)
        first, last = options.slots
        self.columns = slice(first - options.first, last - options.first)
        self.stages = [list(part) for part in np.array_split(np.arange(last - first), options.stages)]
        env = envs.make(options.environment, last - first, **options.settings)
        begun = np.zeros(last - first, np.int64)
        self.episodes = self.kind(
            env, codec, options.seed, options.variant, first, self.columns.start, begun, options.form
        )
        self.to_policy = Bell(Path(bells) / f"policy{options.policy}")
        self.from_policy = Bell(Path(bells) / f"environment{index}")
        self.answered: set[tuple[int, int]] = set()  # stage and decision of what was not waited for yet

    def _start(self, begun: np.ndarray) -> None:
        """Begin a fresh episode in every slot, the next after `begun` `[n]`, and show how it begins."""
        self.episodes.begun[:] = begun
        for slot in range(len(begun)):
            self.episodes.reset(slot)
        for stage, slots in enumerate(self.stages):
            self.episodes.show(self.block, 0, slots)
            self.to_policy.ring(self.index, stage, 0)

    def rollout(self, begun: np.ndarray | None) -> EpisodeLog:
        """Fill the block: T decisions in every slot.

        begun: None to go on with the episodes, row 0 of which is decided already; or how many have begun in
            each slot `[n]`, to start the next ones.
        """
        fresh = begun is not None
        self.answered.clear()
        self.row.turn_to(Doing.STEPPING)
        if begun is not None:
            self._start(begun)
        for decision in range(self.block.shape.decisions):
            for stage, slots in enumerate(self.stages):
                if decision > 0 or fresh:
                    self._wait(stage, decision)
                self.episodes.step(self.block, decision, slots)
                self.episodes.show(self.block, decision + 1, slots)
                self.to_policy.ring(self.index, stage, decision + 1)
        for stage in range(len(self.stages)):  # the bootstrap's decision opens the next iteration
            self._wait(stage, self.block.shape.decisions)
        self.row.turn_to(Doing.IDLE)
        log = EpisodeLog()
        log.read(self.block, self.columns)
        log.begun = self.episodes.begun.copy()
        return log

    def _wait(self, stage: int, decision: int) -> None:
        """Until a stage has been decided for; one that the other workers have finished is answered before its turn."""
        self.row.turn_to(Doing.ASKING, decision)
        while (stage, decision) not in self.answered:
            message = self.from_policy.wait(self.options.deadline_s)
            if message is None:
                what = f"policy worker {self.options.policy}, stage {stage}, decision {decision}"
                raise PipelineTimeout(f"environment worker {self.index}", (), self.options.deadline_s, what)
            if message[1] == stage and message[2] != decision:
                raise RuntimeError(
                    f"environment worker {self.index}: expected stage {stage}, decision {decision}, got {message}"
                )
            self.answered.add((message[1], message[2]))
        self.answered.remove((stage, decision))
        self.row.turn_to(Doing.STEPPING, decision)
