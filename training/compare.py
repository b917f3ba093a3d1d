"""`vla compare RUN RUN ...`: runs of training beside each other, with a statement whether they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from training.comparison import page
from training.comparison.runs import WINDOW, Episode, Group, differing, gather
from training.comparison.verdict import common, compared, efficiency, greedy, mean_curve, over, trained
from training.page import plt, write
from vla.cli import Command
from vla.comparison import rates
from vla.errors import SimrealError
from vla.results import write_json


@dataclass(frozen=True)
class CompareConfig:
    """Options of `vla compare`.

    runs: folders of `vla train`; those with equal options but the seed are a group, and so are all in a folder of runs.
    out: FILE.html, a page that holds everything; or FILE.png or FILE.json, which writes both; null prints alone.
    goal: success whose cost in steps and minutes is told.
    """

    runs: list[Path]
    out: Path | None = None
    goal: float = 0.8


def compare(config: CompareConfig) -> None:
    """Print, and write what is wanted."""
    if config.out is not None and config.out.suffix not in (".html", ".png", ".json"):
        raise SimrealError(
            f"out={config.out} is no page, picture or JSON file", code="OUTPUT",
            remedy="Let its name end in .html, .png or .json.",
        )  # fmt: skip
    found = comparison(gather(config.runs), config.goal)
    show(found, Console())
    if config.out is None:
        return
    config.out.parent.mkdir(parents=True, exist_ok=True)
    if config.out.suffix == ".html":
        write(config.out, page.render(found))
        print(f"written to {config.out}")
        return
    files = save(found, config.out.with_suffix(".png"), config.out.with_suffix(".json"))
    print(f"written to {', '.join(str(file) for file in files)}")


def comparison(
    groups: Sequence[Group], goal: float, beginnings: Mapping[str, Mapping[Episode, bool]] = MappingProxyType({})
) -> dict[str, Any]:
    """All that there is to say, as JSON data. beginnings: name -> greedy episodes of what runs began with."""
    scored = [group for group in groups if all(run.greedy for run in group.runs)]
    episodes = common(scored)
    return {
        "goal": goal, "window": WINDOW,
        "evaluated": {
            "variants": sorted({e.variant for e in episodes}), "seeds": [e.seed for e in episodes],
        },
        "beginnings": {
            name: over([rates([played[e] for e in episodes])]) for name, played in beginnings.items()
            if episodes and played.keys() >= set(episodes)
        },
        "groups": {group.name: {
            "runs": [str(run.folder) for run in group.runs], "seeds": [run.seed for run in group.runs],
            "greedy": over([greedy(run, episodes if group in scored else []) for run in group.runs]),
            "training": over([trained(run) for run in group.runs]), "to_goal": efficiency(group, goal),
            "env_steps": [run.curve.env_steps[-1] for run in group.runs],
            "minutes": [run.curve.minutes[-1] for run in group.runs],
            "curves": {axis: mean_curve(group, axis) for axis in ("env_steps", "minutes")},
        } for group in groups},
        "verdicts": compared(groups), "options": differing(groups), "facts": differing(groups, "facts"),
        "notes": [note for group in groups for run in group.runs for note in run.notes],
    }  # fmt: skip


def save(found: dict[str, Any], picture: Path, data: Path) -> tuple[Path, Path]:
    """As a picture and as JSON."""
    figure, part = page.figure(found), picture.with_suffix(".part")
    figure.savefig(part, dpi=110, format="png")
    plt.close(figure)
    part.rename(picture)
    write_json(data, found)
    return picture, data


def show(found: dict[str, Any], console: Console) -> None:
    """On the terminal."""
    table = Table(*page.HEADINGS)
    for row in page.rows(found):
        table.add_row(*row)
    console.print(table)
    console.print(page.legend(found), highlight=False)
    for title, of in (("options that differ", "options"), ("what else differs", "facts")):
        if found[of]:
            table = Table(title, *found["groups"])
            for row in page.differences(found, of):
                table.add_row(*row)
            console.print(table)
    for text in (*(verdict["text"] for verdict in found["verdicts"]), *found["notes"]):
        console.print(text, highlight=False, markup=False)


command = Command(
    name="compare", help="Put runs of training beside each other and say whether they differ.", schema=CompareConfig,
    run=compare, subject="runs",
)  # fmt: skip
