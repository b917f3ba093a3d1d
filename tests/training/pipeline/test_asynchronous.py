"""The asynchronous schedule: who gets which fragment, what a learner makes of them, the engine with real workers."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from going_on import GoingOn
from point_env import untrained

from training.algorithms.base import Algorithm
from training.algorithms.grpo import GRPOConfig
from training.algorithms.ppo import PPOConfig
from training.pipeline.actors import ray_session
from training.pipeline.asynchronous import Asynchronous
from training.pipeline.bell import Bell
from training.pipeline.block import RolloutBlock, RolloutShape, unlink
from training.pipeline.board import Board
from training.pipeline.dispatcher import Dispatcher
from training.pipeline.placement import EngineError, PlacementConfig, plan
from training.pipeline.status import Doing, Status
from training.pipeline.weights import WeightsBlock, WeightsLayout
from training.workers.batching import BatchingPolicy
from training.workers.lanes import WANT
from training.workers.learner import Learner, LearnerOptions
from training.workers.policy import PolicyOptions
from training.workers.streaming import StreamingLearner
from vla.lora import FULL
from vla.policy import Policy
from vla.types import ModelInputs

SETTINGS = {"image_size": 16, "chunk": 2}
SLOTS, DECISIONS = 8, 6
NUMBERS = RolloutShape(4, 3, (1, 16, 16, 3), 3, 8, chunk=2, action_dim=4, values=1, privileged=0, critic=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    untrained(folder)
    return folder


# Plans


def placed(**changes: Any) -> PlacementConfig:
    given = {"schedule": "asynchronous", "environment_workers": 2, "lanes": 2, "policy_threads": 1, "learners": 1}
    return PlacementConfig(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lanes": 3}, "8 environments can't be split evenly over 2 workers x 3 lanes"),
        ({"lanes": 8}, "8 environments can't be split evenly over 2 workers x 8 lanes"),
        ({"lanes": 0}, "can't be split evenly over 2 workers x 0 lanes"),
        ({"stages": 2}, "stages is 2"),
        ({"schedule": "synchronous"}, "lanes is 2"),
        ({"staleness": -1}, "staleness is -1"),
        ({"batch_max": 3}, "a batch of 3 can't be made of lanes with 2 environments"),
        ({"batch_max": 1}, "a batch of 1 can't be made of lanes with 2 environments"),
        ({"batch_wait_ms": -1}, "batch_wait_ms is -1"),
        ({"fragments_per_update": 5}, "5 fragments can't be split into 2 minibatches"),
        ({"fragments_per_update": 0}, "0 fragments can't be split into 2 minibatches"),
        ({"fragments_per_update": 2, "staleness": 0}, "2 fragments may be begun at a time"),
        ({"learners": 7}, "give 6 samples at worst, too few for 7 learners"),
        ({"micro_batch": 0}, "micro_batch is 0"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(checkpoint: Path, changes: dict[str, int], said: str) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        planned(checkpoint, placed(**changes))
    assert caught.value.code == "PLACEMENT" and caught.value.remedy


def test_a_plan_has_fragments_for_the_bound_of_staleness(checkpoint: Path) -> None:
    shape = planned(checkpoint, placed(staleness=2, fragments_per_update=6, batch_max=4)).shape
    assert (shape.fragments, shape.slots, shape.decisions) == (18, 2, DECISIONS)


def planned(checkpoint: Path, placement: PlacementConfig) -> Any:
    return plan(checkpoint, "point_env:make", SETTINGS, SLOTS, DECISIONS, PPOConfig(minibatches=2), placement)


# The dispatcher


class Yard:
    """A dispatcher whose lanes and learner are played by the test."""

    def __init__(self, folder: Path, name: str, lanes: int, per_update: int, staleness: int):
        self.shape = RolloutShape(2, 1, (1, 1, 1, 3), 1, 1, 1, 1, 1, 0, 0, fragments=(staleness + 1) * per_update)
        self.block = RolloutBlock(self.shape, name, create=True)
        self.board = Board(lanes, lanes, f"{name}_board", create=True)
        self.status = Status([f"lane {lane}" for lane in range(lanes)], f"{name}_status", create=True)
        self.dispatcher = Dispatcher(self.block, self.board, self.status, folder, 1, per_update, staleness, PPOConfig())
        self.learner = Bell(folder / "learner0")
        self.version, self.per_update, self.lanes = 0, per_update, lanes

    def want(self, lane: int, generation: int = 0) -> int | None:
        """The fragment that a lane is given at once, if any."""
        turn = int(self.board["grant"][lane, 0])
        self.dispatcher.hear(lane, WANT, generation)
        return self.granted(lane, turn)

    def granted(self, lane: int, turn: int) -> int | None:
        now, fragment, _ = self.board["grant"][lane].tolist()
        return fragment if now != turn else None

    def finish(self, lane: int, fragment: int, version: int, generation: int = 0) -> None:
        self.block.fragments[fragment]["versions"][:] = version
        self.dispatcher.hear(lane, fragment, generation)

    def sent(self) -> list[tuple[int, int]]:
        """Fragment and update of what the learner is given."""
        messages = iter(lambda: self.learner.wait(0), None)
        return [(fragment, update) for fragment, update, _ in messages]

    def close(self) -> None:
        self.block.close()
        self.board.close()
        self.status.close()
        for name in (self.block.name, self.board.name, self.status.name):
            unlink(name)


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    made = Yard(tmp_path, f"simreal_yard_{time.time_ns()}", lanes=3, per_update=2, staleness=1)
    yield made
    made.close()


def test_a_lane_waits_until_an_update_frees_fragments(yard: Yard) -> None:
    """begun <= (updates + staleness + 1) x per_update: 4 before the first update, 6 after it."""
    held = {lane: yard.want(lane) for lane in (0, 1, 2)}
    assert sorted(f for f in held.values() if f is not None) == [0, 1, 2]
    assert [int(yard.board["grant"][lane, 2]) for lane in held] == [0, 0, 1]  # the update that each is meant for
    for lane in (0, 1):
        assert held[lane] is not None
        yard.finish(lane, held[lane], 0)
    assert yard.sent() == [(held[0], 0), (held[1], 0)]
    assert yard.want(0) == 3
    turn = int(yard.board["grant"][1, 0])
    assert yard.want(1) is None
    yard.dispatcher.release(0)
    assert yard.granted(1, turn) in (held[0], held[1])


def test_a_fragment_that_was_overtaken_is_dropped_when_it_is_too_old(yard: Yard) -> None:
    slow = yard.want(0)
    assert slow is not None
    for update in range(2):
        for lane in (1, 2):
            fragment = yard.want(lane)
            assert fragment is not None
            yard.finish(lane, fragment, update)
        assert [u for _, u in yard.sent()] == [update, update]
        yard.dispatcher.release(update)
    yard.finish(0, slow, 0)  # decided before the first update, it would be learnt from in the third
    assert yard.sent() == []
    assert [yard.dispatcher.read(update).dropped for update in range(3)] == [0, 0, 1]
    assert slow in yard.dispatcher.free


def test_fragments_of_a_lost_lane_come_back_and_its_last_words_are_ignored(yard: Yard) -> None:
    lost = yard.want(1)
    assert lost is not None
    assert yard.dispatcher.discard([1]) == [lost]
    yard.finish(1, lost, 0)  # by the process that is gone
    assert yard.want(1) is None
    assert yard.sent() == [] and lost not in yard.dispatcher.free
    yard.dispatcher.reclaim([lost])
    assert sorted(yard.dispatcher.free) == [0, 1, 2, 3]
    assert yard.want(1, generation=1) is not None


def test_no_order_of_events_exceeds_the_bound_or_stops_the_flow(yard: Yard) -> None:
    """Lanes of very different speed, updates at any time: each fragment sent is young enough, and all go on."""
    random = np.random.default_rng(0)
    held: dict[int, tuple[int, int]] = {}  # lane -> fragment and the version that it began with
    turns = np.zeros(3, np.int64)
    arrived: list[tuple[int, int]] = []
    versions: dict[int, int] = {}
    updates = 0
    for _ in range(3000):
        lane = int(random.choice(3, p=[0.6, 0.35, 0.05]))
        if random.random() < 0.2 and len(arrived) >= 2:
            assert [u for _, u in arrived[:2]] == [updates, updates]
            assert all(updates - versions[f] <= 1 for f, _ in arrived[:2])
            arrived = arrived[2:]
            yard.dispatcher.release(updates)
            updates += 1
        elif lane in held:
            fragment, began = held.pop(lane)
            versions[fragment] = began
            yard.finish(lane, fragment, began)
        elif lane not in yard.dispatcher.waiting and int(yard.board["grant"][lane, 0]) == turns[lane]:
            yard.dispatcher.hear(lane, WANT, 0)
        for other in range(3):
            turn, fragment, due = yard.board["grant"][other].tolist()
            if turn != turns[other]:
                turns[other] = turn
                assert updates <= due <= updates + 1
                held[other] = fragment, updates
        arrived += yard.sent()
    assert updates > 200


def test_a_policy_that_always_has_requests_empties_its_bell(checkpoint: Path, tmp_path: Path) -> None:
    """Else the pipe is full after some thousand rings, and the next lane that rings fails."""
    name, layout = f"simreal_busy_{time.time_ns()}", WeightsLayout.of(Policy.load(checkpoint, None).model, FULL)
    shape = RolloutShape(**{**NUMBERS.__dict__, "fragments": 1})
    block, board = RolloutBlock(shape, name, create=True), Board(1, shape.slots, f"{name}_board", create=True)
    weights = WeightsBlock(layout, f"{name}_weights", create=True)
    options = PolicyOptions(str(checkpoint), layout, weights.name, 1.0, 0, 1, 5.0, FULL)
    try:
        policy = BatchingPolicy(0, options, "cpu", shape, name, [0], 1, str(tmp_path), None, 0.0, 5.0)
        policy.doing = np.array([Doing.IDLE])  # of its only lane
        for request in range(1, 8000):
            board["asked"][0] = request
            policy.bell.ring(0, 0, 0)
            assert policy._gather() == ([0], [request])
            board["answered"][0] = request
    finally:
        for shared in (block, board, weights):
            shared.close()
            unlink(shared.name)


# The learner


@pytest.fixture
def learners(checkpoint: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A synchronous learner on a block of 6 slots and a streaming one on the same numbers as 2 fragments of 3."""
    stamp = time.time_ns()
    whole = RolloutShape(**{**NUMBERS.__dict__, "slots": 6})
    parts = RolloutShape(**{**NUMBERS.__dict__, "fragments": 2})
    one = RolloutBlock(whole, f"simreal_one_{stamp}", create=True)
    two = RolloutBlock(parts, f"simreal_two_{stamp}", create=True)
    policy = Policy.load(checkpoint, None)
    layout = WeightsLayout.of(policy.model, FULL)
    weights = WeightsBlock(layout, f"simreal_weights_{stamp}", create=True)
    random = np.random.default_rng(0)
    one["images"][:] = random.integers(0, 256, one["images"].shape)
    one["tokens"][..., -1] = 5
    one["action_tokens"][:] = random.integers(0, 8, one["action_tokens"].shape)
    one["executed"][:] = True
    one["rewards"][:] = random.normal(size=one["rewards"].shape)
    one["boundary"][2, 1] = True
    with torch.no_grad():
        for row in range(5):
            inputs: Any = (torch.from_numpy(one[k][row]) for k in ("images", "state", "tokens"))
            found = policy.evaluate_actions(ModelInputs(*inputs), torch.from_numpy(one["action_tokens"][row]), 1.0)
            one["log_probs"][row], one["values"][row] = found.log_probs.numpy(), found.values.numpy()
    for number, fragment in enumerate(two.fragments):
        for name, array in fragment.arrays.items():
            array[:] = one[name][:, 3 * number : 3 * number + 3]

    def options(config: PPOConfig, micro_batch: int | None) -> LearnerOptions:
        return LearnerOptions(1, str(checkpoint), layout, weights.name, config, 0, 10, 1, "", micro_batch)

    bell = Bell(tmp_path / "learner0")

    def synchronous(config: PPOConfig, micro_batch: int | None = None) -> Learner:
        return Learner(0, options(config, micro_batch), "cpu", whole, one.name)

    def streaming(config: PPOConfig, micro_batch: int | None = None) -> StreamingLearner:
        return StreamingLearner(0, options(config, micro_batch), "cpu", parts, two.name, str(tmp_path), 2, 5.0)

    def deliver(update: int) -> None:
        for fragment in (0, 1):
            bell.ring(fragment, update, 0)

    yield {"synchronous": synchronous, "streaming": streaming, "deliver": deliver, "block": two, "weights": weights}
    for block in (one, two, weights):
        block.close()
        unlink(block.name)


