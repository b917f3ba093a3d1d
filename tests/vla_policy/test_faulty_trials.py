"""`vla trials` on an arm that stops with a fault each time: it says so, and its process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(150)
def test_after_three_faults_the_process_ends(tmp_path: Path) -> None:
    env = {**os.environ, "ROS_DOMAIN_ID": os.environ.get("ROS_DOMAIN_ID", str(100 + os.getpid() % 100))}
    script = Path(__file__).with_name("faulty_trials.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "trials")], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("ended with"):
                break
        assert process.wait(20) == 2, said  # TimeoutExpired, if a thread or a node keeps it
    finally:
        process.kill()
        process.wait()
    text = "".join(said)
    assert text.count("trial 1: fault, repeated: a fault is latched: CAMERA_SILENT") == 3
    assert "[FAULTS] 3 faults in trial 1" in text and said[-1] == "ended with 2\n"
    log = (tmp_path / "trials" / "trials.jsonl").read_text()
    assert log.count('"event": "end"') == 3 and '"label"' not in log  # nothing was scored
