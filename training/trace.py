"""The timeline of a run for people: a trace that Perfetto and Chrome open, and a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from training.pipeline.status import Doing
from training.pipeline.timeline import Interval, kept, read
from vla.results import write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    Doing.STEPPING: "#2e7d4f",
    Doing.DECIDING: "#1f5fa8",
    Doing.LOADING: "#7fb2e5",
    Doing.UPDATING: "#b5533c",
    Doing.AVERAGING: "#e3a08f",
    Doing.SAVING: "#7a5c99",
    Doing.THROTTLED: "#f0c808",
}  # all others wait: they are grey
WAITING = "#dddddd"
SHOWN = 2  # iterations in the picture


def words(doing: Doing) -> str:
    return doing.name.lower().replace("_", " ")


def write_trace(intervals: Sequence[Interval], file: Path) -> None:
    """Chrome's trace event format, times in microseconds from the first one: https://ui.perfetto.dev opens it."""
    rows = list(dict.fromkeys(interval.name for interval in intervals))
    zero = min((interval.start for interval in intervals), default=0.0)
    names = [
        {"ph": "M", "name": kind, "pid": 1, "tid": row, "args": {key: value}}
        for row, name in enumerate(rows)
        for kind, key, value in (("thread_name", "name", name), ("thread_sort_index", "sort_index", row))
    ]
    events = [
        {
            "ph": "X", "name": words(interval.doing), "cat": "busy" if interval.doing in COLORS else "waiting",
            "pid": 1, "tid": rows.index(interval.name), "ts": round(1e6 * (interval.start - zero), 1),
            "dur": round(1e6 * (interval.end - interval.start), 1),
            **({"args": {"number": interval.number}} if interval.number >= 0 else {}),
        }
        for interval in intervals
    ]  # fmt: skip
    process = {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "vla train"}}
    write_json(file, {"traceEvents": [process, *names, *events], "displayTimeUnit": "ms"})


def timeline_figure(intervals: Sequence[Interval]) -> plt.Figure:
    """A bar for every process, coloured by what it does."""
    rows = list(dict.fromkeys(interval.name for interval in intervals))
    zero = min(interval.start for interval in intervals)
    figure, axis = plt.subplots(figsize=(10, 0.8 + 0.28 * len(rows)))
    for row, name in enumerate(rows):
        mine = [interval for interval in intervals if interval.name == name]
        axis.broken_barh(
            [(interval.start - zero, interval.end - interval.start) for interval in mine], (row - 0.4, 0.8),
            facecolors=[COLORS.get(interval.doing, WAITING) for interval in mine],
        )  # fmt: skip
    axis.set_yticks(np.arange(len(rows)), rows, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("s")
    seen = {interval.doing for interval in intervals}
    legend = {words(doing): color for doing, color in COLORS.items() if doing in seen} | {"waiting": WAITING}
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in legend.values()]
    axis.legend(patches, list(legend), fontsize=8, ncols=len(legend), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    return figure


def publish(run: Path) -> plt.Figure | None:
    """Write RUN/trace.json of all iterations that are kept; a picture of the last ones. Nothing without a timeline."""
    iterations = kept(run / "timeline")
    intervals = read(run / "timeline", iterations)
    if not intervals:
        return None
    write_trace(intervals, run / "trace.json")
    return timeline_figure(read(run / "timeline", iterations[-SHOWN:]))
