"""The board: who does what since when, and what they ask of each other, in shared memory for all to read.

A bell only says that there is something to read here. So whoever is replaced finds what it has to go on with.
"""

import time
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from training.pipeline.block import Arrays, SharedArrays


class Doing(IntEnum):
    """What a lane or the policy worker is busy with."""

    THROTTLED = 0  # lane: waits for a free fragment
    STEPPING = 1
    ASKING = 2  # waits for the policy
    IDLE = 3  # policy worker: waits for requests
    DECIDING = 4
    LOADING = 5  # copies new weights


class Board(SharedArrays):
    """Of a number of lanes and one policy worker, whose row of `doing` comes after theirs.

    begun `[slots]`: episodes so far. request `[lanes, 3]`: fragment, decision and turn that a lane asks for.
    asked, answered `[lanes]`: numbers of its last request, and of the last that was answered. asked_s: when.
    grant `[lanes, 3]`: turn, fragment and the update that it is meant for; turns are counted over all lanes.
    """

    def __init__(self, lanes: int, slots: int, name: str, create: bool = False):
        self.lanes, self.policy = lanes, lanes
        everyone = lanes + 1
        layout: Arrays = {
            "doing": ((everyone,), np.int32),
            "since": ((everyone,), np.float64),
            "seconds": ((everyone, len(Doing)), np.float64),
            "begun": ((slots,), np.int64),
            "request": ((lanes, 3), np.int64),
            "asked": ((lanes,), np.int64),
            "answered": ((lanes,), np.int64),
            "asked_s": ((lanes,), np.float64),
            "grant": ((lanes, 3), np.int64),
            "forwards": ((1,), np.int64),
            "decided": ((1,), np.int64),  # rows, in all forward passes
        }
        super().__init__(layout, name, create)

    def turn_to(self, row: int, doing: Doing) -> None:
        """Account for what this row did until now; only its owner may call it."""
        now = time.monotonic()
        before = self["doing"][row]
        self["seconds"][row, before] += now - self["since"][row]
        self["since"][row] = now
        self["doing"][row] = doing

    def reset(self, rows: Sequence[int], doing: Doing) -> None:
        """Forget what a process that is gone was doing, and what it asked for."""
        for row in rows:
            self["since"][row], self["doing"][row] = time.monotonic(), doing
            if row < self.lanes:
                self["answered"][row] = self["asked"][row]

    def stuck(self, row: int, seconds: float) -> bool:
        """Whether a row works for longer than that without waiting for anybody."""
        waits = self["doing"][row] in (Doing.THROTTLED, Doing.ASKING, Doing.IDLE)
        return not waits and time.monotonic() - self["since"][row] > seconds
