"""A comparison as a picture, as Markdown and as a page."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from training.page import page, plt, png

COLORS = ("#1f5fa8", "#b5533c", "#2e7d4f", "#7a4fa3", "#8a7a1f", "#333333")
STYLES = ("-", "--", ":", "-.")
HEADINGS = ("", "seeds", "greedy evaluation", "last training episodes", "steps to goal", "minutes to goal", "steps",
            "minutes")  # fmt: skip


def figure(found: Mapping[str, Any]) -> plt.Figure:
    """Success in training against environment steps and against minutes; points are greedy evaluations."""
    drawing, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), sharey=True)
    for number, (name, group) in enumerate(found["groups"].items()):
        color, style = COLORS[number % len(COLORS)], STYLES[number // len(COLORS) % len(STYLES)]
        for axis, key, scale in ((axes[0], "env_steps", 1e-3), (axes[1], "minutes", 1.0)):
            curve = group["curves"][key]
            x = [scale * value for value in curve["x"]]
            axis.plot(x, curve["mean"], color=color, linestyle=style, linewidth=2, label=name)
            axis.fill_between(x, curve["low"], curve["high"], color=color, alpha=0.15, linewidth=0)
            if group["greedy"]["rate"] is not None and x:
                rate, (low, high) = group["greedy"]["rate"], group["greedy"]["interval95"]
                bars = [[max(0.0, rate - low)], [max(0.0, high - rate)]]
                axis.errorbar([x[-1]], [rate], yerr=bars, color=color, marker="o", capsize=3)
    for name, entry in found["beginnings"].items():
        for axis in axes:
            axis.axhline(entry["rate"], color="#333", linewidth=1, linestyle="--", label=f"{name}, greedy")
    for axis, label in zip(axes, ("thousand environment steps", "minutes"), strict=True):
        axis.axhline(found["goal"], color="#999", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"success in the last {found['window']} episodes")
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].legend(fontsize=8, loc="best")
    drawing.tight_layout()
    return drawing


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table, a row for what runs began with and for each group; HEADINGS are those of its columns."""
    before = [[name, "", _rate(entry), *[""] * (len(HEADINGS) - 3)] for name, entry in found["beginnings"].items()]
    return before + [
        [
            name, ", ".join(str(seed) for seed in group["seeds"]), _rate(group["greedy"]), _rate(group["training"]),
            _goal(group["to_goal"], "env_steps"), _goal(group["to_goal"], "minutes"),
            f"{max(group['env_steps']):,}", f"{max(group['minutes']):.1f}",
        ] for name, group in found["groups"].items()
    ]  # fmt: skip


def _rate(entry: Mapping[str, Any]) -> str:
    if entry["rate"] is None:
        return "none"
    low, high = (100 * value for value in entry["interval95"])
    return f"{entry['rate']:.1%} ({low:.0f} to {high:.0f} over {entry['over']})"


def _goal(entry: Mapping[str, Any], name: str) -> str:
    reached = f"{entry['reached']} of {entry['of']}"
    if entry[name] is None:
        return f"not reached ({reached})"
    return (f"{entry[name]:,.0f}" if name == "env_steps" else f"{entry[name]:.1f}") + f" ({reached})"


def differences(found: Mapping[str, Any], of: str) -> list[list[str]]:
    """The cells of the table of what differs, a row for each option."""
    return [[name, *(str(value) for value in values)] for name, values in found[of].items()]


def legend(found: Mapping[str, Any]) -> str:
    """What the numbers mean."""
    episodes = found["evaluated"]
    variants = ", ".join(episodes["variants"])
    before = "Beginning: the bundle that runs started from, before training. " if found["beginnings"] else ""
    evaluated = "No greedy evaluation is there that all share. "
    if variants:
        evaluated = f"Greedy evaluation: {len(episodes['seeds'])} episodes of each run, {variants}. "
    return (
        f"{evaluated}{before}Training: sampled actions, the last {found['window']} episodes. "
        f"Goal: {found['goal']:.0%} over {found['window']} episodes; the median, and how many runs reached it. "
        "Intervals are 95%: bootstrap over seeds from 3 on, else Wilson over episodes; the shade around a curve "
        "likewise, of two runs the runs themselves. p-values are not corrected for several comparisons."
    )


def markdown(found: Mapping[str, Any]) -> str:
    """All but the picture."""
    names = list(found["groups"])
    parts = [_table(HEADINGS, rows(found)), "", legend(found), "", *(f"- {v['text']}" for v in found["verdicts"])]
    for title, of in (("Options that differ", "options"), ("What else differs", "facts")):
        if found[of]:
            parts += ["", f"{title}:", "", _table(("", *names), differences(found, of))]
    parts += ["", *(f"- {note}" for note in found["notes"])] if found["notes"] else []
    return "\n".join(parts) + "\n"


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def render(found: Mapping[str, Any]) -> str:
    """The page as a string."""
    names = list(found["groups"])
    parts = [
        f"<h1>{html.escape(' and '.join(names))}</h1>",
        f'<img src="{png(figure(found))}" alt="learning curves">',
        _rows(HEADINGS, rows(found)), f"<p><small>{html.escape(legend(found))}</small></p>",
        "<h2>Do they differ?</h2><ul>", *(f"<li>{html.escape(v['text'])}</li>" for v in found["verdicts"]), "</ul>",
    ]  # fmt: skip
    for title, of in (("Options that differ", "options"), ("What else differs", "facts")):
        if found[of]:
            parts += [f"<h2>{title}</h2>", _rows(("", *names), differences(found, of))]
    parts += ["<ul>", *(f"<li>{html.escape(note)}</li>" for note in found["notes"]), "</ul>"]
    return page(parts, "simreal comparison")


def _rows(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in cells)
    return f"<table><tr>{head}</tr>{body}</table>"
