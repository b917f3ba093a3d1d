"""Whole episodes in groups: plans, the learner, both engines on the point environment."""

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from point_env import DIMENSIONS, MAX_STEPS, untrained
from whole_episodes import check_whole

from training.algorithms.base import Algorithm
from training.algorithms.groups import Grouped
from training.algorithms.grpo import GRPOConfig
from training.algorithms.ppo import PPOConfig
from training.algorithms.reinforce_pp import ReinforcePPConfig
from training.algorithms.rloo import RLOOConfig
from training.metrics import read
from training.pipeline.actors import ray_session
from training.pipeline.asynchronous import Asynchronous
from training.pipeline.block import RolloutBlock, RolloutShape, unlink
from training.pipeline.groups import Groups
from training.pipeline.judging import GroupError
from training.pipeline.placement import PlacementConfig, plan
from training.pipeline.weights import WeightsBlock, WeightsLayout
from training.train import TrainConfig, train
from training.workers.learner import Learner, LearnerOptions
from training.workers.targets import DataError
from vla import configuration
from vla.errors import SimrealError
from vla.lora import FULL
from vla.policy import Policy

SETTINGS: dict[str, Any] = {"image_size": 16, "chunk": 2}
LONGEST = MAX_STEPS // 2  # decisions of an episode
GRPO = GRPOConfig(group_size=4, groups=4, minibatches=2, epochs=1, perception_steps=0, learning_rate=1e-3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    untrained(folder)
    return folder


# Plans


def planned(
    checkpoint: Path, algorithm: Algorithm, slots: int = 8, decisions: int = 2 * LONGEST, **placement: Any
) -> Any:
    given = {"environment_workers": 1, "learners": 1, **placement}
    return plan(checkpoint, "point_env:make", SETTINGS, slots, decisions, algorithm, PlacementConfig(**given))


LANES = {"schedule": "asynchronous", "environment_workers": 2}


@pytest.mark.parametrize(
    ("algorithm", "where", "said"),
    [
        ({"group_size": 3}, {}, "an environment worker has 8 of 8 environments, which groups of 3 don't divide"),
        ({}, {"environment_workers": 2, "slots": 12}, "has 6 of 12 environments, which groups of 4 don't divide"),
        ({"groups": 1}, {}, "1 groups of 4 episodes leave some of 8 environments without any"),
        ({"groups": 5}, {}, "12 decisions are too few for 3 whole episodes of 6 decisions in every slot"),
        ({}, {"learners": 5, "decisions": 99}, "1 groups of 4 may be all .* too few for 5 learners"),
        ({"batch_size": 20}, {"micro_batch": 21}, "an update has 20 samples at most, fewer than a micro-batch of 21"),
        ({"batch_size": 97}, {}, "an iteration has 96 samples at most, fewer than batch_size 97"),
        ({"minibatches": 8}, {"micro_batch": 13}, "an update has 12 samples at most, fewer than a micro-batch of 13"),
        ({"group_size": 3}, LANES, "a lane has 4 environments, which groups of 3 don't divide"),
        ({"groups": 3}, {**LANES, "slots": 16}, "3 groups can't be played in fragments of 2"),
        ({}, {**LANES, "fragments_per_update": 7}, "fragments_per_update is 7, and 4 groups are 4"),
        ({"batch_size": 8}, LANES, "batch_size is for the synchronous schedule"),
        ({"group_size": 8}, {**LANES, "decisions": 7}, "7 decisions are too few for 2 whole episodes"),
    ],
)
def test_groups_that_do_not_fit_are_refused(
    checkpoint: Path, algorithm: dict[str, Any], where: dict[str, Any], said: str
) -> None:
    with pytest.raises(SimrealError, match=said) as caught:
        planned(checkpoint, replace(GRPO, **algorithm), **where)
    assert caught.value.code in ("GROUPS", "BATCH") and caught.value.remedy


def test_groups_that_fit_are_planned(checkpoint: Path) -> None:
    planned(checkpoint, GRPO)
    assert planned(checkpoint, GRPO, **LANES, staleness=2).shape.fragments == 3 * 4


def test_no_values_are_needed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on tensors without elements
        untrained(checkpoint, values=0)
    planned(checkpoint, GRPO)
    with pytest.raises(SimrealError, match="no value head") as caught:
        planned(checkpoint, PPOConfig(minibatches=1))
    assert "algorithm=grpo" in caught.value.remedy


# The learner

SHAPE = RolloutShape(4, 4, (1, 16, 16, 3), 3, 8, chunk=2, action_dim=DIMENSIONS, values=1, privileged=0, critic=2)


class Bench:
    """A learner on a block that the test fills: three groups of two episodes in four slots."""

    def __init__(self, checkpoint: Path, folder: Path):
        self.checkpoint, self.layout = checkpoint, WeightsLayout.of(Policy.load(checkpoint, None).model, FULL)
        name = f"simreal_groups_{folder.name}_{time.time_ns()}"
        self.block = RolloutBlock(SHAPE, name, create=True)
        self.weights = WeightsBlock(self.layout, f"{name}_weights", create=True)
        self.rows = {1: (0, 0, 2), 2: (1, 0, 1), 3: (2, 0, 3), 4: (3, 0, 2), 5: (0, 2, 4), 6: (1, 1, 4)}

    def fill(self, returns: dict[int, float], seed: int = 0) -> None:
        """Episodes with these returns, paid at the end."""
        random, block = np.random.default_rng(seed), self.block
        block.clear()
        block["images"][:] = random.integers(0, 256, block["images"].shape)
        block["state"][:] = 0.1
        block["tokens"][..., -1] = 5
        block["action_tokens"][:] = random.integers(0, 8, block["action_tokens"].shape)
        block["log_probs"][:] = np.log(1 / 8) + random.normal(0, 0.05, block["log_probs"].shape)
        for number, total in returns.items():
            slot, first, last = self.rows[number]
            block["episodes"][first:last, slot] = number
            block["executed"][first:last, slot] = True
            block["rewards"][last - 1, slot, 0] = total
            block["terminated"][last - 1, slot] = True

    def learner(self, **changes: Any) -> Learner:
        config = replace(GRPO, group_size=2, minibatches=1, grad_clip=1e9, **changes)
        options = LearnerOptions(1, str(self.checkpoint), self.layout, self.weights.name, config, 0, 10, 1, "")
        return Learner(0, options, "cpu", SHAPE, self.block.name)

    def close(self) -> None:
        for part in (self.block, self.weights):
            part.close()
            unlink(part.name)


@pytest.fixture
def bench(checkpoint: Path, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(checkpoint, tmp_path)
    yield made
    made.close()


MIXED = {1: 1.0, 2: 0.0, 3: 1.0, 4: 1.0, 5: 0.5, 6: 0.0}  # the second group is all right


def gradient(learner: Learner) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])


