"""The policy worker of the asynchronous schedule: decides for whatever lanes ask, in batches with a deadline."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.pipeline.bell import Bell, PipelineTimeout
from training.pipeline.block import RolloutBlock, RolloutRows, RolloutShape
from training.pipeline.board import Board
from training.pipeline.status import Doing, Status
from training.workers.policy import INPUTS, PolicyOptions, Sampler


class BatchingPolicy(Sampler):
    """Runs in a Ray actor of its own.

    own: numbers of the lanes that it serves; lanes: how many there are in all.
    batch_max: environments in a forward pass. wait_s: for more requests after the first.
    idle_s: longest wait for a first one. whole: whether whole episodes are played, after which a slot is empty.
    """

    def __init__(
        self, number: int, options: PolicyOptions, device: str, shape: RolloutShape, name: str, own: Sequence[int],
        lanes: int, bells: str, batch_max: int | None, wait_s: float, idle_s: float, whole: bool = False,
    ):  # fmt: skip
        super().__init__(options, device)
        self.number, self.own = number, np.asarray(own)
        self.block = RolloutBlock(shape, name)
        self.board = Board(lanes, lanes * shape.slots, f"{name}_board")
        self.bell = Bell(Path(bells) / f"policy{number}")
        self.lanes = {lane: Bell(Path(bells) / f"lane{lane}") for lane in own}
        self.most = len(own) if batch_max is None else batch_max // shape.slots
        self.wait_s, self.idle_s, self.whole = wait_s, idle_s, whole

    def ready(self, status: Status, rows: Sequence[str]) -> int:
        self.doing = status["doing"][: self.board.lanes]  # lanes have the first rows
        return super().ready(status, rows)

    def serve(self) -> None:
        """Decide until the process ends."""
        board = self.board
        while True:
            self.row.turn_to(Doing.GATHERING)
            lanes, numbers = self._gather()
            self.refresh()
            self.row.turn_to(Doing.DECIDING, len(lanes) * self.block.shape.slots)
            self._decide(lanes)
            for lane, number in zip(lanes, numbers, strict=True):
                board["answered"][lane] = number
                self.lanes[lane].ring(lane, 0, 0)

    def _gather(self) -> tuple[list[int], list[int]]:
        """Lanes of the next batch, those first that wait longest, and the numbers of their requests."""
        board = self.board
        idle_until = time.monotonic() + self.idle_s
        while True:
            self.bell.drain()  # what the rings say stands on the board; left in the pipe, they would fill it
            asked = board["asked"].copy()
            waiting = self.own[asked[self.own] > board["answered"][self.own]]
            waiting = waiting[np.argsort(board["asked_s"][waiting], kind="stable")]
            now = time.monotonic()
            until = float(board["asked_s"][waiting[0]]) + self.wait_s if len(waiting) else idle_until
            more = (self.doing[self.own] == Doing.STEPPING).any()  # else nobody is on the way
            if len(waiting) >= self.most or (len(waiting) and (now >= until or not more)):
                chosen = waiting[: self.most]
                return chosen.tolist(), asked[chosen].tolist()
            if self.bell.wait(max(0.0, until - now)) is None and not len(waiting) and time.monotonic() >= idle_until:
                what = f"a request of lane {', '.join(map(str, self.own))}"
                raise PipelineTimeout(f"policy worker {self.number}", (), self.idle_s, what)

    def _decide(self, lanes: list[int]) -> None:
        slots = self.block.shape.slots
        requests = self.board["request"][lanes].tolist()
        places = [(self.block.fragments[fragment], decision) for fragment, decision, _ in requests]
        live = [self._live(rows, decision) for rows, decision in places]
        draws = [
            (lane * slots + int(slot), turn, decision)
            for lane, (_, decision, turn), chosen in zip(lanes, requests, live, strict=True)
            for slot in chosen
        ]
        inputs = [
            np.concatenate([rows[name][d, chosen] for (rows, d), chosen in zip(places, live, strict=True)])
            for name in INPUTS
        ]
        answer = self.sample(inputs, draws, bool(self.block.shape.seen))
        first = 0
        for (rows, decision), chosen in zip(places, live, strict=True):
            part = slice(first, first := first + len(chosen))
            for name, value in answer.items():
                rows[name][decision, chosen] = value[part]
        self.board["forwards"][self.number] += 1
        self.board["decided"][self.number] += len(draws)

    def _live(self, rows: RolloutRows, decision: int) -> np.ndarray:
        """Slots of a lane that are in an episode, where whole ones are played; else all of them."""
        everyone = np.arange(self.block.shape.slots)
        return everyone[rows["episodes"][decision] > 0] if self.whole else everyone
