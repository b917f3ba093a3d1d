"""The event model of schedules and placements: cases worked out by hand, and measured runs."""

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from training.pipeline.events import Cores, Lane, Loop, Process, Signal, Stalled
from training.pipeline.model import ModelError, predict_rollout, simulate, write_trace
from training.pipeline.scenarios import (
    ABLATION,
    ASYNCHRONOUS,
    ASYNCHRONOUS_PLACEMENTS,
    HYBRID,
    HYBRID_PLACEMENTS,
    BatchedEnvironments,
    Inference,
    Learner,
    Placement,
    Scenario,
    Schedule,
    SeparateEnvironments,
    colocated,
    disaggregated,
    hybrid,
    pipelined,
)

# A decision of all 4 environments: 0.2 s of stepping, 0.2 s of inference, in proportion to their number; an update
# takes 1 s of a device.
EVEN = Scenario(4, 5, BatchedEnvironments(0.0, 0.2), Inference(0.0, 0.05), Learner(0.05))
ROLLOUT = Path(__file__).parents[3] / "docs" / "results" / "rollout.json"


def seconds(scenario: Scenario, placement: Placement, schedule: Schedule) -> float:
    return simulate(scenario, placement, schedule).seconds_per_iteration


def test_sequential_sums_all_phases() -> None:
    result = simulate(EVEN, disaggregated(1, 1, 1), Schedule())
    assert result.seconds_per_iteration == pytest.approx(5 * 0.4 + 1.0)
    assert result.env_steps_per_s == pytest.approx(20 / 3)
    assert result.utilisation == pytest.approx(dict.fromkeys(("environment", "policy", "learner", "devices"), 1 / 3))
    assert result.waiting == pytest.approx({"policy": 1 / 3, "weights": 1 / 3, "steps": 2 / 3})


def test_two_stages_overlap_fully() -> None:
    # The first inference of 0.1 s is seen, all others are hidden behind 10 steps of 0.1 s.
    assert seconds(EVEN, disaggregated(1, 1, 1), pipelined(2)) == pytest.approx(0.1 + 10 * 0.1 + 1.0)
    # Four stages: 0.05 s are seen.
    assert seconds(EVEN, disaggregated(1, 1, 1), pipelined(4)) == pytest.approx(0.05 + 20 * 0.05 + 1.0)


def test_stages_cost_the_fixed_time_again() -> None:
    fixed = replace(EVEN, environment=BatchedEnvironments(0.1, 0.2))
    assert seconds(fixed, disaggregated(1, 1, 1), pipelined(2)) == pytest.approx(0.1 + 10 * (0.1 + 0.1) + 1.0)


def test_colocated_sums_the_phases_over_all_devices_and_changes_hands_twice() -> None:
    slower = replace(EVEN, hands_s=0.3, learner=Learner(0.05, shared_speed=0.4))
    expected = 5 * 0.4 / 2 + 1.0 / 2 / 0.4 + 2 * 0.3
    assert seconds(slower, colocated(2), Schedule()) == pytest.approx(expected)
    # Stages have nothing to overlap with: policy and environments are on the same devices.
    assert seconds(slower, colocated(2), pipelined(2)) == pytest.approx(expected)


def test_hybrid_gives_the_learner_all_devices_at_full_speed() -> None:
    slower = replace(EVEN, hands_s=0.3, learner=Learner(0.05, fixed_s=0.01, shared_speed=0.4))
    result = simulate(slower, hybrid(1, 1, 2), pipelined(2))
    assert result.seconds_per_iteration == pytest.approx(0.1 + 1.0 + 2 * 0.3 + 1.0 / 4 + 0.2)
    assert result.utilisation["devices"] == pytest.approx((1.0 + 1.0 + 4 * 0.45) / 4 / result.seconds_per_iteration)


