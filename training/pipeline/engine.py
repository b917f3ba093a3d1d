"""The engine: starts the actors of a placement, saves and restores a run. What rolls out when is a schedule's."""

import hashlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from training.algorithms.ppo import PPOConfig
from training.pipeline.actors import collect, wait_ready
from training.pipeline.block import RolloutBlock
from training.pipeline.crew import Node, here
from training.pipeline.hosts import Hosts
from training.pipeline.placement import PlacementConfig, plan
from training.pipeline.weights import WeightsBlock
from training.workers.episodes import EpisodeLog
from training.workers.learner import LearnerOptions, Update
from training.workers.policy import PolicyLog, PolicyOptions
from vla.lora import FULL, Lora

RESTARTS = 3  # of workers, for one iteration


@dataclass(frozen=True)
class Rollout:
    """Logs of an iteration, of environment workers and policy; seconds it took; metrics of the schedule alone."""

    episodes: list[EpisodeLog]
    policy: PolicyLog
    seconds: float
    measures: dict[str, float] = field(default_factory=dict)


def name_of(run: Path) -> str:
    """How the shared memory of a run begins: whoever starts it again removes what a killed one has left."""
    place = f"{socket.gethostname()} {run.resolve()}"
    return "simreal_" + hashlib.sha1(place.encode()).hexdigest()[:16]


class Engine(ABC):
    """Owns the actors and the hosts' memory of one run. nodes: of the cluster; none for this machine alone."""

    def __init__(
        self, checkpoint: Path, run: Path, environment: str, settings: dict[str, Any], variant: str,
        slots: int, decisions: int, algorithm: PPOConfig, placement: PlacementConfig, seed: int,
        iterations: int, lora: Lora = FULL, nodes: Sequence[Node] = (),
    ):  # fmt: skip
        self.environment, self.settings, self.variant, self.seed = environment, settings, variant, seed
        self.slots, self.placement = slots, placement
        checked = plan(checkpoint, environment, settings, slots, decisions, algorithm, placement, lora, nodes)
        self.codec, self.shape, self.crew = checked.codec, checked.shape, checked.crew
        self.name = name_of(run)
        parts = np.array_split(np.arange(slots), placement.environment_workers)
        self.parts = [(int(part[0]), int(part[-1]) + 1) for part in parts]  # first slot and last + 1 of each worker
        self.hosts = Hosts(
            self.crew, nodes or here(), self.shape, checked.weights, self.name, self.parts, placement.deadline_s
        )
        sent = checked.weights, self.hosts.first_learner.weights
        self.policy_options = PolicyOptions(
            str(checkpoint.resolve()), *sent, algorithm.temperature, seed, placement.policy_threads,
            placement.deadline_s, lora, placement.dtype or "", placement.offload, placement.compile,
        )  # fmt: skip
        self.learner_options = LearnerOptions(
            len(self.crew.learners), str(checkpoint.resolve()), *sent, algorithm, seed, iterations,
            placement.learner_threads, self.hosts.rendezvous(), placement.micro_batch, lora,
            placement.dtype or "", placement.offload, placement.compile, placement.shard,
        )  # fmt: skip
        self.prepare()
        self.environments = {i: self.start_environment(i) for i in range(placement.environment_workers)}
        self.policies = {i: self.start_policy(i) for i in range(len(self.crew.policies))}
        self.learners = [self.start_learner(rank) for rank in range(len(self.crew.learners))]
        everyone = {f"environment worker {i}": w for i, w in self.environments.items()}
        everyone.update({f"policy worker {i}": w for i, w in self.policies.items()})
        everyone.update({f"learner {i}": w for i, w in enumerate(self.learners)})
        self.processes = {name: wait_ready(name, worker) for name, worker in everyone.items()}

    @property
    def block(self) -> RolloutBlock:
        """Of this host."""
        return self.hosts.here.block

    @property
    def weights(self) -> WeightsBlock:
        """Of this host."""
        return self.hosts.here.weights

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

    def learn(self, method: str, *arguments: Any) -> list[Any]:
        """Have all learners do something; their answers."""
        return collect({
            f"learner {i}": getattr(worker, method).remote(*arguments) for i, worker in enumerate(self.learners)
        })  # fmt: skip

    def save(self, folder: Path) -> None:
        self.learn("save", str(folder.resolve()))

    def restore(self, folder: Path, iteration: int, counters: list[int]) -> None:
        """Weights and optimizer of a state saved before this iteration."""
        self.learn("restore", str(folder.resolve()), iteration)
        self.hosts.share_weights()
        self.resume(iteration, np.asarray(counters, np.int64))

    def export(self, folder: Path, curve: dict[str, Any], config: dict[str, Any]) -> None:
        self.learn("export", str(folder.resolve()), curve, config)

    def close(self) -> None:
        for worker in (*self.environments.values(), *self.policies.values(), *self.learners):
            ray.kill(worker)
        self.hosts.close()
