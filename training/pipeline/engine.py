"""The engine: starts the actors of a placement, saves and restores a run. What rolls out when is a schedule's."""

import hashlib
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.algorithms.ppo import PPOConfig
from training.pipeline.actors import collect, end
from training.pipeline.bell import Bell
from training.pipeline.block import RolloutBlock, unlink
from training.pipeline.leaks import grown, refuse_grown
from training.pipeline.placement import PlacementConfig, plan
from training.pipeline.status import Clock, Doing, Status, shares
from training.pipeline.timeline import Timeline
from training.pipeline.weights import WeightsBlock
from training.workers.episodes import EpisodeLog
from training.workers.learner import LearnerOptions, Update
from training.workers.policy import PolicyOptions
from vla.lora import FULL, Lora
from vla.results import write_json

RESTARTS = 3  # for one iteration
START_S = 600.0  # for a worker to be set up


@dataclass(frozen=True)
class PolicyLog:
    """Seconds that the policy decided, and waited for environments, in an iteration; forward passes."""

    forward_s: float
    wait_s: float
    forwards: int


@dataclass(frozen=True)
class Rollout:
    """Logs of an iteration, of environment workers and policy; seconds it took; metrics of the schedule alone."""

    episodes: list[EpisodeLog]
    policy: PolicyLog
    seconds: float
    measures: dict[str, float] = field(default_factory=dict)


