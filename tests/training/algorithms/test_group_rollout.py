"""Rollouts of whole episodes without Ray: the real workers, lanes and dispatcher, as threads of one process."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from point_env import MAX_STEPS, untrained
from whole_episodes import check_whole

from training.algorithms.grpo import GRPOConfig
from training.algorithms.ppo import PPOConfig
from training.pipeline.bell import ABORT, Bell, PipelineAborted
from training.pipeline.block import RolloutBlock, unlink
from training.pipeline.board import Board
from training.pipeline.dispatcher import Dispatcher
from training.pipeline.group_checks import settled
from training.pipeline.judging import GroupError
from training.pipeline.placement import PlacementConfig, plan
from training.pipeline.status import Status
from training.pipeline.weights import WeightsBlock, WeightsLayout, sent
from training.workers.batching import BatchingPolicy
from training.workers.environment import EnvironmentOptions
from training.workers.group_lanes import GroupLane
from training.workers.groups import GroupWorker, Order
from training.workers.lanes import LaneOptions
from training.workers.policy import PolicyOptions, PolicyWorker
from vla.lora import FULL
from vla.policy import Policy

SETTINGS: dict[str, Any] = {"image_size": 16, "chunk": 2}
ROWS = MAX_STEPS  # of a slot: two episodes of six chunks
SLOTS = 8
GRPO = GRPOConfig(group_size=4, groups=4, minibatches=2, perception_steps=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    untrained(folder)
    return folder


class Stage:
    """Block, weights and bells of a run with `placement`."""

    def __init__(self, checkpoint: Path, folder: Path, algorithm: GRPOConfig, **placement: Any):
        self.checkpoint, self.folder, self.algorithm = checkpoint, folder, algorithm
        self.placement = settled(PlacementConfig(learners=1, **placement), algorithm, SLOTS)
        found = plan(checkpoint, "point_env:make", SETTINGS, SLOTS, ROWS, algorithm, self.placement)
        self.codec, self.shape = found.codec, found.shape
        self.name = f"simreal_groups_{folder.name}_{time.time_ns()}"
        self.block = RolloutBlock(self.shape, self.name, create=True)
        self.layout = WeightsLayout.of(Policy.load(checkpoint, None).model, FULL)
        self.weights = WeightsBlock(self.layout, f"{self.name}_weights", create=True)
        self.options = PolicyOptions(
            str(checkpoint), self.layout, self.weights.name, algorithm.temperature, 3, 1, 600.0, FULL
        )  # fmt: skip

    def roll_out(self, orders: list[Order], number: int = 0, slow_s: float = 0.0) -> tuple[list[Any], int]:
        """A round: logs of the environment workers, forward passes of the policy. slow_s: a step of the last one."""
        where, folder = self.placement, str(self.folder)
        parts = np.array_split(np.arange(SLOTS), where.environment_workers)
        spans = [(int(part[0]), int(part[-1]) + 1) for part in parts]
        workers = [
            GroupWorker(
                i, EnvironmentOptions("point_env:make", SETTINGS | ({"pause_s": slow_s} if i == len(spans) - 1 else {}),
                                      "in_distribution", span, where.stages, 3, 60.0,
                                      self.algorithm.reward_form(), group_size=self.algorithm.group_size),
                self.codec, self.shape, self.name, folder,
            )
            for i, span in enumerate(spans)
        ]  # fmt: skip
        slots = {
            i: [part.tolist() for part in np.array_split(np.arange(*span), where.stages)]
            for i, span in enumerate(spans)
        }
        policy = PolicyWorker(0, self.options, "cpu", self.shape, self.name, folder, slots, 0, whole=True)
        self.block.clear()
        with ThreadPoolExecutor(len(workers)) as threads:
            logs = [threads.submit(w.play, order) for w, order in zip(workers, orders, strict=True)]
            forwards = policy.rollout(0, None, number)
            return [log.result(60) for log in logs], forwards

    def close(self) -> None:
        for part in (self.block, self.weights):
            part.close()
            unlink(part.name)


@pytest.fixture
def stage(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(algorithm: GRPOConfig = GRPO, **placement: Any) -> Stage:
        made.append(Stage(checkpoint, tmp_path, algorithm, **placement))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(("workers", "stages"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_every_group_is_played_to_its_end(stage: Callable[..., Stage], workers: int, stages: int) -> None:
    made = stage(environment_workers=workers, stages=stages)
    orders = [Order([0, 1, 2, 3], 0)] if workers == 1 else [Order([0, 1], 0), Order([2, 3], 2)]
    logs, forwards = made.roll_out(orders)
    check_whole(dict(made.block.arrays), 4, 4)
    assert sum(len(log.successes) for log in logs) == 16 and not any(log.unfinished for log in logs)
    decided = (made.block["episodes"] > 0).sum()
    assert decided == made.block["executed"].any(-1).sum() < SLOTS * ROWS, "those that are over cost no decision"
    busy = (made.block["episodes"] > 0).any(1).sum()
    assert busy <= forwards <= busy * stages, "nor does a stage in which nobody is left"
    again = {k: v.copy() for k, v in made.block.arrays.items()}
    made.roll_out(orders)
    assert all((again[k] == v).all() for k, v in made.block.arrays.items() if k != "images")
    made.roll_out(orders, number=1)
    assert (made.block["action_tokens"] != again["action_tokens"]).any(), "another round has other random numbers"
    assert (made.block["state"][0] == again["state"][0]).all()


def test_a_stage_that_another_worker_has_finished_is_decided_before_its_turn(stage: Callable[..., Stage]) -> None:
    """The second worker has nobody in stage 1 and is slow in stage 0, for which the first one waits."""
    made = stage(replace(GRPO, group_size=2), environment_workers=2, stages=2)
    logs, _ = made.roll_out([Order([0, 1, 2], 0), Order([3], 3)], slow_s=0.05)
    check_whole(dict(made.block.arrays), 2, 4)
    assert [len(log.successes) for log in logs] == [6, 2] and not any(log.unfinished for log in logs)


def test_fewer_groups_than_slots_leave_slots_and_stages_empty(stage: Callable[..., Stage]) -> None:
    made = stage(environment_workers=2)
    logs, _ = made.roll_out([Order([7], 0), Order([], 1)])
    check_whole(dict(made.block.arrays), 4, 1)
    assert not made.block["episodes"][:, 4:].any() and not logs[1].successes


def test_episodes_for_which_there_are_no_rows_are_told(stage: Callable[..., Stage]) -> None:
    made = stage(environment_workers=1)
    logs, _ = made.roll_out([Order(list(range(9)), 0)])
    assert logs[0].unfinished > 0
    assert len(logs[0].successes) + logs[0].unfinished == 36


# Asynchronous


class Lanes(Stage):
    """With lanes, a policy that serves them and a dispatcher; the test is the learner."""

    def __init__(self, checkpoint: Path, folder: Path, algorithm: GRPOConfig):
        super().__init__(
            checkpoint, folder, algorithm, schedule="asynchronous", environment_workers=1, lanes=2, staleness=1
        )
        where = self.placement
        self.board = Board(2, SLOTS, f"{self.name}_board", create=True)
        rows = ["lane 0", "lane 1", "policy worker 0"]
        self.status = Status(rows, f"{self.name}_status", create=True)
        self.learner = Bell(folder / "learner0")
        self.dispatcher = Dispatcher(
            self.block, self.board, self.status, folder, 1, where.update_fragments, where.staleness, algorithm
        )
        self.policy = BatchingPolicy(
            0, self.options, "cpu", self.shape, self.name, [0, 1], 2, str(folder), None, 0.002, 600.0, whole=True
        )
        self.policy.ready(self.status, rows[2:])
        options = LaneOptions(
            "point_env:make", SETTINGS, "in_distribution", 3, 1, 600.0, 600.0, algorithm.reward_form(), 4
        )
        self.lanes = [
            GroupLane(n, 0, options, self.codec, RolloutBlock(self.shape, self.name),
                      Board(2, SLOTS, f"{self.name}_board"), folder)
            for n in (0, 1)
        ]  # fmt: skip
        self.threads = ThreadPoolExecutor(3)
        self.dispatcher.start(0)
        self.futures = [self.threads.submit(work) for work in (self.policy.serve, *(lane.play for lane in self.lanes))]

    def take(self, count: int) -> list[int]:
        """So many fragments, as a learner gets them."""
        found: list[int] = []
        end = time.monotonic() + 600
        while len(found) < count and time.monotonic() < end:
            self.dispatcher.check()
            if message := self.learner.wait(0.2):
                found.append(message[0])
        return found

    def close(self) -> None:
        end = time.monotonic() + 600
        while not all(future.done() for future in self.futures) and time.monotonic() < end:
            for name in ("policy0", "lane0", "lane1"):  # the policy may throw one away
                Bell(self.folder / name).ring(*ABORT)
            time.sleep(0.05)
        for future in self.futures:
            assert isinstance(future.exception(1), PipelineAborted)
        self.threads.shutdown()
        self.dispatcher.stop()
        self.board.close()
        self.status.close()
        unlink(f"{self.name}_board")
        unlink(f"{self.name}_status")
        super().close()


def test_fragments_of_lanes_are_whole_groups_and_what_teaches_nothing_is_played_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    algorithm = replace(GRPO, reward="success", refills=50)
    made = Lanes(checkpoint, tmp_path, algorithm)
    try:
        numbers: set[int] = set()
        groups = kept = 0
        for update in range(5):
            for fragment in made.take(4):
                arrays = made.block.fragments[fragment].arrays
                check_whole(arrays, 4, 1)
                won = arrays["successes"].sum()
                assert 0 < won < 4, "all right or all wrong"
                assert arrays["rewards"].sum() == won
                new = set(np.unique(arrays["episodes"]).tolist()) - {0}
                assert len(new) == 4 and not new & numbers
                numbers |= new
            traffic = made.dispatcher.read(update)
            groups, kept = groups + traffic.groups, kept + traffic.kept
            made.weights.write(sent(made.policy.policy.model, FULL), update + 1)  # else what follows were too old
            made.dispatcher.release(update)
        assert kept == 20 < groups
        assert made.board["begun"].sum() >= 4 * groups
    finally:
        made.close()


def test_a_dispatcher_that_finds_nothing_to_learn_says_so(checkpoint: Path, tmp_path: Path) -> None:
    made = Lanes(checkpoint, tmp_path, replace(GRPO, band=(50.0, 60.0), refills=1))
    try:
        with pytest.raises(GroupError, match="none of 8 groups teaches anything"):
            made.take(1)
    finally:
        made.close()


def test_ppo_keeps_its_streams() -> None:
    assert PPOConfig().groups == 0 and not PPOConfig().filters and GRPO.filters
