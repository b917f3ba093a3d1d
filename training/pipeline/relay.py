"""A relay stands in for the dispatcher on another host, whose lanes' bells and board are not heard or seen here.

It hears what they want and have finished, and is asked for that again and again by a thread of the driver, its line.
What it told is numbered, so that nothing is lost or done twice when an answer does not arrive. Rows of a finished
fragment come along as a Ray object and are copied into the same fragment here. Grants go the other way.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from training.pipeline.actors import LOOK_S, START_S, actor, collect, end_stopped, reason
from training.pipeline.bell import Bell
from training.pipeline.block import RolloutBlock, RolloutShape, unlink
from training.pipeline.board import Board
from training.pipeline.dispatcher import Dispatcher
from training.pipeline.hosts import CLOSE_S, Host
from training.pipeline.status import Status
from training.pipeline.watch import LaneWatch
from training.workers.lanes import WANT

HEAR_S = 0.5  # a relay answers so often, also if it has heard nothing
CALLS = 4  # at a time: one hears, the others are short
COUNTED = ("forwards", "decided")  # on the board, of each policy worker


@dataclass(frozen=True)
class News:
    """What a lane told the dispatcher; number: of all that the relay heard. rows: of a finished fragment."""

    number: int
    lane: int
    fragment: int
    generation: int
    rows: dict[str, np.ndarray] | None


@dataclass(frozen=True)
class Heard:
    """News, workers that hang and why, and what the boards there show of this host's workers."""

    news: list[News]
    stuck: dict[str, str]
    seen: dict[str, np.ndarray]
    begun: np.ndarray
    counted: dict[str, np.ndarray]


@dataclass(frozen=True)
class Sitting:
    """Who sits on a host: lanes of each environment worker and those that each policy worker serves; rows of all on the
    status board; slots: of these lanes."""

    environments: Mapping[int, Sequence[int]]
    policies: Mapping[int, Sequence[int]]
    rows: Sequence[str]
    slots: slice

    @property
    def lanes(self) -> list[int]:
        return [lane for lanes in self.environments.values() for lane in lanes]


class Relay:
    """Runs in a Ray actor on the other host; it makes the boards there.

    block: name of the rollout block there. lanes: of the run. rows: of its status board.
    """

    def __init__(
        self, block: str, shape: RolloutShape, bells: str, lanes: int, rows: Sequence[str], sitting: Sitting,
        patience: float,
    ):  # fmt: skip
        self.block, self.sitting = RolloutBlock(shape, block), sitting
        self.board = Board(lanes, lanes * shape.slots, f"{block}_board", create=True)
        self.status = Status(rows, f"{block}_status", create=True)
        self.watch = LaneWatch(self.board, self.status, sitting.environments, sitting.policies, patience)
        self.bell = Bell(Path(bells) / "dispatcher")
        self.lanes = {lane: Bell(Path(bells) / f"lane{lane}") for lane in sitting.lanes}
        self.untold: deque[tuple[int, int, int, int]] = deque()  # number, lane, fragment, generation
        self.count = 0
        self._hearing, self._granting = threading.Lock(), threading.Lock()  # a call that was repeated may still go on

    def ready(self) -> int:
        """Its process, as soon as it is there."""
        return os.getpid()

    def status_board(self) -> Status:
        """For the workers of this host."""
        return self.status

    def begin(self, begun: np.ndarray) -> None:
        """Lanes begin to play; begun: episodes of the run so far in each slot."""
        self.board["begun"][:] = begun
        self.board.forget(range(self.board.lanes))

    def hear(self, known: int, seconds: float) -> Heard:
        """What was heard after the first `known`; within so many seconds."""
        with self._hearing:
            while self.untold and self.untold[0][0] <= known:
                self.untold.popleft()
            message = self.bell.wait(0.0 if self.untold else seconds)
            while message is not None:
                self.count += 1
                self.untold.append((self.count, *message))
                message = self.bell.wait(0.0)
            news = [
                News(*told, None if told[2] == WANT else self.block.fragments[told[2]].arrays) for told in self.untold
            ]
        board, sitting = self.board, self.sitting
        return Heard(
            news, self.watch.stuck(), self.status.portrait(sitting.rows), board["begun"][sitting.slots],
            {key: board[key] for key in COUNTED},
        )  # fmt: skip

    def grant(self, lane: int, turn: int, fragment: int, due: int, weights: None = None) -> None:
        """Give a lane a fragment. Ray begins it once `weights` have arrived on this host."""
        with self._granting:
            if turn <= self.board["grant"][lane, 0]:
                return  # it was repeated
            self.board["grant"][lane, 1:] = fragment, due
            self.board["grant"][lane, 0] = turn  # last: this is what the lane looks for
            self.lanes[lane].ring(lane, 0, 0)

    def end(self, process: int) -> None:
        """Of a worker of this host."""
        end_stopped(process)

    def starting(self, rows: Sequence[str]) -> None:
        self.watch.starting(rows)

    def forget(self, worker: int, turns: int) -> int:
        """As the watch does; grants of the first so many turns that are still on their way come too late."""
        with self._granting:
            self.board["grant"][list(self.sitting.environments[worker]), 0] = turns
        return self.watch.forget(worker)

    def leave(self, worker: int, forwards: int) -> None:
        self.watch.leave(worker, forwards)

    def close(self) -> None:
        for bell in (self.bell, *self.lanes.values()):
            bell.close()
        for shared in (self.board, self.status):
            name = shared.name
            shared.close()
            unlink(name)
        self.block.close()


