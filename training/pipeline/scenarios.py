"""What a run is made of, as data: stage times, placements, schedules, and the scenarios of the benchmarks.

Times are in s. A device is a GPU, or a process where only processors compute.
"""

import math
import random
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BatchedEnvironments:
    """Environments that step in one call, all of them ready at the same time: fixed_s + share_s * f / d.

    fixed_s: of every call. share_s: for all environments on one device; f is the share of them in the call and d
        the number of devices that split it.
    """

    fixed_s: float
    share_s: float

    def seconds(self, share: float, devices: int) -> float:
        return self.fixed_s + self.share_s * share / devices


@dataclass(frozen=True)
class SeparateEnvironments:
    """Environments each on a processor core of its own; a step takes a log-normal time.

    mean_s: of a step. variation: standard deviation over mean. reset_s: added to every reset_every-th step; all
        environments begin their first episode together.
    """

    mean_s: float
    variation: float
    reset_s: float = 0.0
    reset_every: int = 1

    def draw(self, random_numbers: random.Random, step: int) -> float:
        """Seconds of an environment's step number `step`, counted from 1."""
        variance = math.log1p(self.variation**2)  # of the logarithm
        step_s = random_numbers.lognormvariate(math.log(self.mean_s) - variance / 2, math.sqrt(variance))
        return step_s + (self.reset_s if step % self.reset_every == 0 else 0.0)


@dataclass(frozen=True)
class Inference:
    """fixed_s + environment_s * n / d for a batch of n environments on d devices."""

    fixed_s: float
    environment_s: float

    def seconds(self, batch: float, devices: int) -> float:
        return self.fixed_s + self.environment_s * batch / devices


@dataclass(frozen=True)
class Learner:
    """step_s / d + fixed_s per environment step, on d devices.

    step_s: device time that devices split. fixed_s: time that no further device shortens (collectives, batches too
        small for the device). shared_speed: of a learner on a device that holds the other two components as well.
    """

    step_s: float
    fixed_s: float = 0.0
    shared_speed: float = 1.0

    def seconds(self, steps: float, devices: int, shared: bool) -> float:
        return steps * (self.step_s / devices + self.fixed_s) / (self.shared_speed if shared else 1.0)


@dataclass(frozen=True)
class Scenario:
    """Stage times and sizes of a run.

    environments: in all. decisions: of each environment for an update. chunk: environment steps of a decision.
    hands_s: of a change of hands, when devices pass from the rollout to the learner or back.
    sync_s: from the end of an update until the policy has its weights.
    """

    environments: int
    decisions: int
    environment: BatchedEnvironments | SeparateEnvironments
    inference: Inference
    learner: Learner
    chunk: int = 1
    hands_s: float = 0.0
    sync_s: float = 0.0

    @property
    def steps(self) -> int:
        """Environment steps of an update."""
        return self.environments * self.decisions * self.chunk


@dataclass(frozen=True)
class Placement:
    """The devices of each component; environments on processor cores of their own have none.

    cores: that the processes of a machine without a GPU share, None where every device is its own.
    """

    name: str
    environment: range
    policy: range
    learner: range
    cores: int | None = None

    @property
    def devices(self) -> int:
        return len({*self.environment, *self.policy, *self.learner})

    @property
    def learner_shares(self) -> bool:
        """Whether the learner has to take its devices from the rollout."""
        return bool(set(self.learner) & {*self.environment, *self.policy})

    @property
    def memory_shared(self) -> bool:
        """Whether a device holds all three components."""
        return bool(set(self.environment) & set(self.policy) & set(self.learner))


def colocated(devices: int, simulator: bool = True) -> Placement:
    """All components on all devices. simulator: whether environments need devices."""
    everything = range(devices)
    return Placement("colocated", everything if simulator else range(0), everything, everything)


def disaggregated(environment: int, policy: int, learner: int) -> Placement:
    """Devices of its own for each component."""
    first, second = environment, environment + policy
    return Placement("disaggregated", range(first), range(first, second), range(second, second + learner))


def hybrid(environment: int, policy: int, rest: int = 0) -> Placement:
    """Environments and policy apart, the learner on all devices; `rest` devices are the learner's alone."""
    both = environment + policy
    return Placement("hybrid", range(environment), range(environment, both), range(both + rest))


@dataclass(frozen=True)
class Schedule:
    """What may overlap. The defaults are the sequential schedule.

    stages: groups of environments that take turns; k of them make a rollout pipelined.
    batching: "stage": the policy decides for a whole stage. "dynamic": for whoever is ready.
    deadline_s: with dynamic batching, how long the first of a batch waits for it to fill up.
    batch: with dynamic batching, environments that fill a batch; 0: no more than are waiting.
    fragment: decisions after which an environment hands its steps to the learner; 0: those of an update.
    microbatch: environment steps with which the learner begins; 0: those of an update.
    staleness: updates that a fragment's weights may be behind those of the update that it is begun for.
    """

    name: str = "sequential"
    stages: int = 1
    batching: str = "stage"
    deadline_s: float = 0.0
    batch: int = 0
    fragment: int = 0
    microbatch: int = 0
    staleness: int = 0


def pipelined(stages: int) -> Schedule:
    """The sequential schedule where there is one stage."""
    return Schedule("pipelined" if stages > 1 else "sequential", stages)


# A simulator that steps all environments on a GPU, and its learner, on three devices.
HYBRID = Scenario(
    environments=48, decisions=40,
    environment=BatchedEnvironments(0.015, 0.035), inference=Inference(0.010, 0.040 / 48),
    learner=Learner(6.0 / (48 * 40), shared_speed=0.4), hands_s=0.2,
)  # fmt: skip
HYBRID_PLACEMENTS = {"hybrid": hybrid(1, 1, 1), "disaggregated": disaggregated(1, 1, 1), "colocated": colocated(3)}

# Environments on processor cores whose steps differ a lot in time, on two devices; an update has an episode of each.
ASYNCHRONOUS = Scenario(
    environments=64, decisions=100,
    environment=SeparateEnvironments(0.060, 1.0, reset_s=2.0, reset_every=100), inference=Inference(0.020, 0.0006),
    learner=Learner(0.003),
)  # fmt: skip
ASYNCHRONOUS_PLACEMENTS = {"asynchronous": disaggregated(0, 1, 1), "synchronous": colocated(2, simulator=False)}
ASYNCHRONOUS_SCHEDULE = Schedule("asynchronous", 1, "dynamic", fragment=10, microbatch=160, staleness=1)
# Each line has one part more than the line before.
ABLATION = {
    "one device each": Schedule(),
    "dynamic batching": replace(ASYNCHRONOUS_SCHEDULE, fragment=0, microbatch=0, staleness=0),
    "streaming": replace(ASYNCHRONOUS_SCHEDULE, staleness=0),
    "overlap of the update": ASYNCHRONOUS_SCHEDULE,
}
