"""What recording costs: `python benchmarks/recording.py --out recording.json`.

Streams: recorder_node beside a process that publishes as a robot does (`robot_streams.py`: two cameras of 640 x 480 px
at 30 Hz, raw or compressed by their driver, joint states and poses at 100 Hz); measured are its share of a core and the
messages that are not in the file. Control: the same trials on the twin with and without the recorder, in turns; the
error of the command's period and the delay from camera to command. Needs rclpy, for the control also franky.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import vla_policy
from rich.progress import Progress

from vla.episode_reader import Episode
from vla.results import commit, machine, write_json

STREAMS = Path(__file__).with_name("robot_streams.py")
PROFILE = Path(vla_policy.__file__).parents[1] / "config" / "fastdds_images.xml"  # raw images of this size need it
HEIGHT, WIDTH = 480, 640  # px
MARGIN_S = 0.5  # at both ends of what is measured
LIMIT_S = 30.0  # for the recorder to close its file


def streams(folder: Path, transport: str, seconds: float, bundle: Path) -> dict[str, Any]:
    """Share of a core of recorder_node, and what was sent and lost of every topic, while a policy acts for so long."""
    words = ["-r", "__ns:=/left"]
    for name, value in {"folder": folder, "checkpoint": bundle, "transport": transport}.items():
        words += ["-p", f"{name}:={value}"]
    recorder = subprocess.Popen([sys.executable, "-m", "vla_policy.start", "recorder_node", "--ros-args", *words])
    robot = subprocess.Popen(
        [sys.executable, str(STREAMS), str(seconds), str(HEIGHT), str(WIDTH), "idle", transport],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"FASTRTPS_DEFAULT_PROFILES_FILE": str(PROFILE)},
    )  # fmt: skip
    try:
        assert robot.stdout is not None
        if robot.stdout.readline() != "acts\n":
            raise SystemExit("the robot's streams ended before they began, see above")
        time.sleep(MARGIN_S)
        process, began = psutil.Process(recorder.pid), time.monotonic()
        used = sum(process.cpu_times()[:2])
        time.sleep(seconds - 2 * MARGIN_S)
        share = (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - began)
        sent = json.loads(robot.stdout.readline())
        recorder.send_signal(signal.SIGINT)
        if recorder.wait(LIMIT_S):
            raise SystemExit(f"recorder_node ended with code {recorder.returncode}, see above")
    finally:
        for child in (robot, recorder):
            child.kill()
            child.wait()
    (file,) = folder.glob("episode_*.mcap")
    episode = Episode(file)
    lost = {}
    for topic, stamps in sent.items():
        headers = (message.header.stamp for _, message in episode.decoded(f"/left/{topic}"))
        lost[topic] = len(set(stamps) - {stamp.sec * 10**9 + stamp.nanosec for stamp in headers})
    return {
        "share_of_a_core": share, "sent": {topic: len(stamps) for topic, stamps in sent.items()}, "lost": lost,
        "megabytes_per_s": file.stat().st_size / 1e6 / seconds,
    }  # fmt: skip


def control(folder: Path, record: bool, arguments: argparse.Namespace, turn: int) -> dict[str, Any]:
    """Trials on the twin."""
    out = folder / "deploy.json"
    words = [
        "deploy", f"checkpoint={arguments.checkpoint}", "use_sim=true", f"trials={arguments.trials}",
        f"seed={90_001 + arguments.trials * turn}", f"logs={folder / 'logs'}", f"out={out}",
    ]  # fmt: skip
    words += [f"record={folder / 'episodes'}"] if record else []
    subprocess.run([sys.executable, "-m", "vla", *words], check=True, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text())
    return {key: found[key] for key in ("successes", "episodes", "faulted", "latency_ms", "period_error_ms")}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"streams": {}, "control": {"alone": [], "recorded": []}}
    steps = 2 + 2 * arguments.repeats
    with tempfile.TemporaryDirectory() as name, Progress() as progress:
        bar = progress.add_task("recording", total=steps)
        for transport in ("raw", "compressed"):
            folder = Path(name) / transport
            found["streams"][transport] = streams(folder, transport, arguments.seconds, arguments.checkpoint)
            progress.advance(bar)
        for turn in range(arguments.repeats):
            for kind in ("alone", "recorded"):
                folder = Path(name) / f"{kind}{turn}"
                folder.mkdir()
                found["control"][kind].append(control(folder, kind == "recorded", arguments, turn))
                progress.advance(bar)
    return found


def markdown(found: dict[str, Any]) -> str:
    lines = ["| recorder_node | share of a core | messages sent | lost | MB/s |", "|---|---|---|---|---|"]
    for transport, told in found["streams"].items():
        sent, lost = sum(told["sent"].values()), sum(told["lost"].values())
        share, rate = told["share_of_a_core"], told["megabytes_per_s"]
        lines.append(f"| {transport} images | {share:.1%} | {sent:,} | {lost} | {rate:.1f} |")
    lines += ["", "| trials on the twin | period error p99, ms | camera to command p50, p99, ms | successes |"]
    lines.append("|---|---|---|---|")
    for kind, runs in found["control"].items():
        if not runs:
            continue
        period = [run["period_error_ms"]["p99"] for run in runs]
        delays = [statistics.mean(run["latency_ms"][key] for run in runs) for key in ("p50", "p99")]
        won, played = (sum(run[key] for run in runs) for key in ("successes", "episodes"))
        lines.append(
            f"| {kind} | {statistics.mean(period):.1f} ({min(period):.1f} to {max(period):.1f}) | "
            f"{delays[0]:.0f}, {delays[1]:.0f} | {won} of {played} |"
        )
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/put_on_plate"), help="policy that acts")
    parser.add_argument("--seconds", type=float, default=30.0, help="that the streams are recorded")
    parser.add_argument("--trials", type=int, default=5, help="of a run on the twin")
    parser.add_argument("--repeats", type=int, default=4, help="runs with and without the recorder; 0 for none")
    arguments = parser.parse_args(given)
    if arguments.seconds < 3 or arguments.trials < 1 or arguments.repeats < 0:
        parser.error("--seconds must be 3 or more, --trials 1 or more, --repeats 0 or more")
    if not (arguments.checkpoint / "contract.json").is_file():
        parser.error(f"{arguments.checkpoint} is no checkpoint")
    os.environ.setdefault("ROS_DOMAIN_ID", str(100 + os.getpid() % 100))
    found = measure(arguments)
    command = shlex.join(["python", *sys.argv])
    write_json(arguments.out, {"command": command, "commit": commit(), "machine": machine("mujoco"), **found})
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
