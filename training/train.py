"""Reinforcement learning: `vla train`."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from training import capacity, origin
from training.algorithms.base import Algorithm
from training.algorithms.ppo import PPOConfig
from training.envs import EnvConfig
from training.pipeline.actors import WorkerLost, ray_session
from training.pipeline.asynchronous import Asynchronous
from training.pipeline.bell import PipelineTimeout
from training.pipeline.cluster import LOCAL, smallest_gpu
from training.pipeline.crew import Crew, Node, here, picture
from training.pipeline.engine import RESTARTS, Engine, Rollout
from training.pipeline.groups import Groups
from training.pipeline.placement import AUTO, PlacementConfig, plan
from training.pipeline.seats import Cluster
from training.pipeline.synchronous import Synchronous
from training.run import RunFolder, Totals
from training.start import revalued, untrained
from vla import options
from vla.checkpoint import fingerprint, read_model_config
from vla.cli import Command
from vla.errors import SimrealError
from vla.lora import Lora
from vla.models import ModelConfig
from vla.policy import Policy, Provenance
from vla.results import commit, write_json

# Of a schedule, for episodes without end and for whole ones in groups.
SCHEDULES: dict[str, tuple[type[Engine], type[Engine]]] = {
    "synchronous": (Synchronous, Groups), "asynchronous": (Asynchronous, Asynchronous),
}  # fmt: skip
START = "start"  # folder of the bundle with random weights
FREE = ("out", "placement", "cluster", "force", "from")  # options that may change between the parts of a run


@dataclass(frozen=True)
class TrainConfig:
    """Options of `vla train`.

    out: run folder; the final bundle stands in out/checkpoint.
    checkpoint: bundle to start from, of `vla sft` or `vla import`; null for random weights.
    model: what gets random weights where there is no checkpoint; its class and sizes, see configs/model.
    values: one value of the bundle's head for a chunk, or for each action; where it has others it gets a fresh head.
        null keeps it.
    seed: of the whole run.
    iterations: rollout and update, so many times.
    slots: environments in all.
    decisions: of every slot in an iteration.
    env: where to learn.
    algorithm: how to learn.
    placement: who runs where.
    lora: adapters in place of all weights, for large models; they are merged into the final bundle.
    cluster: local, a Ray of its own on this machine; auto, the cluster that this machine is in; HOST:PORT of its head.
    force: start although the estimate of `vla plan` says that memory does not suffice.
    from: run to repeat: all options are those it began with, but for those that are given.
    """

    out: Path
    checkpoint: Path | None = field(default=None, metadata={"also": ("policy", "bundle")})
    model: ModelConfig | None = None
    values: Literal["chunk", "action"] | None = None
    seed: int = 0
    iterations: int = 100
    slots: int = 32
    decisions: int = 32
    env: EnvConfig = field(default_factory=EnvConfig)
    algorithm: Algorithm = field(default_factory=PPOConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    lora: Lora = field(default_factory=Lora)
    cluster: str = LOCAL
    force: bool = False
    from_: Path | None = None


def train(config: TrainConfig) -> None:
    """Improve a policy; go on where a killed run of the same configuration stopped."""
    console = Console(soft_wrap=True)  # a line stays one line in a log
    run = RunFolder(config.out, config, ignore=FREE)
    if (config.out / "checkpoint").exists():
        console.print(f"{config.out}/checkpoint is there already")
        return
    if config.from_ is not None:
        origin.check(config.from_, config.out, config.checkpoint)
        for line in origin.differences(config.from_):
            console.print(f"repeating {config.from_}: {line}", highlight=False)
    with tempfile.TemporaryDirectory() as aside:  # nothing is written to `out` before everything has been checked
        checkpoint = _start(config, Path(aside))
        if config.cluster == LOCAL:  # this machine is known before Ray has started
            config = _settle(config, checkpoint, here(), console)
            _check(config, checkpoint, here())
        with ray_session(config.cluster) as nodes:
            if config.cluster != LOCAL:
                config = _settle(config, checkpoint, nodes, console)
                console.print(picture(_check(config, checkpoint, nodes), nodes))
            run.create()
            if checkpoint.is_relative_to(aside):
                part = shutil.copytree(checkpoint, config.out / f".{START}.part", dirs_exist_ok=True)
                checkpoint = part.rename(config.out / START)
            _note(config, run, checkpoint, console)
            _persevere(config, run, checkpoint, nodes, console)
    run.close()
    console.print(f"written to {config.out}/checkpoint")


def _start(config: TrainConfig, aside: Path) -> Path:
    """The bundle that the run begins with; one with random weights, or with a fresh head, is written to `aside`."""
    if (config.checkpoint is None) == (config.model is None):
        raise SimrealError(
            f"a run starts from a bundle (checkpoint=) or from random weights (model=), and "
            f"{'neither is' if config.model is None else 'both are'} given",
            code="START", remedy="Give one of them; a bundle brings its model along.",
        )  # fmt: skip
    if config.values is not None and config.checkpoint is None:
        raise SimrealError("values= is for a bundle", code="START", remedy="Give model.values, how many there are.")
    if (kept := config.out / START).exists():
        return kept
    if (policy := _beginning(config)) is None:
        return config.checkpoint
    policy.save(aside / START, Provenance(commit(), options.write(config), config.seed))
    return aside / START


def _beginning(config: TrainConfig) -> Policy | None:
    """The policy to begin with; None if it is the bundle as it stands."""
    if config.checkpoint is None:
        return untrained(config.model, config.env, config.seed)
    if config.values is None:
        return None
    wanted = 1 if config.values == "chunk" else int(read_model_config(config.checkpoint)["chunk"])
    return revalued(config.checkpoint, wanted, config.seed)


def _note(config: TrainConfig, run: RunFolder, checkpoint: Path, console: Console) -> None:
    """Keep what this start of the run begins with."""
    told = options.write(config)
    first = run.totals().iteration + 1
    origin.record(config.out, config.checkpoint or checkpoint, first, told["placement"], config.cluster, told["from"])
    if config.from_ is not None and config.checkpoint is None:
        before = origin.read(config.from_)["checkpoint"]["sha256"]
        if before != fingerprint(checkpoint):
            console.print(f"repeating {config.from_}: it began with other random weights", highlight=False)


def _check(config: TrainConfig, checkpoint: Path, nodes: Sequence[Node]) -> Crew:
    """Refuse what does not fit; who sits where."""
    sizes = config.slots, config.decisions, config.algorithm, config.placement
    found = plan(checkpoint, config.env.name, config.env.settings, *sizes, config.lora, nodes)
    if not config.force:
        capacity.check_rollouts(found.shape.nbytes)
    return found.crew


def _settle(config: TrainConfig, checkpoint: Path, nodes: Sequence[Node], console: Console) -> TrainConfig:
    """With micro-batches that the learners' memory holds; refuses a run that it can't hold."""
    placement, alike = config.placement, len({node.gpus for node in nodes}) == 1
    is_sized = placement.micro_batch == AUTO or not config.force
    gib = smallest_gpu(list(nodes)) if is_sized and config.cluster != LOCAL else None
    cluster = Cluster(len(nodes), nodes[0].gpus, gib) if alike else Cluster(1, sum(n.gpus for n in nodes), gib)
    sizes = config.slots, config.decisions, config.algorithm, placement
    settled = capacity.settle(checkpoint, *sizes, config.lora, capacity.present(cluster), config.force)
    if settled != placement:
        console.print(f"micro-batches of {settled.micro_batch} samples fit the learners' memory", highlight=False)
    return replace(config, placement=settled)


def _persevere(config: TrainConfig, run: RunFolder, checkpoint: Path, nodes: Sequence[Node], console: Console) -> None:
    """Learn to the end. When a worker is lost that its schedule can't replace, all start again from the last state."""
    failed, latest = 0, run.latest()
    began = time.perf_counter() - run.totals().elapsed_s
    while True:
        try:
            with closing(_engine(config, checkpoint, nodes)) as engine:
                _learn(config, run, engine, began, console)
            return
        except (WorkerLost, PipelineTimeout) as error:
            failed, latest = failed + 1 if run.latest() == latest else 1, run.latest()
            if failed > RESTARTS:
                raise
            console.print(
                f"{error.args[0]}; all workers start again ({failed} of {RESTARTS} times without a complete iteration)",
                highlight=False,
            )


