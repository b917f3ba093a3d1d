"""Whether a run's memory suffices, estimated before it starts: on every GPU, and of this machine for the rollouts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from training.algorithms.base import Algorithm
from training.pipeline.placement import AUTO, PlacementConfig
from training.pipeline.seats import COMPONENTS, Cluster, Seats, seat
from training.pipeline.weigh import GIB, Load, Sizes, weigh
from vla.checkpoint import read_codec, read_model_config
from vla.codec import Codec
from vla.errors import SimrealError
from vla.lora import Lora

CONTEXT_GIB = 0.6  # of the CUDA context, cuBLAS and the allocator's slack, for each process on a device
DEFAULT_GIB = 80.0  # of a GPU, where none is there to ask
FILLED = 0.9  # of a GPU's memory, by micro-batches sized by it: allocators leave gaps
FILLED_HERE = 0.5  # of this machine's free memory, where learners are on its processors
FORCE = "or start all the same with force=true."


@dataclass(frozen=True)
class Device:
    """A GPU of the plan. gib: GiB of each component there, None if not known. peak: GiB, the most at a time."""

    number: int
    node: int
    gib: Mapping[str, float | None]
    peak: float


def present(cluster: Cluster) -> Cluster:
    """With what this machine has in place of what was not named."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = here if cluster.gpus is None else cluster.gpus
    gib = cluster.gpu_gib
    if gib is None:
        gib = torch.cuda.get_device_properties(0).total_memory / GIB if here else DEFAULT_GIB
    return Cluster(cluster.nodes, gpus, gib)


def weigh_devices(
    slots: int, decisions: int, algorithm: Algorithm, placement: PlacementConfig, cluster: Cluster, seats: Seats,
    load: Load, environment_gib: float | None = None,
) -> list[Device]:  # fmt: skip
    """What every GPU of a run would hold."""
    per_node = cluster.gpus or 1
    samples = placement.samples_at_a_time or _share(slots, decisions, algorithm, placement, seats)
    each = {
        **_rollout_gib(slots, placement, seats, load, environment_gib),
        "learner": _learner_gib(samples, algorithm, placement, seats, load),
    }
    found = []
    for number in sorted({*seats.environments, *seats.policy, *seats.learner}):
        own = {name: each[name] for name in COMPONENTS if number in seats.of(name)}
        learner, rollout = own.get("learner") or 0.0, sum(v or 0.0 for k, v in own.items() if k != "learner")
        peak = max(learner, rollout) if placement.offload else learner + rollout
        found.append(Device(number, number // per_node, own, peak))
    return found


def sized(
    slots: int, decisions: int, algorithm: Algorithm, placement: PlacementConfig, cluster: Cluster, seats: Seats,
    load: Load, environment_gib: float | None = None,
) -> PlacementConfig:  # fmt: skip
    """With the largest micro-batch that the memory of every learner's device holds, where it is to be found.

    A micro-batch of 1 that does not fit is left to `settle`. On processors: of the memory that is free now.
    """
    if placement.micro_batch != AUTO:
        return placement
    one = _learner_gib(1, algorithm, placement, seats, load)
    each = _learner_gib(2, algorithm, placement, seats, load) - one
    if seats.learner:
        shared = _rollout_gib(slots, placement, seats, load, environment_gib)
        beside = max(
            0.0 if placement.offload else sum(v or 0.0 for k, v in shared.items() if number in seats.of(k))
            for number in seats.learner
        )
        free = FILLED * (cluster.gpu_gib or DEFAULT_GIB) - beside
    else:
        free = FILLED_HERE * psutil.virtual_memory().available / GIB / max(1, placement.learners)
    learners = len(seats.learner) or max(1, placement.learners)
    most = (algorithm.batch_size or slots * decisions // algorithm.minibatches) // learners
    return replace(placement, micro_batch=max(1, min(most, 1 + int((free - one) / each))))


def _share(slots: int, decisions: int, algorithm: Algorithm, placement: PlacementConfig, seats: Seats) -> int:
    """Samples of a learner in a minibatch."""
    update = algorithm.batch_size or -(-slots * decisions // algorithm.minibatches)
    return -(-update // (len(seats.learner) or max(1, placement.learners)))


def _learner_gib(samples: int, algorithm: Algorithm, placement: PlacementConfig, seats: Seats, load: Load) -> float:
    """Of a learner that takes so many samples at a time."""
    parts = max(1, len(seats.learner)) if placement.shard else 1
    return load.learner(samples, algorithm.gradient_checkpointing, parts) / GIB + CONTEXT_GIB


def _rollout_gib(
    slots: int, placement: PlacementConfig, seats: Seats, load: Load, environment_gib: float | None
) -> dict[str, float | None]:
    """Of whoever rolls out, on a device that it has."""
    batch = -(-slots // (placement.stages * max(1, len(seats.policy))))
    return {"environments": environment_gib, "policy": load.policy(batch) / GIB + CONTEXT_GIB}


def sizes_of(codec: Codec) -> Sizes:
    return Sizes(codec.image_shape, codec.contract.state_size, codec.tokenizer.length, codec.action_shape)


def check_rollouts(nbytes: int, available: int | None = None) -> None:
    """Refuse rollouts that this machine's memory can't hold. available: bytes, null for what is free now."""
    free = psutil.virtual_memory().available if available is None else available
    if nbytes > free:
        raise SimrealError(
            f"the rollouts of an iteration take {nbytes / GIB:.1f} GiB of shared memory, {free / GIB:.1f} are free",
            code="MEMORY", remedy=f"Lower slots, decisions, or the size of the images; {FORCE}",
        )  # fmt: skip


def settle(
    checkpoint: Path, slots: int, decisions: int, algorithm: Algorithm, placement: PlacementConfig, lora: Lora,
    cluster: Cluster, force: bool = False,
) -> PlacementConfig:  # fmt: skip
    """With micro-batches sized by memory. Refuses a run for which a GPU is too small, unless with force."""
    seats = seat({name: getattr(placement, name) for name in COMPONENTS}, cluster)
    if placement.micro_batch != AUTO and not (seats.policy or seats.learner):
        return placement
    load = weigh(read_model_config(checkpoint), sizes_of(read_codec(checkpoint, None)), lora)
    placement = sized(slots, decisions, algorithm, placement, cluster, seats, load)
    devices = weigh_devices(slots, decisions, algorithm, placement, cluster, seats, load)
    capacity = cluster.gpu_gib or DEFAULT_GIB
    if (full := [d for d in devices if d.peak > capacity]) and not force:
        raise SimrealError(
            f"{len(full)} GPUs of {capacity:.1f} GiB are too small: {max(d.peak for d in full):.1f} GiB are needed",
            code="MEMORY", remedy=f"{remedy(algorithm, placement, lora, seats).capitalize()}; {FORCE}",
        )  # fmt: skip
    return placement


def remedy(algorithm: Algorithm, placement: PlacementConfig, lora: Lora, seats: Seats) -> str:
    """What would make it fit, the cheapest first."""
    ways = []
    if not algorithm.gradient_checkpointing:
        ways.append("algorithm.gradient_checkpointing=true")
    if not lora.rank:
        ways.append("lora.rank=32")
    if not placement.shard and len(seats.learner) > 1:
        ways.append("placement.shard=true placement.offload=false")
    shares = any(seats.together(n, "learner") for n in ("environments", "policy"))
    if shares and not placement.offload and not placement.shard:
        ways.append("placement.offload=true")
    if (samples := placement.samples_at_a_time or 16) > 1:
        ways.append(f"placement.micro_batch={samples // 2}")
    return "try " + ", ".join(ways)
