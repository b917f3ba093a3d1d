"""Speed of the published architectures: `python benchmarks/models.py --device cpu --out models.json`.

OpenVLA (autoregressive) and OpenVLA-OFT (a chunk of 8 in one pass) with random weights: time of a decision at several
batch sizes, and samples/s of a LoRA step. Beside each stands its floor: what its floating-point operations take at the
rate of a large matrix product on this device, or what reading the weights takes at the rate of a large copy, whichever
is more.
--size 7b takes 15 GB in bfloat16; tiny is that of the tests. benchmarks/gpu/models.py has the defaults for a GPU.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from training.workers.precision import Precision
from vla import lora
from vla.models import action_tokens
from vla.models.fixed import EAGER_CALLS, FixedShapes
from vla.models.published import LlamaSizes, PublishedConfig, assemble
from vla.models.vit import DINO, SIGLIP, ViTConfig
from vla.policy import Speedup
from vla.results import commit, machine, write_json

PROMPT = 34  # tokens of an ordinary instruction
SIZES = {
    "7b": PublishedConfig(),
    "tiny": PublishedConfig(
        dino=ViTConfig(64, 3, 4, 256, DINO.registers, layer_scale=True),
        siglip=ViTConfig(72, 3, 4, 269, attention_pool=SIGLIP.attention_pool),
        language=LlamaSizes(32064, 64, 176, 2, 4, 4),
    ),
}
STEP = "LoRA step"
BLOCKS = "blocks"  # compiled one by one, as placement.compile does
KINDS = {"OpenVLA": {}, "OpenVLA-OFT": {"decoding": "parallel", "chunk": 8, "stop": False}}


def build(size: str, kind: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights straight on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = assemble(replace(SIZES[size], values=1, **KINDS[kind]))
    finally:
        torch.set_default_dtype(before)
    return model.to(device, dtype).eval()


def inputs(batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 1, 224, 224, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(3, 31000, (batch, PROMPT), generator=generator)
    return images.to(device), torch.zeros(batch, 0, device=device), tokens.to(device)


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Of each repetition, after those that compile and capture."""
    taken = []
    for number in range(-EAGER_CALLS, repeats + 1):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number > 0:
            taken.append(time.perf_counter() - begun)
    return taken


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations/s of a large matrix product, bytes/s read by a large copy."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = 2 * side**3 / min(seconds(lambda: a @ b, device, 10))
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return product, 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device, 10))


def draw(logits: torch.Tensor, index: int) -> torch.Tensor:
    return action_tokens.sample(logits, 1.0)


def decision(model: Any, batch: int, device: torch.device, speedup: Speedup) -> Callable[[], Any]:
    given = inputs(batch, device)
    acting = model if speedup == "none" else FixedShapes(model, *given, compiled=speedup == "compile")

    @torch.no_grad()
    def run() -> Any:
        if model.autoregressive:
            return acting.decide(*given, draw)
        return action_tokens.sample(acting.forward(*given).logits, 1.0)

    return run


def step(model: Any, batch: int, device: torch.device, precision: Precision) -> Callable[[], Any]:
    """Log-probabilities, backward pass and optimiser step of the adapters, as the learner does them."""
    given = inputs(batch, device)
    tokens = torch.randint(0, 256, (batch, model.layout.chunk, model.layout.action_dim), device=device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)

    def run() -> None:
        with precision.context(device):
            output = model(*given, actions=tokens)
        loss = output.values.square().mean() - action_tokens.log_prob(output.logits, tokens, 1.0).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def operations(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def measure(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    product, copy = rates(device, dtype)
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        counts: dict[tuple[str, int], float] = {}  # of the plain model: a compiled one can't be counted
        for is_compiled in (False, True) if BLOCKS in arguments.speedups else (False,):
            model = build(arguments.size, kind, device, dtype)
            if is_compiled:
                torch.compiler.reset()  # what one kind has compiled, and how often, is not for the next
                for block in model.blocks():
                    block.compile()
            weights = sum(p.nbytes for p in model.parameters())
            passes = model.layout.tokens if model.autoregressive else 1  # each reads the weights
            for what, batch, speedup in track(work(arguments, is_compiled), f"{kind}{' compiled' * is_compiled}"):
                if what == STEP:
                    run = plain = step(model, batch, device, adapters(model, arguments.checkpointing))
                else:
                    plain = decision(model, batch, device, "none")
                    run = plain if speedup in ("none", BLOCKS) else decision(model, batch, device, speedup)
                if not is_compiled:
                    counts[what, batch] = operations(plain)
                count = counts[what, batch]
                taken = seconds(run, device, arguments.repeats)
                floor = max(count / product, (passes if what == "decision" else 2) * weights / copy)
                done = batch * model.layout.chunk if what == "decision" else batch
                rows.append(
                    {
                        "model": kind, "what": what, "batch": batch, "speedup": speedup,
                        "ms": 1e3 * statistics.median(taken), "ms_range": [1e3 * min(taken), 1e3 * max(taken)],
                        "flop": count, "floor_ms": 1e3 * floor,
                        "over_floor": statistics.median(taken) / floor,
                        "per_s": done / statistics.median(taken),
                    }
                )  # fmt: skip
            del model, run, plain
    return rows


def work(arguments: argparse.Namespace, is_compiled: bool) -> list[tuple[str, int, str]]:
    """What is measured, at which batch, and how it is sped up."""
    if is_compiled:
        larger = [("decision", batch, BLOCKS) for batch in arguments.batches if batch > 1]
        return [*larger, *((STEP, batch, BLOCKS) for batch in arguments.train_batches)]
    decisions = [
        ("decision", batch, speedup)
        for batch in arguments.batches
        for speedup in (arguments.speedups if batch == 1 else ["none"])  # the others are for acting
        if speedup != BLOCKS
    ]
    return [*decisions, *((STEP, batch, "none") for batch in arguments.train_batches)]


def adapters(model: Any, checkpointing: bool) -> Precision:
    """Make a model ready to be trained, if it is not yet."""
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        if checkpointing:
            model.checkpoint_gradients()
        lora.attach(model, lora.Lora(rank=32))
    return Precision(model)


def main(
    words: Sequence[str] | None = None, program: str = "benchmarks/models.py", defaults: Sequence[str] = ()
) -> int:
    """words: of the command line. program: the file that was called. defaults: words before those."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=[*SIZES], default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on cpu, else bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--speedups", choices=[*get_args(Speedup), BLOCKS], nargs="+", default=["none"],
        help=f"of decisions at batch 1; {BLOCKS}: larger batches and steps with compiled blocks, too",
    )  # fmt: skip
    parser.add_argument("--train-batches", type=int, nargs="+", default=[8])
    parser.add_argument("--checkpointing", action="store_true", help="of gradients, in the LoRA steps")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args([*defaults, *words])
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    rows = measure(arguments, device, dtype)
    write_json(
        arguments.out,
        {
            "size": arguments.size, "dtype": str(dtype).removeprefix("torch."), "rows": rows,
            "command": shlex.join(["python", program, *words]),
            "commit": commit(), "machine": machine("torch", "transformers", "peft"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    )  # fmt: skip
    table = Table("model", "", "batch", "speedup", "ms", "floor ms", "over floor", "actions/s, samples/s")
    for row in rows:
        numbers = (row["ms"], row["floor_ms"], row["over_floor"], row["per_s"])
        what = (row["model"], row["what"], str(row["batch"]), row["speedup"])
        table.add_row(*what, *(f"{number:.4g}" for number in numbers))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
