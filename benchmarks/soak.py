"""Whether the deployment stays as it begins: `python benchmarks/soak.py --out soak.json`.

Trials on the twin, one after the other, for --minutes. Reported: resident memory of every process at the beginning
(after a tenth of the time) and at the end, delays in the first and in the last third, holds for want of a heartbeat,
faults.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from vla_policy.conductor import Conductor
from vla_policy.deploy import DeployConfig, Graph, running

from vla.results import commit, machine, write_json

SAMPLE_S = 5.0


def memory_mib(made: Graph) -> dict[str, float]:
    """Resident memory of the nodes and of what they started."""
    found = {}
    for name, process in made.processes.items():
        node = psutil.Process(process.pid)
        found[name] = node.memory_info().rss / 2**20
        for number, child in enumerate(sorted(node.children(recursive=True), key=lambda c: c.pid)):
            found[f"{name}, child {number + 1}"] = child.memory_info().rss / 2**20
    return found


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    config = DeployConfig(
        checkpoint=arguments.checkpoint, use_sim=True, trials=1, out=arguments.out, logs=arguments.logs
    )  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with running(config) as made, Conductor("", made.ended) as conductor, Progress(*columns) as progress:
        conductor.wait_until_ready()
        seconds, begun, seed = 60 * arguments.minutes, time.monotonic(), 90_001
        samples: list[tuple[float, dict[str, float], int, int]] = []
        played, succeeded, faults = 0, 0, []
        bar = progress.add_task("soak", total=seconds, note="")
        while (now := time.monotonic() - begun) < seconds:
            trial = conductor.play(seed + played, "in_distribution", arguments.trial_s)
            played, succeeded = played + 1, succeeded + trial.success
            faults += [trial.fault] if trial.fault else []
            if not samples or now - samples[-1][0] > SAMPLE_S:
                counts = len(conductor.latency_ms), len(conductor.period_error_ms)
                samples.append((now, memory_mib(made), *counts))
            progress.update(bar, completed=now, note=f"{succeeded}/{played}")
        told = conductor.diagnostics.get("franka_node", {})
        latency, period = np.array(conductor.latency_ms), np.array(conductor.period_error_ms)
    times = np.array([t for t, *_ in samples])
    first, last = (int(np.searchsorted(times, share * seconds)) for share in (1 / 3, 2 / 3))
    settled = samples[min(int(np.searchsorted(times, 0.1 * seconds)), len(samples) - 1)][1]
    return {
        "minutes": arguments.minutes,
        "trials": played,
        "successes": succeeded,
        "faults": faults,
        "missed_heartbeats": int(told.get("held_without_heartbeat", 0)),
        "memory_mib": {n: {"begin": settled[n], "end": v} for n, v in samples[-1][1].items() if n in settled},
        "latency_ms": _thirds(latency, samples[first][2], samples[last][2]),
        "period_error_ms": _thirds(period, samples[first][3], samples[last][3]),
    }


def _thirds(values: np.ndarray, first: int, last: int) -> dict[str, Any]:
    """p50 and p99 of the values before `first` and from `last` on."""
    return {
        name: {"p50": float(np.quantile(part, 0.5)), "p99": float(np.quantile(part, 0.99)), "samples": len(part)}
        for name, part in (("first_third", values[:first]), ("last_third", values[last:]))
        if len(part)
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/put_on_plate"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--trial-s", type=float, default=10.0, help="time limit of a trial")
    parser.add_argument("--logs", type=Path, default=Path("runs/soak"), help="folder of the nodes' output")
    arguments = parser.parse_args(words)
    os.environ.setdefault("ROS_DOMAIN_ID", "78")
    result = {
        **soak(arguments),
        "command": shlex.join(["python", "benchmarks/soak.py", *(words or sys.argv[1:])]),
        "commit": commit(),
        "machine": machine("mujoco", "torch", "franky-control", "franky-sim"),
    }
    write_json(arguments.out, result)
    print({k: v for k, v in result.items() if k not in ("machine", "faults")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
