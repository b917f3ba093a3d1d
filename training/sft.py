"""Imitation learning (supervised fine-tuning) from demonstrations: `vla sft`.

One process per core, gradients averaged by torch's DistributedDataParallel (gloo). The state is saved as it goes; the
same command resumes. The error of the target's position on held-out layouts is logged, because the training loss
says little about it; the auxiliary position loss uses privileged simulator state, which exists in training only.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

from training import demos
from training.envs.tabletop import Tabletop
from vla import checkpoint
from vla.cli import Command
from vla.codec import Codec
from vla.models import build_model
from vla.models.openvla_oft import smoothed_cross_entropy
from vla.policy import Policy
from vla.statistics import ArrayStatistics, Statistics
from vla.tasks.put_on_plate import training_sentences
from vla.tokenizer import train_tokenizer
from vla.types import ModelInputs


@dataclass(frozen=True)
class SftConfig:
    """Options of `vla sft`.

    out: run folder; the bundle stands in out/checkpoint.
    demos: folder of demonstrations.
    episodes: use the first so many, null for all.
    model: model class and sizes, as in configs/model.
    samples: samples to train on, repeats counted.
    batch: samples per step, over all processes.
    learning_rate: peak; cosine decay after a linear warm-up.
    warmup: fraction of the steps.
    weight_decay: AdamW.
    grad_clip: bound of the gradient's norm.
    smoothing: standard deviation in bins of the smoothed targets.
    auxiliary_coef: weight of the position loss.
    augment: photometric noise on images, stray tokens in instructions.
    held_out: fraction of the episodes kept for validation.
    processes: 0 for one per core.
    save_every_s: seconds between resumable states.
    seed: of weights, order and augmentation.
    """

    out: Path
    demos: Path
    episodes: int | None = None
    model: dict[str, Any] = field(default_factory=lambda: {"class": "openvla_oft"})
    samples: int = 150_000
    batch: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    smoothing: float = 2.0
    auxiliary_coef: float = 1.0
    augment: bool = True
    held_out: float = 0.03
    processes: int = 0
    save_every_s: float = 60.0
    seed: int = 0


PROMPT_LENGTH = 48
GRIPPER = 6  # column of the action


def build_policy(data: demos.Demonstrations, env: Tabletop, model: dict[str, Any], seed: int) -> Policy:
    """An untrained policy for an environment's contract, with statistics of the demonstrations."""
    statistics = Statistics(
        action=ArrayStatistics.compute(data.actions.reshape(-1, data.actions.shape[-1]), ranges={GRIPPER: (0.0, 1.0)}),
        state=ArrayStatistics.compute(data.state),
    )
    tokenizer = train_tokenizer(training_sentences(), 512, PROMPT_LENGTH)
    return Policy.untrained(model, env.contract, statistics, tokenizer, seed)


def encode(codec: Codec, data: demos.Demonstrations) -> tuple[ModelInputs, np.ndarray]:
    """All samples as model inputs and action tokens `[N, C, D]`."""
    from vla.codec import run_forward

    ids = {text: codec.tokenizer.encode(codec.inputs.instruction.forward(text)) for text in set(data.instructions)}
    tokens = np.stack([ids[text] for text in data.instructions])
    state = run_forward(codec.inputs.state, data.state).astype(np.float32)
    return ModelInputs(data.images, state, tokens), codec.encode_actions(data.actions)


