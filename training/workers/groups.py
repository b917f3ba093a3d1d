"""Whole episodes in groups that begin alike: how they are played in the slots of a vector environment.

A slot whose episode is over takes the next one; when there is none left it is stepped, shown and decided for no more.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from training.envs.base import EpisodeRequest
from training.pipeline.bell import OVER
from training.pipeline.block import RolloutRows
from training.pipeline.status import Doing
from training.workers.environment import EnvironmentWorker
from training.workers.episodes import EpisodeLog, Episodes, episode_seed


class Order(NamedTuple):
    """Groups to play: their numbers in the run, which tell how they begin, and the place of the first in the round."""

    groups: list[int]
    first: int


class GroupEpisodes(Episodes):
    """Plays the episodes that were dealt. playing: the number of each slot's `[n]`, from 1; 0 for none."""

    def deal(self, seeds: Sequence[int], size: int, first: int) -> None:
        """Groups of `size` episodes, each with a seed; first: number of the first group among all in the rollout."""
        self.queue = deque(
            ((first + group) * size + member + 1, seed) for group, seed in enumerate(seeds) for member in range(size)
        )
        self.playing = np.zeros(self.env.num_envs, np.int32)

    @property
    def unfinished(self) -> int:
        return int((self.playing > 0).sum()) + len(self.queue)

    def reset(self, slot: int) -> None:
        """Begin the next episode, if there is one."""
        self.playing[slot] = 0
        if self.queue:
            self.playing[slot], seed = self.queue.popleft()
            self.env.reset(slot, EpisodeRequest(seed, self.variant))
            self.begin(slot)

    def live(self, slots: Sequence[int]) -> list[int]:
        return [slot for slot in slots if self.playing[slot]]

    def step(self, rows: RolloutRows, decision: int, slots: Sequence[int]) -> None:
        live = self.live(slots)
        result = self.execute(rows, decision, live)
        for slot, ended in zip(live, result.terminated | result.truncated, strict=True):
            if ended:
                self.reset(slot)

    def show(self, rows: RolloutRows, decision: int, slots: Sequence[int]) -> None:
        live = self.live(slots)
        rows["episodes"][decision, np.asarray(slots) + self.column] = self.playing[slots]
        if live:
            super().show(rows, decision, live)


class GroupWorker(EnvironmentWorker):
    """The environment worker of the synchronous schedules where whole episodes are played."""

    episodes: GroupEpisodes
    kind = GroupEpisodes

    def play(self, order: Order) -> EpisodeLog:
        """All episodes of these groups, unless the block has too few rows for them."""
        self.answered.clear()
        self.row.turn_to(Doing.STEPPING)
        episodes, size = self.episodes, self.options.group_size
        episodes.deal([episode_seed(self.options.seed, 0, n) for n in order.groups], size, order.first)
        playing = []
        for stage, slots in enumerate(self.stages):
            for slot in slots:
                episodes.reset(slot)
            if self._shown(stage, slots, 0):
                playing.append((stage, slots))
        for decision in range(self.block.shape.decisions):
            still = []
            for stage, slots in playing:
                self._wait(stage, decision)
                episodes.step(self.block, decision, slots)
                if self._shown(stage, slots, decision + 1):
                    still.append((stage, slots))
            playing = still
        self.row.turn_to(Doing.IDLE)
        log = EpisodeLog(unfinished=episodes.unfinished)
        log.read(self.block, self.columns)
        return log

    def _shown(self, stage: int, slots: list[int], decision: int) -> bool:
        """Show the policy a stage before a decision; whether there was anything to show."""
        goes_on = bool(self.episodes.live(slots)) and decision < self.block.shape.decisions
        if goes_on:
            self.episodes.show(self.block, decision, slots)
        self.to_policy.ring(self.index, stage, decision if goes_on else OVER)
        return goes_on
