"""How fast a schedule on a placement is, by a discrete-event model of it: `simulate`.

The processes are those of a run: groups of environments that ask for actions and step, a policy that answers, a
learner that consumes their steps, and weights that go back. All schedules are the same processes:

- a stage is a group; where batching is dynamic, each environment on a core of its own is a group of itself;
- a fragment that is due for update floor(started / steps of an update) may begin when the weights are at most
  `staleness` updates behind it (the rule of AReaL, arXiv 2505.24298), so that staleness 0 makes phases;
- devices are taken first come, first served; one that learner and rollout share changes hands before and after.

A batch, like an update, is split over all devices of its component; a device takes the next call when it is free.

Not modelled: messages, memory, jitter of calls other than environment steps, failures.
"""

import json
import math
import random
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from training.pipeline.events import Cores, Lane, Loop, Process, Signal
from training.pipeline.scenarios import (
    BatchedEnvironments,
    Inference,
    Learner,
    Placement,
    Scenario,
    Schedule,
    SeparateEnvironments,
    disaggregated,
    pipelined,
)
from vla.errors import SimrealError

COMPONENTS = ("environment", "policy", "learner")
DRAWN = 4000  # environment calls that a timeline has at most


class ModelError(SimrealError):
    """Scenario, placement and schedule do not fit each other."""


@dataclass(frozen=True)
class Interval:
    """A component worked from start to end, in s."""

    component: str
    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Result:
    """What a simulated run came to, from the end of the last update that does not count to that of the last one.

    utilisation: busy share of each component's devices, of "environment"s on cores of their own, and of all "devices".
    waiting: share of time that environments wait for the policy's answer ("policy") or for newer weights ("weights"),
        and that the learner waits for "steps".
    staleness: most updates that the weights of consumed steps were behind those that consumed them.
    """

    seconds_per_iteration: float
    env_steps_per_s: float
    utilisation: dict[str, float]
    waiting: dict[str, float]
    staleness: int
    steps_stepped: int
    steps_consumed: int
    timeline: list[Interval]


@dataclass
class _Request:
    environments: int
    asked: float  # s
    answered: Signal


@dataclass
class _Fragment:
    steps: int
    version: int  # of the weights with which it began


@dataclass
class _Clock:
    """Busy and waiting seconds so far."""

    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COMPONENTS, 0.0))
    device_s: float = 0.0
    waiting: dict[str, float] = field(default_factory=lambda: {"policy": 0.0, "weights": 0.0, "steps": 0.0})


