"""A run as one page: `vla report` writes report.html and, of a quickstart or of trials, report.json."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training import metrics
from training.evaluate import IN_DISTRIBUTION
from training.page import page, plt, png, write
from training.trace import publish
from vla import trial_report
from vla.cli import Command
from vla.errors import SimrealError
from vla.results import machine, write_json
from vla.trial_results import sentence


@dataclass(frozen=True)
class ReportConfig:
    """Options of `vla report`.

    run: folder of a `vla train`; of a quickstart; or of a recipe run by hand: the imitation's and PPO's evaluation as
        sft.json and rl.json, PPO's run as rl.
    trials: folder of `vla trials`, in place of a run.
    sim: with trials: JSON files of `vla eval` of the same checkpoints, for the gap.
    calibration: with trials: what is known of the rig's calibration, such as its age.
    """

    run: Path = Path("runs/quickstart")
    trials: Path | None = None
    sim: list[Path] = field(default_factory=list)
    calibration: str = ""


def report(config: ReportConfig) -> None:
    """Write what there is to report into the run's folder."""
    if config.trials is not None:
        file, found = trial_report.write(config.trials.expanduser(), config.sim, config.calibration)
        for letter, entry in found["comparisons"].items():
            print(f"{letter} beside {found['first']}: {sentence(entry)}")
        print(f"{file}, {file.with_suffix('.json')}")
        return
    run = config.run
    if any("rollout/success" in row for row in metrics.read(run)[:1]):
        write(run / "report.html", render_training(run))
        return
    files = {name: run / f"{name}.json" for name in ("sft", "rl")}
    bundle = run / "rl" / "checkpoint" / "provenance.json"
    missing = [str(f) for f in (*files.values(), bundle) if not f.exists()]
    if missing:
        raise SimrealError(
            f"nothing to report: {', '.join(missing)} missing", code="RUN_MISSING",
            remedy=f"Run `vla quickstart out={run}` first; it goes on where it stopped.",
        )  # fmt: skip
    scores = {name: json.loads(files[name].read_text()) for name in ("sft", "rl")}
    rows = metrics.read(run / "rl")
    provenance = json.loads(bundle.read_text())
    usage = run / "usage.json"  # of the quickstart
    learning = {"wall_s": rows[-1]["time/elapsed_s"], "env_steps": rows[-1]["time/total_env_steps"]}
    summary = {
        "commit": provenance["commit"],
        "seed": provenance["seed"],
        "machine": machine("mujoco", "torch", "ray"),
        "sft": scores["sft"]["axes"],
        "rl": scores["rl"]["axes"],
        "variants": {name: scores[name]["variants"] for name in scores},
        "controls": {name: scores[name]["controls"] for name in scores},
        "generalization_mean": {name: scores[name]["generalization_mean"] for name in scores},
        **(json.loads(usage.read_text()) if usage.exists() else learning),
    }
    write_json(run / "report.json", summary)
    write(run / "report.html", render(scores, rows, summary, run))


def render(
    scores: Mapping[str, Any], rows: Sequence[Mapping[str, float]], summary: Mapping[str, Any], run: Path
) -> str:
    """The page as a string."""
    gain = {a: summary["rl"][a]["rate"] - summary["sft"][a]["rate"] for a in summary["rl"]}
    out_of = float(np.mean([gain[a] for a in gain if a != IN_DISTRIBUTION]))
    memory = f" and at most {summary['peak_rss_mib'] / 1024:.1f} GiB of memory" if "peak_rss_mib" in summary else ""
    where = summary["machine"]
    parts = [
        "<h1>Imitation and reinforcement learning on put-on-plate</h1>",
        f"<p>PPO moved success in distribution from {summary['sft']['in_distribution']['rate']:.0%} to "
        f"{summary['rl']['in_distribution']['rate']:.0%}, and the mean of the generalisation axes by "
        f"{100 * out_of:+.0f} points. It used {int(summary['env_steps']):,} environment steps. The run took "
        f"{summary['wall_s'] / 60:.0f} minutes{memory} on {where['cores']} cores ({html.escape(where['processor'])}). "
        f"Seed {summary['seed']}, commit {html.escape(summary['commit'][:12] or 'unknown')}.</p>",
        f'<img src="{png(curve_figure(rows, scores))}" alt="learning curve">',
        _table(scores),
        "<p><small>Rates over episodes on seeds that no training saw, greedy actions, 95% Wilson intervals. An axis "
        "pools its variants. Blind: black images. Wrong instruction: it names the other object. Both should fail."
        "</small></p>",
        _clips(run / "videos", scores["rl"]["members"]),
        _timeline(run / "rl", "rl/trace.json"),
    ]
    return page(parts)


