"""The speed of the published architectures: every row is measured, and the program for a GPU refuses to run without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/gpu/models.py", "--out", tmp_path / "models.json"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert done.returncode == 1 and "GPU" in done.stderr and not (tmp_path / "models.json").exists()


@pytest.mark.slow
def test_every_way_of_deciding_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "models.json"
    words = ["--device", "cpu", "--out", out, "--repeats", "1", "--batches", "1", "2", "--speedups", "none", "graph"]
    command = [sys.executable, ROOT / "benchmarks/models.py", *words, "--train-batches", "1"]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads(out.read_text())["rows"]
    expected = [("decision", 1, "none"), ("decision", 1, "graph"), ("decision", 2, "none"), ("LoRA step", 1, "none")]
    for kind in ("OpenVLA", "OpenVLA-OFT"):
        assert [(r["what"], r["batch"], r["speedup"]) for r in rows if r["model"] == kind] == expected
    assert all(row["floor_ms"] > 0 and row["ms"] > 0 and row["flop"] > 1e6 for row in rows)