def test_filtered_groups_cost_no_forward_and_change_nothing_else(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.fill(MIXED)
    found = {}
    for filtered in (True, False):
        learner = bench.learner(filter_groups=filtered, length_normalization=False)
        counts: list[int] = []
        evaluate = learner.policy.evaluate_actions

        def counted(inputs: Any, *rest: Any, counts: list[int] = counts, evaluate: Any = evaluate, **more: Any) -> Any:
            counts.append(len(inputs.tokens))
            return evaluate(inputs, *rest, **more)

        monkeypatch.setattr(learner.policy, "evaluate_actions", counted)
        metrics = learner.update(0).metrics
        found[filtered] = sum(counts), metrics["samples"], gradient(learner)
    assert [found[True][:2], found[False][:2]] == [(8, 8.0), (13, 13.0)]  # 5 of 13 rows are of the second group
    assert float(found[True][2].norm()) > 1e-3
    assert torch.allclose(8 * found[True][2], 13 * found[False][2], rtol=1e-3, atol=1e-5)


def test_rounds_that_were_set_aside_count_like_those_in_the_block(bench: Bench) -> None:
    """Two groups in one rollout, or in two: the same update."""
    together = {1: 1.0, 2: 0.0, 5: 0.5, 6: 0.0}
    whole = bench.learner()
    bench.fill(together)
    kept = {k: v.copy() for k, v in bench.block.arrays.items()}
    assert whole.judge(0) == (2, 2)
    expected = whole.update(0).metrics
    parts = bench.learner()
    for number, members in enumerate(([1, 2], [5, 6])):
        for name, array in bench.block.arrays.items():
            array[:] = kept[name]
        others = ~np.isin(bench.block["episodes"], members)
        bench.block["episodes"][others] = 0
        bench.block["executed"][others[:-1]] = False
        assert parts.judge(number) == (1, 1)
        if number == 0:
            parts.set_aside()
    found = parts.update(0).metrics
    assert (found["samples"], found["loss"]) == (expected["samples"], pytest.approx(expected["loss"], rel=1e-5))
    assert torch.allclose(gradient(parts), gradient(whole), rtol=1e-3, atol=1e-5)
    bench.fill(MIXED)
    parts.set_aside()
    assert parts.judge(0) == (3, 2), "a new iteration"
    assert parts.update(1).metrics["samples"] == 8, "has forgotten the rounds of one that was given up"


def test_what_can_not_be_learned_from_is_named(bench: Bench) -> None:
    learner = bench.learner()
    bench.fill(MIXED)
    bench.block["rewards"][1, 2, 0] = np.inf
    with pytest.raises(DataError, match="1 rewards are not finite, the first in decision 1, slot 2, action 0: inf"):
        learner.judge(0)
    bench.fill(MIXED)
    bench.block["rewards"][3, 3] = np.nan  # nobody was there
    assert learner.judge(0) == (3, 2)
    bench.block["state"][2, 0] += 0.5  # where the fifth episode begins
    with pytest.raises(GroupError, match=r"don't begin alike: their `state` differs by 0\.5"):
        learner.judge(0)


def test_values_that_are_not_finite_are_named(bench: Bench) -> None:
    options = LearnerOptions(
        1, str(bench.checkpoint), bench.layout, bench.weights.name, PPOConfig(minibatches=1), 0, 10, 1, ""
    )
    learner = Learner(0, options, "cpu", SHAPE, bench.block.name)
    bench.fill(MIXED)
    bench.block["executed"][:] = True
    bench.block["values"][2, 3] = np.nan
    with pytest.raises(DataError, match="1 values are not finite, the first in decision 2, slot 3"):
        learner.update(0)


def test_the_rate_follows_the_divergence_and_comes_back(bench: Bench, tmp_path: Path) -> None:
    bench.fill(MIXED)
    learner = bench.learner(adaptive_kl=1e-6)
    assert learner.update(0).metrics["learning_rate"] == pytest.approx(1e-3)
    assert learner.update(1).metrics["learning_rate"] == pytest.approx(1e-3 / 1.5), "it moved too far"
    learner.save(str(tmp_path))
    other = bench.learner(adaptive_kl=1e-6)
    other.restore(str(tmp_path), 2)
    assert other.update(2).metrics["learning_rate"] == pytest.approx(1e-3 / 1.5**2)


def test_a_batch_size_sets_the_number_of_updates(bench: Bench) -> None:
    bench.fill(MIXED)
    for size, updates in ((8, 1), (4, 2), (3, 3), (100, 1)):
        assert bench.learner(batch_size=size).update(0).metrics["updates"] == updates


# The synchronous engine


@pytest.fixture(scope="module")
def ray_() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture
def engine(ray_: None, checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(algorithm: Algorithm, settings: dict[str, Any] | None = None, slots: int = 8, **placement: Any) -> Any:
        where = PlacementConfig(**{"environment_workers": 2, "policy_threads": 1, "learners": 1, **placement})
        kind = Asynchronous if where.schedule == "asynchronous" else Groups
        run = tmp_path / str(len(made))
        run.mkdir()
        made.append(kind(
            checkpoint, run, "point_env:make", {**SETTINGS, **(settings or {})}, "in_distribution", slots, 2 * LONGEST,
            algorithm, where, 3, 10,
        ))  # fmt: skip
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_episodes_of_a_group_begin_alike_end_and_leave_their_slots_to_others(engine: Callable[..., Any]) -> None:
    algorithm = replace(GRPO, filter_groups=False, temperature=1.6, minibatches=1)
    made = engine(algorithm, stages=2, environment_workers=1)
    rollout, update = made.iterate(0)
    assert update.metrics["rollout_logprob_gap_max"] < 1e-4, "the rollout's probabilities are as tempered as training's"
    check_whole(dict(made.block.arrays), 4, 4)
    assert rollout.measures["rollout/groups"] == rollout.measures["rollout/groups_kept"] == 4
    assert sum(len(log.successes) for log in rollout.episodes) == 16
    played = made.block["executed"].any(-1).sum()
    assert update.metrics["samples"] == played < 16 * LONGEST, "some were over early"
    assert rollout.policy.forwards <= 2 * 2 * LONGEST


def test_the_same_seed_gives_the_same_run_also_after_a_resume(engine: Callable[..., Any], tmp_path: Path) -> None:
    digests = []
    counters: list[int] = []
    for resumed in (False, True):
        made = engine(GRPO)
        if resumed:
            made.restore(tmp_path / "state", 1, counters)
        else:
            made.iterate(0)
            (tmp_path / "state").mkdir()
            made.save(tmp_path / "state")
            counters = made.counters().tolist()
            assert counters[0] >= 4
        made.iterate(1)
        arrays = {k: v for k, v in made.block.arrays.items() if k != "images"}  # old ones may lie in empty rows
        check_whole(arrays, 4, len(np.unique((arrays["episodes"][arrays["episodes"] > 0] - 1) // 4)))
        digests.append(hashlib.sha1(b"".join(array.tobytes() for array in arrays.values())).hexdigest())
        made.export(tmp_path / f"out{resumed}", {}, {})
        digests.append(hashlib.sha1((tmp_path / f"out{resumed}" / "model.safetensors").read_bytes()).hexdigest())
    assert digests[:2] == digests[2:]


def test_rounds_follow_until_enough_groups_teach_something(engine: Callable[..., Any]) -> None:
    """With 1 for success and nothing else some groups are all wrong: their places are filled."""
    made = engine(replace(GRPO, groups=2, group_size=4, reward="success", refills=9))
    rounds = []
    for iteration in range(6):
        rollout, update = made.iterate(iteration)
        told = rollout.measures
        rounds.append(told["rollout/rounds"])
        assert told["rollout/groups_kept"] >= 2 and told["rollout/groups"] >= told["rollout/groups_kept"]
        assert sum(len(log.successes) for log in rollout.episodes) == 4 * told["rollout/groups"]
        assert np.isfinite(update.metrics["loss"])
    assert max(rounds) > 1


def test_a_run_in_which_no_group_teaches_anything_stops(engine: Callable[..., Any]) -> None:
    made = engine(replace(GRPO, groups=2, band=(50.0, 60.0), refills=1))
    with pytest.raises(GroupError, match=r"none of 4 groups teaches anything: .* of their episodes succeed") as caught:
        made.iterate(0)
    assert "temperature" in caught.value.remedy


def test_an_environment_that_does_not_heed_the_seed_is_refused(engine: Callable[..., Any]) -> None:
    with pytest.raises(GroupError, match="the episodes of a group don't begin alike"):
        engine(GRPO, {"loose": True}).iterate(0)


def test_a_worker_that_dies_is_replaced_and_other_groups_are_played(
    engine: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    made = engine(replace(GRPO, filter_groups=False), {"trouble": str(trouble)})
    (trouble / "exit").touch()
    rollout, update = made.iterate(0)
    assert "is restarted: its process died" in capfd.readouterr().out
    check_whole(dict(made.block.arrays), 4, 4)
    assert made.counters().tolist() == [8] and np.isfinite(update.metrics["loss"])
    assert rollout.measures["rollout/groups"] == 4


@pytest.mark.parametrize(
    "algorithm",
    [
        RLOOConfig(group_size=4, groups=4, minibatches=2, perception_steps=0),
        ReinforcePPConfig(group_size=1, groups=16, minibatches=2, perception_steps=0),
    ],
    ids=["rloo", "reinforce_pp"],
)
def test_the_others_work_likewise(engine: Callable[..., Any], algorithm: Grouped) -> None:
    made = engine(algorithm, environment_workers=1)
    rollout, update = made.iterate(0)
    assert rollout.measures["rollout/groups_kept"] >= algorithm.groups
    assert update.metrics["updates"] == 4 and np.isfinite(update.metrics["loss"]) and update.metrics["grad_norm"] > 0


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("placement", ["colocated", "asynchronous"])
def test_grpo_learns_to_reach_the_middle(checkpoint: Path, tmp_path: Path, placement: str) -> None:
    options = [
        "env=null", "env.name=point_env:make", "env.settings.image_size=16", "env.settings.chunk=2", "algorithm=grpo",
        f"placement={placement}", "placement.environment_workers=1", "placement.learners=1", "slots=32",
        f"decisions={2 * LONGEST}", "iterations=16", "algorithm.groups=8", "algorithm.group_size=8",
        "algorithm.minibatches=4", "algorithm.learning_rate=3e-3", f"checkpoint={checkpoint}", f"out={tmp_path}/run",
    ]  # fmt: skip
    if placement == "asynchronous":
        options += ["placement.lanes=4"]
    train(configuration.load(TrainConfig, "train", options))
    rows = read(tmp_path / "run")
    success = [row["rollout/success"] for row in rows]
    print(f"success of the first and the last three iterations: {success[:3]}, {success[-3:]}")
    assert np.mean(success[-3:]) > 0.9 > 0.7 > np.mean(success[:3])


# The asynchronous engine


def test_lanes_play_whole_groups_that_arrive_in_any_order(engine: Callable[..., Any]) -> None:
    algorithm = replace(GRPO, groups=4, reward="success", refills=20)
    made = engine(algorithm, schedule="asynchronous", environment_workers=1, lanes=2, staleness=1)
    groups, kept, ages = 0.0, 0.0, []
    for iteration in range(6):
        rollout, update = made.iterate(iteration)
        told = rollout.measures
        assert told["rollout/groups_kept"] == 4 and np.isfinite(update.metrics["loss"])
        assert sum(len(log.successes) for log in rollout.episodes) >= 4 * told["rollout/groups"]
        groups, kept = groups + told["rollout/groups"], kept + told["rollout/groups_kept"]
        ages.append(update.metrics["staleness_max"])
    assert groups > kept, "some were all wrong, and others took their place"
    assert max(ages) == 1
    for fragment in made.block.fragments:
        episodes = fragment["episodes"]
        if episodes.any() and not (fragment["lengths"] > 0).sum() % 4:  # one that is not being played
            assert len(np.unique(episodes[episodes > 0])) <= 4


def test_lanes_stop_when_no_group_teaches_anything(engine: Callable[..., Any]) -> None:
    made = engine(replace(GRPO, band=(50.0, 60.0), refills=1), schedule="asynchronous")
    with pytest.raises(GroupError, match="none of 8 groups teaches anything"):
        made.iterate(0)
