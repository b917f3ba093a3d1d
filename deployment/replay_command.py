"""`vla replay`: recorded episodes once more, offline under one policy or two, or on the twin."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from deployment.replay import COLUMNS, UNITS, Agreement, EpisodeReplay, agreement, play, warm_up
from vla.cli import Command
from vla.contract import PolicyContract
from vla.episode_reader import Episode
from vla.episodes import files
from vla.errors import CodedError, SimrealError
from vla.policy import Policy
from vla.recording import Recording
from vla.results import commit, machine, write_json


@dataclass(frozen=True)
class ReplayConfig:
    """Options of `vla replay`.

    episodes: folder of recordings, or one file.
    checkpoint: bundle to ask; two for a comparison. Not needed on the twin.
    on: desk asks policies offline; twin executes what was recorded again, open loop, and tells the drift.
    out: JSON file of the result; a picture is put beside it. null for neither.
    limit: use the first so many episodes; null for all.
    device: of torch. Equality bit for bit is promised on the same device, with the same threads, as recorded.
    threads: of torch; policy_node has 1.
    twin: preset of the twin, nominal or shifted, for on=twin.
    follow: what the twin's arm is given: references, as they were sent to the arm; or the chunks, executed anew.
    """

    episodes: Path
    checkpoint: list[Path] | None = None
    on: Literal["desk", "twin"] = "desk"
    out: Path | None = Path("replay.json")
    limit: int | None = None
    device: str = "cpu"
    threads: int = 1
    twin: Literal["nominal", "shifted"] = "nominal"
    follow: Literal["references", "chunks"] = "references"


@dataclass(frozen=True)
class Replays:
    """All episodes under one checkpoint."""

    checkpoint: str
    contract: PolicyContract
    episodes: tuple[EpisodeReplay, ...]
    same: int  # of the episodes, those that this very checkpoint has recorded

    @property
    def agreement(self) -> Agreement:
        return agreement(self.episodes, self.contract.action.rate_hz)


def run(config: ReplayConfig) -> int:
    """Replay; 1 if an episode could not be, or if a checkpoint's own actions did not come out again."""
    if config.on == "twin":
        from deployment.replay_twin import rerun  # imports the simulator

        return rerun(config.episodes, config.out, config.limit, config.twin, config.follow)
    if not config.checkpoint:
        raise SimrealError("there is no checkpoint", code="NO_CHECKPOINT", remedy="Pass checkpoint=BUNDLE, or on=twin.")
    torch.set_num_threads(config.threads)
    console = Console()
    recordings, refused = usable(config.episodes, config.limit)
    for name, why in refused.items():
        console.print(f"left out: {name}: {why}", markup=False)
    if not recordings:
        raise SimrealError(
            f"no episode in {config.episodes} can be replayed", code="NO_EPISODES",
            remedy="`vla episodes` tells what is there.",
        )  # fmt: skip
    found = [under(checkpoint, recordings, config.device) for checkpoint in config.checkpoint]
    result = report(found, refused)
    _print(found, console)
    if config.out is not None:
        write_json(config.out, result)
        from deployment.replay_picture import draw  # matplotlib takes a second

        picture = draw(found, recordings, config.out.with_suffix(".png"))
        console.print(f"{config.out}, {picture}")
    broken = sum(_unequal(replays) for replays in found)
    if broken:
        console.print(f"{broken} recorded decisions of these checkpoints came out otherwise", style="red")
    return int(bool(refused) or bool(broken))


def usable(path: Path, limit: int | None) -> tuple[list[Recording], dict[str, str]]:
    """The recordings of a folder, and why some of its files are none."""
    recordings: list[Recording] = []
    refused: dict[str, str] = {}
    for file in files(path.expanduser())[:limit]:
        try:
            recordings.append(Recording(Episode(file)))
        except CodedError as error:
            refused[file.name] = str(error)
    return recordings, refused


def under(checkpoint: Path, recordings: Sequence[Recording], device: str) -> Replays:
    """All episodes under a checkpoint. Raises ContractError if it does not fit one of them."""
    policy = Policy.load(checkpoint.expanduser(), None, "vla replay", device=device)
    provenance = (checkpoint.expanduser() / "provenance.json").read_bytes()
    warm_up(policy)
    same = sum(_recorded(policy.contract, provenance, recording) for recording in recordings)
    replays = [play(r, policy) for r in track(recordings, checkpoint.name, transient=True)]
    return Replays(str(checkpoint), policy.contract, tuple(replays), same)


