"""Whether the asynchronous schedule learns as the synchronous one does:
`python benchmarks/asynchronous_learning.py runs/sft/checkpoint --out results.json`.

From one imitation and for every seed, `vla train experiment=tabletop_async_ppo` and the same with
placement=pipelined, one run after the other, then a greedy evaluation of both. Training's success is over the last 200
episodes at least. A killed benchmark goes on where it stopped; so does one with more seeds. Further options of
`vla train` follow the others: `... --out results.json algorithm.learning_rate=1e-4`.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.comparison.runs import windowed
from vla.results import commit, machine, write_json

EXPERIMENT = "tabletop_async_ppo"
PLACEMENTS = {"synchronous": "pipelined", "asynchronous": "asynchronous"}  # configs/placement
GOAL = 0.8
WINDOW = 200  # episodes
LOOK_S = 5.0  # between looks at the machine's load
OF_EACH_UPDATE = (
    "train/approx_kl", "train/clip_fraction", "train/staleness_mean", "train/importance", "train/truncated_share",
    "train/explained_variance", "time/env_steps_per_s", "rollout/dropped_fragments",
)  # fmt: skip


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "vla", *words]


def follow(words: Sequence[str], log: Path) -> None:
    """Run it to its end; the machine's load average of a minute is written to `log` all the while."""
    process = subprocess.Popen(words)
    try:
        while process.poll() is None:
            with log.open("a") as file:
                file.write(f"{os.getloadavg()[0]:.2f}\n")
            time.sleep(LOOK_S)
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        raise SystemExit(f"`{shlex.join(words)}` failed, see above; the same command goes on after it is mended")


def measure(run: Path, start: Path, seed: int, placement: str, options: Sequence[str], episodes: int) -> None:
    """Train and evaluate, unless that is done."""
    run.parent.mkdir(parents=True, exist_ok=True)
    load, score = run.with_suffix(".load"), run.with_suffix(".eval.json")
    if not (run / "checkpoint").exists():
        words = (f"experiment={EXPERIMENT}", f"placement={placement}", f"checkpoint={start}", f"out={run}")
        follow(command("train", *words, f"seed={seed}", *options), load)
    if not score.exists():
        words = (f"checkpoint={run / 'checkpoint'}", f"out={score}", "suite=in_distribution", f"episodes={episodes}")
        subprocess.run(command("eval", *words), check=True)


def success(rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """After each iteration: over its episodes and those before it, as many iterations as give WINDOW of them."""
    return [wins / episodes if episodes >= WINDOW else None for wins, episodes in windowed(rows, WINDOW)]


def summarize(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = success(rows)
    reached = next((i for i, rate in enumerate(curve) if rate is not None and rate >= GOAL), None)
    load = [float(line) for line in run.with_suffix(".load").read_text().split()]
    scored = json.loads(run.with_suffix(".eval.json").read_text())
    means = {}
    for name in OF_EACH_UPDATE:
        values = [row[name] for row in rows if row.get(name) is not None]
        means[name] = statistics.mean(values) if values else None
    return {
        "to_goal": None if reached is None else {
            "iterations": reached + 1, "env_steps": rows[reached]["time/total_env_steps"],
            "minutes": rows[reached]["time/elapsed_s"] / 60,
        },
        "iterations": len(rows), "env_steps": rows[-1]["time/total_env_steps"],
        "minutes": rows[-1]["time/elapsed_s"] / 60, "success": curve[-1],
        "evaluation": scored["axes"]["in_distribution"], "load_average": statistics.mean(load), "means": means,
        "curve": {
            "env_steps": [row["time/total_env_steps"] for row in rows],
            "minutes": [row["time/elapsed_s"] / 60 for row in rows], "success": curve,
            "approx_kl": [row["train/approx_kl"] for row in rows],
        },
    }  # fmt: skip


def markdown(seeds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    lines = [
        f"| seed | schedule | env steps to {GOAL:.0%} | minutes to {GOAL:.0%} | success at the end | evaluation | KL | "
        "env steps/s | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, found in seeds.items():
        for schedule, run in found.items():
            goal, scored, means = run["to_goal"], run["evaluation"], run["means"]
            low, high = scored["wilson95"]
            reached = f"{goal['env_steps']:,} | {goal['minutes']:.1f}" if goal else "not reached | "
            lines.append(
                f"| {seed} | {schedule} | {reached} | {run['success']:.1%} of {run['env_steps']:,} steps | "
                f"{scored['rate']:.1%} ({100 * low:.0f} to {100 * high:.0f}) | {means['train/approx_kl']:.3f} | "
                f"{means['time/env_steps_per_s']:.0f} | {run['load_average']:.1f} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the imitation to start from")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/asynchronous_learning"), help="folder of the runs")
    parser.add_argument("--episodes", type=int, default=100, help="of the evaluation")
    arguments, options = parser.parse_known_args()
    seeds: dict[str, dict[str, Any]] = {}
    for number, seed in enumerate(arguments.seeds):
        names = list(PLACEMENTS)[:: 1 if number % 2 else -1]  # so that neither is always the first
        for schedule in names:
            run = arguments.runs / f"{schedule}_{seed}"
            measure(run, arguments.checkpoint, seed, PLACEMENTS[schedule], options, arguments.episodes)
            seeds.setdefault(str(seed), {})[schedule] = summarize(run)
            write_json(arguments.out, {
                "command": shlex.join(["python", *sys.argv]), "commit": commit(),
                "machine": machine("torch", "mujoco", "ray"), "goal": GOAL, "window": WINDOW, "seeds": seeds,
            })  # fmt: skip
    print(markdown(seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
