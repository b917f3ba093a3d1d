"""`vla top RUN`: who does what in a run, who waits for whom and for how long, live."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from training import metrics
from training.lock import is_held
from training.pipeline.status import BUSY, STAGES, Doing, Status, awaited, kind, shares
from vla.cli import Command
from vla.errors import SimrealError

REFRESH_S = 0.5
WINDOW_S = 10.0  # over which shares of time are taken
NAMED = 3  # of those that are waited for


@dataclass(frozen=True)
class TopConfig:
    """Options of `vla top`.

    run: folder of a `vla train`.
    once: print what is now and end.
    """

    run: Path
    once: bool = False


def top(config: TopConfig) -> None:
    """Look at a run until it ends or the reader has seen enough."""
    if not (config.run / "config.json").exists():
        raise SimrealError(
            f"{config.run} holds no run", code="RUN_MISSING", remedy="Give the folder that `vla train out=` has made."
        )
    console = Console()
    if config.once or not is_held(config.run):
        console.print(view(config.run))
        return
    with Live(view(config.run), console=console, auto_refresh=False) as live:
        while is_held(config.run):
            live.update(view(config.run), refresh=True)
            time.sleep(REFRESH_S)
        live.update(view(config.run), refresh=True)


def view(run: Path) -> RenderableType:
    """What there is to say about a run."""
    rows = metrics.read(run)
    iterations = json.loads((run / "config.json").read_text()).get("iterations")
    head = f"{run}: {len(rows)} of {iterations} iterations"
    if not is_held(run):
        ended = "finished" if (run / "checkpoint").exists() else "not running"
        return Group(Text(f"{head}, {ended}"), *([_last(rows[-1])] if rows else []))
    try:
        told = json.loads((run / "status.json").read_text())
        status = Status(told["rows"], told["block"])
    except FileNotFoundError:  # no file yet, or the block has been removed
        return Text(f"{head}, its workers start")
    try:
        return Group(Text(head), *live(status))
    finally:
        status.close()


def live(status: Status) -> list[RenderableType]:
    """A table of all rows, and what flows between them."""
    seen, now, rows = status.look(), time.monotonic(), status.rows
    doing = seen["doing"].tolist()
    recent = np.stack([_recent(status, index, now) for index in range(len(rows))])
    table = Table("process", "does", "for", "waits for", "busy", title=f"busy: of the last {WINDOW_S:g} s")
    for index, name in enumerate(rows):
        for_s = f"{max(0.0, now - seen['since'][index]):.1f} s"
        busy = recent[index, list(BUSY)].sum() / max(recent[index].sum(), 1e-9)
        does = Doing(doing[index]).name.lower().replace("_", " ")
        table.add_row(name, does, for_s, _shortened(awaited(rows, doing, index)), f"{busy:.0%}")
    passed = float(recent.sum(1).max())
    used = ", ".join(f"{stage} {share:.0%}" for stage, share in shares(rows, recent, passed).items())
    simulating = [what for name, what in zip(rows, doing, strict=True) if kind(name) in STAGES["environments"]]
    queues = f"{simulating.count(Doing.ASKING)} of {len(simulating)} wait for the policy"
    if any(kind(name) == "lane" for name in rows):
        waiting = int(status["finished"][0] - status["taken"][0])
        queues += (
            f", {simulating.count(Doing.THROTTLED)} for a free fragment; "
            f"{waiting} finished fragments wait for the learners"
        )
    return [table, Text(f"busy on average: {used}"), Text(f"queues: {queues}")]


def _recent(status: Status, index: int, now: float) -> np.ndarray:
    """Seconds `[Doing]` of a row within the window."""
    events, _ = status.events(index)
    seconds = np.zeros(len(Doing))
    if len(events):
        begins = np.maximum(events["start"], now - WINDOW_S)
        ends = np.append(events["start"][1:], now)
        np.add.at(seconds, events["doing"], np.maximum(0.0, ends - begins))
    return seconds


def _shortened(names: Sequence[str]) -> str:
    """`lane 0, 1, 2 and 5 others` of names that belong together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kind(name), []).append(name)
    parts = []
    for what, members in groups.items():
        numbers = ", ".join(name.removeprefix(what).strip() for name in members[:NAMED])
        more = f" and {len(members) - NAMED} more" if len(members) > NAMED else ""
        parts.append(f"{what} {numbers}{more}")
    return "; ".join(parts)


def _last(row: Mapping[str, Any]) -> Table:
    """Where the time of the last iteration went."""
    table = Table("metric", "value", title=f"iteration {row['iteration'] + 1}")
    for key, value in row.items():
        if key.startswith("use/") and value is not None:
            table.add_row(key, f"{value:.0%}")
        elif key.startswith("time/") and key.endswith("_s") and value is not None:
            table.add_row(key, f"{value:.2f}")
    return table


command = Command(name="top", help="Watch who does what in a run.", schema=TopConfig, run=top, subject="run")
