"""LIBERO behind the interface of simulators: `python benchmarks/libero_tasks.py PART --out libero.json`, PART one of

- `speed`: control steps per second, ours over LIBERO as it comes, in alternating repeats with the same actions. Both
  give a policy that acts in chunks of 8 what it needs: LIBERO renders after each step, ours what is looked at. Exit
  code 1 if the ratio of the medians is below 4, or if the last images or the states differ in a bit. `coarse`: the same
  with images of 64 px, which ours draws without smooth edges and with fewer triangles.
- `tasks`: all 130 tasks are loaded, reset to a fixed state, stepped and looked at by one environment, which then goes
  through the first of them again, 200 switches in all: its memory after each. Exit code 1 if one fails, or if on the
  second visit to a task memory has grown by more than a tenth.
- `expert`: successes of the scripted expert in the tasks of libero_spatial and libero_object, 10 fixed states each.

The parts stand side by side in the file. Assets: --assets FOLDER, or as docs/simulators/libero.md says.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from training.demos import expert_of
from training.envs import libero
from training.envs import libero_files as files
from training.envs.base import EpisodeRequest
from training.envs.libero_process import Process
from vla.adapters import libero as adapter
from vla.results import commit, machine, score, write_json

TARGET = 4.0
CHUNK = 8
SWITCHES = 200
GROWTH = 0.1
COARSE = {"antialiasing": False, "mesh_edge": 0.005}
CAMERAS = tuple(adapter.NATIVE_CAMERAS.values())


def speed(assets: str | None) -> dict[str, Any]:
    """Control steps per second of both, and the ratio."""
    found = beside(assets, 256)
    reached = found["ratio"] >= TARGET and not found["arrays_that_differ"]
    return {**found, "target": TARGET, "reached": reached, "coarse": beside(assets, 64, **COARSE)}


def beside(assets: str | None, image_size: int, repeats: int = 5, chunks: int = 6, **drawn: Any) -> dict[str, Any]:
    """LIBERO as it comes, and ours with the settings `drawn`, both with images of image_size px."""
    request = EpisodeRequest(1, "libero_spatial/0")
    env = libero.make(1, assets=assets, image_size=image_size, **drawn)
    task = env.task(request)
    state = files.initial_states(task)[0]
    plain = Process(
        "benchmarks.libero_plain",
        {"assets": str(files.assets(assets)), "image_size": image_size, "bddl": str(task.bddl)},
    )
    random = np.random.default_rng(0)
    high = np.array([0.02] * 3 + [0.1] * 3)
    actions = np.concatenate([random.uniform(-high, high, (chunks * CHUNK, 6)), np.ones((chunks * CHUNK, 1))], 1)
    native = np.array([adapter.command(action) for action in actions])
    rates: dict[str, list[float]] = {"plain": [], "ours": [], "plain_reset_s": [], "ours_reset_s": []}
    different = 0
    for repeat in track(range(repeats + 1), "speed"):  # the first one compiles
        plain.send("reset", state, request.seed)
        plain_reset = plain.receive()
        plain.send("step", native)
        plain_s = plain.receive()
        began = time.perf_counter()
        env.reset(0, request)
        (slot,) = env.slots
        slot.collect()
        ours_reset = time.perf_counter() - began
        began = time.perf_counter()
        for chunk in actions.reshape(chunks, CHUNK, 7):
            env.observe([0])
            env.step([0], chunk[None])
        ours_s = time.perf_counter() - began
        plain.send("observe")
        theirs = plain.receive()
        slot.send("observe", CAMERAS)
        mine = slot.collect()
        slot.send("state")
        mine["state"] = slot.collect()
        same = [key for key in mine if key in theirs and not (drawn and key.endswith("_image"))]
        different += sum(not np.array_equal(mine[key], theirs[key]) for key in same)
        if repeat:
            steps = len(actions)
            for name, value in zip(rates, (steps / plain_s, steps / ours_s, plain_reset, ours_reset), strict=True):
                rates[name].append(value)
    env.close()
    plain.end()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    pairs = [ours / theirs for ours, theirs in zip(rates["ours"], rates["plain"], strict=True)]
    return {
        "ratio": medians["ours"] / medians["plain"],
        "ratio_of_pairs": [min(pairs), max(pairs)],
        "steps_per_s": {name: {"median": medians[name], "spread": sorted(rates[name])} for name in ("plain", "ours")},
        "reset_s": {"plain": medians["plain_reset_s"], "ours": medians["ours_reset_s"]},
        "arrays_that_differ": different,
        "image_size": image_size, "settings": drawn, "chunk": CHUNK, "steps": len(actions), "repeats": repeats,
    }  # fmt: skip


def tasks(assets: str | None, image_size: int = 128) -> dict[str, Any]:
    """Every task once, and the memory of the process through 200 switches."""
    env = libero.make(1, assets=assets, image_size=image_size)
    variants = [variant for members in env.axes.values() for variant in members]
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for variant in track((variants * 2)[:SWITCHES], "tasks"):
        began = time.perf_counter()
        try:
            env.reset(0, EpisodeRequest(1, variant))
            env.slots[0].collect()
            loaded = time.perf_counter() - began
            result = env.step([0], np.tile([0, 0, 0, 0, 0, 0, 1.0], (1, CHUNK, 1)))
            (seen,) = env.observe([0])
            blank = [name for name, image in seen.images.items() if image.std() < 5]
            if blank or not result.executed.all() or not all(np.isfinite(v).all() for v in seen.state.values()):
                failed[variant] = f"blank: {blank}, executed: {result.executed.tolist()}"
        except Exception as error:  # recorded, and the exit code tells
            failed[variant] = str(error)
            continue
        env.slots[0].send("memory")
        memory = env.slots[0].collect() / 2**20
        rows.append({"task": variant, "load_s": loaded, "all_s": time.perf_counter() - began, "memory_mib": memory})
    if len(failed) == len(variants):
        raise SystemExit(f"no task passed: {next(iter(failed.values()))}")
    deaths = env.slots[0].deaths
    env.close()
    first, again = rows[: len(variants)], rows[len(variants) :]
    known = {row["task"]: row["memory_mib"] for row in first}
    growth = [row["memory_mib"] / known[row["task"]] - 1 for row in again]
    seconds = [row["load_s"] for row in first]
    return {
        "tasks": len(variants),
        "passed": len(variants) - len(failed),
        "failed": failed,
        "process_deaths": deaths,
        "seconds": sum(row["all_s"] for row in first),
        "load_s": {"median": statistics.median(seconds), "spread": [min(seconds), max(seconds)]},
        "switches": len(rows),
        "memory_mib": {"first_visits": [round(row["memory_mib"]) for row in first],
                       "second_visits": [round(row["memory_mib"]) for row in again]},
        "memory_growth_second_visit": {"median": statistics.median(growth), "spread": [min(growth), max(growth)]},
        "reached": not failed and statistics.median(growth) < GROWTH,
    }  # fmt: skip


def expert(assets: str | None, episodes: int = 10) -> dict[str, Any]:
    """Successes of the scripted expert."""
    env = libero.make(1, assets=assets)
    found: dict[str, Any] = {}
    for variant in track([*env.axes["libero_spatial"], *env.axes["libero_object"]], "expert"):
        steps = []
        for seed in range(1, episodes + 1):
            env.reset(0, EpisodeRequest(seed, variant))
            actor, played = expert_of(env), 0
            while True:
                result = env.step([0], actor.act(env.expert_view(0))[None, None])
                played += 1
                if result.terminated[0] or result.truncated[0]:
                    break
            if result.success[0]:
                steps.append(played)
        instruction = env.task(EpisodeRequest(1, variant)).instruction
        median = statistics.median(steps) if steps else None
        found[variant] = {"instruction": instruction, **score(len(steps), episodes), "median_steps": median}
    env.close()
    return {"episodes": episodes, "variants": found, "reached": True}


PARTS = {"speed": speed, "tasks": tasks, "expert": expert}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--assets")
    given = parser.parse_args()
    began = time.perf_counter()
    found = PARTS[given.part](given.assets)
    print(json.dumps(found, indent=1))
    if given.out:
        record = {
            "command": shlex.join(["python", *sys.argv]), "commit": commit(),
            "machine": machine("mujoco", "robosuite", "hf-libero", "numpy"), "wall_s": time.perf_counter() - began,
            **found,
        }  # fmt: skip
        before = json.loads(given.out.read_text()) if given.out.exists() else {}
        write_json(given.out, before | {given.part: record})
    return 0 if found["reached"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
