"""Scoring in any simulator, on its generalisation axes or suites: `vla eval`.

Every variant of the suite is played on held-out seeds, greedily, in parallel processes. The blind control
(black images) and those of the simulator (put-on-plate: the instruction names the other object) must fail: they show
that the policy needs its eyes and its ears. What is finished is kept beside the result, so a killed evaluation goes on.
"""

import json
import multiprocessing as mp
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from training.envs import EnvConfig
from training.envs.base import VectorEnv
from training.play import EpisodeResult, play
from training.video import write_video
from vla import options
from vla.cli import Command
from vla.errors import SimrealError
from vla.policy import Policy
from vla.results import score, write_json

BLIND = "blind"  # control of every simulator with cameras
EVERYTHING = "generalization"
IN_DISTRIBUTION = "in_distribution"
JOB = 25  # episodes of one variant that a process plays at a time


@dataclass(frozen=True)
class EvalConfig:
    """Options of `vla eval`.

    checkpoint: bundle to score.
    out: JSON file of the result; null for eval_SIMULATOR_SUITE.json beside the bundle.
    env: the simulator; its variant is that of the suite.
    suite: generalization, all axes and controls of the simulator, or the name of one axis (in LIBERO: of a suite).
    tasks: members of each axis by number from 0, null for all.
    episodes: episodes of each variant.
    in_distribution_episodes: of the variant in_distribution, which is an axis by itself; null for as many as of others.
    seed: first episode's seed; training uses seeds from 1000000 on.
    videos: folder for one success and one failure of each variant, null for none.
    workers: processes, 0 for one per core.
    batch: environments that share a forward pass.
    """

    checkpoint: Path
    out: Path | None = None
    env: EnvConfig = field(default_factory=EnvConfig)
    suite: str = EVERYTHING
    tasks: list[int] | None = None
    episodes: int = 100
    in_distribution_episodes: int | None = None
    seed: int = 90_001
    videos: Path | None = None
    workers: int = 0
    batch: int = 8

    @property
    def file(self) -> Path:
        """Where the result goes."""
        return self.out or self.checkpoint.parent / f"eval_{self.env.name.replace(':', '_')}_{self.suite}.json"


@dataclass(frozen=True)
class Suite:
    """What is played. axes: axis -> variants; controls: variants that must fail."""

    axes: Mapping[str, tuple[str, ...]]
    controls: tuple[str, ...] = ()

    @property
    def variants(self) -> tuple[str, ...]:
        return (*(v for members in self.axes.values() for v in members), *self.controls)


def suite_of(config: EvalConfig, env: VectorEnv) -> Suite:
    """The axes that `config` names, of those that the simulator has."""
    if config.suite not in (EVERYTHING, *env.axes):
        known = [EVERYTHING, *env.axes]
        raise SimrealError(
            f"{config.env.name} has no suite {config.suite!r}: {options.nearest(config.suite, known)}", code="SUITE",
            remedy=f"Choose one of {', '.join(known)}.",
        )  # fmt: skip
    axes = dict(env.axes) if config.suite == EVERYTHING else {config.suite: env.axes[config.suite]}
    if config.tasks is not None:
        most = min(len(members) for members in axes.values())
        if not config.tasks or not all(0 <= number < most for number in config.tasks):
            raise SimrealError(
                f"tasks={config.tasks}: {config.suite} has members 0 to {most - 1}", code="TASKS",
                remedy="Name some of these, or leave tasks out for all.",
            )  # fmt: skip
        axes = {axis: tuple(members[number] for number in config.tasks) for axis, members in axes.items()}
    controls = (*((BLIND,) if env.contract.cameras else ()), *env.controls) if config.suite == EVERYTHING else ()
    return Suite(axes, controls)


def summarize(results: Mapping[str, Sequence[EpisodeResult]], config: EvalConfig, suite: Suite) -> dict[str, Any]:
    """The JSON of an evaluation; an axis pools its variants, which have equally many episodes."""
    scores = {v: score(sum(r.success for r in rs), len(rs)) for v, rs in results.items()}
    axes = {}
    for axis, members in suite.axes.items():
        rows = [scores[v] for v in members]
        axes[axis] = score(sum(m["successes"] for m in rows), sum(m["episodes"] for m in rows))
    out: dict[str, Any] = {
        "axes": axes,
        "members": {axis: list(members) for axis, members in suite.axes.items()},
        "variants": {v: entry for v, entry in scores.items() if v not in suite.controls},
        "controls": {v: scores[v] for v in suite.controls},
        # A letter an episode, 1 for success, from the first seed on: what a paired comparison needs.
        "outcomes": {v: "".join(str(int(r.success)) for r in rs) for v, rs in results.items()},
        "env": options.write(config.env),
        "seed": config.seed,
        "checkpoint": str(config.checkpoint),
    }
    outside = [entry["rate"] for axis, entry in axes.items() if axis != IN_DISTRIBUTION]
    if outside and config.suite == EVERYTHING:
        out["generalization_mean"] = float(np.mean(outside))
    out["mean_steps_of_success"] = {
        v: float(np.mean([r.steps for r in rs if r.success])) if any(r.success for r in rs) else None
        for v, rs in results.items()
    }
    return out


