"""`vla episodes`: what a folder of recordings holds, and repairing what was broken off."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vla.cli import Command
from vla.episode_reader import Episode, is_written, repair
from vla.episodes import EpisodeError, files


@dataclass(frozen=True)
class EpisodesConfig:
    """Options of `vla episodes`.

    path: folder of episodes, or one file.
    repair: close the files that were broken off, up to their last full chunk.
    json: print JSON in place of a table.
    """

    path: Path
    repair: bool = False
    json: bool = False


def run(config: EpisodesConfig) -> int:
    """List what is there, repaired if asked for; 1 if a file can't be read."""
    found = [_entry(file, config.repair) for file in files(config.path.expanduser())]
    if config.json:
        print(json.dumps(found, indent=1))
    else:
        _print(found, config.path)
    return int(any(entry["state"] == "unreadable" for entry in found))


def _entry(file: Path, mend: bool) -> dict[str, Any]:
    """A file as one line of the list. state: closed, recording, broken off or unreadable."""
    recording = is_written(file)
    try:
        if mend and not recording:
            file = repair(file)
        episode = Episode(file)
    except EpisodeError as error:
        return {"file": str(file), "state": "recording" if recording else "unreadable", "error": str(error)}
    closed = episode.complete and not file.name.endswith(".part")
    return {
        "file": str(file), "state": "recording" if recording else "closed" if closed else "broken off",
        "seconds": round(episode.seconds, 3), "bytes": file.stat().st_size, "messages": dict(episode.counts),
        "attachments": sorted(episode.attachments), **asdict(episode.info),
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
        table.add_row(name, state, *numbers, entry["outcome"], entry["instruction"])
    console.print(table)
    for entry in found:
        if "error" in entry:
            console.print(entry["error"], markup=False)
    if any(entry["state"] == "broken off" for entry in found):
        console.print("broken off: add --repair to close these files up to their last full chunk")


command = Command(
    name="episodes", help="List recorded episodes, and repair those that were broken off.", schema=EpisodesConfig,
    run=run,
)  # fmt: skip
