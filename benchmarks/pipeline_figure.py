"""The figure of benchmarks/pipeline.py: a panel for each part that there is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def bars(axis: Axes, rows: Mapping[str, tuple[float, float, float]], bounds: Mapping[str, float], unit: str) -> None:
    """rows: mean, least and greatest of each. bounds: of some of them, drawn as a line across the bar."""
    names = list(rows)
    means = [rows[name][0] for name in names]
    errors = [[mean - rows[name][1] for name, mean in zip(names, means, strict=True)],
              [rows[name][2] - mean for name, mean in zip(names, means, strict=True)]]  # fmt: skip
    axis.barh(names, means, xerr=errors, color="C0", height=0.6, capsize=2, error_kw={"linewidth": 1})
    for index, name in enumerate(names):
        if name in bounds:
            axis.plot([bounds[name]] * 2, [index - 0.4, index + 0.4], color="C3", linewidth=2)
    if bounds:
        axis.plot([], [], color="C3", linewidth=2, label="event model, no overhead")
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    axis.set_xlabel(unit)
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", alpha=0.3)


def draw_seconds(axis: Axes, part: Mapping[str, Any]) -> None:
    names = {f"hybrid_{k}": f"hybrid, {k} stage{'s'[: k > 1]}" for k in (1, 2, 3, 4)}
    rows = {names.get(name, name): row for name, row in part["sides"].items()}
    found = {name: (row["mean_s"], min(row["seconds"]), max(row["seconds"])) for name, row in rows.items()}
    bars(axis, found, {name: row["predicted_s"] for name, row in rows.items()}, "s per update")
    axis.set_title("GPU simulator, three devices", fontsize=10)


def draw_ablation(axis: Axes, part: Mapping[str, Any]) -> None:
    rows = {"synchronous, colocated": part["synchronous"]} | part["ablation"]
    rows = {name if n < 2 else f"+ {name}": row for n, (name, row) in enumerate(rows.items())}
    found, bounds = {}, {}
    for name, row in rows.items():
        steps = row["mean_s"] * row["env_steps_per_s"]
        found[name] = (row["env_steps_per_s"], steps / max(row["seconds"]), steps / min(row["seconds"]))
        bounds[name] = steps / row["predicted_s"]
    bars(axis, found, bounds, "env steps/s")
    axis.set_title("64 CPU environments, two devices", fontsize=10)


def draw_tabletop(axis: Axes, part: Mapping[str, Any]) -> None:
    found = {n: (row["mean"], row["min"], row["max"]) for n, row in part["env_steps_per_s"].items()}
    bars(axis, found, {}, "env steps/s")
    axis.set_title(f"tabletop, all on {part['machine']['cores']} cores", fontsize=10)


PANELS: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {
    "hybrid": draw_seconds, "asynchronous": draw_ablation, "tabletop": draw_tabletop,
}  # fmt: skip


def draw(result: Mapping[str, Any], file: Path) -> None:
    """A panel for each part that is in the result."""
    parts = [name for name in PANELS if name in result]
    figure, axes = plt.subplots(1, len(parts), figsize=(4.5 * len(parts), 3.2), squeeze=False)
    for name, axis in zip(parts, axes[0], strict=True):
        PANELS[name](axis, result[name])
    figure.tight_layout()
    figure.savefig(file, dpi=130)
