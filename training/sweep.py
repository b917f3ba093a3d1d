"""`vla sweep`: variants of a training times seeds, each trained and scored, then put beside each other."""

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from training.compare import comparison, save, show
from training.comparison.page import markdown
from training.comparison.runs import episodes_of, gather, is_run
from training.evaluate import EvalConfig
from training.page import write
from training.pipeline.actors import ray_session
from training.pipeline.cluster import LOCAL
from training.run import check_options
from training.sweep_loop import Elsewhere, Here, Job, why, work
from training.sweep_reuse import check, take_over
from training.sweep_run import is_scored
from training.train import FREE, TrainConfig
from vla import configuration, options
from vla.cli import Command
from vla.errors import ConfigError, SimrealError
from vla.results import commit, machine, write_json

BEGINNING = "beginning"  # folder of the evaluation of what runs begin with; a second one's is beginning_2


@dataclass(frozen=True)
class Evaluation:
    """How a finished run is scored, and the bundle that it begins with.

    suite: of `vla eval`.
    episodes: of each variant of the suite; 0 for no evaluation.
    seed: first episode's seed.
    """

    suite: str = "in_distribution"
    episodes: int = 100
    seed: int = 90_001


@dataclass(frozen=True)
class SweepConfig:
    """Options of `vla sweep`.

    out: folder; a run is out/VARIANT/seed_N.
    variants: name of a variant -> the options of `vla train` that make it.
    base: options of `vla train` that all variants share.
    checkpoint: bundle that all begin with; null where base or variants name one, or a model.
    seeds: each variant is trained with each.
    iterations: of each run; null for what base says.
    options: more options of `vla train`, laid over all others; a text may have several: "slots=16 decisions=16".
    evaluation: of the finished runs.
    jobs: runs at a time.
    cluster: local, processes of this machine; auto or HOST:PORT, tasks of a Ray cluster whose nodes share the folders.
    resources: that Ray sets aside for a run on a cluster; CPU, GPU and those that nodes declare.
    goal: success whose cost in steps and minutes is told.
    reuse: folders of other sweeps; a run that one of them has finished, with the same options and beginning, is copied.
    """

    out: Path
    variants: dict[str, list[str]] = field(default_factory=dict)
    base: list[str] = field(default_factory=list)
    checkpoint: Path | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    iterations: int | None = None
    options: list[str] = field(default_factory=list)
    evaluation: Evaluation = field(default_factory=Evaluation)
    jobs: int = 1
    cluster: str = LOCAL
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 2.0})
    goal: float = 0.8
    reuse: list[Path] = field(default_factory=list)


def runs(config: SweepConfig) -> dict[str, TrainConfig]:
    """VARIANT/seed_N -> its options, checked; first all variants with one seed, so that what is there is fair."""
    if not config.variants or not config.seeds or config.jobs < 1:
        raise SimrealError(
            "a sweep needs variants, seeds and a job at a time", code="SWEEP",
            remedy="Choose experiment=ablation/NAME or experiment=own.yaml; seeds=[0,1,2] jobs=1.",
        )  # fmt: skip
    shared = [] if config.checkpoint is None else [f"checkpoint={config.checkpoint}"]
    last = list(config.options) if config.iterations is None else [f"iterations={config.iterations}", *config.options]
    found = {}
    for seed in dict.fromkeys(config.seeds):
        for name, own in config.variants.items():
            if not name.replace("-", "_").isidentifier():
                raise ConfigError(f"variants: {name!r} can't be a folder: use letters, digits, _", code="CONFIG")
            words = [*_words(config.base), *shared, *_words(own), *_words(last), f"seed={seed}"]
            words = list({word.partition("=")[0]: word for word in words}.values())  # the last one of a name counts
            try:
                # The folder is no text to be parsed: it may have any character.
                made = configuration.load(TrainConfig, "train", [*words, "out=later"])
            except ConfigError as error:
                raise ConfigError(f"variant {name}: {error.args[0]}", code="CONFIG") from error
            found[f"{name}/seed_{seed}"] = replace(made, out=config.out / name / f"seed_{seed}")
    return found


def _words(texts: Sequence[str]) -> list[str]:
    """Options one by one."""
    return [word for text in texts for word in shlex.split(text)]


def score_of(config: SweepConfig, run: TrainConfig) -> EvalConfig | None:
    if not config.evaluation.episodes:
        return None
    share = int(config.resources.get("CPU", 1)) if config.cluster != LOCAL else (os.cpu_count() or 1) // config.jobs
    e = config.evaluation
    return EvalConfig(
        run.out / "checkpoint", env=run.env, suite=e.suite, episodes=e.episodes, seed=e.seed, workers=max(1, share)
    )