class Line:
    """The driver's end. Keeps what it is told of the workers there on the boards here.

    weights: future of the newest weights' arrival there. failure: why it can't be heard any more.
    """

    def __init__(
        self, host: Host, lanes: int, sitting: Sitting, dispatcher: Dispatcher, weights: Callable[[], Any],
        patience: float,
    ):  # fmt: skip
        self.host, self.sitting, self.dispatcher, self.weights = host, sitting, dispatcher, weights
        self.patience = patience
        self.failure = ""
        self.hung: dict[str, str] = {}
        self.granted: dict[int, tuple[int, int, int, int]] = {}  # the last grant of each lane
        self.sending: list[Any] = []  # futures of grants
        self._closing = threading.Event()
        self._lock = threading.Lock()
        make: Any = actor(Relay, 1, None, host.node.id, CALLS)
        self.relay = make.remote(
            host.block, host.shape, host.bells, lanes, dispatcher.status.rows, sitting, patience
        )  # fmt: skip
        collect({f"relay of node {host.node.name}": self.relay.ready.remote()}, START_S)
        self._thread = threading.Thread(target=self._listen, name=f"line to {host.node.name}", daemon=True)

    @property
    def lost(self) -> str:
        """Why the host is lost; nothing if it is there."""
        ended = self._thread.ident is not None and not self._thread.is_alive()
        return self.failure or ("what it told could not be read, see the error above" if ended else "")

    def start(self, begun: np.ndarray) -> None:
        ray.get(self.relay.begin.remote(begun), timeout=self.patience)
        self._thread.start()

    def status_board(self) -> Any:
        """A future of the status board there, for workers there."""
        return self.relay.status_board.remote()

    def grant(self, lane: int, turn: int, fragment: int, due: int) -> None:
        """Does not wait: who grants holds the dispatcher's lock."""
        with self._lock:
            self.granted[lane] = (lane, turn, fragment, due)
            self.sending.append(self.relay.grant.remote(*self.granted[lane], self.weights()))

    # What the engine asks of a host's watch.

    def stuck(self) -> dict[str, str]:
        return self.hung

    def starting(self, rows: Sequence[str]) -> None:
        self._ask(self.relay.starting.remote(list(rows)))
        self.hung = {}

    def forget(self, worker: int) -> int:
        """The dispatcher has discarded its lanes: no grant up to now may reach whoever comes next."""
        forwards: int = self._ask(self.relay.forget.remote(worker, self.dispatcher.turns))
        return forwards

    def leave(self, worker: int, forwards: int) -> None:
        self._ask(self.relay.leave.remote(worker, forwards))

    def end(self, process: int) -> None:
        self._ask(self.relay.end.remote(process))

    def _ask(self, future: Any) -> Any:
        return ray.get(future, timeout=2 * self.patience)

    # The thread

    def _listen(self) -> None:
        known, heard_s = 0, time.monotonic()
        while not self._closing.is_set():
            try:
                answer = self.relay.hear.remote(known, HEAR_S)
                known = self._pass_on(ray.get(answer, timeout=self.patience), known)
                self._check_grants()
                heard_s = time.monotonic()
            except ActorUnavailableError:  # it may come back: the network between us was cut
                if time.monotonic() - heard_s > self.patience:
                    self.failure = f"it has not answered for {self.patience:g} s"
                    return
                time.sleep(LOOK_S)
                self._grant_again()
            except GetTimeoutError:
                self.failure = f"it has not answered for {self.patience:g} s"
                return
            except RayError as error:
                self.failure = reason(error)
                return

    def _pass_on(self, heard: Heard, known: int) -> int:
        """Number of the last news."""
        for news in heard.news:
            self.dispatcher.tell(news.lane, news.fragment, news.generation, news.rows)
            known = news.number
        sitting, board = self.sitting, self.dispatcher.board
        self.hung = heard.stuck
        self.dispatcher.status.hang(sitting.rows, heard.seen)
        board["begun"][sitting.slots] = heard.begun
        for key, counted in heard.counted.items():
            chosen = list(sitting.policies)
            board[key][chosen] = counted[chosen]
        return known

    def _check_grants(self) -> None:
        """Raises the error of one that failed: its lane would wait for ever."""
        with self._lock:
            if not self.sending:
                return
            done, self.sending = ray.wait(self.sending, num_returns=len(self.sending), timeout=0)
        ray.get(done)

    def _grant_again(self) -> None:
        """Some may not have arrived; a lane takes no notice of one that it has."""
        with self._lock:
            self.sending = [self.relay.grant.remote(*given, self.weights()) for given in self.granted.values()]

    def close(self) -> None:
        self._closing.set()
        if not self.failure and self._thread.ident is not None:
            self._thread.join(CLOSE_S)
        if not self.failure and not self._thread.is_alive():
            ray.wait([self.relay.close.remote()], timeout=CLOSE_S)
        self.cut()

    def cut(self) -> None:
        """The relay of a host that is lost has nothing to tidy up."""
        self._closing.set()
        ray.kill(self.relay)
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
