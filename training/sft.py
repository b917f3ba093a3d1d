"""Imitation learning (supervised fine-tuning) from demonstrations: `vla sft`.

Two stages. The vision towers first learn to point at what the instruction names, on random scenes; then the whole
model imitates the expert. Both use privileged simulator state in an auxiliary loss, which exists in training only.
One process per core, gradients averaged by torch's DistributedDataParallel (gloo). The same command resumes. The
error on held-out layouts is logged: the training loss says little about it.
"""

import json
import os
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from training import demos, state
from training.algorithms.ppo import privileged_loss
from training.augmentation import augment
from training.envs.tabletop import Tabletop
from training.run import check_options
from vla import checkpoint
from vla.cli import Command
from vla.codec import Codec
from vla.errors import SimrealError
from vla.models.nano import NanoConfig, smoothed_cross_entropy
from vla.models.openvla import OpenVLA
from vla.policy import Policy, Provenance
from vla.results import commit, write_json
from vla.statistics import ArrayStatistics, Statistics
from vla.tasks.put_on_plate import training_sentences
from vla.tokenizer import train_tokenizer
from vla.transforms import run_forward
from vla.types import ModelInputs

GRIPPER = 6  # column of the action
POSITIONS = 9  # first columns of the privileged state: positions; then keypoints
VALIDATION_SAMPLES = 512
Loss = Callable[[nn.Module, "Batch"], tuple[torch.Tensor, dict[str, float]]]


@dataclass(frozen=True)
class SftConfig:
    """Options of `vla sft`.

    out: run folder; the bundle stands in out/checkpoint.
    demos: folder of demonstrations.
    episodes: use the first so many, null for all.
    model: sizes of the model, see configs/model.
    scene_samples: samples of the first stage, repeats counted; 0 leaves it out.
    samples: samples of the second stage.
    batch: samples per step, over all processes.
    learning_rate: peak of both stages; cosine decay after a linear warm-up.
    warmup: fraction of the steps.
    weight_decay: AdamW.
    grad_clip: bound of the gradient's norm.
    smoothing: standard deviation in bins of the smoothed targets.
    auxiliary_coef: weight of the position loss.
    teacher_forcing: share of the samples whose trunk is told the true positions in place of those it found.
    augment: photometric noise on images, stray tokens in instructions.
    held_out: fraction of the episodes kept for validation.
    processes: 0 for one per core.
    save_every_s: seconds between resumable states.
    seed: of weights, order and augmentation.
    """

    out: Path
    demos: Path
    episodes: int | None = None
    model: NanoConfig = field(default_factory=NanoConfig)
    scene_samples: int = 150_000
    samples: int = 60_000
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    smoothing: float = 2.0
    auxiliary_coef: float = 1.0
    teacher_forcing: float = 0.5
    augment: bool = True
    held_out: float = 0.03
    processes: int = 0
    save_every_s: float = 30.0
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """inputs: of B samples; actions: int64 `[B, C, D]` or None; privileged: float32 `[B, A]`, NaN where unknown.

    told: positions `[B, 9]` that the language model is told, NaN where it is to use its own; None for none.
    """

    inputs: ModelInputs
    actions: torch.Tensor | None
    privileged: torch.Tensor
    told: torch.Tensor | None = None


@dataclass(frozen=True)
class Samples:
    """All samples of a stage as arrays; rows in `validation` belong to layouts that training never sees."""

    inputs: ModelInputs
    actions: np.ndarray | None
    privileged: np.ndarray
    train: np.ndarray
    validation: np.ndarray

    def select(self, rows: np.ndarray) -> Batch:
        parts = (self.inputs.images, self.inputs.state, self.inputs.tokens)
        actions = None if self.actions is None else torch.from_numpy(self.actions[rows])
        inputs = ModelInputs(*(torch.from_numpy(a[rows]) for a in parts))
        return Batch(inputs, actions, torch.from_numpy(self.privileged[rows]))


class Pointing(nn.Module):
    """The parts of the model that the first stage trains."""

    def __init__(self, model: OpenVLA):
        super().__init__()
        self.model = model

    def forward(self, inputs: ModelInputs) -> torch.Tensor:
        """The auxiliary output `[B, A]`."""
        return self.model.perceive(inputs.images, inputs.state, inputs.tokens)


