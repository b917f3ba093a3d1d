"""The timeline of a run: who did what from when to when, in RUN/timeline, a file for each iteration that is kept."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.pipeline.status import Doing, Status

FIRST, LAST = 2, 4  # iterations that are kept


@dataclass(frozen=True)
class Interval:
    """Of the process or lane `name`; start, end in s of the machine's clock; number as in `Row.turn_to`."""

    name: str
    doing: Doing
    number: int
    start: float
    end: float


class Timeline:
    """Writes the turns of a status board down, iteration by iteration."""

    def __init__(self, folder: Path, status: Status):
        self.folder, self.status = folder, status
        self.written = [0] * len(status.rows)

    def keep(self, iteration: int) -> None:
        """What happened since the last call; files of iterations in between the first and last few go."""
        self.folder.mkdir(exist_ok=True)
        rows, parts = [], []
        for index, seen in enumerate(self.written):
            events, self.written[index] = self.status.events(index, max(0, seen - 1))  # the one that went on, too
            rows.append(np.full(len(events), index, np.int32))
            parts.append(events)
        temporary = self.folder / ".part.npz"
        np.savez_compressed(
            temporary, names=np.array(self.status.rows), row=np.concatenate(rows), events=np.concatenate(parts)
        )
        temporary.rename(_file(self.folder, iteration))
        for old in sorted(self.folder.glob("iteration_*.npz"))[FIRST:-LAST]:
            old.unlink()


def kept(folder: Path) -> list[int]:
    """Iterations that can be read."""
    return sorted(int(file.stem.rsplit("_", 1)[1]) for file in folder.glob("iteration_*.npz"))


def read(folder: Path, iterations: Iterable[int]) -> list[Interval]:
    """Intervals of all processes; what is still going on when an iteration ends is not known to its end."""
    found = []
    for iteration in iterations:
        with np.load(_file(folder, iteration)) as data:
            for index, name in enumerate(data["names"].tolist()):
                events = data["events"][data["row"] == index]
                found += [
                    Interval(name, Doing(int(event["doing"])), int(event["number"]), float(event["start"]), float(end))
                    for event, end in zip(events[:-1], events["start"][1:], strict=True)
                ]
    return found


def _file(folder: Path, iteration: int) -> Path:
    return folder / f"iteration_{iteration:06d}.npz"