class _Run:
    def __init__(self, scenario: Scenario, placement: Placement, schedule: Schedule, iterations: int, seed: int):
        self.scenario, self.placement, self.schedule = scenario, placement, schedule
        self.loop = Loop()
        self.clock, self.timeline = _Clock(), list[Interval]()
        self.seed, self.iterations = seed, iterations
        self.lanes = _lanes(self.loop, placement)
        self.requests: deque[_Request] = deque()
        self.fragments: deque[_Fragment] = deque()
        self.version = self.started = self.stepped = self.consumed = self.ready = self.stale = 0
        self.asked, self.handed, self.newer = Signal(self.loop), Signal(self.loop), Signal(self.loop)
        self.marks: list[tuple[float, dict[str, float], float, dict[str, float]]] = []
        self.done = Signal(self.loop)

    def go(self) -> None:
        for index, (first, last) in enumerate(_groups(self.scenario, self.schedule)):
            self.loop.start(self._group(index, first, last))
        self.loop.start(self._policy())
        self.loop.start(self._learner())
        self.loop.run(self.done)

    def _wait(self, why: str, signal: Signal, weight: float = 1.0) -> Process:
        began = self.loop.now
        yield signal
        self.clock.waiting[why] += weight * (self.loop.now - began)

    def _call(self, component: str, seconds: float, label: str) -> Process:
        """Work on all devices of a component."""
        lanes = [lane for members, lane in self.lanes.items() if component in members]
        began: dict[Lane, float] = {}
        signals = [lane.use(seconds, partial(self._begin, began, lane)) for lane in lanes]
        for lane, signal in zip(lanes, signals, strict=True):
            signal.then(partial(self._end, began, lane, component))
        yield self.loop.all(signals)
        self.timeline.append(Interval(component, min(began.values()), self.loop.now, label))

    def _begin(self, began: dict[Lane, float], lane: Lane) -> None:
        began[lane] = self.loop.now

    def _end(self, began: dict[Lane, float], lane: Lane, component: str) -> None:
        device_s = lane.width * (self.loop.now - began[lane])
        self.clock.busy[component] += device_s
        self.clock.device_s += device_s

    def _group(self, index: int, first: int, last: int) -> Process:
        """Environments first to last - 1, which ask and step together."""
        scenario, n = self.scenario, last - first
        draws = [random.Random(f"{self.seed}/{environment}") for environment in range(first, last)]
        length = self.schedule.fragment or scenario.decisions
        taken = 0
        while True:
            due = self.started // scenario.steps
            self.started += n * length * scenario.chunk
            while due - self.version > self.schedule.staleness:
                yield from self._wait("weights", self.newer, n)
            version = self.version
            for _ in range(length):
                request = _Request(n, self.loop.now, Signal(self.loop))
                self.requests.append(request)
                self.asked.fire()
                yield from self._wait("policy", request.answered, n)
                taken += 1
                yield from self._step(index, n, draws, taken)
                self.stepped += n * scenario.chunk
            self.fragments.append(_Fragment(n * length * scenario.chunk, version))
            self.ready += n * length * scenario.chunk
            self.handed.fire()

    def _step(self, index: int, n: int, draws: list[random.Random], step: int) -> Process:
        scenario = self.scenario
        if isinstance(scenario.environment, BatchedEnvironments):
            devices = len(self.placement.environment)
            seconds = scenario.environment.seconds(n / scenario.environments, devices)
            yield from self._call("environment", seconds, f"stage {index}")
            return
        times = [scenario.environment.draw(numbers, step) for numbers in draws]
        began = self.loop.now
        yield self.loop.sleep(max(times))
        self.clock.busy["environment"] += sum(times)
        if len(self.timeline) < DRAWN:
            self.timeline.append(Interval("environment", began, self.loop.now, f"group {index}"))

    def _policy(self) -> Process:
        schedule, devices = self.schedule, len(self.placement.policy)
        full = schedule.batch or 1
        while True:
            while not self.requests:
                self.asked = Signal(self.loop)
                yield self.asked
            if schedule.batching == "dynamic":
                left = self.requests[0].asked + schedule.deadline_s - self.loop.now
                deadline = self.loop.sleep(max(0.0, left))
                while sum(r.environments for r in self.requests) < full and not deadline.fired:
                    self.asked = either = Signal(self.loop)
                    deadline.then(either.fire)
                    yield either
                batch = list(self.requests)
                self.requests.clear()
            else:
                batch = [self.requests.popleft()]
            size = sum(r.environments for r in batch)
            yield from self._call("policy", self.scenario.inference.seconds(size, devices), f"{size} environments")
            for request in batch:
                request.answered.fire()

    def _learner(self) -> Process:
        scenario, devices = self.scenario, len(self.placement.learner)
        hands_s = scenario.hands_s if self.placement.learner_shares else 0.0
        for update in range(self.iterations):
            taken = 0
            while taken < scenario.steps:
                size = min(self.schedule.microbatch or scenario.steps, scenario.steps - taken)
                while self.ready < size:
                    self.handed = Signal(self.loop)
                    yield from self._wait("steps", self.handed)
                self._consume(size, update)
                if taken == 0 and hands_s:
                    yield self.loop.sleep(hands_s)
                seconds = scenario.learner.seconds(size, devices, self.placement.memory_shared)
                yield from self._call("learner", seconds, f"update {update}")
                taken += size
            if hands_s:
                yield self.loop.sleep(hands_s)
            self._mark()
            self.loop.at(self.loop.now + scenario.sync_s, self._publish)
        self.done.fire()

    def _consume(self, steps: int, update: int) -> None:
        self.ready -= steps
        self.consumed += steps
        while steps:
            fragment = self.fragments[0]
            self.stale = max(self.stale, update - fragment.version)
            used = min(steps, fragment.steps)
            fragment.steps -= used
            steps -= used
            if not fragment.steps:
                self.fragments.popleft()

    def _publish(self) -> None:
        """The policy has the weights of one more update."""
        self.version += 1
        newer, self.newer = self.newer, Signal(self.loop)
        newer.fire()

    def _mark(self) -> None:
        clock = self.clock
        self.marks.append((self.loop.now, dict(clock.busy), clock.device_s, dict(clock.waiting)))

    def result(self, uncounted: int) -> Result:
        first, last = self.marks[uncounted - 1], self.marks[-1]
        seconds = last[0] - first[0]
        per_iteration = seconds / (self.iterations - uncounted)
        placement, environments = self.placement, self.scenario.environments
        width = {
            "environment": len(placement.environment) or environments,
            "policy": len(placement.policy),
            "learner": len(placement.learner),
        }
        utilisation = {name: (last[1][name] - first[1][name]) / seconds / width[name] for name in COMPONENTS}
        utilisation["devices"] = (last[2] - first[2]) / seconds / placement.devices
        share = {"policy": environments, "weights": environments, "steps": 1}
        waiting = {why: (last[3][why] - first[3][why]) / seconds / share[why] for why in share}
        return Result(
            per_iteration, self.scenario.steps / per_iteration, utilisation, waiting, self.stale, self.stepped,
            self.consumed, self.timeline,
        )  # fmt: skip


