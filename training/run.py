"""A run is a folder: resolved configuration, metrics, states to resume from, the bundle."""

import json
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter

from training import metrics
from training.lock import LOCK, hold
from vla import options
from vla.errors import SimrealError
from vla.results import write_json

KEEP = 2  # states


@dataclass(frozen=True)
class Totals:
    """Of a run up to a state. iteration: the last one. counters: episodes begun in every slot."""

    iteration: int = -1
    counters: list[int] = field(default_factory=list)
    env_steps: int = 0
    elapsed_s: float = 0.0


class RunFolder:
    """`out` for a configuration: a new run, or the rest of one with the same configuration.

    Making the object checks the folder, `create` writes to it.
    """

    def __init__(self, out: Path, config: Any, ignore: tuple[str, ...] = ()):
        self.out = out
        self.config = check_options(out / "config.json", config, ignore)
        if not (out / "config.json").exists() and out.exists() and any(p.name != LOCK for p in out.iterdir()):
            raise SimrealError(
                f"{out} is not empty and holds no run", code="OUTPUT_EXISTS", remedy="Choose another out=."
            )
        self._writer: SummaryWriter | None = None
        self._lock: IO[str] | None = None

    def create(self) -> None:
        """Make the folder, write the configuration, and keep other processes out until this one ends."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = hold(self.out)
        write_json(self.out / "config.json", self.config)

    def latest(self) -> Path | None:
        """The newest complete state."""
        found = sorted((self.out / "states").glob("iteration_*"))
        return found[-1] if found else None

    def begin_state(self) -> Path:
        """A folder to write the next state into."""
        temporary = self.out / "states" / ".part"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    def totals(self) -> Totals:
        """What the newest complete state has seen; before the first iteration, none of them."""
        latest = self.latest()
        return Totals() if latest is None else Totals(**json.loads((latest / "state.json").read_text()))

    def commit_state(self, temporary: Path, totals: Totals) -> None:
        """Rename the state to its final name; older ones go."""
        write_json(temporary / "state.json", asdict(totals))
        temporary.rename(self.out / "states" / f"iteration_{totals.iteration:06d}")
        for old in sorted((self.out / "states").glob("iteration_*"))[:-KEEP]:
            shutil.rmtree(old)

    def metrics(self) -> list[dict[str, Any]]:
        """One dictionary for each iteration so far."""
        return metrics.read(self.out)

    def forget_after(self, iteration: int) -> None:
        """Drop the metrics of iterations that will be repeated."""
        rows = [r for r in self.metrics() if r["iteration"] < iteration]
        text = "".join(json.dumps(r) + "\n" for r in rows)
        temporary = self.out / "metrics.tmp"
        temporary.write_text(text)
        temporary.rename(self.out / metrics.FILE)

    def log(self, iteration: int, row: dict[str, float]) -> None:
        """Append to metrics.jsonl and TensorBoard."""
        with (self.out / metrics.FILE).open("a") as file:
            known = {k: v if math.isfinite(v) else None for k, v in row.items()}  # JSON has no NaN
            file.write(json.dumps({"iteration": iteration, **known}) + "\n")
        if self._writer is None:
            self._writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=iteration)
        for key, value in row.items():
            self._writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            self._lock.close()


def check_options(file: Path, config: Any, ignore: tuple[str, ...]) -> dict[str, Any]:
    """The options of a run but those in `ignore`; refuses a folder whose `file` records other ones."""
    record = {k: v for k, v in options.write(config).items() if k not in ignore}
    if file.exists():
        told = options.fill(type(config), json.loads(file.read_text()))  # a version before may know fewer
        found = {k: v for k, v in told.items() if k not in ignore}
        differing = _differences(found, record)
        if differing:
            raise SimrealError(
                f"{file.parent} holds another run; it differs in {'; '.join(differing)}", code="OUTPUT_EXISTS",
                remedy="Choose another out=, delete the folder, or give its options to go on with it.",
            )  # fmt: skip
    return record


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({a} there, {b} now)")
    return found