def render_training(run: Path) -> str:
    """The page of a `vla train` alone, finished or not."""
    rows = metrics.read(run)
    last = rows[-1]
    parts = [
        f"<h1>Reinforcement learning in {html.escape(str(run))}</h1>",
        f"<p>{len(rows)} iterations, {int(last['time/total_env_steps']):,} environment steps, "
        f"{last['time/elapsed_s'] / 60:.0f} minutes.</p>",
        f'<img src="{png(curve_figure(rows, {}))}" alt="learning curve">',
        _timeline(run, "trace.json"),
    ]
    return page(parts)


def _timeline(run: Path, link: str) -> str:
    """Who did what in the last iterations, and a link to the trace of all that are kept."""
    figure = publish(run)
    if figure is None:
        return ""
    return (
        f'<h2>Who did what</h2><img src="{png(figure)}" alt="timeline"><p><small>The last iterations that '
        f'have ended. More: <a href="{link}">{link}</a>, which Perfetto (ui.perfetto.dev) '
        "opens.</small></p>"
    )


def curve_figure(rows: Sequence[Mapping[str, float]], scores: Mapping[str, Any]) -> plt.Figure:
    """Success against environment steps and against wall time."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    success = np.array([r["rollout/success"] for r in rows], float)
    for axis, key, scale, label in (
        (axes[0], "time/total_env_steps", 1e-3, "thousand environment steps"),
        (axes[1], "time/elapsed_s", 1 / 60, "minutes of PPO"),
    ):
        x = np.array([r[key] for r in rows], float) * scale
        axis.plot(x, success, color="#9db4d0", linewidth=1, label="each iteration (sampled actions)")
        axis.plot(x, smooth(success), color="#1f5fa8", linewidth=2, label="mean of 9 iterations")
        for name in scores:
            color = {"sft": "#b5533c", "rl": "#2e7d4f"}[name]
            rate = scores[name]["axes"]["in_distribution"]["rate"]
            axis.axhline(rate, color=color, linestyle="--", linewidth=1, label=f"{name} evaluated (greedy)")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success in distribution")
    axes[0].set_ylim(0, 1)
    axes[1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    return figure


def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred moving mean that ignores NaN."""
    half = width // 2
    return np.array([np.nanmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _table(scores: Mapping[str, Any]) -> str:
    lines = ["<table><tr><th>axis</th><th>imitation</th><th></th><th>PPO</th><th></th><th>gain</th></tr>"]
    for axis, members in scores["rl"]["members"].items():
        lines.append(_row(axis.replace("_", " "), *(scores[n]["axes"][axis] for n in ("sft", "rl")), kind="axis"))
        if len(members) > 1:
            for variant in members:
                lines.append(_row(variant.replace("_", " "), *(scores[n]["variants"][variant] for n in ("sft", "rl"))))
    for control in scores["rl"]["controls"]:
        lines.append(
            _row(f"control: {control}".replace("_", " "), *(scores[n]["controls"][control] for n in ("sft", "rl")))
        )
    return "".join(lines) + "</table>"


def _row(name: str, before: Mapping[str, Any], after: Mapping[str, Any], kind: str = "") -> str:
    def cells(entry: Mapping[str, Any]) -> str:
        low, high = entry["wilson95"]
        return f"<td>{entry['rate']:.1%}</td><td><small>{low:.0%} to {high:.0%}</small></td>"

    gain = 100 * (after["rate"] - before["rate"])
    return f'<tr class="{kind}"><td>{html.escape(name)}</td>{cells(before)}{cells(after)}<td>{gain:+.0f}</td></tr>'


def _clips(folder: Path, members: Mapping[str, Sequence[str]]) -> str:
    figures = []
    for axis, variants in members.items():
        for variant in variants:
            for label in ("success", "failure"):
                file = folder / f"{variant}_{label}.mp4"
                if file.exists():
                    data = base64.b64encode(file.read_bytes()).decode()
                    caption = f"{axis}: {variant}, {label}".replace("_", " ")
                    figures.append(
                        f'<figure><video src="data:video/mp4;base64,{data}" muted loop autoplay playsinline controls>'
                        "</video>"
                        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
                    )
    return f"<h2>After PPO</h2>{''.join(figures)}" if figures else ""


command = Command(name="report", help="Write the report of a run or of trials.", schema=ReportConfig, run=report)
