"""From robot to desk: what policy_node answered comes out of its recording again, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deployment import replay_command
from deployment.replay_command import ReplayConfig
from vla.episode_reader import Episode
from vla.recording import Recording
from vla.rig import CameraCalibration, Delay, Intrinsics, Measured, Store

pytestmark = pytest.mark.timeout(180)


def test_replaying_what_the_node_recorded_gives_its_actions_bit_for_bit(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", os.environ.get("ROS_DOMAIN_ID", str(100 + os.getpid() % 100)))
    folder, store = tmp_path / "episodes", tmp_path / "rig"
    made = Measured("2026-11-26T08:00:00+00:00", "a test", 1, 0.1)
    late = Delay(0.06, (0.0, 0.1), 0.0, (0.0, 0.0), 0.0, (0.0, 0.0), made)
    for camera, delay in (("third_person", None), ("wrist", late)):
        Store(store).write(CameraCalibration(camera, Intrinsics.from_fov(64, 64, 60.0), made, delay=delay))
    given = {
        # A machine that is busy must not keep the policy from answering.
        "policy_node": {"checkpoint": bundle, "limit_s": 5.0, "tolerance_s": 0.3, "calibration": store},
        "recorder_node": {"checkpoint": bundle, "folder": folder, "reserve_mb": 0, "calibration": store},
    }
    nodes = []
    try:
        for name, parameters in given.items():
            words = [word for key, value in parameters.items() for word in ("-p", f"{key}:={value}")]
            command = [sys.executable, "-m", "vla_policy.start", name, "--ros-args", "-r", "__ns:=/left", *words]
            log = (tmp_path / f"{name}.log").open("w")
            nodes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        arm = [sys.executable, str(Path(__file__).with_name("arm.py")), "4.0"]
        done = subprocess.run(arm, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
        assert int(done.stdout.split()[-1]) > 5
    finally:
        for node in nodes:
            node.send_signal(signal.SIGINT)
        for node in nodes:
            node.wait(20)
    (file,) = folder.glob("*.mcap")
    recorded = Episode(file).counts["/left/decision"]
    recording = Recording(Episode(file))
    assert recording.late == {"third_person": 0.0, "wrist": 0.06} and recording.decisions[0][1].late is not None
    assert sorted(recording.calibrations) == ["third_person", "wrist"]
    recording.decisions = [(log, replace(decision, late=None)) for log, decision in recording.decisions]
    del recording.late
    assert recording.late == {"wrist": 0.06}  # as the calibration in the file has it
    out = tmp_path / "replay.json"
    assert replay_command.run(ReplayConfig(folder, [bundle], out=out)) == 0
    (entry,) = json.loads(out.read_text())["checkpoints"]
    assert entry["recorded_by_it"] == 1 and entry["decisions"] == recorded > 5
    # A message may be lost between processes on a busy machine; what was seen and answered is recorded with the chunk.
    assert entry["missing"] <= 1 and entry["observations_equal"] >= entry["decisions"] - entry["missing"] - 1
    assert entry["actions_equal"] == entry["decisions"] - entry["missing"] and entry["greatest_difference"] == 0.0
    assert entry["chunks_equal"] == entry["chunks"] >= 0.9 * entry["decisions"]  # of those the newest one counts
    assert out.with_suffix(".png").stat().st_size > 10_000
