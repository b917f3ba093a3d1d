"""A relay, which stands in for the dispatcher on another host, without a cluster: what it hears, tells and grants."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from training.algorithms.ppo import PPOConfig
from training.pipeline.bell import Bell
from training.pipeline.block import RolloutBlock, RolloutShape, unlink
from training.pipeline.board import Board
from training.pipeline.dispatcher import Dispatcher
from training.pipeline.judging import GroupError
from training.pipeline.relay import Relay, Sitting
from training.pipeline.status import Doing, Status
from training.workers.lanes import WANT

ROWS = ("lane 0", "lane 1", "lane 2", "policy worker 0", "policy worker 1", "learner 0")
SITTING = Sitting({1: [1, 2]}, {1: [1, 2]}, ["lane 1", "lane 2", "policy worker 1"], slice(1, 3))
SHAPE = RolloutShape(2, 1, (1, 1, 1, 3), 1, 1, 1, 1, 1, 0, 0, fragments=4)


class Hosts:
    """A relay with its host's block, and a dispatcher with another; both on this machine, in folders of their own."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.there = RolloutBlock(SHAPE, f"{name}_1", create=True)
        self.bells = folder / "there"
        self.bells.mkdir()
        self.relay = Relay(self.there.name, SHAPE, str(self.bells), 3, ROWS, SITTING, patience=0.2)
        self.relay.begin(np.array([4, 5, 6]))
        self.block = RolloutBlock(SHAPE, name, create=True)
        self.board = Board(3, 3, f"{name}_board", create=True)
        self.status = Status(ROWS, f"{name}_status", create=True)
        (folder / "here").mkdir()
        self.dispatcher = Dispatcher(self.block, self.board, self.status, folder / "here", 1, 2, 1, PPOConfig())
        self.dispatcher.far = dict.fromkeys((1, 2), self.relay)
        self.learner = Bell(folder / "here" / "learner0")

    def say(self, lane: int, fragment: int, generation: int = 0) -> None:
        """As a lane there does."""
        self.relay.bell.ring(lane, fragment, generation)

    def pass_on(self, known: int) -> int:
        """Tell the dispatcher what the relay heard; number of the last."""
        news = self.relay.hear(known, 0.0).news
        for one in news:
            self.dispatcher.tell(one.lane, one.fragment, one.generation, one.rows)
        return news[-1].number if news else known

    def close(self) -> None:
        self.relay.close()
        for shared in (self.there, self.block, self.board, self.status):
            shared.close()
            unlink(shared.name)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path, f"simreal_relay_{time.time_ns()}")
    yield made
    made.close()


def test_a_fragment_is_granted_played_there_and_arrives_here(hosts: Hosts) -> None:
    hosts.say(2, WANT)
    known = hosts.pass_on(0)
    turn, fragment, due = hosts.relay.board["grant"][2].tolist()
    assert turn == 1 and due == 0 and hosts.dispatcher.playing == {fragment: 2}
    assert hosts.relay.lanes[2].wait(0) == (2, 0, 0), "the lane is woken"
    assert not hosts.board["grant"].any()
    played = hosts.there.fragments[fragment]
    played["rewards"][:] = 3.0
    played["images"][:] = 7
    hosts.there.fragments[(fragment + 1) % 4]["images"][:] = 9  # that of another lane
    hosts.say(2, fragment)
    hosts.pass_on(known)
    assert hosts.learner.wait(0) == (fragment, 0, 0)
    arrived = hosts.block.fragments[fragment]
    assert (arrived["rewards"] == 3.0).all() and (arrived["images"] == 7).all()
    assert sum(bool(f["images"].any()) for f in hosts.block.fragments) == 1


def test_news_are_told_again_until_they_are_known(hosts: Hosts) -> None:
    hosts.say(1, WANT)
    hosts.say(2, WANT)
    first = hosts.relay.hear(0, 0.0).news
    assert [(n.number, n.lane, n.fragment, n.rows) for n in first] == [(1, 1, WANT, None), (2, 2, WANT, None)]
    hosts.say(1, 3)
    again = hosts.relay.hear(1, 0.0).news  # the second was not heard here
    assert [(n.number, n.lane, n.fragment) for n in again] == [(2, 2, WANT), (3, 1, 3)]
    assert again[1].rows is not None and hosts.relay.hear(3, 0.0).news == []


def test_a_relay_waits_for_news_and_answers_without_any(hosts: Hosts) -> None:
    began = time.monotonic()
    assert hosts.relay.hear(0, 0.3).news == []
    assert time.monotonic() - began >= 0.3
    hosts.say(1, WANT)
    began = time.monotonic()
    assert len(hosts.relay.hear(0, 60.0).news) == 1
    assert time.monotonic() - began < 30