def simulate(
    scenario: Scenario, placement: Placement, schedule: Schedule, iterations: int = 3, uncounted: int = 1, seed: int = 0
) -> Result:
    """Run `iterations` updates; the first `uncounted` ones fill the pipeline."""
    if not 0 < uncounted < iterations:
        raise ModelError(
            f"{uncounted} of {iterations} updates are not to count", code="MODEL",
            remedy="Leave out at least one, and not all.",
        )  # fmt: skip
    _check(scenario, placement, schedule)
    run = _Run(scenario, placement, schedule, iterations, seed)
    run.go()
    return run.result(uncounted)


def _check(scenario: Scenario, placement: Placement, schedule: Schedule) -> None:
    separate = isinstance(scenario.environment, SeparateEnvironments)
    rest = scenario.environments % schedule.stages
    broken = scenario.decisions % (schedule.fragment or 1)
    streams = schedule.fragment or schedule.microbatch or schedule.staleness
    sizes = f"{schedule.stages} stages do not divide {scenario.environments} environments"
    wrong = {
        "policy or learner has no device": (not placement.policy or not placement.learner, "Give them devices."),
        "environments on cores of their own have devices, or others none": (
            separate == bool(placement.environment), "Give devices to environments that step in one call only.",
        ),
        sizes: (rest > 0, "Choose a divisor."),
        "fragments do not divide an update's decisions": (broken > 0, "Choose a divisor."),
        "a learner that shares devices with the rollout can't overlap with it": (
            placement.learner_shares and streams > 0, "Set fragment, microbatch and staleness to 0, or part them.",
        ),
    }  # fmt: skip
    for reason, (found, remedy) in wrong.items():
        if found:
            raise ModelError(f"{schedule.name} on {placement.name}: {reason}", code="MODEL", remedy=remedy)


def _groups(scenario: Scenario, schedule: Schedule) -> list[tuple[int, int]]:
    """First and last + 1 environment of each group."""
    alone = schedule.batching == "dynamic" and isinstance(scenario.environment, SeparateEnvironments)
    groups = scenario.environments if alone else schedule.stages
    size = scenario.environments // groups
    return [(group * size, (group + 1) * size) for group in range(groups)]


def _lanes(loop: Loop, placement: Placement) -> dict[frozenset[str], Lane]:
    """Devices that hold the same components do the same at all times: one lane for each kind."""
    holds: dict[int, set[str]] = {}
    for component in COMPONENTS:
        for device in getattr(placement, component):
            holds.setdefault(device, set()).add(component)
    kinds = [frozenset(members) for members in holds.values()]
    cores = Cores(loop, math.inf if placement.cores is None else placement.cores)
    return {kind: Lane(loop, kinds.count(kind), cores) for kind in dict.fromkeys(kinds)}


def predict_rollout(
    environment_s: float, policy_s: float, workers: int, stages: int, cores: int, decisions: int, slots: int,
    policy_fixed_s: float = 0.0,
) -> float:  # fmt: skip
    """Seconds of a rollout on processor cores from stage times of the sequential schedule with one worker.

    environment_s, policy_s: busy seconds of a decision of all slots, one process each (`benchmarks/rollout.py`:
    `environment_busy` and `policy_busy` of `sequential_1` over `decisions`). policy_fixed_s: the part of policy_s
    that a call of half the slots costs as well; the rest, and the environments' time, is in proportion to the slots.
    """
    scenario = Scenario(
        slots, decisions, BatchedEnvironments(0.0, environment_s),
        Inference(policy_fixed_s, (policy_s - policy_fixed_s) / slots), Learner(0.0),
    )  # fmt: skip
    placement = replace(disaggregated(workers, 1, 1), cores=cores)
    return simulate(scenario, placement, pipelined(stages)).seconds_per_iteration


def write_trace(file: Path, timeline: list[Interval]) -> None:
    """A Chrome trace (chrome://tracing, Perfetto) with a row for each component; times in microseconds."""
    events = [
        {
            "name": i.label, "ph": "X", "pid": 0, "tid": COMPONENTS.index(i.component),
            "ts": i.start * 1e6, "dur": (i.end - i.start) * 1e6,
        }
        for i in timeline
    ]  # fmt: skip
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": {"name": name}}
        for tid, name in enumerate(COMPONENTS)
    ]
    file.write_text(json.dumps({"traceEvents": names + events}))