def gradients(learner: Learner) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_on_fresh_data_streaming_has_the_gradient_of_the_synchronous_learner(
    learners: dict[str, Any], micro_batch: int | None
) -> None:
    config = PPOConfig(
        epochs=1, minibatches=1, critic_iterations=0, normalize_advantages=False, entropy_coef=0.1, grad_clip=1e9
    )
    one, two = learners["synchronous"](config), learners["streaming"](config, micro_batch)
    assert learners["synchronous"](config, micro_batch).update(0).metrics["loss"] == pytest.approx(
        expected := one.update(0).metrics["loss"], rel=1e-5
    )
    learners["deliver"](0)
    found = two.update(0).metrics
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert float(gradients(one).norm()) > 1e-2
    assert (gradients(one) - gradients(two)).norm() < 1e-4 * gradients(one).norm()
    assert found["truncated_share"] == 0 and found["importance"] == pytest.approx(1, abs=1e-5)
    assert found["staleness_max"] == 0 and found["clip_fraction"] == 0


def test_further_passes_scale_advantages_as_the_synchronous_learner_does(learners: dict[str, Any]) -> None:
    """They know all fragments of the update; the first pass knows those that came before."""
    config = PPOConfig(epochs=2, minibatches=1, critic_iterations=0, grad_clip=1e9, learning_rate=0.0, value_coef=0.0)
    one, two = learners["synchronous"](config), learners["streaming"](config)
    one.update(0)
    learners["deliver"](0)
    two.update(0)
    assert float(gradients(one).norm()) > 1e-2
    assert (gradients(one) - gradients(two)).norm() < 1e-4 * gradients(one).norm()