def test_a_grant_may_be_repeated_and_an_old_one_comes_too_late(hosts: Hosts) -> None:
    for turn, fragment in ((5, 2), (5, 2), (7, 3), (5, 2)):
        hosts.relay.grant(1, turn, fragment, 0)
    assert hosts.relay.board["grant"][1].tolist() == [7, 3, 0]
    rings = [hosts.relay.lanes[1].wait(0) for _ in range(3)]
    assert rings == [(1, 0, 0), (1, 0, 0), None], "one for each that is new"


def test_rows_of_a_lost_host_are_not_copied_into_what_others_play(hosts: Hosts) -> None:
    hosts.say(2, WANT)
    known = hosts.pass_on(0)
    fragment = int(hosts.relay.board["grant"][2, 1])
    hosts.there.fragments[fragment]["rewards"][:] = 3.0
    hosts.say(2, fragment)
    lost = hosts.dispatcher.discard([1, 2])
    assert lost == [fragment]
    hosts.dispatcher.reclaim(lost)
    hosts.pass_on(known)
    assert not hosts.block.fragments[fragment]["rewards"].any() and hosts.learner.wait(0) is None
    assert sorted(hosts.dispatcher.free) == [0, 1, 2, 3]


def test_what_the_boards_there_show_is_shown_here(hosts: Hosts) -> None:
    relay = hosts.relay
    lane, policy = relay.status.row("lane 1"), relay.status.row("policy worker 1")
    lane.turn_to(Doing.STEPPING)
    policy.turn_to(Doing.DECIDING)
    relay.board["asked"][2] += 1
    relay.board["asked_s"][2] = time.monotonic()
    relay.board["forwards"][1], relay.board["decided"][1] = 3, 12
    time.sleep(0.25)
    heard = relay.hear(0, 0.0)
    assert heard.stuck == {
        "environment worker 1": "lane 1 has not finished a step for 0.2 s",
        "policy worker 1": "it has not decided for 0.2 s",
    }
    assert heard.begun.tolist() == [5, 6] and heard.counted["forwards"].tolist() == [0, 3, 0]
    hosts.status.hang(SITTING.rows, heard.seen)
    assert hosts.status["doing"].tolist()[1:5] == [Doing.STEPPING, Doing.STARTING, Doing.STARTING, Doing.DECIDING]
    spent = hosts.status.spent()
    assert 0.25 <= spent[1, Doing.STEPPING] < 60 and 0.25 <= spent[4, Doing.DECIDING] < 60
    lane.turn_to(Doing.ASKING)
    policy.turn_to(Doing.GATHERING)
    assert relay.hear(0, 0.0).stuck == {}


def test_whoever_follows_a_worker_waits_until_the_policy_has_done_with_it(hosts: Hosts) -> None:
    relay = hosts.relay
    relay.board["asked"][1:] = 4
    policy = relay.status.row("policy worker 1")
    policy.turn_to(Doing.DECIDING)
    relay.board["forwards"][1] = 8
    relay.grant(1, 20, 0, 0)
    forwards = relay.forget(1, 22)
    relay.grant(2, 21, 3, 0)  # was on its way to the one that is gone
    assert relay.board["grant"][:, 0].tolist() == [0, 22, 22] and relay.lanes[2].wait(0) is None
    relay.grant(2, 23, 1, 0)
    assert relay.board["grant"][2].tolist() == [23, 1, 0]
    assert forwards == 8 and (relay.board["asked"] == relay.board["answered"]).all()
    began = time.monotonic()
    relay.leave(1, forwards)
    assert time.monotonic() - began >= 0.2, "it has decided all the time"
    relay.board["forwards"][1] = 9
    relay.watch.patience = 60
    relay.leave(1, forwards)
    policy.turn_to(Doing.GATHERING)
    relay.leave(1, 9)
    assert time.monotonic() - began < 30


def test_the_error_of_a_fragment_that_came_from_afar_ends_the_run(hosts: Hosts) -> None:
    def refuse(fragment: int) -> None:
        raise GroupError("none of 8 groups teaches anything", code="GROUPS", remedy="Raise refills.")

    hosts.dispatcher.start(0)
    hosts.dispatcher._finished = refuse
    try:
        hosts.say(1, 0)
        hosts.pass_on(0)
        with pytest.raises(GroupError, match="none of 8 groups"):
            hosts.dispatcher.check()
    finally:
        hosts.dispatcher.stop()
