"""Scoring on the generalisation axes: `vla eval`.

Every variant of the suite is played on held-out seeds, greedily, in parallel processes. The blind control
(black images) and the wrong-instruction control (the instruction names the other object) must fail: they show
that the policy needs its eyes and its ears.
"""

import multiprocessing as mp
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from training import envs
from training.envs.base import EpisodeRequest
from vla.cli import Command
from vla.errors import SimrealError
from vla.policy import Policy
from vla.results import score, write_json
from vla.tasks.put_on_plate import VARIANTS, axis_of
from vla.types import Observation

AXES = tuple(VARIANTS)
OUT_OF_DISTRIBUTION = tuple(a for a in AXES if a != "in_distribution")
CONTROLS = ("blind", "wrong_instruction")
SUITES: Mapping[str, tuple[str, ...]] = {
    "generalization": (*(v for axis in VARIANTS.values() for v in axis), *CONTROLS),
    "in_distribution": ("in_distribution",),
}
JOB = 25  # episodes of one variant that a process plays at a time
FRAME_STRIDE = 2  # control steps between the frames of a video


@dataclass(frozen=True)
class EvalConfig:
    """Options of `vla eval`.

    checkpoint: bundle to score.
    out: JSON file of the result.
    suite: generalization (all axes and controls) or in_distribution.
    episodes: episodes of each variant.
    in_distribution_episodes: of the variant in_distribution, which is an axis by itself; null for as many as of others.
    seed: first episode's seed; training uses seeds from 1000000 on.
    videos: folder for one success and one failure of each variant, null for none.
    workers: processes, 0 for one per core.
    batch: environments that share a forward pass.
    environment: the simulator.
    """

    checkpoint: Path
    out: Path
    suite: str = "generalization"
    episodes: int = 100
    in_distribution_episodes: int | None = None
    seed: int = 90_001
    videos: Path | None = None
    workers: int = 0
    batch: int = 8
    environment: str = "tabletop"


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode; frames: uint8 `[T, H, W, 3]` if it was filmed."""

    seed: int
    success: bool
    steps: int
    frames: np.ndarray | None = field(default=None, repr=False)


def play(
    policy: Policy,
    env: Any,
    variant: str,
    seeds: Sequence[int],
    film: Sequence[int] = (),
    blind: bool = False,
) -> list[EpisodeResult]:
    """Play one episode for each seed, greedily, `env.num_envs` at a time; films the seeds in `film`."""
    results: dict[int, EpisodeResult] = {}
    waiting = list(seeds)[::-1]
    active: dict[int, int] = {}
    steps = np.zeros(env.num_envs, int)
    frames: dict[int, list[np.ndarray]] = {seed: [] for seed in film}
    while waiting or active:
        for index in range(env.num_envs):
            if index not in active and waiting:
                active[index] = waiting.pop()
                steps[index] = 0
                env.reset(index, EpisodeRequest(active[index], variant))
        indices = sorted(active)
        seen = env.observe(indices)
        if blind:
            seen = [_blinded(o) for o in seen]
        chunks = policy.act(seen)
        actions = np.stack([chunk.actions for chunk in chunks])
        filmed = [i for i in indices if active[i] in frames]
        cuts = range(FRAME_STRIDE, actions.shape[1], FRAME_STRIDE) if filmed else ()
        pieces = np.split(actions, list(cuts), axis=1)
        running = np.ones(len(indices), bool)
        success = np.zeros(len(indices), bool)
        for piece in pieces:
            for index in filmed:
                if running[indices.index(index)]:
                    frames[active[index]].append(env.picture(index))
            rows = np.flatnonzero(running)
            if not len(rows):
                break
            outcome = env.step([indices[r] for r in rows], piece[rows])
            steps[[indices[r] for r in rows]] += outcome.executed.sum(1)
            success[rows] = outcome.success
            running[rows] = ~(outcome.terminated | outcome.truncated)
        for row, index in enumerate(indices):
            if not running[row]:
                seed = active.pop(index)
                movie = np.stack([*frames[seed], env.picture(index)]) if seed in frames else None
                results[seed] = EpisodeResult(seed, bool(success[row]), int(steps[index]), movie)
    return [results[seed] for seed in seeds]


def _blinded(seen: Observation) -> Observation:
    return Observation({k: np.zeros_like(v) for k, v in seen.images.items()}, seen.state, seen.instruction, seen.stamps)


def summarize(results: Mapping[str, Sequence[EpisodeResult]], config: EvalConfig) -> dict[str, Any]:
    """The JSON of an evaluation; an axis pools its variants, which have equally many episodes."""
    variants = {v: score(sum(r.success for r in rs), len(rs)) for v, rs in results.items() if v not in CONTROLS}
    axes = {}
    for axis in AXES:
        members = [variants[v] for v in variants if axis_of(v) == axis]
        if members:
            axes[axis] = score(sum(m["successes"] for m in members), sum(m["episodes"] for m in members))
    out: dict[str, Any] = {
        "axes": axes,
        "variants": variants,
        "seed": config.seed,
        "checkpoint": str(config.checkpoint),
    }
    out["controls"] = {c: score(sum(r.success for r in results[c]), len(results[c])) for c in CONTROLS if c in results}
    if all(a in axes for a in OUT_OF_DISTRIBUTION):
        out["generalization_mean"] = float(np.mean([axes[a]["rate"] for a in OUT_OF_DISTRIBUTION]))
    out["mean_steps_of_success"] = {
        v: float(np.mean([r.steps for r in rs if r.success])) if any(r.success for r in rs) else None
        for v, rs in results.items()
    }
    return out


_STATE: dict[str, Any] = {}


def _start(config: EvalConfig) -> None:
    torch.set_num_threads(1)
    env = envs.make(config.environment, config.batch)
    _STATE.update(policy=Policy.load(config.checkpoint, env.contract, "vla eval"), env=env)


def _job(variant: str, seeds: Sequence[int], film: Sequence[int]) -> tuple[str, list[EpisodeResult]]:
    actual = "in_distribution" if variant == "blind" else variant
    results = play(_STATE["policy"], _STATE["env"], actual, seeds, film, blind=variant == "blind")
    return variant, results


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run the suite, write the JSON file and the videos; returns the JSON."""
    if config.suite not in SUITES:
        raise SimrealError(f"unknown suite {config.suite!r}; known: {', '.join(SUITES)}", code="SUITE")
    env = envs.make(config.environment, 1)
    # A wrong checkpoint is refused before anything starts.
    Policy.load(config.checkpoint, env.contract, "vla eval")
    env.close()
    variants = SUITES[config.suite]
    counts = dict.fromkeys(variants, config.episodes)
    if config.in_distribution_episodes is not None:
        counts["in_distribution"] = config.in_distribution_episodes
    if min(counts.values()) < 1:
        raise SimrealError("an evaluation needs an episode of every variant: episodes is 1 or more", code="EPISODES")
    jobs = [
        (v, range(config.seed + i, config.seed + min(i + JOB, counts[v])))
        for i in range(0, max(counts.values()), JOB)
        for v in variants
        if i < counts[v]
    ]
    results: dict[str, list[EpisodeResult]] = {v: [] for v in variants}
    columns = TextColumn("episodes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(
            config.workers or os.cpu_count() or 1,
            mp.get_context("spawn"),
            initializer=_start,
            initargs=(config,),
        ) as pool,
    ):
        bar = progress.add_task("", total=sum(counts.values()))
        filmed = 6 if config.videos else 0
        futures = [pool.submit(_job, v, part, part[:filmed] if part[0] == config.seed else ()) for v, part in jobs]
        for future in as_completed(futures):
            variant, part_results = future.result()
            results[variant] += part_results
            progress.advance(bar, len(part_results))
    for rows in results.values():
        rows.sort(key=lambda r: r.seed)
    summary = summarize(results, config)
    write_json(config.out, summary)
    if config.videos:
        write_videos(results, config.videos)
    return summary