def test_old_data_are_weighted_and_further_passes_are_clipped_against_the_first(learners: dict[str, Any]) -> None:
    block = learners["block"]
    block["log_probs"][0] += np.log(0.6) / 4  # an action has 4 tokens: it was less likely, its weight is 1 / 0.6
    block["log_probs"][1] += np.log(0.25) / 4  # would be 4, and is cut to 2
    block["versions"][1] = 0
    block["versions"][0] = 1

    def update(learning_rate: float) -> dict[str, float]:
        config = PPOConfig(epochs=2, minibatches=2, critic_iterations=0, ratio="action", learning_rate=learning_rate)
        learner = learners["streaming"](config)
        learners["deliver"](1)
        metrics: dict[str, float] = learner.update(1).metrics
        return metrics

    found = update(0.0)
    assert found["importance"] == pytest.approx((1 / 0.6 + 2) / 2, rel=0.02)  # later passes mix the fragments
    assert found["truncated_share"] == pytest.approx(0.5, abs=0.05)
    assert found["clip_fraction"] == 0 and found["updates"] == 4
    assert found["staleness_max"] == 1 and found["staleness_mean"] == pytest.approx(12 / 23)  # of 11 and 12 samples
    assert update(1e-2)["clip_fraction"] > 0, "the second pass has moved away from the first"
    assert learners["weights"].version == 2


