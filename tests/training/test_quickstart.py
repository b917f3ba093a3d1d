"""`vla quickstart` as its user runs it, in small: killed in the middle, gone on with, reported."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from training import quickstart

ROOT = Path(__file__).parents[2]
TINY = (
    "episodes=6", "scenes=600", "scene_samples=128", "samples=128", "iterations=3", "slots=4", "decisions=4",
    "eval_episodes=1", "eval_in_distribution_episodes=2", "algorithm.perception_steps=1",
    "placement.environment_workers=1", "placement.learners=1",
)  # fmt: skip
LIMIT_S = 240


def start(out: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "vla", "quickstart", f"out={out}", *TINY]
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, cwd=ROOT)


def test_the_account_of_a_step_survives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Callable[..., bool]
) -> None:
    monkeypatch.setattr(quickstart, "WRITE_S", 0.0)
    file = tmp_path / "usage.json"
    killed = quickstart.Meter(file, lambda: 7)
    with killed.step("PPO"):
        assert until(file.exists)
        record = json.loads(file.read_text())
        assert record["steps"]["PPO"] == record["wall_s"] > 0 and record["env_steps"] == 7
        killed.close()
        resumed = quickstart.Meter(file, lambda: 9)
        with resumed.step("PPO"):
            time.sleep(0.05)
        resumed.close()
        after = json.loads(file.read_text())
    assert after["wall_s"] >= record["wall_s"] + 0.05 and after["steps"]["PPO"] == after["wall_s"]
    assert after["env_steps"] == 9


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S + 60)
def test_a_killed_quickstart_goes_on_and_ends_in_a_report(tmp_path: Path) -> None:
    out, metrics = tmp_path / "run", tmp_path / "run" / "rl" / "metrics.jsonl"
    first = start(out, tmp_path / "first.log")
    try:
        end = time.monotonic() + LIMIT_S
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):  # the first one's weights are safe
            assert first.poll() is None and time.monotonic() < end, (tmp_path / "first.log").read_text()
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    imitation = (out / "sft" / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    second = start(out, tmp_path / "second.log")
    assert second.wait(LIMIT_S) == 0, (tmp_path / "second.log").read_text()
    assert "resuming" in (tmp_path / "second.log").read_text()
    assert (out / "sft" / "checkpoint" / "model.safetensors").stat().st_mtime_ns == imitation  # what is done stays
    assert [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()] == [0, 1, 2]

    report = json.loads((out / "report.json").read_text())
    for name in ("sft", "rl"):
        assert set(report[name]) == {"in_distribution", "vision", "semantic", "execution"}
        assert set(report["controls"][name]) == {"blind", "wrong_instruction"}
        assert report["variants"][name]["unseen_table"]["episodes"] == 1
        assert report["variants"][name]["in_distribution"]["episodes"] == 2
    assert report["wall_s"] > 0 and report["peak_rss_mib"] > 0 and report["env_steps"] > 0
    assert report["seed"] == 0 and report["machine"]["cores"] > 0
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page and "data:video/mp4;base64," in page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained

    summary, figure = tmp_path / "summary.json", tmp_path / "curves.png"
    command = [sys.executable, "benchmarks/learning.py", str(out), "--out", str(summary), "--figure", str(figure)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert "mean of the three" in done.stdout and figure.stat().st_size > 0
    assert json.loads(summary.read_text())["runs"][0]["curve"]["env_steps"][-1] == report["env_steps"]
