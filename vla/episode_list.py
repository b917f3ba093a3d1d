"""`vla episodes`: what a folder of recordings holds, and what can be done with it."""

import getpass
import importlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from vla.cli import Command
from vla.episode_edit import is_written, label, repair
from vla.episode_reader import Episode
from vla.episodes import EpisodeError, Label, Outcome, Phase, files
from vla.errors import SimrealError

Task = Literal["list", "repair", "label", "view", "export", "import"]


@dataclass(frozen=True)
class EpisodesConfig:
    """Options of `vla episodes [list|repair|label|view|export|import]`.

    do: list; repair closes files that were broken off; label adds a verdict; view writes a page to look at; export
        writes a LeRobot dataset (v3); import reads one.
    path: folder of episodes, or one file; for import the dataset.
    out: of view the HTML file, a file for Rerun (.rrd), or a folder for several pages; of export the dataset, of
        import the folder of episodes.
    outcome: list, export: only such episodes; label: the verdict.
    instruction: list, export: only episodes whose instruction has these words.
    where: label: where a failure happened.
    intervention: label: whether somebody helped.
    note: label: in words.
    by: label: who judges; by default who is logged in.
    after: label: how many verdicts you have seen; refused if there is another one by now.
    contract: import: a contract.json, for a dataset that simreal has not written.
    crf: export: quality of the video's H.264, 0 to 51; smaller is better and larger.
    json: list: print JSON in place of a table.
    """

    path: Path
    do: Task = "list"
    out: Path | None = None
    outcome: Outcome = ""
    instruction: str = ""
    where: Phase = ""
    intervention: bool = False
    note: str = ""
    by: str = ""
    after: int | None = None
    contract: Path | None = None
    crf: int = 18
    json: bool = False


def run(config: EpisodesConfig) -> int:
    """Do what is asked for; 1 if a file can't be read, or a part of what is asked for could not be done."""
    tasks: Mapping[Task, Callable[[EpisodesConfig], int]] = {
        "list": show, "repair": mend, "label": judge, "view": _later("vla.episode_view"),
        "export": _later("vla.lerobot_export"), "import": _later("vla.lerobot_import"),
    }  # fmt: skip
    return tasks[config.do](config)


def _later(module: str) -> Callable[[EpisodesConfig], int]:
    """What needs more than the list does is imported when it is asked for."""

    def task(config: EpisodesConfig) -> int:
        return int(importlib.import_module(module).run(config))

    return task


def chosen(config: EpisodesConfig) -> list[Path]:
    """The files that fit the filters; those that can't be read are kept, to be told about."""
    words = config.instruction.lower().split()

    def fits(file: Path) -> bool:
        try:
            info = Episode(file).info
        except EpisodeError:
            return True
        return config.outcome in ("", info.outcome) and all(word in info.instruction.lower().split() for word in words)

    return [file for file in files(config.path.expanduser()) if fits(file)]


def show(config: EpisodesConfig) -> int:
    """List what is there."""
    found = [_entry(file) for file in chosen(config)]
    if config.json:
        print(json.dumps(found, indent=1))
    else:
        _print(found, config.path)
    return int(any(entry["state"] == "unreadable" for entry in found))


def mend(config: EpisodesConfig) -> int:
    """Close what was broken off, up to its last full chunk, and list everything."""
    for file in files(config.path.expanduser()):
        if is_written(file) or _entry(file)["state"] != "broken off":
            continue
        repair(file)
    return show(config)


def judge(config: EpisodesConfig) -> int:
    """Add a verdict to one episode."""
    found = files(config.path.expanduser())
    if len(found) != 1:
        raise SimrealError(
            f"{config.path} has {len(found)} episodes", code="ONE_EPISODE", remedy="Name one file: path=FILE.mcap."
        )
    if not config.outcome and not config.note and not config.intervention:
        raise SimrealError("there is no verdict", code="LABEL", remedy="Pass outcome=success, or failure where=grasp.")
    verdict = Label(
        time.time(), config.by or getpass.getuser(), config.outcome, config.where, config.intervention, config.note
    )
    labels = label(found[0], verdict, config.after).labels
    for index, each in enumerate(labels):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.at))
        where, helped = f" at {each.where}" * bool(each.where), " with help" * each.intervention
        note = f" ({each.note})" * bool(each.note)
        print(f"{index + 1}. {when} {each.by}: {each.outcome or 'no outcome'}{where}{helped}{note}")
    return 0


def _entry(file: Path) -> dict[str, Any]:
    """A file as one line of the list. state: closed, recording, broken off or unreadable."""
    recording = is_written(file)
    try:
        episode = Episode(file)
    except EpisodeError as error:
        return {"file": str(file), "state": "recording" if recording else "unreadable", "error": str(error)}
    closed = episode.complete and not file.name.endswith(".part")
    return {
        "file": str(file), "state": "recording" if recording else "closed" if closed else "broken off",
        "seconds": round(episode.seconds, 3), "bytes": file.stat().st_size, "messages": dict(episode.counts),
        "attachments": sorted(episode.attachments), "labels": [asdict(each) for each in episode.labels],
        **asdict(episode.info),
    }  # fmt: skip


def _print(found: list[dict[str, Any]], path: Path) -> None:
    console = Console()
    if not found:
        console.print(f"no episodes in {path}")
        return
    table = Table("file", "state", "s", "MB", "messages", "outcome", "instruction")
    for entry in found:
        name = Path(entry["file"]).name
        if "error" in entry:
            table.add_row(name, entry["state"], *[""] * 5)
            continue
        state = "repaired" if entry["recovered"] else entry["state"]
        numbers = f"{entry['seconds']:.1f}", f"{entry['bytes'] / 1e6:.1f}", str(sum(entry["messages"].values()))
        outcome = f"{entry['outcome']}{entry['where'] and ' at '}{entry['where']}"
        table.add_row(name, state, *numbers, outcome, entry["instruction"])
    console.print(table)
    for entry in found:
        if "error" in entry:
            console.print(entry["error"], markup=False)
    counts = Counter(entry.get("outcome") or "not judged" for entry in found if "error" not in entry)
    console.print(", ".join(f"{number} {outcome}" for outcome, number in counts.most_common()))
    if any(entry["state"] == "broken off" for entry in found):
        console.print(f"broken off: `vla episodes repair path={path}` closes these up to their last full chunk")


command = Command(
    name="episodes", help="List, repair, label, view, export and import recorded episodes.", schema=EpisodesConfig,
    run=run, subject="do",
)  # fmt: skip
