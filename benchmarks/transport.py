"""What a round trip between environments and policy costs: `python benchmarks/transport.py --out transport.json`.

Two Ray actors on one host, the rollout's block of shared memory and the bells of the real workers. The environments'
side has its images ready and writes them into the block, state and instruction too; the policy's side reads them as
tensors, as the policy worker does, and answers with action tokens that depend on them, which are read and compared.
Neither simulates nor infers: all of the time is messaging. Beside it, in turns in the same run: the same arrays as
arguments and results of calls of a Ray actor.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from rich.progress import track

from training.pipeline.actors import actor, ray_session
from training.pipeline.bell import Bell
from training.pipeline.block import RolloutBlock, RolloutShape, span, unlink
from training.workers.policy import INPUTS
from vla.results import commit, machine, write_json

DECISIONS = 8  # rows of the block that are used in turn
TARGET_MS = 0.5
WARM_UP = 20
DEADLINE_S = 30.0


def answer(images: Any, chunk: int, dim: int) -> np.ndarray:
    """Action tokens `[B, C, D]` that only these images give: they show that no older ones were read."""
    first = np.asarray(images[:, 0, 0, 0, 0]).astype(np.int16)
    return np.broadcast_to(first[:, None, None], (len(first), chunk, dim))


class Environments:
    """The side that shows and waits."""

    def __init__(self, shape: RolloutShape, block: str, bells: str):
        self.shape, self.block = shape, RolloutBlock(shape, block)
        self.columns = span(np.arange(shape.slots))
        self.to_policy, self.from_policy = Bell(Path(bells) / "policy"), Bell(Path(bells) / "environment0")
        random = np.random.default_rng(0)
        self.images = random.integers(0, 256, (shape.slots, *shape.image), np.uint8)
        self.state = random.normal(size=(shape.slots, shape.state)).astype(np.float32)
        self.tokens = random.integers(0, 100, (shape.slots, shape.prompt))

    def ready(self) -> None:
        """Answers once everything is set up."""

    def by_block(self, number: int) -> float:
        """Seconds of a round trip through the block."""
        decision = number % DECISIONS
        self.images[:, 0, 0, 0, 0] = (number + np.arange(len(self.images))) % 256
        began = time.perf_counter()
        for name in INPUTS:
            self.block[name][decision, self.columns] = getattr(self, name)
        self.to_policy.ring(0, 0, decision)
        if self.from_policy.wait(DEADLINE_S) is None:
            raise SystemExit(f"no answer within {DEADLINE_S:g} s")
        found = self.block["action_tokens"][decision, self.columns]
        taken = time.perf_counter() - began
        assert (found == answer(self.images, self.shape.chunk, self.shape.action_dim)).all(), "another image's answer"
        return taken

    def by_ray(self, policy: Any, number: int) -> float:
        """Seconds of a round trip through calls of an actor."""
        self.images[:, 0, 0, 0, 0] = (number + np.arange(len(self.images))) % 256
        began = time.perf_counter()
        found = ray.get(policy.decide.remote(self.images, self.state, self.tokens))
        taken = time.perf_counter() - began
        assert (found == answer(self.images, self.shape.chunk, self.shape.action_dim)).all(), "another image's answer"
        return taken


class Policy:
    """The side that answers."""

    def __init__(self, shape: RolloutShape, block: str, bells: str):
        self.shape, self.block = shape, RolloutBlock(shape, block)
        self.rows = span(np.arange(shape.slots))
        self.bell, self.environment = Bell(Path(bells) / "policy"), Bell(Path(bells) / "environment0")

    def serve(self, count: int) -> None:
        """Answer so many observations from the block."""
        for _ in range(count):
            message = self.bell.wait(DEADLINE_S)
            if message is None:
                raise SystemExit(f"no observation within {DEADLINE_S:g} s")
            decision = message[2]
            images, *_ = (torch.from_numpy(self.block[name][decision, self.rows]) for name in INPUTS)
            self.block["action_tokens"][decision, self.rows] = answer(images, self.shape.chunk, self.shape.action_dim)
            self.environment.ring(0, 0, decision)

    def decide(self, images: np.ndarray, state: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The same by a call."""
        return answer(torch.from_numpy(images.copy()), self.shape.chunk, self.shape.action_dim).copy()


def measure(arguments: argparse.Namespace, shape: RolloutShape, bells: str) -> dict[str, list[float]]:
    """Milliseconds of every round trip."""
    name = f"simreal_transport_{time.time_ns()}"
    block = RolloutBlock(shape, name, create=True)
    try:
        environments: Any = actor(Environments, 1).remote(shape, name, bells)
        policy: Any = actor(Policy, 1).remote(shape, name, bells)
        ray.get(environments.ready.remote())
        found: dict[str, list[float]] = {"shared_memory": [], "ray_calls": []}
        each = arguments.round_trips // arguments.turns
        for _ in track(range(arguments.turns), "round trips"):
            serving = policy.serve.remote(each + WARM_UP)
            times = [ray.get(environments.by_block.remote(n)) for n in range(each + WARM_UP)]
            ray.get(serving)
            found["shared_memory"] += [1e3 * t for t in times[WARM_UP:]]
            calls = [ray.get(environments.by_ray.remote(policy, n)) for n in range(each // 4 + 5)]
            found["ray_calls"] += [1e3 * t for t in calls[5:]]
    finally:
        block.close()
        unlink(name)
    return found


def quantiles(values: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.quantile(values, (0.5, 0.99))
    return {"p50": float(p50), "p99": float(p99), "samples": len(values)}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--environments", type=int, default=16)
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=224, help="height and width, px")
    parser.add_argument("--round-trips", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=5, help="of either way")
    arguments = parser.parse_args(words)
    size = arguments.image_size
    shape = RolloutShape(
        DECISIONS, arguments.environments, (arguments.cameras, size, size, 3), 11, 48, chunk=8, action_dim=7, values=1,
        privileged=0, critic=0,
    )  # fmt: skip
    with ray_session(), tempfile.TemporaryDirectory() as bells:
        found = measure(arguments, shape, bells)
    ours, calls = quantiles(found["shared_memory"]), quantiles(found["ray_calls"])
    result = {
        "roundtrip_ms": ours, "ray_calls_ms": calls, "ray_calls_over_ours": calls["p50"] / ours["p50"],
        "image_bytes": int(np.prod((arguments.environments, arguments.cameras, size, size, 3))),
        "command": shlex.join(["python", "benchmarks/transport.py", *(words or sys.argv[1:])]),
        "commit": commit(), "machine": machine("ray", "numpy", "torch"),
    }  # fmt: skip
    write_json(arguments.out, result)
    print(f"round trip: p50 {ours['p50']:.3f} ms, p99 {ours['p99']:.3f} ms (aim: p50 {TARGET_MS} ms)")
    print(f"by calls of a Ray actor: p50 {calls['p50']:.3f} ms, p99 {calls['p99']:.3f} ms")
    return int(ours["p50"] > TARGET_MS)


if __name__ == "__main__":
    sys.exit(main())