def test_separate_environments_wait_for_the_slowest_unless_batching_is_dynamic() -> None:
    scenario = replace(EVEN, environment=SeparateEnvironments(0.1, 0.7), inference=Inference(0.0, 0.0))
    placement = disaggregated(0, 1, 1)
    draws = [random.Random(f"0/{environment}") for environment in range(4)]
    steps = [[scenario.environment.draw(numbers, step) for numbers in draws] for step in range(1, 16)]
    slowest = [sum(max(row) for row in steps[first : first + 5]) for first in (5, 10)]  # of the second and third update
    assert seconds(scenario, placement, Schedule()) == pytest.approx(1.0 + statistics.mean(slowest))
    alone = [max(sum(row[n] for row in steps[first : first + 5]) for n in range(4)) for first in (5, 10)]
    dynamic = Schedule("asynchronous", batching="dynamic")
    assert seconds(scenario, placement, dynamic) == pytest.approx(1.0 + statistics.mean(alone))


@pytest.mark.parametrize(
    ("deadline_s", "expected"),
    # Two stages on one device, 0.3 s a step: the second is ready 0.3 s after the first. Inference takes 0.1 s.
    [
        (0.0, [(0.0, "2"), (0.4, "1"), (0.7, "1"), (1.0, "1")]),  # nobody waits
        (0.2, [(0.0, "2"), (0.6, "1"), (0.9, "1"), (1.2, "1")]),  # in vain
        (0.5, [(0.0, "2"), (0.7, "2"), (1.4, "2"), (2.1, "2")]),  # the batch is full before the deadline
    ],
)
def test_a_batch_waits_until_it_is_full_or_its_deadline(deadline_s: float, expected: list[tuple[float, str]]) -> None:
    scenario = Scenario(2, 8, BatchedEnvironments(0.3, 0.0), Inference(0.1, 0.0), Learner(0.0))
    schedule = Schedule("dynamic", 2, "dynamic", deadline_s=deadline_s, batch=2)
    timeline = simulate(scenario, disaggregated(1, 1, 1), schedule).timeline
    calls = [(i.start, i.label.split()[0]) for i in timeline if i.component == "policy"]
    assert [label for _, label in calls[:4]] == [label for _, label in expected]
    assert [start for start, _ in calls[:4]] == pytest.approx([start for start, _ in expected])


def test_the_deadline_counts_from_when_the_first_one_asked() -> None:
    # Never full. The second stage asks at 1.2 s, while the policy is busy until 1.5 s: it has waited long enough then.
    scenario = Scenario(2, 8, BatchedEnvironments(0.3, 0.0), Inference(0.5, 0.0), Learner(0.0))
    schedule = Schedule("dynamic", 2, "dynamic", deadline_s=0.1, batch=3)
    timeline = simulate(scenario, disaggregated(1, 1, 1), schedule).timeline
    assert [i.start for i in timeline if i.component == "policy"][:4] == pytest.approx([0.1, 1.0, 1.5, 2.0])


def test_micro_batches_hide_the_update_behind_the_rollout() -> None:
    # One environment, 10 steps of 1 s; 1 s of learning per step: all but the last step's is hidden.
    scenario = Scenario(1, 10, SeparateEnvironments(1.0, 0.0), Inference(0.0, 0.0), Learner(1.0))
    schedule = Schedule("streaming", fragment=1, microbatch=1)
    assert seconds(scenario, disaggregated(0, 1, 1), schedule) == pytest.approx(11.0)
    assert seconds(scenario, disaggregated(0, 1, 1), replace(schedule, microbatch=5)) == pytest.approx(15.0)
    assert seconds(scenario, disaggregated(0, 1, 1), Schedule()) == pytest.approx(20.0)
    # With weights that may be one update old, the last step's is hidden as well.
    assert seconds(scenario, disaggregated(0, 1, 1), replace(schedule, staleness=1)) == pytest.approx(10.0)


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
def test_the_staleness_bound_throttles_the_producers(staleness: int) -> None:
    # The learner needs 3 s for what an environment makes in 1 s.
    scenario = Scenario(1, 4, SeparateEnvironments(1.0, 0.0), Inference(0.0, 0.0), Learner(3.0))
    schedule = Schedule("asynchronous", fragment=1, microbatch=1, staleness=staleness)
    result = simulate(scenario, disaggregated(0, 1, 1), schedule, iterations=10)
    assert result.staleness == staleness
    # With 9 updates published, what is due for update 9 + staleness may have begun, and the run ends with update 10.
    assert result.steps_stepped <= (10 + staleness) * scenario.steps
    free = simulate(scenario, disaggregated(0, 1, 1), replace(schedule, staleness=100), iterations=10)
    assert free.steps_stepped > (10 + 4) * scenario.steps
    assert free.waiting["weights"] == 0
    assert result.waiting["weights"] > 0.5
    assert result.seconds_per_iteration == pytest.approx(12.0 + (1.0 if staleness == 0 else 0.0))


