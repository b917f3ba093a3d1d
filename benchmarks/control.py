"""How the deployment holds and how smoothly it moves: `python benchmarks/control.py --out control.json`.

Watchdog: the policy's process is stopped, killed, or a chunk of NaN is sent, while the arm of the twin moves; measured
is the time until the reference for the arm has come to rest, and until the arm itself is slower than 2 cm/s for good.
Smoothness: the same trials with asynchronous execution and with naive synchronous chunking, side by side; ratios below
1 are in favour of the asynchronous one. Idle pauses are those in which the fingers don't move either.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from trajectory_msgs.msg import MultiDOFJointTrajectory, MultiDOFJointTrajectoryPoint
from vla_policy import graph, messages
from vla_policy.conductor import Conductor, Samples
from vla_policy.deploy import DeployConfig, Graph, running

from deployment.trials import Trial
from vla.results import commit, machine, write_json

STILL = 2e-3  # m/s, of the reference
MOVING = 0.02  # m/s, of the arm; and of the reference, for holding to be worth measuring
WATCHED_S = 1.0
SEEN_S = 0.2  # for which references have to be there before and after the break


def config(arguments: argparse.Namespace, mode: str = "asynchronous") -> DeployConfig:
    return DeployConfig(
        checkpoint=arguments.checkpoint,
        use_sim=True,
        trials=1,
        mode=mode,
        out=arguments.out,
        logs=arguments.logs / mode,
    )


def _speed(trace: Samples, begun: float) -> tuple[np.ndarray, np.ndarray]:
    """Times `[N]` s from `begun` on, and speeds in m/s between them `[N - 1]`."""
    seen = [(t, p) for t, p in trace if t > begun - SEEN_S]
    if not seen or seen[0][0] > begun or seen[-1][0] < begun + SEEN_S:
        raise SystemExit(f"the driver was not heard around the break: {len(seen)} messages")
    grid = np.arange(begun, seen[-1][0], 0.01)
    times, positions = np.array([t for t, _ in seen]), np.array([p for _, p in seen])
    smooth = np.stack([np.interp(grid, times, column) for column in positions.T], 1)
    return grid, np.linalg.norm(np.diff(smooth, axis=0), axis=1) / 0.01


def _until_let_go(wanted: Samples, measured: Samples, begun: float) -> Samples:
    """Once the reference rests after a fault, the driver lets go and tells where the arm is instead: leave that out."""
    places = dict(measured)
    told = [t for t, p in wanted if t >= begun and t in places and (places[t] == p).all()]
    end = told[0] if told else wanted[-1][0]
    kept = [(t, p) for t, p in wanted if t < end]
    return [*kept, (wanted[-1][0], kept[-1][1])]


class Watchdog:
    """Breaks the policy while the arm moves, and measures how long it goes on."""

    def __init__(self, made: Graph, conductor: Conductor):
        self.made, self.conductor, self.seed = made, conductor, 95_001
        self.publisher = conductor.node.create_publisher(MultiDOFJointTrajectory, "chunk", messages.COMMAND)

    def measure(self, breaks: Callable[[], None], mends: Callable[[], None]) -> tuple[float, float]:
        """Milliseconds from the break to the rest of the reference and of the arm."""
        conductor = self.conductor
        with conductor.tracing() as wanted, conductor.tracing("current_pose") as measured:
            while True:
                self._set_off()
                if conductor.wait_for_speed(MOVING, 4.0):
                    break
                conductor.trigger("franka_node/stop")
                self.seed += 1
            time.sleep(float(np.random.default_rng(self.seed).uniform(0.0, 0.4)))  # at any moment of a chunk
            begun = time.time()
            breaks()
            time.sleep(WATCHED_S)
        self.seed += 1
        mends()
        times, speed = _speed(_until_let_go(wanted, measured, begun), begun)
        moving = times[:-1][speed > STILL]
        rest = moving[-1] if len(moving) else begun
        times, speed = _speed(measured, begun)
        moving = times[1:][speed > MOVING]
        return 1e3 * max(0.0, float(rest - begun)), 1e3 * float(moving[-1] - begun if len(moving) else 0.0)

    def _set_off(self) -> None:
        self.conductor.prepare(self.seed, "in_distribution")
        end = time.monotonic() + 30
        while not self.conductor.trigger("franka_node/start")[0]:
            if time.monotonic() > end:
                raise SystemExit("the policy does not come back")
            time.sleep(0.1)

    def stop_process(self) -> None:
        self.made.processes["policy_node"].send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.made.processes["policy_node"].send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.made.processes["policy_node"].kill()

    def restart(self) -> None:
        spec = next(s for s in self.made.specs if s.executable == "policy_node")
        self.made.processes["policy_node"].wait()
        self.made.processes["policy_node"] = subprocess.Popen(
            graph.command_line(sys.executable, spec, ""), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def send_nan(self) -> None:
        message = MultiDOFJointTrajectory(joint_names=["fr3_hand_tcp", "fr3_gripper"])
        message.header.stamp = messages.to_time(time.time())
        for row in range(9):
            tool, gripper = messages.Transform(), messages.Transform()
            tool.translation.x = float("nan")
            message.points.append(
                MultiDOFJointTrajectoryPoint(
                    transforms=[tool, gripper], time_from_start=messages.Duration(nanosec=50_000_000 * row % 10**9)
                )
            )
        self.publisher.publish(message)


def watchdog(arguments: argparse.Namespace) -> dict[str, Any]:
    kinds = ("hung", "not_a_number", "killed")
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with running(config(arguments)) as made, Conductor("", lambda: "") as conductor, Progress() as progress:
        conductor.wait_until_ready()
        test = Watchdog(made, conductor)
        ways = {
            "hung": (test.stop_process, test.go_on),
            "not_a_number": (test.send_nan, lambda: None),
            "killed": (test.kill, test.restart),
        }
        bar = progress.add_task("watchdog", total=arguments.faults)
        for number in range(arguments.faults):
            kind = kinds[number % 3]
            found[kind].append(test.measure(*ways[kind]))
            progress.advance(bar)
    everything = np.array([v for kind in found.values() for v in kind])  # [times, reference and arm]
    each = {k: {"times": len(v), **_summary(np.array(v))} for k, v in found.items() if v}
    within = int((everything[:, 1] <= 200).sum())
    return {**_summary(everything), "within_200_ms": within, "times": len(everything), "kinds": each}


def _summary(values: np.ndarray) -> dict[str, float]:
    """Of times `[N, 2]` of the reference and the arm, in ms."""
    reference, arm = values.T
    return {
        "max": float(arm.max()), "median": float(np.median(arm)),
        "reference_max": float(reference.max()), "reference_median": float(np.median(reference)),
    }  # fmt: skip


def trials(arguments: argparse.Namespace, mode: str) -> list[Trial]:
    with running(config(arguments, mode)) as made, Conductor("", made.ended) as conductor, Progress() as progress:
        conductor.wait_until_ready()
        bar = progress.add_task(mode, total=arguments.trials)
        played = []
        for index in range(arguments.trials):
            played.append(conductor.play(90_001 + index, "in_distribution", arguments.trial_s))
            progress.advance(bar)
    return played


def smoothness(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ratios, asynchronous over synchronous, on the trials that succeed in both; bootstrap intervals over trials."""
    played = {mode: trials(arguments, mode) for mode in ("asynchronous", "synchronous")}
    pairs = [
        (a, s) for a, s in zip(*played.values(), strict=True) if a.success and s.success and a.trace and s.trace
    ]  # fmt: skip
    rows = np.array(
        [
            [
                [t.trace.pauses(), t.trace.idle_pauses(), t.trace.squared_jerk(), t.seconds]
                for t in pair
                if t.trace is not None
            ]
            for pair in pairs
        ],
        float,
    )  # [pairs, mode, measure]
    names = ("pauses", "idle_pauses", "jerk", "time")
    result: dict[str, Any] = {
        "trials": arguments.trials, "in_both": len(pairs),
        **{f"successes_{mode}": sum(t.success for t in found) for mode, found in played.items()},
    }  # fmt: skip
    if pairs:
        random = np.random.default_rng(0)
        draws = rows[random.integers(len(rows), size=(2000, len(rows)))].mean(1)
        ratio = rows.mean(0)[0] / np.maximum(rows.mean(0)[1], 1e-9)
        spread = np.quantile(draws[:, 0] / np.maximum(draws[:, 1], 1e-9), (0.025, 0.975), axis=0)
        for column, name in enumerate(names):
            result[f"{name}_ratio"] = float(ratio[column])
            unbounded = bool((draws[:, 1, column] == 0).any())  # too few for an interval: some draws have none at all
            result[f"{name}_ratio_95"] = None if unbounded else [float(v) for v in spread[:, column]]
            result[f"{name}_mean"] = {m: float(v) for m, v in zip(played, rows.mean(0)[:, column], strict=True)}
    return result


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/put_on_plate"))
    parser.add_argument("--faults", type=int, default=100, help="breaks of the policy")
    parser.add_argument("--trials", type=int, default=20, help="trials of each mode")
    parser.add_argument("--trial-s", type=float, default=15.0, help="time limit of a trial")
    parser.add_argument("--logs", type=Path, default=Path("runs/control"), help="folder of the nodes' output")
    arguments = parser.parse_args(words)
    os.environ.setdefault("ROS_DOMAIN_ID", "77")
    result = {
        "watchdog_ms": watchdog(arguments) if arguments.faults else None,
        "smoothness": smoothness(arguments) if arguments.trials else None,
        "command": shlex.join(["python", "benchmarks/control.py", *(words or sys.argv[1:])]),
        "commit": commit(),
        "machine": machine("mujoco", "torch", "franky-control", "franky-sim"),
    }
    write_json(arguments.out, result)
    for name in ("watchdog_ms", "smoothness"):
        if result[name]:
            print(name, {k: v for k, v in result[name].items() if not isinstance(v, dict)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