def beginnings(config: SweepConfig, wanted: Iterable[TrainConfig]) -> list[EvalConfig]:
    """Of the bundles that runs begin with, scored as the runs are: what training adds is the difference."""
    found: dict[str, EvalConfig] = {}
    for run in wanted:
        score = score_of(config, run)
        if score is not None and run.checkpoint is not None and run.checkpoint.exists():
            found.setdefault(f"{run.checkpoint} {options.write(run.env)}", replace(score, checkpoint=run.checkpoint))
    folders = (BEGINNING if not n else f"{BEGINNING}_{n + 1}" for n in range(len(found)))
    return [replace(s, out=config.out / name / s.file.name) for name, s in zip(folders, found.values(), strict=True)]


def sweep(config: SweepConfig) -> int:
    """Train and score what is missing, then compare; the exit code is 1 if a run failed."""
    console = Console()
    wanted = runs(config)
    check(config.reuse)
    for run in wanted.values():
        check_options(run.out / "config.json", run, FREE)
    first = beginnings(config, wanted.values())
    jobs, finished = [_job(score.file.parent, None, score) for score in first if not is_scored(score)], 0
    for name, run in wanted.items():
        score = score_of(config, run)
        if not run.out.exists() and (found := take_over(config.reuse, run, score)) is not None:
            console.print(f"{name} is a copy of {found}", highlight=False, soft_wrap=True)
        if (run.out / "checkpoint").exists() and (score is None or is_scored(score)):
            finished += 1
            continue
        jobs.append(_job(run.out, run, score))
    if finished:
        console.print(f"{finished} of {len(wanted)} runs are finished already", highlight=False, soft_wrap=True)
    failed = _work(config, jobs, console)
    reasons = {job.name: why(job) for job in jobs if job.name in failed}
    _conclude(config, first, reasons, console)
    for name, reason in reasons.items():
        console.print(f"{name} failed: {reason}", highlight=False, soft_wrap=True, markup=False)
    if reasons:
        console.print("the same command goes on with these, after what is wrong has been mended")
    return 1 if reasons else 0


def _job(folder: Path, run: TrainConfig | None, score: EvalConfig | None) -> Job:
    """A run that is trained and scored, or a score alone."""
    name = folder.name if run is None else f"{folder.parent.name}/{folder.name}"
    job = Job(name, folder.with_name(f"{folder.name}.json"), folder, 0 if run is None else run.iterations)
    told = {"train": run, "evaluation": score}
    write_json(job.file, {key: None if value is None else options.write(value) for key, value in told.items()})
    return job


def _work(config: SweepConfig, jobs: list[Job], console: Console) -> dict[str, int]:
    if not jobs:
        return {}
    if config.cluster == LOCAL:
        return work(jobs, config.jobs, Here(), console)
    with ray_session(config.cluster):
        return work(jobs, config.jobs, Elsewhere(config.resources), console)


def title(beginning: EvalConfig, of: int) -> str:
    """What a table calls it; of several, the same bundle in two simulators included, no two are called alike."""
    folder = beginning.file.parent.name
    return folder if of == 1 else f"{folder} {beginning.checkpoint}"


def _conclude(config: SweepConfig, first: Sequence[EvalConfig], failed: Mapping[str, str], console: Console) -> None:
    """table.md, results.json and curves.png, of whatever has learned so far."""
    folders = [config.out / name for name in config.variants]
    known = [folder for folder in folders if any(is_run(run) for run in folder.glob("*"))]
    if not known:
        return
    begun = {title(score, len(first)): episodes_of(score.file) for score in first if is_scored(score)}
    found: dict[str, Any] = comparison(gather(known), config.goal, begun) | {
        "sweep": options.write(config), "failed": dict(failed), "commit": commit(), "machine": machine("torch", "ray"),
    }  # fmt: skip
    save(found, config.out / "curves.png", config.out / "results.json")
    parts = [f"# {config.out.name}", "", markdown(found), *(f"- failed: {k}: {v}" for k, v in failed.items())]
    write(config.out / "table.md", "\n".join(parts))
    show(found, console)
    console.print(f"written to {config.out}: table.md, results.json, curves.png", highlight=False, soft_wrap=True)


command = Command(
    name="sweep", help="Train variants with several seeds each, score them and compare.", schema=SweepConfig,
    config_name="sweep", run=sweep,
)  # fmt: skip
