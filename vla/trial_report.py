"""Trials as one page and one JSON file: `vla report trials=...`. The page holds everything."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla.episode_reader import Episode
from vla.errors import SimrealError
from vla.recording import IMAGE, Recording
from vla.results import write_json
from vla.trial_results import PHASES, Trials, match_evaluations, results, sentence

CLIP_FRAMES, CLIP_EDGE, CLIP_HZ = 60, 192, 10
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}figure{display:inline-block;margin:.4rem;font-size:.85rem}
img{border-radius:4px}small{color:#666}.bar{fill:#1f6fb4}.whisker{stroke:#222;stroke-width:1.5}"""


def write(folder: Path, sim: Sequence[Path] = (), calibration: str = "") -> tuple[Path, dict[str, Any]]:
    """Write report.html and report.json into the folder of the trials."""
    trials = Trials(folder)
    found = results(trials, match_evaluations(trials, sim), calibration)
    write_json(folder / "report.json", found)
    page = folder / "report.html"
    page.write_text(render(trials, found), encoding="utf-8")
    return page, found


def render(trials: Trials, found: Mapping[str, Any]) -> str:
    where = "twin, " + found["twin"] if found["use_sim"] else "robot"
    commit = found.get("commit", "")[:12] or "not known"
    state = f"{found['scored']} of {found['trials']} trials are scored"
    parts = [
        "<h1>Trials</h1>",
        f"<p>On the {html.escape(where)}. {state}; {len(found['faulted'])} with a fault were repeated, "
        f"{found['interrupted']} interrupted; somebody helped in {found['interventions']}, which count as failures. "
        f"Calibration: {html.escape(found['calibration'])}. Commit {html.escape(commit)}.</p>",
        _detector(found), _rates(found), _comparisons(found), _failures(found), _times(found), _gap(found),
        _faults(found),
        _clips(trials),
        "<p><small>Rates with 95% Wilson intervals. Differences over scenes that both checkpoints played, with a 95% "
        "bootstrap interval; exact two-sided p-values of McNemar's test, not corrected for several comparisons. "
        "Who operated saw letters only.</small></p>",
    ]  # fmt: skip
    body = "\n".join(part for part in parts if part)
    head = f'<meta charset="utf-8"><title>Trials</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html><html lang="en">{head}{body}</html>'


def _detector(found: Mapping[str, Any]) -> str:
    entry = found["detector"]
    if entry is None:
        return ""
    sure = entry["trials"] - entry["unsure"]
    return f"<p>The camera's detector agrees with the verdict in {entry['agreed']} of {sure} trials; in " \
           f"{entry['unsure']} more it could not tell. Verdicts are what counts.</p>"  # fmt: skip


def _rates(found: Mapping[str, Any]) -> str:
    policies = found["checkpoints"]
    axes = list(next(iter(policies.values()))["axes"])
    head = "".join(f"<th>{_name(k, v)}</th>" for k, v in policies.items())
    rows = [
        f"<tr><td>{html.escape(axis.replace('_', ' '))}</td>"
        + "".join(_cell(p["axes"][axis]) for p in policies.values()) + "</tr>"
        for axis in axes
    ]  # fmt: skip
    total = "<tr><td><b>all</b></td>" + "".join(_cell(p) for p in policies.values()) + "</tr>"
    return f"<h2>Success</h2><table><tr><th></th>{head}</tr>{''.join(rows)}{total}</table>"


def _name(letter: str, policy: Mapping[str, Any]) -> str:
    return f"{letter}: {html.escape('/'.join(Path(policy['checkpoint']).parts[-2:]))}"


def _cell(entry: Mapping[str, Any]) -> str:
    """Rate, interval, and both as a picture."""
    if not entry["episodes"]:
        return "<td>not played</td>"
    low, high = (100 * v for v in entry["wilson95"])
    rate = 100 * entry["rate"]
    picture = (
        f'<svg width="102" height="12" role="img"><rect class="bar" width="{rate:.1f}" height="12" opacity=".35"/>'
        f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="6" y2="6"/></svg>'
    )
    text = f"{rate:.1f}% <small>({low:.0f} to {high:.0f})</small>, {entry['successes']} of {entry['episodes']}"
    return f"<td>{text}<br>{picture}</td>"


