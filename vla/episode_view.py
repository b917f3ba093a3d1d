"""`vla episodes view`: an episode as one HTML page: cameras, states, commanded and executed motion, delays, faults.

The page holds everything and asks no other machine. Images are the recorded files, drawn frame by frame, so that they
are where the cursor is.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vla.episode_list import EpisodesConfig, chosen
from vla.episode_reader import Episode
from vla.episode_rerun import events, write
from vla.errors import CodedError, SimrealError
from vla.recording import IMAGE, Recording, Track
from vla.ros_messages import to_seconds

PAGE = Path(__file__).with_name("pages") / "episode.html"
POINTS = 1500  # of a line, at most
BLACK, ORANGE, BLUE, GREEN, RED = "#222", "#e07b00", "#1f6fb4", "#2a8a3e", "#c02020"


def page(episode: Episode) -> str:
    """The page's text."""
    data = contents(Recording(episode))
    text = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    return PAGE.read_text(encoding="utf-8").replace("__DATA__", text)


def contents(recording: Recording) -> dict[str, Any]:
    """What the page shows; times in s since the episode's first message."""
    episode, info, zero = recording.episode, recording.info, recording.episode.begin_ns / 1e9
    begin, end = recording.acting
    facts = {
        "instruction": info.instruction, "outcome": info.outcome or "not judged", "where": info.where,
        "note": info.note, "variant": info.variant, "seed": "" if info.seed is None else str(info.seed),
        "recorded": "up to its last full chunk" if info.recovered or not episode.complete else "",
        "decisions": str(len(recording.decisions)), "acting": f"{end - begin:.1f} s",
    }  # fmt: skip
    return {
        "title": episode.path.name, "seconds": episode.seconds, "facts": {k: v for k, v in facts.items() if v},
        "cameras": [_camera(recording, name, zero) for name in recording.cameras],
        "plots": [*_motion(recording, zero), _gripper(recording, zero), _delays(recording, zero)],
        "events": [{"t": time - zero, "text": text, "bad": bad} for time, text, bad in events(recording)],
        "acting": [begin - zero, end - zero],
        "labels": [
            {"by": each.by, "outcome": each.outcome, "where": each.where, "note": each.note} for each in episode.labels
        ],
    }  # fmt: skip


def _camera(recording: Recording, name: str, zero: float) -> dict[str, Any]:
    """Frames at their capture times."""
    found = recording.of(f"{name}{IMAGE}")
    kind = "png" if found and bytes(found[0][1].data[:4]) == b"\x89PNG" else "jpeg"
    return {
        "name": name, "kind": kind, "times": [to_seconds(said.header.stamp) - zero for _, said in found],
        "frames": [base64.b64encode(bytes(said.data)).decode() for _, said in found],
    }  # fmt: skip


def _motion(recording: Recording, zero: float) -> list[dict[str, Any]]:
    """The tool along each axis: measured, sent to the arm, wanted, and what each decision wanted."""
    tracks = (("measured", BLACK, recording.tool), ("sent to the arm", GREEN, recording.target),
              ("wanted by the policy", ORANGE, recording.commanded))  # fmt: skip
    step_s = 1.0 / recording.contract.action.rate_hz
    plots = []
    for axis, name in enumerate("xyz"):
        lines = [_line(label, color, track.times - zero, track.positions[:, axis]) for label, color, track in tracks]
        lines += [
            _line("chunks" if not index else "", BLUE, times - zero, ways[:, axis], thin=True)
            for index, (times, ways) in enumerate(_chunks(recording, recording.commanded, step_s))
        ]
        plots.append({"title": f"tool {name}", "unit": "m", "lines": lines})
    return plots


def _chunks(recording: Recording, track: Track, step_s: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """The motion that each decision asked for, from where the tool was to be."""
    found = []
    for _, decision in recording.decisions:
        stamp, actions = decision.chunk.stamp, decision.chunk.actions
        if not len(track.times) or not track.times[0] <= stamp <= track.times[-1]:
            continue
        start, _ = track.at(np.array([stamp]))
        ways = np.concatenate([start, start + np.cumsum(actions[:, :3], 0)])
        found.append((stamp + step_s * np.arange(len(ways)), ways))
    return found


def _gripper(recording: Recording, zero: float) -> dict[str, Any]:
    times, widths = recording.widths
    asked = [(d.chunk.stamp - zero, float(d.chunk.actions[0, 6] > 0.5)) for _, d in recording.decisions]
    top = 1e3 * float(widths.max()) if len(widths) else 1.0
    wanted = np.array(asked).reshape(-1, 2)
    lines = [_line("width", BLACK, times - zero, 1e3 * widths),
             _line("asked for", ORANGE, wanted[:, 0], top * wanted[:, 1], dots=True)]  # fmt: skip
    return {"title": "gripper", "unit": "mm", "lines": lines}


def _delays(recording: Recording, zero: float) -> dict[str, Any]:
    """Of each decision: how long the policy took, and how old its observation was when the chunk was recorded."""
    calls = np.array([(log - zero, 1e3 * d.seconds) for log, d in recording.decisions]).reshape(-1, 2)
    ages = [(log - zero, 1e3 * (log - to_seconds(said.header.stamp))) for log, said in recording.chunks]
    age = np.array(ages).reshape(-1, 2)
    return {"title": "delays", "unit": "ms", "lines": [
        _line("capture to chunk", RED, age[:, 0], age[:, 1], dots=True),
        _line("the policy's call", BLUE, calls[:, 0], calls[:, 1], dots=True),
    ]}  # fmt: skip


def _line(name: str, color: str, times: np.ndarray, values: np.ndarray, thin: bool = False, dots: bool = False
          ) -> dict[str, Any]:  # fmt: skip
    every = max(1, len(times) // POINTS)
    return {
        "name": name, "color": color, "thin": thin, "dots": dots, "t": np.round(times[::every], 4).tolist(),
        "v": np.round(np.nan_to_num(values[::every]), 6).tolist(),
    }  # fmt: skip


def run(config: EpisodesConfig) -> int:
    """`vla episodes view`; 1 if an episode can't be shown."""
    found, console, failed = chosen(config), Console(), 0
    if not found:
        raise SimrealError(f"no episodes in {config.path}", code="NO_EPISODES", remedy="Name another folder or file.")
    single = config.out is not None and config.out.suffix in (".html", ".rrd")
    if single and len(found) > 1:
        raise SimrealError(
            f"{len(found)} episodes for one file", code="OUT", remedy="Name one episode, or a folder: out=FOLDER."
        )
    for file in found:
        out = file.with_suffix(".html") if config.out is None else config.out.expanduser()
        if config.out is not None and not single:
            out = out / f"{file.name.partition('.')[0]}.html"
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            if out.suffix == ".rrd":
                write(Episode(file), out)
            else:
                out.write_text(page(Episode(file)), encoding="utf-8")
        except CodedError as error:
            console.print(f"left out: {file.name}: {error}", markup=False)
            failed = 1
            continue
        console.print(str(out), markup=False)
    return failed