class Imitation(nn.Module):
    def __init__(self, model: OpenVLA):
        super().__init__()
        self.model = model

    def forward(self, inputs: ModelInputs, positions: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        output = self.model(inputs.images, inputs.state, inputs.tokens, positions)
        return output.logits, output.auxiliary


def build_policy(data: demos.Demonstrations, env: Tabletop, model: NanoConfig, seed: int) -> Policy:
    """An untrained policy for an environment's contract, with statistics of the demonstrations."""
    flat = data.actions.reshape(-1, data.actions.shape[-1])
    columns = [field.unit for field in env.contract.state for _ in range(field.size)]
    # Quaternions keep their scale: stretched to their small range in the demonstrations, they would drown the rest in
    # the arm's slightest tilt.
    unit = {column: (-1.0, 1.0) for column, name in enumerate(columns) if name.startswith("quaternion")}
    statistics = Statistics(
        action=ArrayStatistics.compute(flat, ranges={GRIPPER: (0.0, 1.0)}),
        state=ArrayStatistics.compute(data.state, ranges=unit),
    )
    tokenizer = train_tokenizer(training_sentences(), model.vocabulary, model.prompt_length)
    config = {"class": "nano", **asdict(model)}
    return Policy.untrained(config, env.contract, statistics, tokenizer, seed)


def _tokens(codec: Codec, instructions: list[str]) -> np.ndarray:
    ids = {text: codec.tokenizer.encode(codec.inputs.instruction.forward(text)) for text in set(instructions)}
    return np.stack([ids[text] for text in instructions])


def demonstrated(codec: Codec, data: demos.Demonstrations, held_out: float) -> Samples:
    """The samples of the second stage."""
    state = run_forward(codec.inputs.state, data.state).astype(np.float32)
    inputs = ModelInputs(data.images, state, _tokens(codec, data.instructions))
    first_held = int(data.episode.max()) + 1 - max(1, round(held_out * (int(data.episode.max()) + 1)))
    validation = np.flatnonzero(data.episode >= first_held)
    approach = (data.state[:, -1] > 0.07) & (np.linalg.norm(data.privileged[:, :3], axis=1) > 0.5)  # still to be found
    return Samples(
        inputs,
        codec.encode_actions(data.actions),
        data.privileged,
        np.flatnonzero(data.episode < first_held),
        validation[approach[validation]][:VALIDATION_SAMPLES],
    )


def scenes(codec: Codec, folder: Path) -> Samples:
    """The samples of the first stage."""
    images, state, instructions, privileged = demos.read_scenes(folder)
    normalized = run_forward(codec.inputs.state, state).astype(np.float32)
    inputs = ModelInputs(images, normalized, _tokens(codec, instructions))
    rows = np.arange(len(images))
    return Samples(inputs, None, privileged, rows[VALIDATION_SAMPLES:], rows[:VALIDATION_SAMPLES])


def _position_errors(error: torch.Tensor) -> dict[str, float]:
    """Horizontal errors in cm from differences `[B, A]` in units of 0.1 m."""
    target, goal = 10 * error[:, :2].norm(dim=1), 10 * error[:, 3:5].norm(dim=1)
    near = float((target < 1.5).float().mean())
    return {"target_cm": float(target.median()), "target_within_1.5cm": near, "goal_cm": float(goal.median())}


def _point(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    predicted = model(batch.inputs)
    error = (predicted - batch.privileged).detach()
    pixels = error[:, POSITIONS:].unflatten(1, (-1, 2)).norm(dim=-1) * batch.inputs.images.shape[2] / 2
    metrics = _position_errors(error)
    for column, name in enumerate(("third_target", "third_goal", "wrist_target", "wrist_goal")):
        seen = pixels[:, column][~pixels[:, column].isnan()]
        metrics[f"{name}_px"] = float(seen.median())
        metrics[f"{name}_within_2px"] = float((seen < 2).float().mean())
    return 10 * privileged_loss(predicted, batch.privileged), metrics


def _imitate(config: SftConfig) -> Loss:
    def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        assert batch.actions is not None
        logits, auxiliary = model(batch.inputs, batch.told)
        total = smoothed_cross_entropy(logits, batch.actions, config.smoothing).mean()
        near = (logits.argmax(-1) - batch.actions).abs() <= 4
        metrics = {"loss": float(total.detach()), "accuracy": float(near.float().mean())}
        travel = (logits.argmax(-1) - batch.actions).float().sum(1)[:, :2].norm(dim=-1)
        metrics["chunk_error_bins"] = float(travel.median())  # horizontal way of a whole chunk
        if auxiliary is not None:
            total = total + config.auxiliary_coef * 10 * privileged_loss(auxiliary, batch.privileged)
            metrics.update(_position_errors((auxiliary - batch.privileged).detach()))
        return total, metrics

    return loss


def _prepare(batch: Batch, config: SftConfig, generator: torch.Generator) -> Batch:
    """A batch to learn from: with noise, and true positions for a share of the samples."""
    told = batch.privileged[:, :POSITIONS].clone()
    told[torch.rand(len(told), generator=generator) >= config.teacher_forcing] = torch.nan
    inputs = augment(batch.inputs, generator) if config.augment else batch.inputs
    return Batch(inputs, batch.actions, batch.privileged, told)


def learning_rate(config: SftConfig, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth."""
    warm = max(1, int(config.warmup * steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + float(np.cos(np.pi * progress))))


@dataclass
class _Process:
    """One data-parallel process; rank 0 reports and saves."""

    config: SftConfig
    rank: int
    world: int
    progress: Progress | None

    def run(
        self, name: str, module: nn.Module, parameters: list[nn.Parameter], samples: Samples, steps: int, loss: Loss
    ) -> None:
        """Train one stage, from its saved state if there is one."""
        config = self.config
        file = config.out / f"{name}.safetensors"
        optimizer = torch.optim.AdamW(
            parameters, config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.95)
        )
        first = state.restore(file, module, optimizer) if file.exists() else 0
        if first == steps:
            return
        parallel = DistributedDataParallel(module)
        share = config.batch // self.world
        bar = self.progress.add_task(name, total=steps, completed=first, note="") if self.progress else None
        saved_at = time.monotonic()
        for step in range(first, steps):
            # A step's samples and noise come from its number, so a resumed run repeats an unbroken one.
            chosen = np.random.default_rng([config.seed, step, 5]).choice(samples.train, config.batch)
            batch = samples.select(chosen[self.rank * share : (self.rank + 1) * share])
            seed = int(np.random.default_rng([config.seed, step, self.rank, 6]).integers(2**62))
            batch = _prepare(batch, config, torch.Generator().manual_seed(seed))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, steps)
            value, _ = loss(parallel, batch)
            if not torch.isfinite(value):
                raise SimrealError(f"{name}: the loss is {float(value)} at step {step}", code="NAN_LOSS",
                                   remedy="Lower learning_rate; the last good state is kept.")  # fmt: skip
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            optimizer.step()
            if self.rank == 0:
                assert self.progress is not None and bar is not None
                self.progress.advance(bar)
                if step % 100 == 99 or step == steps - 1:
                    self._report(name, module, samples, step + 1, loss, bar)
                if time.monotonic() - saved_at > config.save_every_s:
                    saved_at = time.monotonic()
                    state.save(file, module, optimizer, step + 1)
        if self.rank == 0:
            state.save(file, module, optimizer, steps)
        dist.barrier()

    def _report(self, name: str, module: nn.Module, samples: Samples, step: int, loss: Loss, bar: Any) -> None:
        module.eval()
        with torch.no_grad():
            _, metrics = loss(module, samples.select(samples.validation))
        module.train()
        with (self.config.out / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"stage": name, "step": step, "samples": step * self.config.batch, **metrics}) + "\n")
        assert self.progress is not None
        shown = " ".join(f"{k} {v:.2f}" for k, v in metrics.items() if "target" in k or k == "loss")
        self.progress.update(bar, note=shown)


def _worker(rank: int, world: int, config: SftConfig, port: int) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # improbable bins make them, and processors handle them slowly
    # Gradients of the channels-last convolutions are copied into contiguous buckets, which costs next to nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    torch.manual_seed(config.seed)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    data = demos.read(config.demos, config.episodes)
    policy = build_policy(data, Tabletop(1), config.model, config.seed)
    model = policy.model
    assert isinstance(model, OpenVLA)
    model.train()
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    progress = Progress(*columns) if rank == 0 else None
    process = _Process(config, rank, world, progress)
    for parameter in model.value_head.parameters():  # nothing trains the critic here
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    if progress:
        progress.start()
    steps = config.scene_samples // config.batch
    if steps and config.model.pointing:
        seeing = [model.language_model.embed_tokens.weight, *model.seeing()]
        for parameter in trained:
            parameter.requires_grad_(any(parameter is p for p in seeing))
        process.run("scenes", Pointing(model), seeing, scenes(policy.codec, config.demos), steps, _point)
        for parameter in trained:
            parameter.requires_grad_(True)
    samples = demonstrated(policy.codec, data, config.held_out)
    process.run("imitation", Imitation(model), trained, samples, config.samples // config.batch, _imitate(config))
    if progress:
        progress.stop()
    if rank == 0:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.eval()
        last = json.loads((config.out / "metrics.jsonl").read_text().splitlines()[-1])
        record = json.loads(json.dumps(asdict(config), default=str))
        checkpoint.save(
            policy, config.out / "checkpoint", Provenance(commit(), record, config.seed, last), overwrite=True
        )
    dist.destroy_process_group()


def sft(config: SftConfig) -> None:
    """Train both stages; a finished run is left as it is."""
    console = Console()
    record = check_options(config.out / "sft.json", config, ("out", "processes", "save_every_s"))
    if (config.out / "checkpoint").exists():
        console.print(f"{config.out}/checkpoint is there already")
        return
    demos.check(config.demos)
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "sft.json", record)
    world = config.processes or os.cpu_count() or 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (world, config, port), nprocs=world)
    console.print(f"written to {config.out}/checkpoint")


command = Command(
    name="sft", help="Imitate demonstrations (supervised fine-tuning).", schema=SftConfig, config_name="sft", run=sft
)
