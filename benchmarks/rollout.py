"""How fast rollouts are: `python benchmarks/rollout.py --out rollout.json`.

1. Environment steps/s per core: the tabletop in one process on one core replays chunks of the scripted expert,
   so that objects are grasped and carried, and renders the policy's two images once a chunk. Resets count.
2. Pipelined over sequential placement: the same rollouts through the engine, one policy thread, in turns within
   one run. `median` compares one environment worker with two stages and with one; `two_workers` does so with two
   workers; `both_cores` compares two pipelined workers with one sequential worker. `bound` is the ratio that
   perfect overlap would give one worker, from the busy times of its sequential rollouts. There is little to hide
   behind a policy that is quick, so the ratio depends on the model: `models` has all of --models, and
   `pipelined_over_sequential` is the last one's.

Exit code 1 if a median misses its target. Other work on the machine spoils both: its load is in the result.
"""

import argparse
import multiprocessing as mp
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from training.algorithms.ppo import PPOConfig
from training.envs.base import EpisodeRequest
from training.envs.tabletop import TIMESTEP, Tabletop
from training.pipeline.actors import ray_session
from training.pipeline.engine import Rollout
from training.pipeline.placement import PlacementConfig
from training.pipeline.synchronous import Synchronous
from training.sft import SftConfig
from vla import configuration
from vla.policy import Policy
from vla.results import commit, machine, write_json
from vla.statistics import ArrayStatistics, Statistics
from vla.tasks.expert import Expert
from vla.tasks.put_on_plate import MAX_STEPS, training_sentences
from vla.tokenizer import train_tokenizer

TARGETS = {"env_steps_per_s_per_core": 800.0, "pipelined_over_sequential": 1.4}
SEED = 77_000_000
EPISODES = 48  # of a repeat of part 1
ENVIRONMENTS = 8  # of part 1
PLACEMENTS = {
    f"{name}_{workers}": PlacementConfig(environment_workers=workers, stages=stages, policy_threads=1, learners=1)
    for workers in (1, 2)
    for name, stages in (("sequential", 1), ("pipelined", 2))
}
PAIRS = {  # name of the ratio -> its numerator and denominator
    "one_worker": ("pipelined_1", "sequential_1"),
    "two_workers": ("pipelined_2", "sequential_2"),
    "both_cores": ("pipelined_2", "sequential_1"),
}


@dataclass(frozen=True)
class Replay:
    """One repeat of part 1: control steps; seconds on the clock, of processor time and in each part."""

    steps: int
    wall_s: float
    cpu_s: float
    parts_s: dict[str, float]


def expert_chunks(env: Tabletop, seed: int) -> np.ndarray:
    """The expert's actions in an episode as chunks `[T, C, 7]`; the last action fills up the last chunk."""
    env.reset(0, EpisodeRequest(seed))
    expert = Expert(env.config.max_translation, env.config.max_rotation)
    actions = []
    for _ in range(MAX_STEPS):
        actions.append(expert.act(env.expert_view(0)))
        result = env.step([0], actions[-1][None, None])
        if result.terminated[0]:
            break
    chunk = env.config.chunk
    actions += [actions[-1]] * (-len(actions) % chunk)
    return np.array(actions).reshape(-1, chunk, 7)


def replay(env: Tabletop, episodes: Sequence[tuple[int, np.ndarray]]) -> Replay:
    """Play recorded episodes `(seed, chunks)`, `env.num_envs` at a time, as an environment worker would."""
    parts = {"reset": 0.0, "observe": 0.0, "step": 0.0}
    wall, cpu = time.perf_counter(), time.process_time()
    steps = 0

    def timed(part: str, since: float) -> float:
        now = time.perf_counter()
        parts[part] += now - since
        return now

    for first in range(0, len(episodes), env.num_envs):
        group = episodes[first : first + env.num_envs]
        mark = time.perf_counter()
        for index, (seed, _) in enumerate(group):
            env.reset(index, EpisodeRequest(seed))
        mark = timed("reset", mark)
        for t in range(max(len(chunks) for _, chunks in group)):
            playing = [i for i, (_, chunks) in enumerate(group) if t < len(chunks)]
            mark = time.perf_counter()
            env.observe(playing)
            mark = timed("observe", mark)
            steps += int(env.step(playing, np.stack([group[i][1][t] for i in playing])).executed.sum())
            timed("step", mark)
    return Replay(steps, time.perf_counter() - wall, time.process_time() - cpu, parts)


_STATE: dict[str, Any] = {}


def _record(core: int) -> None:
    """Set a process of part 1 up: one core, one simulator, the episodes."""
    os.sched_setaffinity(0, {core})
    env = Tabletop(ENVIRONMENTS)
    _STATE.update(env=env, episodes=[(seed, expert_chunks(env, seed)) for seed in range(SEED, SEED + EPISODES)])
    replay(env, _STATE["episodes"][:ENVIRONMENTS])  # warm-up


def _replay(_: int) -> Replay:
    return replay(_STATE["env"], _STATE["episodes"])