_STATE: dict[str, Any] = {}


def _start(config: EvalConfig) -> None:
    torch.set_num_threads(1)
    env = config.env.make(config.batch)
    _STATE.update(policy=Policy.load(config.checkpoint, env.contract, "vla eval"), env=env)


def _job(variant: str, played: str, seeds: Sequence[int], film: Sequence[int]) -> tuple[str, list[EpisodeResult]]:
    return variant, play(_STATE["policy"], _STATE["env"], played, seeds, film, blind=variant == BLIND)


class _Finished:
    """Episodes that an evaluation has played, one line each, beside its result: FILE.part."""

    def __init__(self, config: EvalConfig):
        self.file = config.file.with_suffix(".part")
        self.record = {k: v for k, v in options.write(config).items() if k not in ("out", "workers", "batch")}
        self.results: dict[tuple[str, int], EpisodeResult] = {}
        if self.file.exists():
            self._read()
        config.file.parent.mkdir(parents=True, exist_ok=True)

    def _read(self) -> None:
        first, *lines = self.file.read_text().splitlines() or ["{}"]
        if json.loads(first) != self.record:
            raise SimrealError(
                f"{self.file} holds a part of an evaluation with other options", code="OUTPUT_EXISTS",
                remedy="Delete it, choose another out=, or give its options to go on with it.",
            )  # fmt: skip
        for line in lines:
            if line.endswith("}"):  # the last one may have been cut off
                row = json.loads(line)
                result = EpisodeResult(row["seed"], row["success"], row["steps"])
                self.results[row["variant"], result.seed] = result

    def add(self, variant: str, results: Sequence[EpisodeResult]) -> None:
        with self.file.open("a") as out:
            if out.tell() == 0:
                out.write(json.dumps(self.record) + "\n")
            for result in results:
                self.results[variant, result.seed] = result
                row = {"variant": variant, "seed": result.seed, "success": result.success, "steps": result.steps}
                out.write(json.dumps(row) + "\n")

    def missing(self, variant: str, seeds: Sequence[int]) -> list[int]:
        return [seed for seed in seeds if (variant, seed) not in self.results]


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Run the suite, write the JSON file and the videos; returns the JSON."""
    env = config.env.make(1)
    try:
        suite = suite_of(config, env)
        # A wrong checkpoint is refused before anything starts.
        Policy.load(config.checkpoint, env.contract, "vla eval")
    finally:
        env.close()
    first = next(iter(suite.axes.values()))[0]
    counts = dict.fromkeys(suite.variants, config.episodes)
    if config.in_distribution_episodes is not None and IN_DISTRIBUTION in counts:
        counts[IN_DISTRIBUTION] = config.in_distribution_episodes
    if min(counts.values()) < 1:
        raise SimrealError("an evaluation needs an episode of every variant: episodes is 1 or more", code="EPISODES")
    finished = _Finished(config)
    jobs = [
        (v, missing)
        for i in range(0, max(counts.values()), JOB)
        for v in suite.variants
        if (missing := finished.missing(v, range(config.seed + i, config.seed + min(i + JOB, counts[v]))))
    ]
    filmed = 6 if config.videos else 0
    films: dict[str, list[EpisodeResult]] = {v: [] for v in suite.variants}
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
        total = sum(counts.values())
        progress.console.print(f"{len(counts)} variants and controls, {total} episodes", highlight=False)
        bar = progress.add_task("", total=total, completed=len(finished.results))
        futures = [
            pool.submit(_job, v, first if v == BLIND else v, seeds, [s for s in seeds if s < config.seed + filmed])
            for v, seeds in jobs
        ]
        for future in as_completed(futures):
            variant, played = future.result()
            finished.add(variant, played)
            films[variant] += [row for row in played if row.frames is not None]
            progress.advance(bar, len(played))
    results = {
        v: [finished.results[v, seed] for seed in range(config.seed, config.seed + counts[v])] for v in suite.variants
    }
    summary = summarize(results, config, suite)
    write_json(config.file, summary)
    finished.file.unlink(missing_ok=True)
    if config.videos:
        write_videos({v: sorted(rows, key=lambda r: r.seed) for v, rows in films.items()}, config.videos)
    return summary


def write_videos(results: Mapping[str, Sequence[EpisodeResult]], folder: Path) -> list[Path]:
    """One success and one failure of each variant, as far as they were filmed: VARIANT_success.mp4, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for variant, rows in results.items():
        for wanted, label in ((True, "success"), (False, "failure")):
            found = next((r for r in rows if r.frames is not None and r.success == wanted), None)
            if found is not None and found.frames is not None:
                written.append(folder / f"{variant.replace('/', '_')}_{label}.mp4")
                write_video(written[-1], found.frames)
    return written


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
        for variant in summary["members"][name]:
            table.add_row("", variant, *_shown(summary["variants"][variant]))
    for name, entry in summary["controls"].items():
        table.add_row("control", name, *_shown(entry))
    console = Console()
    console.print(table)
    console.print(f"written to {config.file}")


command = Command(
    name="eval", help="Score a checkpoint in a simulator, on its generalisation axes or suites.", schema=EvalConfig,
    config_name="eval", run=_run,
)  # fmt: skip
