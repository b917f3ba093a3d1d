"""The status board: what every process of a run does since when, in shared memory, for whoever wants to look.

A process, or a lane, writes its own row and nobody else's; a turn costs a microsecond, and nobody waits for a reader.
"""

import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import IntEnum

import numpy as np

from training.pipeline.block import SharedArrays


class Doing(IntEnum):
    """What a process is busy with, or waits for."""

    STARTING = 0
    IDLE = 1  # its turn has not come
    STEPPING = 2  # environments: physics, rendering, encoding
    ASKING = 3  # environments: wait for the policy
    THROTTLED = 4  # lane: waits for a free fragment
    GATHERING = 5  # policy: waits for environments
    DECIDING = 6
    LOADING = 7  # policy: copies new weights
    AWAITING = 8  # learner: waits for finished fragments
    UPDATING = 9
    AVERAGING = 10  # learner: waits for the other learners' gradients
    SAVING = 11
    ROLLING_OUT = 12  # driver: waits for environments and policy
    LEARNING = 13  # driver: waits for the learners


BUSY = (Doing.STEPPING, Doing.DECIDING, Doing.LOADING, Doing.UPDATING, Doing.SAVING)
RING = 4096  # turns of a row that are remembered
EVENT = np.dtype([("start", np.float64), ("doing", np.int32), ("number", np.int32)])
_PACK = struct.Struct("=dii")