def measure_simulation(repeats: int, console: Console) -> dict[str, Any]:
    """Part 1."""
    core = max(os.sched_getaffinity(0))
    rows: list[Replay] = []
    with ProcessPoolExecutor(1, mp.get_context("spawn"), initializer=_record, initargs=(core,)) as pool:
        for number in range(repeats):
            row = pool.submit(_replay, number).result()
            rows.append(row)
            console.print(f"simulation {number + 1}/{repeats}: {row.steps / row.wall_s:.0f} steps/s", highlight=False)
    total = sum(r.wall_s for r in rows)
    return spread([r.steps / r.wall_s for r in rows]) | {
        "per_cpu_second": spread([r.steps / r.cpu_s for r in rows]),
        "share_of_time": {part: sum(r.parts_s[part] for r in rows) / total for part in rows[0].parts_s},
        "env_steps_per_repeat": rows[0].steps,
        "environments": ENVIRONMENTS,
        "physics_step_s": TIMESTEP,
    }


def untrained(folder: Path, model: str) -> int:
    """A bundle of configs/model/MODEL.yaml with random weights: a rollout's cost hardly depends on them. Its size."""
    config = configuration.load(SftConfig, "sft", ["out=unused", "demos=unused", f"model={model}"])
    env = Tabletop(1)
    action = env.contract.action
    bound = [action.max_translation] * 3 + [action.max_rotation] * 3
    ones = np.ones(env.contract.state_size)
    numbers = Statistics(
        ArrayStatistics.from_bounds([-b for b in bound] + [0.0], [*bound, 1.0]),
        ArrayStatistics.from_bounds(-ones, ones),
    )
    words = train_tokenizer(training_sentences(), config.model.words(), config.model.prompt_length)
    policy = Policy.untrained(config.model.data(), env.contract, numbers, words, seed=0)
    policy.save(folder)
    env.close()
    return sum(p.numel() for p in policy.model.parameters())


def measure_placements(model: str, repeats: int, slots: int, decisions: int, console: Console) -> dict[str, Any]:
    """Part 2 for a model."""
    rates: dict[str, list[float]] = {name: [] for name in PLACEMENTS}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in PLACEMENTS}
    with tempfile.TemporaryDirectory() as temporary, ray_session():
        checkpoint = Path(temporary) / "untrained"
        parameters = untrained(checkpoint, model)
        engines: dict[str, Synchronous] = {}
        try:
            for name, placement in PLACEMENTS.items():
                engines[name] = Synchronous(
                    checkpoint, Path(temporary) / name, "tabletop", {}, "in_distribution", slots, decisions,
                    PPOConfig(), placement, SEED, repeats,
                )  # fmt: skip
                engines[name].rollout(0)  # warm-up
            for number in range(repeats):
                for name in list(engines)[:: 1 if number % 2 == 0 else -1]:
                    rollout = engines[name].rollout(number + 1)
                    rates[name].append(sum(log.steps for log in rollout.episodes) / rollout.seconds)
                    seconds[name].append(where_time_went(rollout))
                shown = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items())
                console.print(f"{model} {number + 1}/{repeats}: {shown} steps/s", highlight=False)
        finally:
            for engine in engines.values():
                engine.close()
    ratios = {
        pair: spread([a / b for a, b in zip(rates[over], rates[under], strict=True)])
        for pair, (over, under) in PAIRS.items()
    }
    placements = {
        name: {
            "env_steps_per_s": spread(rates[name]),
            "mean_s": {k: statistics.mean(row[k] for row in seconds[name]) for k in seconds[name][0]},
            "seconds": seconds[name],
        }
        for name in PLACEMENTS
    }
    busy = placements["sequential_1"]["mean_s"]
    work = busy["environment_busy"], busy["policy_busy"]
    return ratios.pop("one_worker") | ratios | {
        "bound": sum(work) / max(work), "model": model, "parameters": parameters, "placements": placements,
        "slots": slots, "decisions": decisions,
    }  # fmt: skip


def where_time_went(rollout: Rollout) -> dict[str, float]:
    """Seconds of a rollout: in all, and busy and waiting of the policy and of the mean environment worker."""
    return {
        "rollout": rollout.seconds,
        "environment_busy": statistics.mean(log.step_s for log in rollout.episodes),
        "environment_waits": statistics.mean(log.wait_s for log in rollout.episodes),
        "policy_busy": rollout.policy.forward_s,
        "policy_waits": rollout.policy.wait_s,
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest, and all of them."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["nano", "small"], help="files of configs/model for part 2")
    parser.add_argument("--slots", type=int, default=32, help="environments of part 2")
    parser.add_argument("--decisions", type=int, default=32, help="chunks of each environment in a repeat of part 2")
    arguments = parser.parse_args()
    console = Console()
    result: dict[str, Any] = {
        "commit": commit() or "unknown",
        "machine": machine("mujoco", "torch", "ray"),
        "command": shlex.join(["python", *sys.argv]),
    }
    busy = result["machine"]["load_average_1_min"]
    if busy > 0.5:
        console.print(f"other work is running (load {busy:.1f}): the figures will be too low", style="yellow")
    result["env_steps_per_s_per_core"] = measure_simulation(arguments.repeats, console)
    sizes = arguments.repeats, arguments.slots, arguments.decisions
    result["models"] = {model: measure_placements(model, *sizes, console) for model in arguments.models}
    result["pipelined_over_sequential"] = result["models"][arguments.models[-1]]
    result["machine"]["load_average_1_min_after"] = os.getloadavg()[0]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, result)
    missed = 0
    for name, target in TARGETS.items():
        entry = result[name]
        met = entry["median"] >= target
        missed += not met
        figures = f"{entry['median']:.4g} ({entry['min']:.4g} to {entry['max']:.4g})"
        console.print(f"{name}: {figures}, target {target:g}: {'met' if met else 'MISSED'}", highlight=False)
    console.print(f"written to {arguments.out}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
