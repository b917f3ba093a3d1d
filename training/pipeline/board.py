"""The board: what lanes, policy workers and dispatcher ask of each other, in shared memory.

A bell only says that there is something to read here. So whoever is replaced finds what it has to go on with.
"""

import time
from collections.abc import Sequence

import numpy as np

from training.pipeline.block import Arrays, SharedArrays


class Board(SharedArrays):
    """Of a number of lanes and the policy workers that serve them, of which there are no more than lanes.

    begun `[slots]`: episodes so far. request `[lanes, 3]`: fragment, decision and turn that a lane asks for.
    asked, answered `[lanes]`: numbers of its last request, and of the last that was answered. asked_s: when.
    grant `[lanes, 3]`: turn, fragment and the update that it is meant for; turns are counted over all lanes.
    forwards, decided `[lanes]`: of each policy worker by its number: passes, and rows in all of them.
    """

    def __init__(self, lanes: int, slots: int, name: str, create: bool = False):
        self.lanes = lanes
        layout: Arrays = {
            "begun": ((slots,), np.int64),
            "request": ((lanes, 3), np.int64),
            "asked": ((lanes,), np.int64),
            "answered": ((lanes,), np.int64),
            "asked_s": ((lanes,), np.float64),
            "grant": ((lanes, 3), np.int64),
            "forwards": ((lanes,), np.int64),
            "decided": ((lanes,), np.int64),
        }
        super().__init__(layout, name, create)

    def forget(self, lanes: Sequence[int]) -> None:
        """Drop what lanes asked for whose process is gone."""
        for lane in lanes:
            self["answered"][lane] = self["asked"][lane]

    def unheard(self, lanes: Sequence[int], seconds: float) -> bool:
        """Whether one of these lanes waits for an answer for longer than that."""
        chosen = list(lanes)
        waiting = self["asked"][chosen] != self["answered"][chosen]
        return bool((time.monotonic() - self["asked_s"][chosen][waiting] > seconds).any())
