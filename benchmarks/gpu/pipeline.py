"""The schedules with OpenVLA-OFT at 7B on one GPU: `python benchmarks/gpu/pipeline.py --out pipeline.json`.

Random weights in bfloat16, two images, proprioception, chunks of 8; LoRA adapters and the value head are trained by
PPO. The tabletop's environments run on the processors (their images are drawn by the GPU where EGL finds one), policy
and learner share the GPU. Sequential, pipelined with two stages and asynchronous in one run, each for --iterations
after the first one, which is not counted: environment steps/s in all and while rolling out, seconds of each part, use
of the GPU and its memory, both asked of nvidia-smi.

--size tiny --device cpu runs the same on a processor, to try the program.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from training import envs
from training.algorithms.ppo import PPOConfig
from training.pipeline.actors import ray_session
from training.pipeline.placement import PlacementConfig
from training.train import SCHEDULES
from vla.codec import Codec
from vla.lora import Lora
from vla.models.published import PublishedConfig
from vla.policy import Policy
from vla.results import commit, machine, write_json
from vla.statistics import ArrayStatistics, Statistics
from vla.tasks.put_on_plate import training_sentences
from vla.tokenizer import train_tokenizer

SETTINGS: dict[str, Any] = {"image_size": 224}
BINS = 256
SCHEDULE = {
    "sequential": PlacementConfig(stages=1),
    "pipelined": PlacementConfig(stages=2),
    "asynchronous": PlacementConfig(schedule="asynchronous", lanes=2, staleness=1, batch_wait_ms=5.0),
}


class Watch:
    """What nvidia-smi says of the first GPU, four times a second."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float]] = []  # when, use in %, MiB
        words = ["nvidia-smi", "-i", "0", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
        try:
            self.process = subprocess.Popen([*words, "-lms", "250"], stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            self.process = None
            return
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            use, memory = line.split(",")
            self.rows.append((time.monotonic(), float(use), float(memory)))

    def between(self, begin: float, end: float) -> dict[str, float | None]:
        rows = [row for row in self.rows if begin <= row[0] <= end]
        if not rows:
            return {"gpu_use_percent": None, "gpu_memory_gib": None}
        return {
            "gpu_use_percent": statistics.mean(row[1] for row in rows),
            "gpu_memory_gib": max(row[2] for row in rows) / 1024,
        }

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()


def bundle(folder: Path, size: str, device: torch.device) -> int:
    """A checkpoint with random weights; its parameters."""
    from benchmarks.models import SIZES  # found once this program's folder is known

    env = envs.make("tabletop", 1, **SETTINGS)
    contract = env.contract
    env.close()
    action = contract.action
    bound = [action.max_translation] * 3 + [action.max_rotation] * 3
    ones = np.ones(contract.state_size)
    numbers = Statistics(
        ArrayStatistics.from_bounds([-b for b in bound] + [0.0], [*bound, 1.0]),
        ArrayStatistics.from_bounds(-ones, ones),
    )
    config: PublishedConfig = replace(
        SIZES[size], decoding="parallel", stop=False, chunk=action.chunk, cameras=len(contract.cameras),
        state_dim=contract.state_size, values=1, prompt_length=48, pad=0, n_bins=BINS,
    )  # fmt: skip
    words = train_tokenizer(training_sentences(), 512, config.prompt_length)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, config.dtype))
    try:
        with torch.device(device):
            model = config.build()
    finally:
        torch.set_default_dtype(before)
    Policy(Codec.create(contract, numbers, words, BINS), model.eval()).save(folder)
    return sum(p.numel() for p in model.parameters())