def augment_images(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness, contrast, colour cast and blotches on half of the samples; uint8 `[B, K, H, W, 3]`."""
    batch, cameras, height, width, _ = images.shape
    chosen = (torch.rand(batch, 1, 1, 1, 1, generator=generator) < 0.5).float()
    gain = 1 + chosen * 0.2 * (2 * torch.rand(batch, 1, 1, 1, 3, generator=generator) - 1)
    shift = chosen * 25 * (2 * torch.rand(batch, 1, 1, 1, 1, generator=generator) - 1)
    blotches = torch.rand(batch * cameras, 3, height // 8, width // 8, generator=generator)
    blotches = torch.nn.functional.interpolate(blotches, (height, width)).view(batch, cameras, 3, height, width)
    mix = chosen * 0.3 * torch.rand(batch, 1, 1, 1, 1, generator=generator)
    mixed = (1 - mix) * images.float() * gain + shift + mix * 255 * blotches.permute(0, 1, 3, 4, 2)
    return mixed.clamp(0, 255).to(torch.uint8)


def augment_tokens(tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Stray byte tokens in a third of the prompts, so that unseen words don't derail the policy; int64 `[B, L]`."""
    result = tokens.clone()
    for row in torch.nonzero(torch.rand(len(tokens), generator=generator) < 0.33).flatten().tolist():
        words = tokens[row][tokens[row] != 0].tolist()
        for _ in range(int(torch.randint(1, 10, (1,), generator=generator))):
            position = int(torch.randint(0, len(words) + 1, (1,), generator=generator))
            words.insert(position, int(torch.randint(3, 259, (1,), generator=generator)))
        words = words[-tokens.shape[1] :]
        result[row] = 0
        result[row, len(result[row]) - len(words) :] = torch.tensor(words)
    return result


def _learning_rate(config: SftConfig, step: int, steps: int) -> float:
    warm = max(1, int(config.warmup * steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return config.learning_rate * 0.5 * (1 + float(np.cos(np.pi * progress)))


def _losses(
    model: torch.nn.Module, config: SftConfig, inputs: ModelInputs, tokens: torch.Tensor, privileged: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    output = model(inputs.images, inputs.state, inputs.tokens)
    action = smoothed_cross_entropy(output.logits, tokens, config.smoothing).mean()
    loss = action
    metrics = {"loss": float(action), "accuracy": float((abs(output.logits.argmax(-1) - tokens) <= 4).float().mean())}
    if output.auxiliary is not None and config.auxiliary_coef:
        position = torch.nn.functional.smooth_l1_loss(10 * output.auxiliary, 10 * privileged, beta=0.1)
        loss = loss + config.auxiliary_coef * 10 * position
        error = (output.auxiliary - privileged).detach()
        metrics["target_error_cm"] = 100 * float(error[:, :2].norm(dim=1).median())
        metrics["goal_error_cm"] = 100 * float(error[:, 3:5].norm(dim=1).median())
    return loss, metrics


def _select(
    inputs: ModelInputs, tokens: np.ndarray, privileged: np.ndarray, rows: np.ndarray
) -> tuple[ModelInputs, torch.Tensor, torch.Tensor]:
    batch = ModelInputs(*(torch.from_numpy(a[rows]) for a in (inputs.images, inputs.state, inputs.tokens)))
    return batch, torch.from_numpy(tokens[rows]), torch.from_numpy(privileged[rows])


def _worker(rank: int, world: int, config: SftConfig, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    data = demos.read(config.demos, config.episodes)
    env = Tabletop(1)
    policy = build_policy(data, env, config.model, config.seed)
    inputs, tokens = encode(policy.codec, data)
    episodes = int(data.episode.max()) + 1
    held = max(1, round(config.held_out * episodes))
    train = np.flatnonzero(data.episode < episodes - held)
    validation = np.flatnonzero(data.episode >= episodes - held)[:512]
    model = policy.model.train()
    for parameter in model.value_head.parameters():  # nothing trains the critic here
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.95))
    parallel = DistributedDataParallel(model)
    steps = max(1, config.samples // config.batch)
    first = 0
    state_file = config.out / "state.pt"
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    local = config.batch // world
    log = (config.out / "metrics.jsonl").open("a") if rank == 0 else None
    began = saved_at = time.monotonic()
    for step in range(first, steps):
        # Every step draws its rows from its number, so that a resumed run continues the same order.
        rows = np.random.default_rng([config.seed, step, 5]).choice(train, config.batch)[rank * local : (rank + 1) * local]
        batch, target, privileged = _select(inputs, tokens, data.privileged, rows)
        if config.augment:
            generator = torch.Generator().manual_seed(hash((config.seed, step, rank)) % 2**31)
            images, words = augment_images(batch.images, generator), augment_tokens(batch.tokens, generator)
            batch = ModelInputs(images, batch.state, words)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step, steps)
        loss, metrics = _losses(parallel, config, batch, target, privileged)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
        optimizer.step()
        if rank == 0 and (step % 100 == 99 or step == steps - 1):
            model.eval()
            with torch.no_grad():
                _, held_metrics = _losses(model, config, *_select(inputs, tokens, data.privileged, validation))
            model.train()
            line = {"step": step + 1, **metrics, **{f"val_{k}": v for k, v in held_metrics.items()}}
            line["samples_per_s"] = (step + 1 - first) * config.batch / (time.monotonic() - began)
            print(json.dumps({k: round(v, 4) for k, v in line.items()}), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
        if rank == 0 and time.monotonic() - saved_at > config.save_every_s:
            saved_at = time.monotonic()
            temporary = state_file.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, temporary)
            temporary.rename(state_file)
    if rank == 0:
        model.eval()
        checkpoint.save(policy, config.out / "checkpoint", overwrite=True)
        state_file.unlink(missing_ok=True)
    dist.destroy_process_group()
