"""The engine: starts the actors of a placement, saves and restores a run. What rolls out when is a schedule's."""

import hashlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training.algorithms.base import ActorCritic, Algorithm
from training.pipeline.actors import START_S, collect, end, stillness
from training.pipeline.block import RolloutBlock, unlink
from training.pipeline.crew import Node, here
from training.pipeline.group_checks import settled
from training.pipeline.hosts import Hosts
from training.pipeline.leaks import grown, refuse_grown
from training.pipeline.patience import Patience, Pulse
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


def name_of(run: Path) -> str:
    """How the shared memory of a run begins: whoever starts it again removes what a killed one has left."""
    place = f"{socket.gethostname()} {run.resolve()}"
    return "simreal_" + hashlib.sha1(place.encode()).hexdigest()[:16]


class Engine(ABC):
    """Owns the actors and the hosts' memory of one run. nodes: of the cluster; none for this machine alone."""

    def __init__(
        self, checkpoint: Path, run: Path, environment: str, settings: dict[str, Any], variant: str,
        slots: int, decisions: int, algorithm: Algorithm, placement: PlacementConfig, seed: int,
        iterations: int, lora: Lora = FULL, nodes: Sequence[Node] = (),
    ):  # fmt: skip
        self.run, self.environment, self.settings, self.variant, self.seed = run, environment, settings, variant, seed
        placement = settled(placement, algorithm, slots)
        self.slots, self.placement, self.algorithm = slots, placement, algorithm
        checked = plan(checkpoint, environment, settings, slots, decisions, algorithm, placement, lora, nodes)
        self.codec, self.shape, self.crew = checked.codec, checked.shape, checked.crew
        self.name = name_of(run)
        parts = np.array_split(np.arange(slots), placement.environment_workers)
        self.parts = [(int(part[0]), int(part[-1]) + 1) for part in parts]  # first slot and last + 1 of each worker
        self.hosts = Hosts(
            self.crew, nodes or here(), self.shape, checked.weights, self.name, self.parts, placement.deadline_s
        )
        self._open_status()
        sent = checked.weights, self.hosts.first_learner.weights
        self.policy_options = PolicyOptions(
            str(checkpoint.resolve()), *sent, algorithm.temperature, seed, placement.policy_threads,
            placement.deadline_s, lora, placement.dtype or "", placement.offload, placement.compile,
        )  # fmt: skip
        self.learner_options = LearnerOptions(
            len(self.crew.learners), str(checkpoint.resolve()), *sent, algorithm, seed, iterations,
            placement.learner_threads, self.hosts.rendezvous(), placement.samples_at_a_time, lora,
            placement.dtype or "", placement.offload, placement.compile, placement.shard,
        )  # fmt: skip
        self.patience = Patience(placement.update_patience, placement.deadline_s)
        self.prepare()
        self.environments = {i: self.start_environment(i) for i in range(placement.environment_workers)}
        self.policies = {i: self.start_policy(i) for i in range(len(self.crew.policies))}
        self.learners = [self.start_learner(rank) for rank in range(len(self.crew.learners))]
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
        """Those that are there, by name."""
        return {
            **{f"environment worker {i}": worker for i, worker in self.environments.items()},
            **{f"policy worker {i}": worker for i, worker in self.policies.items()},
            **{f"learner {i}": worker for i, worker in enumerate(self.learners)},
        }

    def is_here(self, name: str) -> bool:
        """Whether a worker is on the driver's host: only there its process and its row on the board can be reached."""
        kind, number = name.rsplit(" ", 1)
        host = self.hosts.alive.get(self.crew.everyone[kind][int(number)].node)
        return host is not None and host.node.is_here

    def board_of(self, name: str) -> Any:
        """The status board that a worker writes to, or a future of it."""
        return self.status if self.is_here(name) else None

    def end(self, name: str, worker: Any) -> None:
        end(worker, self.processes.get(name) if self.is_here(name) else None)

    def set_up(self, workers: dict[str, Any]) -> None:
        """Wait until workers are ready. An environment worker has to begin within its bound of memory."""
        futures = {
            name: worker.ready.remote(self.board_of(name), self.rows_of(name)) for name, worker in workers.items()
        }
        ready = dict(zip(workers, collect(futures, START_S), strict=True))
        self.processes |= ready
        refuse_grown(self._simulating(ready), self.placement.worker_memory_gib)

    def leaking(self) -> dict[str, str]:
        """Environment workers that have grown too large, with reasons."""
        found = grown(self._simulating(self.processes), self.placement.worker_memory_gib)
        return {name: f"it has grown to {own:.2f} GiB" for name, own in found.items()}

    def _simulating(self, processes: dict[str, int]) -> dict[str, int]:
        return {k: process for k, process in processes.items() if k.startswith("environment") and self.is_here(k)}

    def use(self) -> dict[str, float]:
        """How busy environments, policy and learners were since the last call, as metrics."""
        return {f"use/{stage}": share for stage, share in shares(self.status.rows, *self.clock.lap()).items()}

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

    def kind(self, iteration: int) -> str:
        """Of an update, for the engine's patience: the first ones may be quicker than all others."""
        algorithm = self.algorithm
        warms_up = isinstance(algorithm, ActorCritic) and iteration < algorithm.critic_iterations
        return "critic's update" if warms_up else "update"

    def learn(self, method: str, *arguments: Any, kind: str = "") -> list[Any]:
        """Have all learners do something; their answers. kind: of what they are asked, if it is not always the same."""
        asked = {f"learner {i}": getattr(worker, method).remote(*arguments) for i, worker in enumerate(self.learners)}
        with self.patience.measuring(kind or method) as seconds:
            return collect(asked, check=self.watch_learners(seconds))

    def watch_learners(self, seconds: float) -> Callable[[], None]:
        """To be called now and then: raises an error when a learner of this host has stood still for so long."""
        names = [f"learner {i}" for i in range(len(self.learners))]
        pulse = Pulse({name: self.processes[name] for name in names if self.is_here(name)})

        def look() -> None:
            if still := pulse.still(seconds):
                raise stillness(still, seconds)

        return look

    def save(self, folder: Path) -> None:
        with self.row.during(Doing.SAVING):
            self.learn("save", str(folder.resolve()))

    def restore(self, folder: Path, iteration: int, counters: list[int]) -> None:
        """Weights and optimizer of a state saved before this iteration."""
        self.learn("restore", str(folder.resolve()), iteration)
        self.hosts.share_weights()
        self.resume(iteration, np.asarray(counters, np.int64))

    def export(self, folder: Path, curve: dict[str, Any], config: dict[str, Any]) -> None:
        with self.row.during(Doing.SAVING):
            self.learn("export", str(folder.resolve()), curve, config)

    def close(self) -> None:
        for name, worker in self.workers().items():
            self.end(name, worker)
        self.hosts.close()
        self.status.close()
        unlink(f"{self.name}_status")