def test_a_learner_that_gets_no_fragment_says_so(learners: dict[str, Any]) -> None:
    learner = learners["streaming"](PPOConfig(minibatches=1))
    learner.deadline_s = 0.1
    with pytest.raises(Exception, match=r"learner 0 waited 0.1 s for fragment 1 of 2 for update 0"):
        learner.update(0)


def test_weights_are_read_whole_while_the_next_are_written() -> None:
    layout = WeightsLayout({"a": ((1000,), torch.float32), "b": ((), torch.int64), "c": ((3, 2), torch.bfloat16)})
    block = WeightsBlock(layout, f"simreal_weights_{time.time_ns()}", create=True)
    reader = WeightsBlock(layout, block.name)
    try:
        assert reader.version == 0
        own = {k: torch.zeros(shape, dtype=kind) for k, (shape, kind) in layout.tensors.items()}
        for version in (1, 2, 3):
            block.write({k: torch.full_like(v, version) for k, v in own.items()}, version)
            assert reader.read(own) == version
            assert all((v == version).all() for v in own.values())
        block._shared["begun"][0] = 4  # the fourth is being written, over the second
        assert reader.read(own) == 3
    finally:
        block.close()
        reader.close()
        unlink(block.name)


# The engine


@pytest.fixture(scope="module")
def ray_() -> Iterator[None]:
    with ray_session():
        yield


