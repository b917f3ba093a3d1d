"""A worker that says what it does."""

import os
from collections.abc import Sequence

from training.pipeline.status import Doing, Row, Status, Unwatched


class Watched:
    """Has a row on the run's status board once it is ready, if it is on the driver's host."""

    row: Row | Unwatched = Unwatched()

    def ready(self, status: Status | None, rows: Sequence[str]) -> int:
        """The process id, once everything is set up. status: None on another host than the board's."""
        if status is not None:
            self.row = status.row(rows[0])
            self.row.turn_to(Doing.IDLE)
        return os.getpid()