def _comparisons(found: Mapping[str, Any]) -> str:
    lines = []
    for letter, entry in found["comparisons"].items():
        lines.append(f"<li><b>{letter} beside {found['first']}</b>: {sentence(entry)}</li>")
        for axis, part in entry["axes"].items():
            lines.append(f"<li>{html.escape(axis.replace('_', ' '))}: {sentence(part)}</li>")
    return f"<h2>Differences</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _failures(found: Mapping[str, Any]) -> str:
    names = (*PHASES, "helped", "not said")
    rows = "".join(
        f"<tr><td>{letter}</td>" + "".join(f"<td>{p['failures'].get(n, 0)}</td>" for n in names) + "</tr>"
        for letter, p in found["checkpoints"].items()
    )
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<h2>Where failures happen</h2><table><tr><th></th>{head}</tr>{rows}</table>"


def _times(found: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{letter}</td><td>{p['seconds_of_success']['median']:.1f} s</td>"
        f"<td>{p['seconds_of_success']['longest']:.1f} s</td></tr>"
        for letter, p in found["checkpoints"].items() if p["seconds_of_success"]
    )  # fmt: skip
    head = "<tr><th></th><th>median</th><th>longest</th></tr>"
    return f"<h2>Time to success</h2><table>{head}{rows}</table>" if rows else ""


def _gap(found: Mapping[str, Any]) -> str:
    if "gap" not in found:
        return ""
    entry = found["gap"]
    rows = "".join(
        f"<tr><td>{p['letter']} {html.escape(p['variant'])}</td><td>{p['simulated']:.1%} of {p['episodes']}</td>"
        f"<td>{p['real']:.1%} of {p['trials']}</td></tr>"
        for p in entry["points"]
    )

    def said(value: float | None) -> str:
        return "not defined" if value is None else f"{value:+.2f}"

    text = f"Mean difference {said(entry['difference'])}, Pearson {said(entry['pearson'])}, rank correlation " \
           f"(Spearman) {said(entry['spearman'])}, MMRV {said(entry['mmrv'])}."  # fmt: skip
    head = "<tr><th></th><th>simulator</th><th>here</th></tr>"
    return f"<h2>From the simulator to here</h2><p>{text}</p><table>{head}{rows}</table>"


def _faults(found: Mapping[str, Any]) -> str:
    lines = [f"<li>trial {f['slot'] + 1}: {html.escape(f['fault'])}</li>" for f in found["faulted"]]
    return f"<h2>Faults</h2><ul>{''.join(lines)}</ul>" if lines else ""


def _clips(trials: Trials) -> str:
    """One success and one failure of each checkpoint, where they were recorded."""
    figures = []
    for letter in trials.names:
        for success in (True, False):
            for played in trials.of(letter):
                file = trials.folder / "episodes" / played.recording
                if played.success == success and played.recording and file.is_file():
                    word = "success" if success else "failure"
                    figures.append(f"<figure>{_clip(file)}<figcaption>{letter}, trial {played.slot + 1}: {word}"
                                   f"</figcaption></figure>")  # fmt: skip
                    break
    return f"<h2>Clips</h2>{''.join(figures)}" if figures else ""


def _clip(file: Path) -> str:
    """The first camera's images as a moving picture, at CLIP_HZ."""
    try:
        recording = Recording(Episode(file))
    except SimrealError as error:
        return html.escape(f"{file.name} can't be read: {error}")
    camera = next(iter(recording.cameras))
    found = recording.of(f"{camera}{IMAGE}")
    stamps = [said.header.stamp.sec + 1e-9 * said.header.stamp.nanosec for _, said in found]
    if not stamps:
        return "no images"
    chosen: list[int] = np.searchsorted(stamps, np.arange(stamps[0], stamps[-1], 1 / CLIP_HZ))[:CLIP_FRAMES].tolist()
    frames = []
    for index in chosen:
        image = Image.open(io.BytesIO(bytes(found[index][1].data))).convert("RGB")
        image.thumbnail((CLIP_EDGE, CLIP_EDGE))
        frames.append(image)
    if not frames:
        return "no images"
    out = io.BytesIO()
    pause = round(1000 / CLIP_HZ)
    frames[0].save(out, "webp", quality=70, save_all=True, append_images=frames[1:], duration=pause, loop=0)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img width="{CLIP_EDGE}" alt="{html.escape(camera)}" src="data:image/webp;base64,{data}">'