PPO = PPOConfig(minibatches=2, epochs=1)
LEARNS = PPOConfig(minibatches=2, critic_iterations=0, perception_steps=0, learning_rate=3e-3)
GROUPS = GRPOConfig(groups=4, group_size=2, minibatches=2, filter_groups=False)


def engine(
    checkpoint: Path, run: Path, settings: dict[str, Any], algorithm: Algorithm = PPO, slots: int = SLOTS,
    decisions: int = DECISIONS, **placement: Any,
) -> Asynchronous:  # fmt: skip
    return Asynchronous(
        checkpoint, run, "point_env:make", {**SETTINGS, **settings}, "in_distribution", slots, decisions,
        algorithm, placed(**placement), 3, 1000,
    )  # fmt: skip


def test_lanes_do_not_wait_for_a_slow_one_and_staleness_stays_in_its_bound(
    ray_: None, checkpoint: Path, tmp_path: Path
) -> None:
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    (trouble / "slow").touch()
    made = engine(checkpoint, tmp_path / "run", {"trouble": str(trouble)}, staleness=1)
    try:
        iteration, dropped, ages = 0, 0.0, []
        end = time.monotonic() + 60
        while (dropped < 1 or iteration < 20) and time.monotonic() < end:
            rollout, update = made.iterate(iteration)
            ages.append(update.metrics["staleness_max"])
            dropped += rollout.measures["rollout/dropped_fragments"]
            iteration += 1
        asked = sorted(made.board["asked"].tolist())
        assert asked[0] > 2, "the slow one does step"
        assert asked[1] > 4 * asked[0], "the others have not waited for it"
        assert max(ages) == 1, "the bound is reached and not exceeded"
        assert dropped >= 1, "what the slow one has finished came too late"
        assert rollout.measures["rollout/batch_mean"] >= 2
        assert made.weights.version == iteration
    finally:
        made.close()


def test_without_staleness_every_decision_is_of_the_newest_weights(
    ray_: None, checkpoint: Path, tmp_path: Path
) -> None:
    made = engine(checkpoint, tmp_path / "run", {}, staleness=0, batch_max=4)
    try:
        for iteration in range(4):
            rollout, update = made.iterate(iteration)
            assert update.metrics["staleness_max"] == update.metrics["staleness_mean"] == 0
            assert rollout.measures["rollout/dropped_fragments"] == 0
            assert rollout.measures["rollout/batch_mean"] <= 4
        assert made.board["begun"].min() >= 1
    finally:
        made.close()


