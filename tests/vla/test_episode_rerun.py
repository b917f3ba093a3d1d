"""An episode for Rerun: what is in the file is what was recorded, at its times. Rerun itself reads it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla import episode_list
from vla.episode_list import EpisodesConfig
from vla.episode_reader import Episode
from vla.errors import SimrealError
from vla.policy import Policy
from vla.recording import Recording

Record = Callable[..., Path]
Table = dict[str, tuple[np.ndarray, list[Any]]]  # entity -> times in ns, and values


def read(file: Path) -> Table:
    """As Rerun's own reader has it: the first component of each entity."""
    chunk = pytest.importorskip("rerun.chunk", reason="rerun-sdk is not installed: pip install 'simreal[rerun]'")
    found: Table = {}
    for part in chunk.RrdReader(file).stream().to_chunks():
        batch, path = part.to_record_batch(), part.entity_path.lstrip("/")
        if part.is_static:
            continue
        assert [name for name in batch.schema.names if "time" in name] == ["time"]
        times = np.array(batch.column("time").cast("int64").to_pylist())
        column = next(n for n in batch.schema.names if ":" in n and not n.endswith((":media_type", ":level")))
        before = found.get(path, (np.zeros(0, np.int64), []))
        values = batch.column(column).to_pylist()
        found[path] = np.concatenate([before[0], times]), [*before[1], *values]
    return found


def test_the_file_holds_what_was_recorded(tmp_path: Path, acting: Policy, record: Record) -> None:
    pytest.importorskip("rerun", reason="rerun-sdk is not installed: pip install 'simreal[rerun]'")
    file = record(tmp_path, acting, seconds=1.0)
    out = tmp_path / "one.rrd"
    assert episode_list.run(EpisodesConfig(file, "view", out=out)) == 0
    found, recording = read(out), Recording(Episode(file))
    times, values = found["tool/x/measured"]
    assert np.array_equal(times, np.round(recording.tool.times * 1e9).astype(np.int64))
    assert np.allclose(np.array(values).ravel(), recording.tool.positions[:, 0])
    assert len(found["tool/z/sent"][0]) == len(recording.target.times)
    assert np.allclose(np.array(found["gripper/width_mm"][1]).ravel(), 1e3 * recording.widths[1])
    times, frames = found["cameras/wrist"]
    (_, first) = next(iter(Episode(file).decoded("/left/wrist/image_raw/compressed")))
    assert len(times) == 20 and bytes(np.array(frames[0]).ravel().astype(np.uint8)) == bytes(first.data)
    decisions = [decision for _, decision in recording.decisions]
    times, values = found["action/gripper/commanded"]
    assert times[0] == round(decisions[0].chunk.stamp * 1e9)
    assert np.array(values).ravel()[0] == decisions[0].chunk.actions[0, 6]
    executed = np.array(found["action/x/executed"][1]).ravel()
    assert np.allclose(executed[:6], recording.executed(decisions[0].chunk.stamp, 6)[:, 0])
    assert np.allclose(np.array(found["delays/call_ms"][1]).ravel(), 20.0)
    assert len(found["arm/chunk"][0]) == len(decisions) and len(found["events"][0]) == 2
    assert "running" in str(found["events"][1][0])


def test_without_rerun_the_command_says_what_to_install(
    tmp_path: Path, acting: Policy, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    file = record(tmp_path, acting, seconds=0.3)
    with pytest.raises(SimrealError, match=r"simreal\[rerun\]"):
        episode_list.run(EpisodesConfig(file, "view", out=tmp_path / "one.rrd"))
    with pytest.raises(SimrealError, match="OUT"):
        record(tmp_path, acting, seconds=0.3, number=2)
        episode_list.run(EpisodesConfig(tmp_path, "view", out=tmp_path / "one.rrd"))