def write_videos(results: Mapping[str, Sequence[EpisodeResult]], folder: Path) -> list[Path]:
    """One success and one failure of each variant, as far as they were filmed: VARIANT_success.mp4, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for variant, rows in results.items():
        for wanted, label in ((True, "success"), (False, "failure")):
            found = next((r for r in rows if r.frames is not None and r.success == wanted), None)
            if found is not None and found.frames is not None:
                written.append(folder / f"{variant}_{label}.mp4")
                write_video(written[-1], found.frames)
    return written


def write_video(path: Path, frames: np.ndarray, rate: int = 10) -> None:
    """H.264 video of uint8 frames `[T, H, W, 3]` (even H and W)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _shown(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """Episodes, rate and interval of an entry."""
    return str(entry["episodes"]), f"{entry['rate']:.1%}", "{:.1%} .. {:.1%}".format(*entry["wilson95"])


def _run(config: EvalConfig) -> None:
    summary = evaluate(config)
    table = Table(title=f"{config.checkpoint}: success")
    for heading in ("axis", "variant", "episodes", "rate", "95% interval"):
        table.add_column(heading)
    for name, entry in summary["axes"].items():
        table.add_row(name, "", *_shown(entry), style="bold")
        for variant in VARIANTS[name]:
            table.add_row("", variant, *_shown(summary["variants"][variant]))
    for name, entry in summary["controls"].items():
        table.add_row("control", name, *_shown(entry))
    console = Console()
    console.print(table)
    console.print(f"written to {config.out}")


command = Command(name="eval", help="Score a checkpoint on the generalisation axes.", schema=EvalConfig, run=_run)