@pytest.mark.slow
def test_failing_workers_are_replaced_while_the_others_go_on(
    ray_: None, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    settings = {"trouble": str(trouble), "pause_s": 0.005}
    made = engine(checkpoint, tmp_path / "run", settings, staleness=1, learners=2, deadline_s=5)
    run = GoingOn(made, 60, staleness=1, slots=SLOTS)
    try:
        run.times(2)
        reasons = {"exit": "its process died", "raise": "it raised RuntimeError: the gripper fell off",
                   "hang": "has not finished a step for 5 s"}  # fmt: skip
        for kind, reason in reasons.items():
            capfd.readouterr()
            before, begun = dict(made.processes), made.counters()
            (trouble / kind).touch()
            run.until(lambda before=before: made.processes != before)
            culprit = int((trouble / f"{kind}.done").read_text())
            name = next(name for name, process in before.items() if process == culprit)
            said = capfd.readouterr().out
            assert f"{name} (process {culprit}) is restarted: " in said and reason in said
            assert {k for k in before if before[k] != made.processes[k]} == {name}
            goal = made.counters() + 1
            run.until(lambda goal=goal: (made.counters() >= goal).all())  # all lanes play, the new ones too
            assert (made.counters() > begun).all()
        for how, reason in ((signal.SIGKILL, "its process died"), (signal.SIGSTOP, "it has not decided for 5 s")):
            before = dict(made.processes)
            os.kill(before["policy worker 0"], how)
            run.until(lambda before=before: made.processes != before)
            assert {k for k in before if before[k] != made.processes[k]} == {"policy worker 0"}
            said = capfd.readouterr().out
            assert f"policy worker 0 (process {before['policy worker 0']}) is restarted: {reason}" in said
            goal = made.counters() + 1
            run.until(lambda goal=goal: (made.counters() >= goal).all())
        os.kill(made.processes["learner 1"], signal.SIGKILL)
        with pytest.raises(EngineError, match="the learner 1 failed: its process died") as caught:
            run.until(lambda: False)
        assert caught.value.code == "WORKER"
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_policy_workers_decide_each_for_its_own_lanes_and_it_learns(
    ray_: None, checkpoint: Path, tmp_path: Path
) -> None:
    made = engine(checkpoint, tmp_path / "run", {}, LEARNS, slots=32, decisions=12, policy_workers=2)
    try:
        assert made.served == {0: [0, 1], 1: [2, 3]}
        success: list[float] = []
        while len(success) < 60 and (len(success) < 4 or np.mean(success[-3:]) < 0.9):
            before = {key: made.board[key].copy() for key in ("forwards", "decided")}
            rollout, update = made.iterate(len(success))
            success.append(float(np.mean([s for log in rollout.episodes for s in log.successes])))
            assert update.metrics["staleness_max"] <= 1
            assert rollout.policy.forwards >= 2 and rollout.measures["rollout/batch_mean"] <= 16
            gained = {key: made.board[key] - before[key] for key in before}
            assert (gained["decided"][:2] > 0).all() and not gained["decided"][2:].any()
        print(f"success {success[0]:.2f} at first, {np.mean(success[-3:]):.2f} after {len(success)} updates")
        assert np.mean(success[-3:]) >= 0.9 > 0.75 > success[0]
    finally:
        made.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("algorithm", [PPO, GROUPS], ids=["endless", "groups"])
def test_of_two_policy_workers_one_that_fails_is_replaced_alone(
    ray_: None, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], algorithm: Algorithm
) -> None:
    made = engine(
        checkpoint, tmp_path / "run", {"pause_s": 0.005}, algorithm, policy_workers=2, staleness=3, deadline_s=5
    )  # fmt: skip
    run = GoingOn(made, 300, staleness=3, slots=SLOTS)
    try:
        run.times(2)
        for how, reason in ((signal.SIGKILL, "its process died"), (signal.SIGSTOP, "it has not decided for 5 s")):
            capfd.readouterr()
            before, forwards = dict(made.processes), made.board["forwards"].copy()
            os.kill(before["policy worker 1"], how)
            run.until(lambda before=before: made.processes != before)
            assert {k for k in before if before[k] != made.processes[k]} == {"policy worker 1"}
            said = capfd.readouterr().out
            assert f"policy worker 1 (process {before['policy worker 1']}) is restarted: {reason}" in said
            assert made.board["forwards"][0] > forwards[0], "the other one has gone on"
            goal = made.board["forwards"][:2] + 5
            run.until(lambda goal=goal: (made.board["forwards"][:2] >= goal).all())
    finally:
        made.close()
