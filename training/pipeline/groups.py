"""The synchronous schedules for algorithms that compare whole episodes: an iteration is a number of groups.

A round plays groups until all their episodes are over. Where too few of them teach something, another round follows.
"""

from typing import Any

import numpy as np

from training.pipeline.engine import PolicyLog, Rollout
from training.pipeline.judging import GroupError, hopeless
from training.pipeline.synchronous import Synchronous
from training.workers.episodes import EpisodeLog
from training.workers.groups import GroupWorker, Order
from training.workers.learner import Update


class Groups(Synchronous):
    """Plays `algorithm.groups` groups in an iteration, and refills."""

    environment_class = GroupWorker

    def prepare(self) -> None:
        super().prepare()
        self.drawn, self.count = 0, 0  # groups of the run so far; of the next round

    def counters(self) -> np.ndarray:
        return np.array([self.drawn])

    def resume(self, iteration: int, counters: np.ndarray) -> None:
        self.drawn = int(counters[0])

    def step_environments(self) -> dict[Any, str]:
        """A round that is begun anew plays other groups than the one that failed."""
        futures, first = {}, 0
        for part, (i, worker) in zip(
            np.array_split(np.arange(self.count), len(self.environments)), self.environments.items(), strict=True
        ):
            order = Order([self.drawn + int(place) for place in part], first)
            futures[worker.play.remote(order)] = f"environment worker {i}"
            first += len(part)
        self.drawn += self.count
        return futures

    def played(self, logs: list[EpisodeLog]) -> None:
        if unfinished := sum(log.unfinished for log in logs):
            raise GroupError(
                f"{unfinished} of {self.count * self.algorithm.group_size} episodes were not over after "
                f"{self.shape.decisions} decisions: they can't be compared with the others of their groups",
                code="GROUPS", remedy="The environment's episodes are longer than its max_steps tells: mend that.",
            )  # fmt: skip

    def iterate(self, iteration: int) -> tuple[Rollout, Update]:
        wanted, size = self.algorithm.groups, self.algorithm.group_size
        refills: int = self.algorithm.refills  # type: ignore[attr-defined]
        rounds: list[Rollout] = []
        kept = complete = 0
        for self.round in range(refills + 1):
            self.count = wanted if self.round == 0 else max(wanted - kept, self.slots // size)  # no slot rests
            rounds.append(self.rollout(iteration))
            judged = self.learn("judge", self.round)[0]
            kept, complete = kept + judged.kept, complete + judged.complete
            if kept >= wanted or self.round == refills:
                break
            self.learn("set_aside")
        if not kept:
            raise hopeless(complete, [s for rollout in rounds for log in rollout.episodes for s in log.successes])
        measures = {
            "rollout/rounds": float(len(rounds)),
            "rollout/groups": float(complete),
            "rollout/groups_kept": float(kept),
        }
        return merged(rounds, measures), self.update(iteration)


def merged(rounds: list[Rollout], measures: dict[str, float]) -> Rollout:
    """The rounds of an iteration as one rollout."""
    logs = []
    for parts in zip(*(rollout.episodes for rollout in rounds), strict=False):  # of each environment worker
        log = EpisodeLog()
        for part in parts:
            log.returns += part.returns
            log.lengths += part.lengths
            log.successes += part.successes
            log.steps += part.steps
            log.step_s += part.step_s
            log.wait_s += part.wait_s
        logs.append(log)
    told = [rollout.policy for rollout in rounds]
    policy = PolicyLog(sum(p.forward_s for p in told), sum(p.wait_s for p in told), sum(p.forwards for p in told))
    summed = {key: sum(r.measures[key] for r in rounds) for key in rounds[0].measures if key.endswith("_s")}
    return Rollout(logs, policy, sum(r.seconds for r in rounds), {**rounds[-1].measures, **summed, **measures})