def _engine(config: TrainConfig, checkpoint: Path, nodes: Sequence[Node]) -> Engine:
    return SCHEDULES[config.placement.schedule][bool(config.algorithm.groups)](
        checkpoint, config.out, config.env.name, config.env.settings, config.env.variant,
        config.slots, config.decisions, config.algorithm, config.placement, config.seed,
        config.iterations, config.lora, nodes,
    )  # fmt: skip


def _learn(config: TrainConfig, run: RunFolder, engine: Engine, began: float, console: Console) -> None:
    """The iterations after the newest state, and the bundle."""
    totals = run.totals()
    first, env_steps, latest = totals.iteration + 1, totals.env_steps, run.latest()
    run.forget_after(first)
    if latest is not None:
        engine.restore(latest, first, totals.counters)
        console.print(f"resuming {config.out} at iteration {first}")
    write_json(config.out / "processes.json", engine.processes)
    for iteration in range(first, config.iterations):
        rollout, update = engine.iterate(iteration)
        write_json(config.out / "processes.json", engine.processes)  # a worker may have been replaced
        row = summarize(rollout, update.metrics) | engine.use()
        env_steps += int(row["rollout/env_steps"])
        row["time/total_env_steps"], row["time/elapsed_s"] = env_steps, time.perf_counter() - began
        state = run.begin_state()
        engine.save(state)
        run.log(iteration, row)
        run.commit_state(state, Totals(iteration, engine.counters().tolist(), env_steps, row["time/elapsed_s"]))
        engine.timeline.keep(iteration)
        console.print(_line(iteration, config.iterations, row), highlight=False)
    engine.export(config.out / "checkpoint", _curve(run.metrics()), run.config)