class Row:
    """What its owner writes. A process that takes the place of a dead one makes a row of the same name."""

    def __init__(self, status: "Status", name: str):
        self.status, self.index = status, status.rows.index(name)
        part = slice(self.index, self.index + 1)
        self._turns, self._since, self._doing = (memoryview(status[k][part]) for k in ("turns", "since", "doing"))
        self._seconds = memoryview(status["seconds"][self.index])
        self._events = memoryview(status["events"][self.index].view(np.uint8))
        self.turns = self._turns[0] // 2 * 2  # odd if the owner died while it wrote
        self.since, self.doing = self._since[0], self._doing[0]

    def turn_to(self, doing: Doing, number: int = -1) -> None:
        """Account for what was done until now. number: of the decision, the batch or the iteration that is begun."""
        now = time.monotonic()
        self._turns[0] = self.turns + 1
        self._seconds[self.doing] += now - self.since
        self._since[0], self._doing[0] = now, doing
        _PACK.pack_into(self._events, self.turns // 2 % RING * _PACK.size, now, doing, number)
        self.turns += 2
        self._turns[0] = self.turns
        self.since, self.doing = now, doing

    @contextmanager
    def during(self, doing: Doing, number: int = -1) -> Iterator[None]:
        """Be busy with this, then with what was before."""
        before = Doing(self.doing)
        self.turn_to(doing, number)
        try:
            yield
        finally:
            self.turn_to(before)

    def count(self, name: str) -> None:
        """One more of what only its owner counts."""
        self.status[name][0] += 1

    def release(self) -> None:
        for view in (self._turns, self._since, self._doing, self._seconds, self._events):
            view.release()


class Unwatched:
    """The row of a process that nobody looks at."""

    def turn_to(self, doing: Doing, number: int = -1) -> None: ...

    def during(self, doing: Doing, number: int = -1) -> AbstractContextManager[None]:
        return nullcontext()

    def count(self, name: str) -> None: ...


class Status(SharedArrays):
    """Rows by name. It can be sent to another process, which then looks at the same memory.

    turns `[rows]`: twice their number; odd while one is being written. since, doing `[rows]`: of the present one.
    seconds `[rows, Doing]`: of those before. events `[rows, RING]`: when each began, what it was, and its number.
    finished, taken `[1]`: fragments that lanes have filled for the learners, and that these have begun with.
    """

    def __init__(self, rows: Sequence[str], name: str, create: bool = False):
        self.rows = tuple(rows)
        count = len(self.rows)
        layout = {
            "turns": ((count,), np.int64), "since": ((count,), np.float64), "doing": ((count,), np.int32),
            "seconds": ((count, len(Doing)), np.float64), "events": ((count, RING), EVENT),
            "finished": ((1,), np.int64), "taken": ((1,), np.int64),
        }  # fmt: skip
        super().__init__(layout, name, create)
        self._written: list[Row] = []
        if create:
            self["since"][:] = time.monotonic()

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...], str]]:
        return Status, (self.rows, self.name)

    def row(self, name: str) -> Row:
        """To write to."""
        self._written.append(Row(self, name))
        return self._written[-1]

    def turn(self, name: str, doing: Doing) -> None:
        """Write into the row of a process that is gone."""
        row = Row(self, name)
        row.turn_to(doing)
        row.release()

    def look(self) -> dict[str, np.ndarray]:
        """A copy of turns, since, doing and seconds in which the numbers of a row belong together."""
        keys = ("turns", "since", "doing", "seconds")
        seen = {key: self[key].copy() for key in keys}
        for _ in range(100):  # a row whose owner died while it wrote stays torn
            torn = (seen["turns"] % 2 == 1) | (seen["turns"] != self["turns"])
            if not torn.any():
                break
            for key in keys:
                seen[key][torn] = self[key][torn]
        return seen

    def spent(self) -> np.ndarray:
        """Seconds `[rows, Doing]` up to now."""
        seen = self.look()
        rows = np.arange(len(self.rows))
        seen["seconds"][rows, seen["doing"]] += np.maximum(0.0, time.monotonic() - seen["since"])
        return seen["seconds"]

    def stuck(self, name: str, seconds: float) -> bool:
        """Whether a row works for longer than that without waiting for anybody."""
        index = self.rows.index(name)
        return self["doing"][index] in BUSY and self.still(name, seconds)

    def still(self, name: str, seconds: float) -> bool:
        """Whether a row has not turned to anything for longer than that."""
        return bool(time.monotonic() - self["since"][self.rows.index(name)] > seconds)

    def portrait(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """What these rows do, for how long already, and the seconds before: to be shown on another host's board."""
        chosen = [self.rows.index(name) for name in names]
        seen = self.look()
        return {
            "doing": seen["doing"][chosen], "age": time.monotonic() - seen["since"][chosen],
            "seconds": seen["seconds"][chosen],
        }  # fmt: skip

    def hang(self, names: Sequence[str], portrait: dict[str, np.ndarray]) -> None:
        """Show what rows of another host do; clocks of hosts differ. Their turns and events stay there."""
        chosen = [self.rows.index(name) for name in names]
        self["since"][chosen] = time.monotonic() - portrait["age"]
        for key in ("doing", "seconds"):
            self[key][chosen] = portrait[key]

    def events(self, index: int, after: int = 0) -> tuple[np.ndarray, int]:
        """A row's turns after the first so many, as far as they are remembered; how many there were in all."""
        count = int(self["turns"][index]) // 2
        first = max(after, count - RING)
        found = self["events"][index][np.arange(first, count) % RING]
        begun = (int(self["turns"][index]) + 1) // 2  # what was written meanwhile took the place of the oldest
        return found[max(0, begun - RING - first) :], count

    def close(self) -> None:
        for row in self._written:
            row.release()
        super().close()


class Clock:
    """Seconds that rows spend on what, from one reading to the next."""

    def __init__(self, status: Status):
        self.status, self.before, self.read_s = status, status.spent(), time.monotonic()

    def lap(self) -> tuple[np.ndarray, float]:
        """Seconds `[rows, Doing]` since the last call, and all that have passed."""
        spent, now = self.status.spent(), time.monotonic()
        passed = np.maximum(0.0, spent - self.before), now - self.read_s
        self.before, self.read_s = spent, now
        return passed


def kind(name: str) -> str:
    """Of a row: `lane` of `lane 3`."""
    return name.rstrip("0123456789").rstrip()


STAGES = {"environments": ("environment worker", "lane"), "policy": ("policy worker",), "learners": ("learner",)}


def shares(rows: Sequence[str], seconds: np.ndarray, passed: float) -> dict[str, float]:
    """How much of the time the rows of each stage were busy, on average; seconds `[rows, Doing]`."""
    busy = seconds[:, list(BUSY)].sum(1)
    return {
        stage: float(np.mean([busy[i] for i, name in enumerate(rows) if kind(name) in kinds])) / max(passed, 1e-9)
        for stage, kinds in STAGES.items()
    }


AWAITED: dict[Doing, tuple[tuple[str, ...], tuple[Doing, ...]]] = {
    Doing.ASKING: (("policy worker",), ()),
    Doing.THROTTLED: (("learner",), (Doing.IDLE, Doing.AWAITING)),
    Doing.GATHERING: (("environment worker", "lane"), (Doing.IDLE, Doing.ASKING, Doing.THROTTLED)),
    Doing.AWAITING: (("lane",), (Doing.THROTTLED,)),
    Doing.AVERAGING: (("learner",), (Doing.AVERAGING,)),
    Doing.ROLLING_OUT: (("environment worker", "policy worker"), (Doing.IDLE,)),
    Doing.LEARNING: (("learner",), (Doing.IDLE,)),
}  # who is waited for: rows of these kinds, but for those that do one of these


def awaited(rows: Sequence[str], doing: Sequence[int], index: int) -> list[str]:
    """Rows that a row waits for."""
    if doing[index] not in AWAITED:
        return []
    kinds, ready = AWAITED[Doing(doing[index])]
    return [name for name, what in zip(rows, doing, strict=True) if kind(name) in kinds and what not in ready]