class Engine(ABC):
    """Owns the actors, the shared memory and the bells of one run."""

    def __init__(
        self, checkpoint: Path, run: Path, environment: str, settings: dict[str, Any], variant: str,
        slots: int, decisions: int, algorithm: PPOConfig, placement: PlacementConfig, seed: int,
        iterations: int, lora: Lora = FULL,
    ):  # fmt: skip
        self.run, self.environment, self.settings, self.variant, self.seed = run, environment, settings, variant, seed
        self.slots, self.placement = slots, placement
        checked = plan(checkpoint, environment, settings, slots, decisions, algorithm, placement, lora)
        self.codec, self.shape, self.crew = checked.codec, checked.shape, checked.crew
        self.name = "simreal_" + hashlib.sha1(str(run.resolve()).encode()).hexdigest()[:16]
        self.bells = run / "bells"
        shutil.rmtree(self.bells, ignore_errors=True)
        self.bells.mkdir(parents=True)
        self.policy_bells = [Bell(self.bells / f"policy{i}") for i in range(len(self.crew.policies))]
        self.block = RolloutBlock(self.shape, self.name, create=True)
        self.weights = WeightsBlock(checked.weights, f"{self.name}_weights", create=True)
        self._open_status()
        sent = checked.weights, f"{self.name}_weights"
        self.policy_options = PolicyOptions(
            str(checkpoint), *sent, algorithm.temperature, seed, placement.policy_threads, placement.deadline_s, lora,
            placement.dtype or "", placement.offload, placement.compile,
        )  # fmt: skip
        self.learner_options = LearnerOptions(
            len(self.crew.learners), str(checkpoint), *sent, algorithm, seed, iterations, placement.learner_threads,
            str((self.bells / "rendezvous").resolve()), placement.micro_batch, lora,
            placement.dtype or "", placement.offload, placement.compile, placement.shard,
        )  # fmt: skip
        self.prepare()
        self.environments: list[Any] = [self.start_environment(i) for i in range(placement.environment_workers)]
        self.policies: list[Any] = [self.start_policy(i) for i in range(len(self.crew.policies))]
        self.learners: list[Any] = [self.start_learner(rank) for rank in range(len(self.crew.learners))]
        self.processes: dict[str, int] = {}
        try:
            self.set_up(self.workers())
            self.clock.lap()
        except BaseException:
            self.close()
            raise

    def _open_status(self) -> None:
        rows = [*(row for name in self.names() for row in self.rows_of(name)), "driver"]
        block = f"{self.name}_status"
        unlink(block)  # so that nobody finds the new rows and an old block
        write_json(self.run / "status.json", {"block": block, "rows": rows})
        self.status = Status(rows, block, create=True)
        self.row, self.clock = self.status.row("driver"), Clock(self.status)
        self.timeline = Timeline(self.run / "timeline", self.status)

    def names(self) -> list[str]:
        """Of all workers."""
        crew = self.crew
        return [
            *(f"environment worker {i}" for i in range(len(crew.environments))),
            *(f"policy worker {i}" for i in range(len(crew.policies))),
            *(f"learner {i}" for i in range(len(crew.learners))),
        ]

    def rows_of(self, name: str) -> list[str]:
        """Of a worker, on the status board."""
        return [name]

    def workers(self) -> dict[str, Any]:
        return dict(zip(self.names(), (*self.environments, *self.policies, *self.learners), strict=True))

    def set_up(self, workers: dict[str, Any]) -> None:
        """Wait until workers are ready. An environment worker has to begin within its bound of memory."""
        futures = {name: worker.ready.remote(self.status, self.rows_of(name)) for name, worker in workers.items()}
        ready = dict(zip(workers, collect(futures, START_S), strict=True))
        self.processes |= ready
        refuse_grown(_simulating(ready), self.placement.worker_memory_gib)

    def leaking(self) -> dict[str, str]:
        """Environment workers that have grown too large, with reasons."""
        found = grown(_simulating(self.processes), self.placement.worker_memory_gib)
        return {name: f"it has grown to {own:.2f} GiB" for name, own in found.items()}

    def use(self) -> dict[str, float]:
        """How busy environments, policy and learners were since the last call, as metrics."""
        return {f"use/{stage}": share for stage, share in shares(self.status.rows, *self.clock.lap()).items()}

    @abstractmethod
    def prepare(self) -> None:
        """Set up what the schedule's workers share."""

    @abstractmethod
    def start_environment(self, index: int) -> Any: ...

    @abstractmethod
    def start_policy(self, index: int) -> Any: ...

    @abstractmethod
    def start_learner(self, rank: int) -> Any: ...

    @abstractmethod
    def iterate(self, iteration: int) -> tuple[Rollout, Update]:
        """One update, and what was rolled out for it or meanwhile."""

    @abstractmethod
    def counters(self) -> np.ndarray:
        """Episodes begun so far in every slot."""

    @abstractmethod
    def resume(self, iteration: int, counters: np.ndarray) -> None:
        """Go on with this iteration; every slot goes on with its next episode."""

    def save(self, folder: Path) -> None:
        with self.row.during(Doing.SAVING):
            collect({f"learner {i}": w.save.remote(str(folder)) for i, w in enumerate(self.learners)})

    def restore(self, folder: Path, iteration: int, counters: list[int]) -> None:
        """Weights and optimizer of a state saved before this iteration."""
        collect({f"learner {i}": w.restore.remote(str(folder), iteration) for i, w in enumerate(self.learners)})
        self.resume(iteration, np.asarray(counters, np.int64))

    def export(self, folder: Path, curve: dict[str, Any], config: dict[str, Any]) -> None:
        exports = {f"learner {i}": w.export.remote(str(folder), curve, config) for i, w in enumerate(self.learners)}
        with self.row.during(Doing.SAVING):
            collect(exports)

    def close(self) -> None:
        for name, worker in self.workers().items():
            end(worker, self.processes.get(name))
        self.block.close()
        self.weights.close()
        self.status.close()
        for name in (self.name, f"{self.name}_weights", f"{self.name}_status"):
            unlink(name)
        for bell in self.policy_bells:
            bell.close()
        shutil.rmtree(self.bells, ignore_errors=True)


def _simulating(processes: dict[str, int]) -> dict[str, int]:
    return {name: process for name, process in processes.items() if name.startswith("environment")}