def summarize(rollout: Rollout, update: dict[str, float]) -> dict[str, float]:
    """The metrics of an iteration under their standard names."""
    logs = rollout.episodes
    successes = [s for log in logs for s in log.successes]
    returns = [r for log in logs for r in log.returns]
    lengths = [n for log in logs for n in log.lengths]
    steps = sum(log.steps for log in logs)
    row = {
        "rollout/success": float(np.mean(successes)) if successes else float("nan"),
        "rollout/return": float(np.mean(returns)) if returns else float("nan"),
        "rollout/episode_length": float(np.mean(lengths)) if lengths else float("nan"),
        "rollout/episodes": float(len(successes)),
        "rollout/env_steps": float(steps),
        "time/rollout_s": rollout.seconds,
        "time/env_step_s": float(np.mean([log.step_s for log in logs])),
        "time/env_wait_s": float(np.mean([log.wait_s for log in logs])),
        "time/policy_s": rollout.policy.forward_s,
        "time/policy_wait_s": rollout.policy.wait_s,
        "time/env_steps_per_s": steps / rollout.seconds,
        **rollout.measures,
    }
    return row | {f"{'time' if key.endswith('_s') else 'train'}/{key}": value for key, value in update.items()}


def _line(iteration: int, iterations: int, row: dict[str, float]) -> str:
    left = row["time/elapsed_s"] / (iteration + 1) * (iterations - iteration - 1)
    return (
        f"{iteration + 1:4d}/{iterations}  success {row['rollout/success']:6.1%}  "
        f"return {row['rollout/return']:5.2f}  "
        f"kl {row['train/approx_kl']:.3f}  clip {row['train/clip_fraction']:.2f}  "
        f"ev {row['train/explained_variance']:5.2f}  "
        f"aux {row['train/privileged_loss']:.4f}  "
        f"{row['time/env_steps_per_s']:5.0f} steps/s  rollout {row['time/rollout_s']:.1f} s  "
        f"update {row['time/update_s']:.1f} s  "
        f"left {left / 60:.0f} min"
    )


def _curve(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a bundle remembers of its training curve."""
    last = rows[-10:]
    success = [r["rollout/success"] for r in last if r["rollout/success"] is not None]
    return {
        "iterations": len(rows),
        "env_steps": rows[-1]["time/total_env_steps"] if rows else 0,
        "success_last_10": float(np.mean(success)) if success else None,
    }


command = Command(
    name="train",
    help="Improve a policy by reinforcement learning.",
    schema=TrainConfig,
    config_name="train",
    run=train,
    base=origin.options_of,
)
