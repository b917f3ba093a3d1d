"""The environment worker of the asynchronous schedule: lanes that step on their own, each in a thread."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training import envs
from training.algorithms.rewards import RewardForm
from training.pipeline.bell import Bell, PipelineTimeout
from training.pipeline.block import RolloutBlock, RolloutRows, RolloutShape
from training.pipeline.board import Board
from training.pipeline.status import Doing, Row, Status, Unwatched
from training.workers.episodes import Episodes
from vla.codec import Codec

WANT = -1  # what a lane tells the dispatcher in place of a finished fragment


@dataclass(frozen=True)
class LaneOptions:
    """environment, settings: registered name and its options. variant: of the episodes. seed: of the run.

    staleness: bound of it. deadline_s, throttle_s: longest wait for the policy, and for a free fragment.
    form: of the rewards. group_size: of whole episodes. policy: number of the policy worker that decides.
    """

    environment: str
    settings: dict[str, Any]
    variant: str
    seed: int
    staleness: int
    deadline_s: float
    throttle_s: float
    form: RewardForm
    group_size: int = 1
    policy: int = 0


class Lane:
    """A few environments that go through fragment after fragment; made and played in one thread."""

    row: Row | Unwatched = Unwatched()
    kind: type[Episodes] = Episodes

    def __init__(
        self, number: int, generation: int, options: LaneOptions, codec: Codec, block: RolloutBlock, board: Board,
        bells: Path,
    ):  # fmt: skip
        self.number, self.generation, self.options, self.block, self.board = number, generation, options, block, board
        slots = block.shape.slots
        env = envs.make(options.environment, slots, **options.settings)
        begun = board["begun"][number * slots : (number + 1) * slots]
        self.episodes = self.kind(env, codec, options.seed, options.variant, number * slots, 0, begun, options.form)
        self.slots = list(range(slots))
        self.turn = int(board["grant"][number, 0])
        self.bell = Bell(bells / f"lane{number}")
        self.to_policy, self.to_dispatcher = Bell(bells / f"policy{options.policy}"), Bell(bells / "dispatcher")

    def play(self) -> None:
        """Fragment after fragment, each from where the one before ended."""
        opening: dict[str, np.ndarray] | None = None
        while True:
            fragment, due = self._fragment()
            rows = self.block.fragments[fragment]
            self._begin(rows, fragment, opening, due)
            for decision in range(rows.shape.decisions):
                self.episodes.step(rows, decision, self.slots)
                self.episodes.show(rows, decision + 1, self.slots)
                self._ask(fragment, decision + 1)
            opening = {name: row.copy() for name, row in rows.last_row().items()}
            self.to_dispatcher.ring(self.number, fragment, self.generation)

    def _begin(self, rows: RolloutRows, fragment: int, opening: dict[str, np.ndarray] | None, due: int) -> None:
        """Fill row 0: with fresh episodes, or with what was observed last and, unless it is too old, decided."""
        self.row.turn_to(Doing.STEPPING)
        if opening is None:
            rows.clear()
            for slot in self.slots:
                self.episodes.reset(slot)
            self.episodes.show(rows, 0, self.slots)
            self._ask(fragment, 0)
        else:
            rows.carry_over(opening)
            if due - int(opening["versions"].min()) > self.options.staleness:
                self._ask(fragment, 0)

    def _fragment(self) -> tuple[int, int]:
        """A free fragment, and the update that it is meant for."""
        self.row.turn_to(Doing.THROTTLED)
        self.to_dispatcher.ring(self.number, WANT, self.generation)
        grant = self.board["grant"][self.number]
        end = time.monotonic() + self.options.throttle_s
        while int(grant[0]) == self.turn:
            if self.bell.wait(end - time.monotonic()) is None and time.monotonic() >= end:
                raise PipelineTimeout(self._name, (), self.options.throttle_s, "a free fragment from the learners")
        self.turn, fragment, due = (int(x) for x in grant)
        return fragment, due

    def _ask(self, fragment: int, decision: int) -> None:
        """Wait until the policy has decided for this row."""
        board, lane = self.board, self.number
        board["request"][lane] = fragment, decision, self.turn
        board["asked_s"][lane] = time.monotonic()
        self.row.turn_to(Doing.ASKING, decision)
        board["asked"][lane] += 1
        self.to_policy.ring(lane, fragment, decision)
        end = time.monotonic() + self.options.deadline_s
        while board["answered"][lane] != board["asked"][lane]:
            if self.bell.wait(end - time.monotonic()) is None and time.monotonic() >= end:
                what = f"policy worker {self.options.policy}, fragment {fragment}, decision {decision}"
                raise PipelineTimeout(self._name, (), self.options.deadline_s, what)
        self.row.turn_to(Doing.STEPPING, decision)

    @property
    def _name(self) -> str:
        return f"lane {self.number}"


class LaneWorker:
    """Runs in a Ray actor of its own; lanes: their numbers. generation: how many there were before it."""

    kind: type[Lane] = Lane

    def __init__(
        self, lanes: list[int], generation: int, options: LaneOptions, codec: Codec, shape: RolloutShape, name: str,
        all_lanes: int, bells: str,
    ):  # fmt: skip
        block, board = RolloutBlock(shape, name), Board(all_lanes, all_lanes * shape.slots, f"{name}_board")
        # A renderer belongs to the thread that made it.
        self.threads = [ThreadPoolExecutor(1, f"lane{number}") for number in lanes]
        made = [
            thread.submit(self.kind, number, generation, options, codec, block, board, Path(bells))
            for thread, number in zip(self.threads, lanes, strict=True)
        ]
        self.lanes = [future.result() for future in made]

    def ready(self, status: Status, rows: Sequence[str]) -> int:
        """The process id, once everything is set up; from now on it is told what each lane does."""
        for lane, name in zip(self.lanes, rows, strict=True):
            lane.row = status.row(name)
            lane.row.turn_to(Doing.IDLE)
        return os.getpid()

    def serve(self) -> None:
        """Play until a lane fails; its error is raised."""
        playing = [thread.submit(lane.play) for thread, lane in zip(self.threads, self.lanes, strict=True)]
        for future in as_completed(playing):
            future.result()
