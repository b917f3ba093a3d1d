"""recorder_node in a process of its own, and a robot's streams from another."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import vla_policy
from rosbags.highlevel import AnyReader

from vla.episode_edit import repair
from vla.episode_reader import Episode

pytestmark = pytest.mark.timeout(120)
STREAMS = Path(__file__).parents[2] / "benchmarks" / "robot_streams.py"
PROFILE = Path(vla_policy.__file__).parents[1] / "config" / "fastdds_images.xml"
Start = Callable[..., "Recording"]


class Recording:
    """The recorder's process, its folder and what it says."""

    def __init__(self, folder: Path, contract: Path, log: Path, **parameters: str):
        self.folder, self.log = folder, log
        given = {"folder": folder, "checkpoint": contract.parent, **parameters}
        words = [word for name, value in given.items() for word in ("-p", f"{name}:={value}")]
        command = [sys.executable, "-m", "vla_policy.start", "recorder_node", "--ros-args", "-r", "__ns:=/left", *words]
        self.process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("episode_*"))

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def start(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(folder=..., PARAMETER=...): a recorder; ended afterwards. Apart from whatever else runs on this machine."""
    monkeypatch.setenv("ROS_DOMAIN_ID", os.environ.get("ROS_DOMAIN_ID", str(100 + os.getpid() % 100)))
    made: list[Recording] = []

    def begin(folder: Path = tmp_path / "episodes", **parameters: str) -> Recording:
        made.append(Recording(folder, bundle / "contract.json", tmp_path / "recorder.log", **parameters))
        return made[-1]

    yield begin
    for recording in made:
        recording.process.kill()
        recording.process.wait()


@contextmanager
def robot(
    seconds: float, height: int = 64, width: int = 64, end: str = "idle", transport: str = "raw"
) -> Iterator[subprocess.Popen[str]]:
    """The robot's process, once its policy acts."""
    words = [str(word) for word in (seconds, height, width, end, transport)]
    process = subprocess.Popen(
        [sys.executable, str(STREAMS), *words],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "FASTRTPS_DEFAULT_PROFILES_FILE": str(PROFILE)},
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "acts\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("transport", ["raw", "compressed"])
def test_nothing_is_lost_at_the_rates_of_a_robot(
    start: Start, transport: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = start(transport=transport)
    seconds = 5.0
    with robot(seconds, 480, 640, transport=transport) as publisher:
        measured = psutil.Process(recording.process.pid)
        used, began = measured.cpu_times(), time.monotonic()
        time.sleep(seconds - 0.5)
        now = measured.cpu_times()
        share = (now.user + now.system - used.user - used.system) / (time.monotonic() - began)
        assert publisher.stdout is not None
        sent: dict[str, list[int]] = json.loads(publisher.stdout.readline())
    assert recording.end() == 0, recording.log.read_text()
    (file,) = recording.files
    episode = Episode(file)
    lost = {}
    for topic, stamps in sent.items():
        found = [
            said.header.stamp.sec * 10**9 + said.header.stamp.nanosec for _, said in episode.decoded(f"/left/{topic}")
        ]
        assert len(found) == len(set(found)) and len(found) > len(stamps)  # a little before and after, too
        lost[topic] = len(set(stamps) - set(found))
    with capsys.disabled():
        counts = {topic: len(stamps) for topic, stamps in sent.items()}
        print(f"\nrecorder_node, {transport}: {100 * share:.1f}% of a core, sent {counts}, lost {lost}")
    assert not any(lost.values()) and len(sent) == 8
    assert counts["joint_states"] > 60 * seconds and counts["wrist/image_raw/compressed"] > 18 * seconds
    assert share < 0.3
    assert episode.complete and set(episode.attachments) == {"contract.json", "provenance.json"}
    assert episode.info.instruction == "put the red cube on the plate" and episode.info.namespace == "/left"
    _, picture = next(episode.decoded("/left/wrist/image_raw/compressed"))
    with AnyReader([file]) as bag:
        assert bag.topics["/left/joint_states"].msgcount == episode.counts["/left/joint_states"]
        (status,) = [c for c in bag.connections if c.topic == "/left/franka_node/status"]
        qos = status.ext.offered_qos_profiles[0]
        assert (qos.durability.name, qos.reliability.name) == ("TRANSIENT_LOCAL", "RELIABLE")
        assert {str(bag.deserialize(raw, c.msgtype).data) for c, _, raw in bag.messages([status])} == {
            "running", "idle",
        }  # fmt: skip
        connection, _, raw = next(bag.messages(bag.topics["/left/wrist/image_raw/compressed"].connections))
        assert bytes(bag.deserialize(raw, connection.msgtype).data) == bytes(picture.data)


def test_a_fault_ends_the_episode_and_is_told_and_the_next_goes_on_counting(start: Start) -> None:
    recording = start()
    for end in ("fault", "idle"):
        with robot(1.0, end=end) as publisher:
            publisher.wait(20)
    assert recording.end() == 0
    first, second = (Episode(file) for file in recording.files)
    assert (first.info.number, first.info.outcome) == (1, "fault") and "POLICY_SILENT" in first.info.note
    assert (second.info.number, second.info.outcome, second.info.note) == (2, "", "")
    _, said = next(first.decoded("/left/third_person/image_raw/compressed"))
    assert said.format.startswith("rgb8; png")


def test_ctrl_c_closes_the_file_and_a_kill_leaves_what_can_be_repaired(start: Start) -> None:
    recording = start()
    with robot(30.0):
        time.sleep(1.5)
        assert recording.end() == 0
    (file,) = recording.files
    episode = Episode(file)
    assert episode.complete and episode.info.outcome == "interrupted" and "stopped" in episode.info.note
    recording = start()
    with robot(30.0):
        time.sleep(2.0)
        assert recording.end(signal.SIGKILL) == -signal.SIGKILL
    _, part = recording.files
    assert part.suffix == ".part" and Episode(repair(part)).info.number == 2
    seconds = Episode(recording.files[1]).seconds
    assert seconds > 1.0 and Episode(recording.files[1]).counts["/left/joint_states"] > 80 * seconds


def test_a_recorder_without_space_stops_the_robot(start: Start, until: Callable[..., bool]) -> None:
    recording = start(reserve_mb=str(2**20))  # 1 TiB left free
    with robot(20.0) as publisher:
        assert publisher.stdout is not None and publisher.stdout.readline() == "stop was called\n"
    assert until(lambda: "DISK_FULL" in recording.log.read_text())
    assert recording.process.poll() is None and recording.end() == 0  # it goes on, for when there is space again
    assert "franka_node is stopped" in recording.log.read_text() and not recording.files


@pytest.mark.parametrize(
    ("parameters", "told"),
    [({"folder": "/proc/nowhere"}, "EPISODE_WRITE"), ({"checkpoint": "/nowhere"}, "CONTRACT_MISSING")],
)
def test_what_can_not_work_ends_with_a_plain_message(start: Start, parameters: dict[str, str], told: str) -> None:
    recording = start(**{**parameters, **({"folder": Path(parameters["folder"])} if "folder" in parameters else {})})
    assert recording.process.wait(30) == 2
    assert told in recording.log.read_text() and "Traceback" not in recording.log.read_text()