def measure(name: str, checkpoint: Path, folder: Path, arguments: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    """A schedule's iterations after the first."""
    gpu = arguments.device == "cuda"
    asynchronous = name == "asynchronous"
    placement = replace(
        SCHEDULE[name], policy="0" if gpu else "cpu", learner="0" if gpu else "cpu", learners=1, policy_threads=1,
        environment_workers=arguments.workers, micro_batch=arguments.micro_batch, deadline_s=300.0,
        compile=arguments.compile,
    )  # fmt: skip
    if asynchronous:
        placement = replace(placement, fragments_per_update=placement.all_lanes)
    algorithm = PPOConfig(
        epochs=1, minibatches=arguments.minibatches, perception_steps=0, critic_iterations=0,
        gradient_checkpointing=arguments.checkpointing, learning_rate=1e-5,
    )  # fmt: skip
    engine = SCHEDULES[placement.schedule](
        checkpoint, folder, "tabletop", SETTINGS, "in_distribution", arguments.slots, arguments.decisions, algorithm,
        placement, 0, arguments.iterations + 1, Lora(rank=arguments.rank),
    )  # fmt: skip
    rows = []
    try:
        for iteration in range(arguments.iterations + 1):
            begin = time.monotonic()
            rollout, update = engine.iterate(iteration)
            end = time.monotonic()
            steps = sum(log.steps for log in rollout.episodes)
            rows.append(
                {
                    "seconds": end - begin, "env_steps": steps, "rollout_s": rollout.seconds,
                    "environment_s": statistics.mean(log.step_s for log in rollout.episodes),
                    "environment_waits_s": statistics.mean(log.wait_s for log in rollout.episodes),
                    "policy_s": rollout.policy.forward_s, "policy_waits_s": rollout.policy.wait_s,
                    "update_s": update.metrics["update_s"],
                    "learner_waits_s": rollout.measures.get("time/learner_wait_s", 0.0),
                    "approx_kl": update.metrics["approx_kl"],
                    "logprob_gap_mean": update.metrics["rollout_logprob_gap_mean"],
                    **watch.between(begin, end),
                }
            )  # fmt: skip
    finally:
        engine.close()
    counted = rows[1:]
    rates = [row["env_steps"] / row["seconds"] for row in counted]
    whole = sum(row["env_steps"] for row in counted) / sum(row["seconds"] for row in counted)
    return {"env_steps_per_s": whole, "env_steps_per_s_range": [min(rates), max(rates)], "iterations": rows}


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--size", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--schedules", choices=[*SCHEDULE], nargs="+", default=[*SCHEDULE])
    parser.add_argument("--iterations", type=int, default=2, help="that count, of each schedule")
    parser.add_argument("--slots", type=int, default=32, help="environments")
    parser.add_argument("--decisions", type=int, default=8, help="chunks of each environment in an iteration")
    parser.add_argument("--workers", type=int, default=8, help="environment workers")
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32, help="of the adapters")
    parser.add_argument("--compile", action="store_true", help="the blocks of the model")
    parser.add_argument("--checkpointing", action="store_true", help="of gradients")
    parser.add_argument("--folder", type=Path, help="for the checkpoint of 15 GB; default: a temporary one")
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU: run it where there is one, or with --device cpu --size tiny", file=sys.stderr)
        return 1
    watch, rows = Watch(), {}
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/gpu/pipeline.py", *words]), "commit": commit(),
        "machine": machine("torch", "transformers", "peft", "ray", "mujoco"),
        "device": torch.cuda.get_device_name(0) if arguments.device == "cuda" else "cpu", "schedules": rows,
    }  # fmt: skip
    table = Table("schedule", "env steps/s", "s/iteration", "rollout s", "update s", "GPU %", "GiB")
    with tempfile.TemporaryDirectory() as temporary, ray_session():
        checkpoint = (arguments.folder or Path(temporary)) / "random"
        result["parameters"] = bundle(checkpoint, arguments.size, torch.device(arguments.device))
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
        for name in arguments.schedules:
            rows[name] = found = measure(name, checkpoint, Path(temporary) / name, arguments, watch)
            write_json(arguments.out, result)  # what is measured stays, whatever comes after
            last = found["iterations"][1:]
            mean = {k: statistics.mean(row[k] for row in last) for k in ("seconds", "rollout_s", "update_s")}
            use = [row["gpu_use_percent"] for row in last if row["gpu_use_percent"] is not None]
            memory = [row["gpu_memory_gib"] for row in last if row["gpu_memory_gib"] is not None]
            table.add_row(
                name, f"{found['env_steps_per_s']:.1f}", *(f"{mean[k]:.1f}" for k in mean),
                f"{statistics.mean(use):.0f}" if use else "", f"{max(memory):.1f}" if memory else "",
            )  # fmt: skip
            Console().print(f"{name}: {found['env_steps_per_s']:.1f} environment steps/s", highlight=False)
    watch.close()
    base = rows.get("sequential", {}).get("env_steps_per_s")
    result["over_sequential"] = {k: v["env_steps_per_s"] / base for k, v in rows.items()} if base else {}
    write_json(arguments.out, result)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main())
