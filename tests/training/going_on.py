"""An engine that is iterated until something has happened."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np


class GoingOn:
    """seconds: longest wait. staleness: bound that every update has to keep. slots: that every rollout has to have."""

    def __init__(self, engine: Any, seconds: float, staleness: int, slots: int):
        self.engine, self.seconds, self.staleness, self.slots = engine, seconds, staleness, slots
        self.iteration = 0

    def until(self, done: Callable[[], Any]) -> None:
        end = time.monotonic() + self.seconds
        while not done():
            assert time.monotonic() < end
            rollout, update = self.engine.iterate(self.iteration)
            assert np.isfinite(update.metrics["loss"]) and update.metrics["staleness_max"] <= self.staleness
            assert rollout.measures["rollout/slots"] == self.slots
            self.iteration += 1

    def times(self, iterations: int) -> None:
        """So many iterations more."""
        goal = self.iteration + iterations
        self.until(lambda: self.iteration == goal)
