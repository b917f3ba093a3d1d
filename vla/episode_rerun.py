"""`vla episodes view out=FILE.rrd`: an episode for the Rerun viewer, everything on one timeline.

Images are the recorded files, at the times at which the policy took them: their stamps less the camera's delay.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.episode_reader import Episode
from vla.errors import SimrealError
from vla.recording import IMAGE, Recording
from vla.ros_messages import to_seconds

TIMELINE = "time"
ACTION = ("x", "y", "z", "rx", "ry", "rz", "gripper")


def write(episode: Episode, out: Path) -> Path:
    """Write the file."""
    try:
        import rerun
    except ImportError as error:
        raise SimrealError(
            "a file for Rerun needs rerun-sdk", code="MISSING_MODULE", remedy='pip install "simreal[rerun]"'
        ) from error
    recording = Recording(episode)
    stream = rerun.RecordingStream("simreal", recording_id=episode.path.name.partition(".")[0])
    stream.save(out)
    sink = _Sink(rerun, stream)
    sink.text("episode", _facts(recording))
    _cameras(recording, sink)
    _states(recording, sink)
    _actions(recording, sink)
    _delays(recording, sink)
    for time, text, bad in events(recording):
        sink.log("events", time, text, bad)
    stream.flush()
    stream.disconnect()
    return out


class _Sink:
    """Columns of values over time, for Rerun."""

    def __init__(self, rerun: Any, stream: Any):
        self._rerun, self._stream = rerun, stream

    def scalars(self, path: str, times: np.ndarray, values: np.ndarray) -> None:
        """times `[N]` s since 1970, values `[N]`."""
        if len(times):
            columns = self._rerun.Scalars.columns(scalars=np.asarray(values, np.float64))
            self._stream.send_columns(path, [self._at(times)], columns)

    def points(self, path: str, times: np.ndarray, positions: np.ndarray) -> None:
        """positions `[N, 3]` m, robot base frame."""
        if len(times):
            self._stream.send_columns(path, [self._at(times)], self._rerun.Points3D.columns(positions=positions))

    def images(self, path: str, times: np.ndarray, files: Sequence[bytes], kind: str) -> None:
        if len(times):
            columns = self._rerun.EncodedImage.columns(blob=list(files), media_type=[kind] * len(files))
            self._stream.send_columns(path, [self._at(times)], columns)

    def way(self, path: str, time: float, positions: np.ndarray) -> None:
        """A line through positions `[N, 3]` m."""
        columns = self._rerun.LineStrips3D.columns(strips=[positions])
        self._stream.send_columns(path, [self._at(np.array([time]))], columns)

    def log(self, path: str, time: float, text: str, bad: bool) -> None:
        columns = self._rerun.TextLog.columns(text=[text], level=["ERROR" if bad else "INFO"])
        self._stream.send_columns(path, [self._at(np.array([time]))], columns)

    def text(self, path: str, text: str) -> None:
        self._stream.log(path, self._rerun.TextDocument(text, media_type="text/markdown"), static=True)

    def _at(self, times: np.ndarray) -> Any:
        return self._rerun.TimeColumn(TIMELINE, timestamp=_nanoseconds(times))


def _nanoseconds(times: np.ndarray) -> np.ndarray:
    return np.round(np.asarray(times, np.float64) * 1e9).astype("datetime64[ns]")


def _facts(recording: Recording) -> str:
    info = recording.info
    facts = {
        "instruction": info.instruction, "outcome": info.outcome or "not judged", "where": info.where,
        "note": info.note, "variant": info.variant, "seed": "" if info.seed is None else str(info.seed),
        **{f"calibration of {name}": f"made {found.measured.time}" for name, found in recording.calibrations.items()},
    }  # fmt: skip
    return "\n".join(f"- {key}: {value}" for key, value in facts.items() if value)


def _cameras(recording: Recording, sink: _Sink) -> None:
    for name in recording.cameras:
        found = [said for _, said in recording.of(f"{name}{IMAGE}")]
        late = recording.late.get(name, 0.0)
        times = np.array([to_seconds(said.header.stamp) - late for said in found])
        for kind, magic in (("image/png", b"\x89PNG"), ("image/jpeg", b"\xff\xd8")):
            chosen = [index for index, said in enumerate(found) if bytes(said.data[: len(magic)]) == magic]
            sink.images(f"cameras/{name}", times[chosen], [bytes(found[index].data) for index in chosen], kind)


def _states(recording: Recording, sink: _Sink) -> None:
    """The tool as measured, as sent to the arm and as wanted by the policy; joints and gripper."""
    tracks = {"measured": recording.tool, "sent": recording.target, "wanted": recording.commanded}
    for name, track in tracks.items():
        sink.points(f"arm/{name}", track.times, track.positions)
        for axis, column in zip("xyz", track.positions.T, strict=True):
            sink.scalars(f"tool/{axis}/{name}", track.times, column)
    times, widths = recording.widths
    sink.scalars("gripper/width_mm", times, 1e3 * widths)
    joints: dict[str, list[tuple[float, float]]] = {}
    for _, said in recording.of("joint_states"):
        for name, position in zip(said.name, said.position, strict=True):
            joints.setdefault(name, []).append((to_seconds(said.header.stamp), position))
    for name, rows in joints.items():
        sink.scalars(f"joints/{name}", *np.array(rows).T)


def _actions(recording: Recording, sink: _Sink) -> None:
    """Of each decision the rows up to the next one, what was done meanwhile, and the chunk as a line."""
    step_s = 1.0 / recording.contract.action.rate_hz
    track, decisions = recording.commanded, [decision for _, decision in recording.decisions]
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for decision, after in zip(decisions, [*decisions[1:], None], strict=True):
        begin, actions = decision.chunk.stamp, decision.chunk.actions
        if len(track.times) and track.times[0] <= begin <= track.times[-1]:
            start, _ = track.at(np.array([begin]))
            sink.way("arm/chunk", begin, np.concatenate([start, start + np.cumsum(actions[:, :3], 0)]))
        times = begin + step_s * np.arange(len(actions))
        kept = len(times) if after is None else max(1, int(np.searchsorted(times, after.chunk.stamp)))
        rows.append((times[:kept], actions[:kept], recording.executed(begin, kept)))
    if not rows:
        return
    times, commanded, executed = (np.concatenate([row[part] for row in rows]) for part in range(3))
    for index, name in enumerate(ACTION[: commanded.shape[1]]):
        sink.scalars(f"action/{name}/commanded", times, commanded[:, index])
        known = ~np.isnan(executed[:, index])
        sink.scalars(f"action/{name}/executed", times[known], executed[known, index])


def _delays(recording: Recording, sink: _Sink) -> None:
    ages = np.array([(log, log - to_seconds(said.header.stamp)) for log, said in recording.chunks]).reshape(-1, 2)
    calls = np.array([(log, decision.seconds) for log, decision in recording.decisions]).reshape(-1, 2)
    sink.scalars("delays/capture_to_chunk_ms", ages[:, 0], 1e3 * ages[:, 1])
    sink.scalars("delays/call_ms", calls[:, 0], 1e3 * calls[:, 1])


def events(recording: Recording) -> Iterable[tuple[float, str, bool]]:
    """What franka_node's status became, and every fault that a node has told: when, in words, and whether it is bad."""
    found = [(log, said.data, said.data in ("fault", "holding")) for log, said in recording.of("franka_node/status")]
    told: dict[str, str] = {}
    for message, said in recording.episode.decoded("/diagnostics"):
        for status in said.status:
            bad = status.level not in (0, b"\x00")
            if bad and told.get(status.name) != status.message:
                found.append((message.log_ns / 1e9, f"{status.name}: {status.message}", True))
            told[status.name] = status.message if bad else ""
    return sorted(found)
