"""`vla plan --auto`: stage times measured on this machine, and the placements that they favour.

A minute of the engine itself, one environment worker, one policy worker and one learner in turns, with one stage and
with two, gives the time of the simulators, of a forward pass over all and over half of the environments, and of an
update. Rollouts are short for it, and an update of full size is extrapolated from two; so few decisions hardly see the
end of an episode, whose reset is not in the times. The event model (training/pipeline/model.py) then plays every
candidate with these times.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from training.algorithms.base import ActorCritic, Algorithm
from training.pipeline.model import simulate
from training.pipeline.placement import PlacementConfig
from training.pipeline.scenarios import (
    BatchedEnvironments,
    Inference,
    Learner,
    Placement,
    Scenario,
    Schedule,
    pipelined,
)
from training.pipeline.seats import CPU, Cluster
from training.pipeline.synchronous import Synchronous
from vla.errors import SimrealError
from vla.lora import Lora

STAGES = (1, 2, 3, 4)
FEW = (2, 6)  # decisions of every slot in a rollout that is measured, with one stage and with two
Show = Callable[[str], None]


@dataclass(frozen=True)
class StageTimes:
    """Seconds, of one process or device each, for a decision of all environments.

    environment_s: simulators. policy_s, policy_half_s: forward pass over all, and over half of them.
    learner_s: update, for the decisions of an iteration.
    """

    slots: int
    decisions: int
    environment_s: float
    policy_s: float
    policy_half_s: float
    learner_s: float

    @property
    def policy_fixed_s(self) -> float:
        """What a forward pass takes whatever its size."""
        return min(max(0.0, 2 * self.policy_half_s - self.policy_s), self.policy_s)

    @property
    def scenario(self) -> Scenario:
        fixed = self.policy_fixed_s
        return Scenario(
            self.slots, self.decisions, BatchedEnvironments(0.0, self.environment_s),
            Inference(fixed, (self.policy_s - fixed) / self.slots),
            Learner(self.learner_s / (self.slots * self.decisions)),
        )  # fmt: skip


@dataclass(frozen=True)
class Proposal:
    """A placement, and what the model says of it: chunks/s and seconds of an iteration."""

    placement: PlacementConfig
    chunks_per_s: float
    seconds: float
    name: str


def measure(
    checkpoint: Path, environment: str, settings: dict[str, Any], variant: str, slots: int, decisions: int,
    algorithm: Algorithm, placement: PlacementConfig, lora: Lora, seconds: float, show: Show,
) -> StageTimes:  # fmt: skip
    """Play with this placement's devices and types for about so long, the start of the workers included.

    A Ray session has to be open.
    """
    if not isinstance(algorithm, ActorCritic):
        raise SimrealError(
            "stage times are measured in episodes without end", code="ALGORITHM",
            remedy="Measure with algorithm=ppo: a decision takes as long with any other.",
        )  # fmt: skip
    forwards: dict[int, float] = {}
    steps: list[float] = []
    updates: dict[int, float] = {}
    began = time.monotonic()
    for stages, few in zip((1, 2), FEW, strict=True):
        one = replace(
            placement, schedule="synchronous", environment_workers=1, policy_workers=1, learners=1, stages=stages,
            lanes=1, learner_threads=1, policy_threads=1,
        )  # fmt: skip
        played = min(decisions, few)
        minibatches = max(1, min(algorithm.minibatches, slots * played // 2))
        learning = replace(algorithm, critic_iterations=0, minibatches=minibatches)
        with tempfile.TemporaryDirectory() as folder:
            engine = Synchronous(
                checkpoint, Path(folder), environment, settings, variant, slots, played, learning, one, 0, 1000, lora
            )
            try:
                engine.rollout(0)  # the first ones are slower, in the update, too
                engine.update(0)
                rows: list[tuple[float, float]] = []
                while not rows or time.monotonic() < began + stages * seconds / 2:
                    rollout = engine.rollout(len(rows) + 1)
                    log, policy = rollout.episodes[0], rollout.policy
                    rows.append((log.step_s / played, policy.forward_s / policy.forwards))
                    if len(rows) == 1:
                        updates[played] = float(engine.update(1).metrics["update_s"])
            finally:
                engine.close()
        step_s, forwards[stages] = (statistics.median(values) for values in zip(*rows, strict=True))
        steps.append(step_s)
        call_s = forwards[stages]
        show(f"{stages} stages: environments {step_s * 1e3:.1f} ms for all, policy {call_s * 1e3:.1f} ms a call")
    return StageTimes(slots, decisions, steps[0], forwards[1], forwards[2], at_size(updates, decisions))


def at_size(updates: dict[int, float], decisions: int) -> float:
    """Seconds of an update with so many decisions of every slot, on the line through those measured with few.

    A part of it, the auxiliary phase, takes as long with any number.
    """
    (few, first), (more, second) = min(updates.items()), max(updates.items())
    if few == more:
        return first * decisions / few
    slope = min(max(0.0, (second - first) / (more - few)), second / more)  # noise: neither part is below zero
    return second + slope * (decisions - more)


def propose(times: StageTimes, base: PlacementConfig, cluster: Cluster) -> list[Proposal]:
    """Every candidate with its prediction, the fastest first. base: what the candidates do not change."""
    found = []
    for name, placement, seats, schedule in candidates(base, cluster, times.slots):
        scenario = times.scenario
        if placement.schedule == "asynchronous":
            schedule = replace(schedule, fragment=scenario.decisions)
        result = simulate(scenario, seats, schedule, iterations=6, uncounted=2)
        rate = result.env_steps_per_s
        found.append(Proposal(placement, rate, result.seconds_per_iteration, name))
    return sorted(found, key=lambda one: -one.chunks_per_s)


def candidates(
    base: PlacementConfig, cluster: Cluster, slots: int
) -> Iterator[tuple[str, PlacementConfig, Placement, Schedule]]:
    """Environment workers, stages and schedules; simulators are on the processors, the rest on GPUs if there are."""
    cores = os.cpu_count() or 1
    gpus = cluster.devices
    learners = gpus or cores
    shared = replace(base, learners=cores, learner_threads=1, policy_threads=1, policy_workers=1)
    for workers in sorted({1, 2, cores // 2, cores} - {0}):
        for stages in STAGES:
            if slots % stages or slots < workers * stages or workers < gpus:  # each policy worker needs one
                continue
            name = "sequential" if stages == 1 else f"pipelined, {stages} stages"
            placement = replace(shared, schedule="synchronous", environment_workers=workers, stages=stages, lanes=1)
            if gpus:
                words = "all" if gpus > 1 else "0"
                placement = replace(placement, environments=CPU, policy=words, learner=words)
            seats = _seats(workers, max(1, gpus), learners, None if gpus else cores)
            yield f"{name}, {workers} environment workers", placement, seats, pipelined(stages)
        for lanes in (1, 2):
            groups = workers * lanes
            if gpus == 1 or slots % groups:
                continue
            placement = replace(
                shared, schedule="asynchronous", environment_workers=workers, stages=1, lanes=lanes, learners=1
            )
            seats = _seats(workers, 1, max(1, gpus - 1), None if gpus else cores)
            if gpus:
                rest = f"1-{gpus - 1}" if gpus > 2 else "1"
                placement = replace(placement, environments=CPU, policy="0", learner=rest)
            schedule = Schedule("asynchronous", groups, "dynamic", microbatch=slots // groups, staleness=1)
            yield f"asynchronous, {workers} environment workers x {lanes} lanes", placement, seats, schedule


def _seats(environment: int, policy: int, learner: int, cores: int | None) -> Placement:
    """Every process on a place of its own; where the places are cores they share those that there are."""
    first, second = environment, environment + policy
    return Placement("candidate", range(first), range(first, second), range(second, second + learner), cores)


def as_yaml(placement: PlacementConfig) -> str:
    """What differs from the defaults, for a file under configs/placement."""
    plain = asdict(PlacementConfig())
    rows = {k: v for k, v in asdict(placement).items() if v != plain[k]}
    return "".join(f"{k}: {_word(v)}\n" for k, v in rows.items())


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) and value[:1].isdigit() else str(value)