def test_weights_travel_behind_the_rollout_unless_it_needs_them() -> None:
    scenario = Scenario(1, 10, SeparateEnvironments(1.0, 0.0), Inference(0.0, 0.0), Learner(0.5), sync_s=2.0)
    schedule = Schedule("streaming", fragment=1, microbatch=1)
    assert seconds(scenario, disaggregated(0, 1, 1), schedule) == pytest.approx(10.0 + 0.5 + 2.0)
    assert seconds(scenario, disaggregated(0, 1, 1), replace(schedule, staleness=1)) == pytest.approx(10.0)


@pytest.mark.parametrize("schedule", [*ABLATION.values(), pipelined(4)], ids=lambda s: s.name)
def test_steps_are_conserved(schedule: Schedule) -> None:
    result = simulate(ASYNCHRONOUS, ASYNCHRONOUS_PLACEMENTS["asynchronous"], schedule, iterations=4)
    assert result.steps_consumed == 4 * ASYNCHRONOUS.steps
    assert result.steps_consumed <= result.steps_stepped
    assert result.steps_stepped <= (4 + schedule.staleness) * ASYNCHRONOUS.steps
    assert all(0 <= share <= 1 + 1e-9 for share in (*result.utilisation.values(), *result.waiting.values()))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("name", HYBRID_PLACEMENTS)
def test_quicker_stages_are_never_slower(stages: int, name: str) -> None:
    def at(speed: float) -> list[float]:
        quicker = (
            replace(HYBRID, inference=Inference(0.010 / speed, 0.040 / 48 / speed)),
            replace(HYBRID, environment=BatchedEnvironments(0.015 / speed, 0.035 / speed)),
            replace(HYBRID, learner=replace(HYBRID.learner, step_s=HYBRID.learner.step_s / speed)),
        )
        return [seconds(scenario, HYBRID_PLACEMENTS[name], pipelined(stages)) for scenario in quicker]

    now, half, double = at(1.0), at(0.5), at(2.0)
    assert all(d <= n + 1e-9 <= h + 2e-9 for d, n, h in zip(double, now, half, strict=True))
    assert double[2] < now[2] < half[2]  # the learner is never hidden here


def test_log_normal_steps_have_their_mean_variation_and_resets() -> None:
    numbers, environment = random.Random(3), SeparateEnvironments(0.06, 1.0, reset_s=2.0, reset_every=100)
    draws = [environment.draw(numbers, step) for step in range(1, 100)] + [environment.draw(numbers, 100) - 2.0]
    draws += [environment.draw(numbers, 1) for _ in range(100_000)]
    assert statistics.mean(draws) == pytest.approx(0.06, rel=0.02)
    assert statistics.stdev(draws) / statistics.mean(draws) == pytest.approx(1.0, rel=0.05)


def test_the_hybrid_scenario_is_its_formula() -> None:
    rollout = {
        k: 0.010 + 0.040 / k + 40 * k * (0.015 + 0.035 / k) for k in (2, 3, 4)
    }  # the environments' device is full
    sequential = 40 * (0.050 + 0.050)
    for k, rollout_s in rollout.items():
        assert seconds(HYBRID, HYBRID_PLACEMENTS["hybrid"], pipelined(k)) == pytest.approx(rollout_s + 2.0 + 0.4)
    assert seconds(HYBRID, HYBRID_PLACEMENTS["hybrid"], Schedule()) == pytest.approx(sequential + 2.0 + 0.4)
    assert seconds(HYBRID, HYBRID_PLACEMENTS["disaggregated"], Schedule()) == pytest.approx(sequential + 6.0)
    shared = 40 * (0.015 + 0.035 / 3 + 0.010 + 0.040 / 3) + 6.0 / 3 / 0.4 + 0.4
    assert seconds(HYBRID, HYBRID_PLACEMENTS["colocated"], Schedule()) == pytest.approx(shared)


