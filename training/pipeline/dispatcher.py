"""The dispatcher: gives free fragments to lanes and finished ones to the learners, in a thread of the driver."""

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from training.algorithms.base import Algorithm
from training.pipeline.bell import ABORT, Bell, PipelineAborted
from training.pipeline.block import RolloutBlock, RolloutRows
from training.pipeline.board import Board
from training.pipeline.judging import hopeless, judge
from training.pipeline.placement import EngineError
from training.pipeline.status import Status
from training.workers.episodes import EpisodeLog
from training.workers.lanes import WANT
from vla.errors import SimrealError

POLL_S = 3600.0  # it serves for as long as the run lasts; whoever waits for it has a deadline


class Far(Protocol):
    """The way to lanes of another host."""

    def grant(self, lane: int, turn: int, fragment: int, due: int) -> None: ...


@dataclass
class Traffic:
    """Of an update: episodes in its fragments, in those found too old meanwhile, and in those that teach nothing.

    dropped: fragments that were too old. filtered: that taught nothing. groups, kept: complete ones, and those that
    teach something.
    """

    episodes: EpisodeLog = field(default_factory=EpisodeLog)
    dropped: int = 0
    filtered: int = 0
    groups: int = 0
    kept: int = 0


class Dispatcher:
    """An update takes `per_update` fragments. There are (staleness + 1) times as many, and with none free a lane waits:

    so a fragment is begun only if begun <= (updates + staleness + 1) x per_update (Fu et al. 2025). One that other
    lanes have overtaken may still be older than `staleness` updates when it is finished; it is dropped.
    far: the way to each lane of another host; `tell` brings what these say.
    """

    def __init__(
        self, block: RolloutBlock, board: Board, status: Status, bells: Path, learners: int, per_update: int,
        staleness: int, algorithm: Algorithm,
    ):  # fmt: skip
        self.algorithm = algorithm
        self.failure: SimrealError | None = None
        self.block, self.board, self.status = block, board, status
        self.per_update, self.staleness = per_update, staleness
        self.bell = Bell(bells / "dispatcher")
        self.lanes = [Bell(bells / f"lane{i}") for i in range(board.lanes)]
        self.far: dict[int, Far] = {}
        self.learners = [Bell(bells / f"learner{i}") for i in range(learners)]
        self.generations = [0] * board.lanes
        self.waiting: deque[int] = deque()  # lanes that want a fragment
        self.free = deque(range(block.shape.fragments))
        self.playing: dict[int, int] = {}  # fragment -> its lane
        self.taken: dict[int, list[int]] = {}  # update -> its fragments
        self.sent = 0  # fragments to learners, those of updates before a resume included
        self.turns = 0
        self.traffic: dict[int, Traffic] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="dispatcher", daemon=True)

    def start(self, update: int) -> None:
        """Begin to serve; `update` is the first."""
        self.sent = self.turns = update * self.per_update
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.bell.ring(*ABORT)
            self._thread.join()
        for bell in (self.bell, *self.lanes, *self.learners):
            bell.close()

    def check(self) -> None:
        """Raise an error if it serves no longer."""
        if self.failure is not None:
            raise self.failure
        if not self._thread.is_alive():
            raise EngineError(
                "the dispatcher failed, see the error above", code="WORKER",
                remedy="The same command goes on after the last complete iteration.",
            )  # fmt: skip

    def release(self, update: int) -> None:
        """The learners have done with the fragments of an update, and the weights are there."""
        with self._lock:
            self.free.extend(self.taken.pop(update))
            self._grant()

    def discard(self, lanes: list[int]) -> list[int]:
        """Forget lanes whose process is gone; returns their unfinished fragments, for `reclaim`."""
        with self._lock:
            for lane in lanes:
                self.generations[lane] += 1
            self.waiting = deque(lane for lane in self.waiting if lane not in lanes)
            lost = [fragment for fragment, lane in self.playing.items() if lane in lanes]
            for fragment in lost:
                del self.playing[fragment]
            return lost

    def reclaim(self, fragments: list[int]) -> None:
        """Nobody writes into these any more."""
        with self._lock:
            self.free.extend(fragments)
            self._grant()

    def read(self, update: int) -> Traffic:
        """What passed for an update that is done."""
        with self._lock:
            return self.traffic.pop(update)

    def _serve(self) -> None:
        while True:
            try:
                message = self.bell.wait(POLL_S)
            except PipelineAborted:
                return
            if message is not None:
                self.tell(*message)
            if self.failure is not None:
                return

    def tell(
        self, lane: int, fragment: int, generation: int, rows: Mapping[str, np.ndarray] | None = None
    ) -> None:  # fmt: skip
        """As `hear`, from a thread that serves; an error of what was played is raised by `check`."""
        try:
            self.hear(lane, fragment, generation, rows)
        except SimrealError as error:
            self.failure = error

    def hear(
        self, lane: int, fragment: int, generation: int, rows: Mapping[str, np.ndarray] | None = None
    ) -> None:  # fmt: skip
        """A lane wants a fragment, or has finished one. rows: of a fragment that was played on another host."""
        with self._lock:
            if generation != self.generations[lane]:
                return  # its process has been replaced
            if fragment == WANT:
                self.waiting.append(lane)
            else:
                for name, array in (rows or {}).items():
                    self.block.fragments[fragment][name][:] = array
                self._finished(fragment)
            self._grant()

    def _finished(self, fragment: int) -> None:
        del self.playing[fragment]
        rows = self.block.fragments[fragment]
        update = self.sent // self.per_update
        traffic = self.traffic.setdefault(update, Traffic())
        traffic.episodes.read(rows, slice(None))
        versions = rows["versions"][:-1]
        if self.algorithm.groups:
            versions = versions[rows["episodes"][:-1] > 0]
        if update - int(versions.min()) > self.staleness:
            traffic.dropped += 1
            self.free.append(fragment)
            return
        if self.algorithm.groups and not self._teaches(rows, traffic):
            self.free.append(fragment)
            return
        self.sent += 1
        self.status["finished"][0] += 1
        self.taken.setdefault(update, []).append(fragment)
        for bell in self.learners:
            bell.ring(fragment, update, 0)

    def _teaches(self, rows: RolloutRows, traffic: Traffic) -> bool:
        """Whether a fragment of groups is worth a learner's time; too many of those that aren't are a GroupError."""
        judged = judge({k: torch.from_numpy(v) for k, v in rows.arrays.items()}, self.algorithm)
        traffic.groups += judged.complete
        traffic.kept += judged.kept
        if judged.kept:
            return True
        traffic.filtered += 1
        refills: int = getattr(self.algorithm, "refills", 0)
        if not traffic.kept and traffic.filtered >= (refills + 1) * self.per_update:
            raise hopeless(traffic.groups, traffic.episodes.successes)
        return False

    def _grant(self) -> None:
        while self.free and self.waiting:
            lane, fragment = self.waiting.popleft(), self.free.popleft()
            update = (self.sent + len(self.playing)) // self.per_update  # if all finish in the order of their beginning
            self.playing[fragment] = lane
            self.turns += 1
            if lane in self.far:
                self.far[lane].grant(lane, self.turns, fragment, update)
                continue
            self.board["grant"][lane, 1:] = fragment, update
            self.board["grant"][lane, 0] = self.turns  # last: this is what the lane looks for
            self.lanes[lane].ring(lane, 0, 0)
