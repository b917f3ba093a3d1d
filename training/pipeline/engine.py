"""The engine: starts the actors of a placement, saves and restores a run. What rolls out when is a schedule's."""

import hashlib
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.algorithms.ppo import PPOConfig
from training.pipeline.actors import collect, end, wait_ready
from training.pipeline.bell import Bell
from training.pipeline.block import RolloutBlock, unlink
from training.pipeline.leaks import grown, refuse_grown
from training.pipeline.placement import PlacementConfig, plan
from training.pipeline.weights import WeightsBlock
from training.workers.episodes import EpisodeLog
from training.workers.learner import LearnerOptions, Update
from training.workers.policy import PolicyLog, PolicyOptions
from vla.lora import FULL, Lora

RESTARTS = 3  # for one iteration


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
        self.environment, self.settings, self.variant, self.seed = environment, settings, variant, seed
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
        except BaseException:
            self.close()
            raise

    def workers(self) -> dict[str, Any]:
        everyone = {f"environment worker {i}": w for i, w in enumerate(self.environments)}
        everyone |= {f"policy worker {i}": w for i, w in enumerate(self.policies)}
        return everyone | {f"learner {i}": w for i, w in enumerate(self.learners)}

    def set_up(self, workers: dict[str, Any]) -> None:
        """Wait until workers are ready. An environment worker has to begin within its bound of memory."""
        ready = wait_ready(workers)
        self.processes |= ready
        refuse_grown(_simulating(ready), self.placement.worker_memory_gib)

    def leaking(self) -> dict[str, str]:
        """Environment workers that have grown too large, with reasons."""
        found = grown(_simulating(self.processes), self.placement.worker_memory_gib)
        return {name: f"it has grown to {own:.2f} GiB" for name, own in found.items()}

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
        collect({f"learner {i}": w.save.remote(str(folder)) for i, w in enumerate(self.learners)})

    def restore(self, folder: Path, iteration: int, counters: list[int]) -> None:
        """Weights and optimizer of a state saved before this iteration."""
        collect({f"learner {i}": w.restore.remote(str(folder), iteration) for i, w in enumerate(self.learners)})
        self.resume(iteration, np.asarray(counters, np.int64))

    def export(self, folder: Path, curve: dict[str, Any], config: dict[str, Any]) -> None:
        collect({f"learner {i}": w.export.remote(str(folder), curve, config) for i, w in enumerate(self.learners)})

    def close(self) -> None:
        for name, worker in self.workers().items():
            end(worker, self.processes.get(name))
        self.block.close()
        self.weights.close()
        unlink(self.name)
        unlink(f"{self.name}_weights")
        for bell in self.policy_bells:
            bell.close()
        shutil.rmtree(self.bells, ignore_errors=True)


def _simulating(processes: dict[str, int]) -> dict[str, int]:
    return {name: process for name, process in processes.items() if name.startswith("environment")}