def test_the_asynchronous_scenario_is_bound_by_its_learner() -> None:
    placement = ASYNCHRONOUS_PLACEMENTS["asynchronous"]
    result = simulate(ASYNCHRONOUS, placement, ABLATION["overlap of the update"], iterations=4)
    assert result.seconds_per_iteration == pytest.approx(6400 * 0.003)
    assert result.staleness <= 2  # fragments overtake each other: one update more than the rule at most
    rates = [simulate(ASYNCHRONOUS, placement, schedule).env_steps_per_s for schedule in ABLATION.values()]
    assert rates == sorted(rates)


def test_processes_share_cores_evenly() -> None:
    loop, ends = Loop(), {}
    cores = Cores(loop, 2)

    def work(name: str, after: float, seconds_: float, processes: int) -> Process:
        yield loop.sleep(after)
        yield cores.use(seconds_, processes)
        ends[name] = loop.now

    # Until 1 s two run at full speed; then four at half, until a has its 2 s; then three at 2/3.
    for name, job in {"a": (0.0, 2.0, 1), "b": (0.0, 4.0, 1), "c": (1.0, 2.5, 2)}.items():
        loop.start(work(name, *job))
    loop.run(loop.sleep(100.0))
    # a: 1 s + 1 s / 0.5 = 3. At 3 b has 2 left, c 1.5: three at 2/3, so c ends at 5.25 with b at 0.5.
    assert ends == pytest.approx({"a": 3.0, "c": 5.25, "b": 5.75})


def test_a_lane_serves_one_at_a_time_and_a_stalled_run_says_so() -> None:
    loop = Loop()
    lane, begun = Lane(loop, 1, Cores(loop)), []
    last = [lane.use(s, lambda: begun.append(loop.now)) for s in (2.0, 1.0, 3.0)][-1]
    loop.run(last)
    assert begun == [0.0, 2.0, 3.0]
    assert loop.now == 6.0
    with pytest.raises(Stalled, match="every simulated process waits"):
        loop.run(Signal(loop))


@pytest.mark.parametrize("model", ["nano", "small"])
@pytest.mark.parametrize("pair", ["one_worker", "two_workers", "both_cores"])
def test_measured_rollouts_are_predicted_within_a_tenth(model: str, pair: str) -> None:
    entry = json.loads(ROLLOUT.read_text())["models"][model]
    decisions, slots = entry["decisions"], entry["slots"]
    busy = entry["placements"]["sequential_1"]["mean_s"]
    environment_s, policy_s = (busy[f"{name}_busy"] / decisions for name in ("environment", "policy"))
    fixed_s = entry["placements"]["pipelined_1"]["mean_s"]["policy_busy"] / decisions - policy_s
    runs = {"one_worker": ((1, 1), (1, 2)), "two_workers": ((2, 1), (2, 2)), "both_cores": ((1, 1), (2, 2))}[pair]
    slow, fast = (predict_rollout(environment_s, policy_s, w, k, 2, decisions, slots, fixed_s) for w, k in runs)
    measured = entry["median"] if pair == "one_worker" else entry[pair]["median"]
    assert slow / fast == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize(
    ("placement", "schedule", "message"),
    [
        (disaggregated(0, 1, 1), Schedule(), "or others none"),
        (disaggregated(1, 0, 1), Schedule(), "has no device"),
        (disaggregated(1, 1, 1), pipelined(3), "3 stages do not divide 4"),
        (disaggregated(1, 1, 1), Schedule(fragment=2), "do not divide an update's decisions"),
        (hybrid(1, 1), Schedule(staleness=1), "can't overlap"),
    ],
)
def test_what_does_not_fit_is_refused(placement: Placement, schedule: Schedule, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        simulate(EVEN, placement, schedule)
    with pytest.raises(ModelError, match="2 of 2 updates"):
        simulate(EVEN, disaggregated(1, 1, 1), Schedule(), iterations=2, uncounted=2)


def test_a_trace_has_every_interval(tmp_path: Path) -> None:
    result = simulate(EVEN, disaggregated(1, 1, 1), pipelined(2), iterations=2)
    write_trace(tmp_path / "trace.json", result.timeline)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    shown = [e for e in events if e["ph"] == "X"]
    assert len(shown) == len(result.timeline)
    learner = [e for e in shown if e["tid"] == 2]
    assert math.isclose(sum(e["dur"] for e in learner), 2 * 1.0e6)
