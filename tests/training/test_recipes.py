"""Published recipes: they compose, have the published numbers, fit the GPUs they are for, and run with a tiny model."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from point_env import MAX_STEPS, untrained

from training import capacity
from training.algorithms.base import Algorithm
from training.algorithms.groups import Grouped
from training.pipeline.placement import PlacementConfig
from training.pipeline.seats import COMPONENTS, Cluster, check, seat
from training.pipeline.weigh import GIB, Load, Sizes, weigh
from training.plan import OFT, OFT_PROMPT
from training.train import TrainConfig, train
from vla import configuration
from vla.errors import SimrealError
from vla.lora import Lora

# experiment: slots, decisions, group size, groups, batch, micro-batch, learning rates, LoRA, clip, ratio, grad clip,
# band, temperature, stages; as published for 8 GPUs.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "maniskill_ppo_openvla": (128, 160, 1, 0, 640, 80, 1e-4, 3e-3, 32, 0.2, 0.2, "action", 10, None, 1.0, 2),
    "maniskill_ppo_openvla_oft": (128, 20, 1, 0, 640, 40, 1e-4, 3e-3, 32, 0.2, 0.28, "token", 10, None, 1.0, 1),
    "maniskill_grpo_openvla": (256, 80, 8, 32, 640, 40, 1e-5, None, 0, 0.2, 0.28, "token", 1, None, 1.0, 2),
    "maniskill_grpo_openvla_oft": (256, 10, 8, 32, 640, 40, 1e-4, None, 32, 0.2, 0.28, "token", 10, None, 1.0, 1),
    "libero_grpo_openvla_oft":
        (64, 1024, 8, 128, 16384, 32, 2e-5, None, 0, 0.2, 0.28, "token", 1, (0.5, 4.5), 1.6, 1),
    "robotwin_ppo_openvla_oft": (128, 64, 1, 0, 1024, 16, 1e-4, 3e-3, 32, 0.2, 0.28, "token", 10, None, 1.6, 1),
    "robotwin_grpo_openvla_oft":
        (128, 64, 8, 128, 1024, 32, 2e-4, None, 32, 0.2, 0.28, "token", 1, (0.5, 4.5), 1.6, 1),
}  # fmt: skip
SMALL = [f"{name}_{gib}gb" for name in ("maniskill_ppo_openvla_oft", "libero_grpo_openvla_oft") for gib in (24, 48, 80)]
FREE_GIB = {24: 22.0, 48: 44.0, 80: 79.0}  # what the driver leaves of a GPU of that name


def composed(name: str, *options: str) -> TrainConfig:
    return configuration.load(TrainConfig, "train", [f"experiment={name}", "out=x", "checkpoint=y", *options])


@pytest.fixture(scope="module")
def loads() -> dict[bool, Load]:
    """Of OpenVLA-OFT with 7 billion parameters, all trained or with adapters."""
    settings = {"class": "openvla", "vocabulary": OFT.language.vocab_size, **asdict(OFT)}
    side = OFT.dino.image_size
    sizes = Sizes((OFT.cameras, side, side, 3), OFT.state_dim, OFT_PROMPT, (OFT.chunk, OFT.action_dim))
    return {lora: weigh(settings, sizes, Lora(rank=32) if lora else Lora()) for lora in (False, True)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_numbers(name: str) -> None:
    config = composed(name)
    a: Any = config.algorithm
    band = a.band if isinstance(a, Grouped) else None
    rate = getattr(a, "value_learning_rate", None)
    assert PUBLISHED[name] == (
        config.slots, config.decisions, a.group_size, a.groups, a.batch_size, config.placement.micro_batch,
        a.learning_rate, rate, config.lora.rank, a.clip_low, a.clip_high, a.ratio, a.grad_clip, band, a.temperature,
        config.placement.stages,
    )  # fmt: skip
    assert (a.dual_clip, a.epochs, a.weight_decay, a.entropy_coef) == (3.0, 1, 0.01, 0.0)
    assert config.placement.dtype == "bfloat16" and a.gradient_checkpointing
    if rate is not None:
        assert (a.gamma, a.lam, a.value_clip) == (0.99, 0.95, 0.2)
    if name.startswith("maniskill_ppo"):
        assert a.huber == 10.0
    if band:
        assert (a.reward, a.reward_scale) == ("success", 5.0)


def peak(config: TrainConfig, load: Load, cluster: Cluster) -> float:
    where = config.placement
    seats = seat({name: getattr(where, name) for name in COMPONENTS}, cluster)
    check(seats, where.stages, where.schedule == "asynchronous", where.offload, cluster.devices)
    sizes = config.slots, config.decisions, config.algorithm, where
    return max(d.peak for d in capacity.weigh_devices(*sizes, cluster, seats, load))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_fits_eight_gpus(name: str, loads: dict[bool, Load]) -> None:
    config = composed(name)
    assert peak(config, loads[bool(config.lora.rank)], Cluster(1, 8, 79.0)) < 79.0


@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_fits_its_gpu(name: str, loads: dict[bool, Load]) -> None:
    config = composed(name)
    free = FREE_GIB[int(name.rsplit("_", 1)[1].removesuffix("gb"))]
    needed = peak(config, loads[True], Cluster(1, 1, free))
    print(f"{name}: {needed:.1f} of {free} GiB")
    assert config.lora.rank == 32 and needed < free


def test_a_machine_that_is_too_small_is_told_and_can_be_overruled(tmp_path: Path) -> None:
    with pytest.raises(SimrealError, match=r"take 3\.0 GiB of shared memory, 2\.0 are free") as caught:
        capacity.check_rollouts(int(3 * GIB), int(2 * GIB))
    assert "force=true" in caught.value.remedy
    untrained(tmp_path / "checkpoint")
    config = composed(
        "tabletop_grpo", "env=null", "env.name=point_env:make", "env.settings.image_size=16", "env.settings.chunk=2",
        "slots=8", "decisions=400000000", "algorithm.group_size=4", "placement=colocated",
        "placement.environment_workers=1",
    )  # fmt: skip
    config = replace(
        config, out=tmp_path / "run", checkpoint=tmp_path / "checkpoint",
        algorithm=replace(config.algorithm, train_vision=True, perception_steps=0),
    )  # fmt: skip
    with pytest.raises(SimrealError, match="GiB of shared memory"):
        train(config)
    assert not (tmp_path / "run").exists()
    small: tuple[Any, ...] = (tmp_path / "checkpoint", 8, 12, config.algorithm)
    where = PlacementConfig(policy="0", learner="0")
    capacity.settle(*small, where, Lora(), Cluster(1, 1, 24.0))
    with pytest.raises(SimrealError, match=r"1 GPUs of 0\.5 GiB are too small: .* GiB are needed") as caught:
        capacity.settle(*small, where, Lora(), Cluster(1, 1, 0.5))
    assert "force=true" in caught.value.remedy and "offload=true" in caught.value.remedy


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [*PUBLISHED, *SMALL, "tabletop_grpo", "maniskill_nano_ppo", "libero_nano_ppo"])
def test_a_recipe_completes_an_iteration_in_small(name: str, tmp_path: Path) -> None:
    """Its own algorithm and options, on the processors, with a tiny model in the point environment."""
    config = composed(name)
    untrained(tmp_path / "checkpoint")
    algorithm: Algorithm = replace(config.algorithm, gradient_checkpointing=False)
    if isinstance(algorithm, Grouped):
        band = algorithm.band and (-99.0, 99.0)  # a random policy need not succeed now and then
        algorithm = replace(algorithm, group_size=4, groups=4, band=band, reward="environment")
    algorithm = replace(
        algorithm, batch_size=algorithm.batch_size and 16, train_vision=True, perception_steps=0,
    )  # fmt: skip
    placement = PlacementConfig(
        environment_workers=1, stages=config.placement.stages, learners=1, policy_threads=1, micro_batch=8,
    )  # fmt: skip
    tiny = replace(
        config, out=tmp_path / "run", checkpoint=tmp_path / "checkpoint", iterations=1, slots=8, decisions=MAX_STEPS,
        algorithm=algorithm, placement=placement, lora=Lora(rank=min(2, config.lora.rank)),
        env=replace(config.env, name="point_env:make", settings={"image_size": 16, "chunk": 2},
                    variant="in_distribution"),
    )  # fmt: skip
    train(tiny)
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()