def _recorded(contract: PolicyContract, provenance: bytes, recording: Recording) -> bool:
    """Whether this checkpoint acted in an episode."""
    return recording.contract == contract and recording.episode.attachments.get("provenance.json") == provenance


def _unequal(replays: Replays) -> int:
    """Decisions that should have come out again and did not."""
    if replays.same < len(replays.episodes):
        return 0
    return sum(r.decisions - r.missing - r.actions_equal for r in replays.episodes if r.has_decisions)


def report(found: Sequence[Replays], refused: dict[str, str]) -> dict[str, Any]:
    """The result as JSON data."""
    return {
        "checkpoints": [_entry(replays) for replays in found], "refused": refused, "commit": commit(),
        "machine": machine("torch", "pillow"),
    }  # fmt: skip


def _entry(replays: Replays) -> dict[str, Any]:
    agreed, episodes = replays.agreement, replays.episodes
    seconds = [answer.seconds for replay in episodes for answer in replay.answers]
    return {
        "checkpoint": replays.checkpoint, "columns": COLUMNS, "units": UNITS, **asdict(agreed),
        "recorded_by_it": replays.same, "latency_ms": _quantiles(1e3 * np.array(seconds)),
        "speed": _speed(episodes, "wall_s"), "speed_of_a_free_core": _speed(episodes, "busy_s"),
        **{key: sum(getattr(r, key) for r in episodes) for key in (
            "decisions", "missing", "observations_equal", "actions_equal", "chunks", "chunks_equal")},
        "greatest_difference": max((r.greatest for r in episodes), default=0.0),
        "episodes": [
            {k: v for k, v in vars(r).items() if k != "answers"} | {
                "answers": len(r.answers), **asdict(agreement([r], replays.contract.action.rate_hz))
            } for r in episodes
        ],
    }  # fmt: skip


def _quantiles(values: np.ndarray) -> dict[str, float | None]:
    return {f"p{100 * q:.0f}": float(np.quantile(values, q)) if len(values) else None for q in (0.5, 0.99)}


def _speed(episodes: Sequence[EpisodeReplay], kind: str) -> float:
    """Seconds of episodes per second of replay: of the clock, or of the processor."""
    return sum(r.seconds for r in episodes) / max(1e-9, sum(getattr(r, kind) for r in episodes))


def _print(found: Sequence[Replays], console: Console) -> None:
    table = Table("", *(Path(r.checkpoint).name if len(found) == 1 else r.checkpoint for r in found))
    entries = [_entry(replays) for replays in found]

    def add(name: str, texts: Sequence[str]) -> None:
        table.add_row(name, *texts)

    add("episodes, decisions", [f"{len(e['episodes'])}, {e['decisions']}" for e in entries])
    add("of these without an image", [str(e["missing"]) for e in entries])
    for name, key in (("observations", "observations_equal"), ("actions", "actions_equal")):
        add(f"{name} equal to the recorded, bit for bit", [f"{e[key]} of {e['decisions']}" for e in entries])
    add("chunks equal to those sent", [f"{e['chunks_equal']} of {e['chunks']}" for e in entries])
    add("rows compared with what was executed", [str(e["rows"]) for e in entries])
    for column, (name, unit) in enumerate(zip(COLUMNS[:6], UNITS, strict=False)):
        scale, shown = (1e3, "mm") if unit == "m" else (1e3, "mrad")
        add(f"mean error {name}, {shown} a step", [_number(e["mean_error"], column, scale) for e in entries])
    add("gripper agrees", [_share(e["gripper"]) for e in entries])
    add("consecutive chunks apart, mm", [_plain(e["overlap_mm"]) for e in entries])
    add("... which disagree about the gripper", [_share(e["flips"]) for e in entries])
    add("call p50, p99, ms", [f"{_plain(e['latency_ms']['p50'])}, {_plain(e['latency_ms']['p99'])}" for e in entries])
    speeds = [f"{e['speed']:.1f}, {e['speed_of_a_free_core']:.1f}" for e in entries]
    add("times real time, here and on a free core", speeds)
    console.print(table)


def _number(values: Sequence[float], column: int, scale: float) -> str:
    return f"{scale * values[column]:.2f}" if values else "-"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


command = Command(
    name="replay", help="Recorded episodes under another policy, or once more on the twin.", schema=ReplayConfig,
    run=run, subject="episodes",
)  # fmt: skip
