"""A model's load without the model, against what the model really keeps; and the plan made of it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from training.algorithms.ppo import PPOConfig
from training.capacity import FILLED, sized, weigh_devices
from training.pipeline.placement import AUTO, EngineError, PlacementConfig
from training.pipeline.seats import COMPONENTS, CPU, Cluster, seat
from training.pipeline.weigh import GIB, Sizes, weigh
from training.plan import OFT, PlanConfig, plan
from vla.lora import Lora
from vla.models.published import LlamaSizes, PublishedConfig
from vla.models.vit import DINO, SIGLIP, ViTConfig
from vla.policy import build

TINY = PublishedConfig(
    dino=ViTConfig(64, 3, 4, 256, DINO.registers, layer_scale=True),
    siglip=ViTConfig(72, 3, 4, 269, attention_pool=SIGLIP.attention_pool),
    language=LlamaSizes(32064, 64, 176, 2, 4, 4), decoding="parallel", chunk=8, stop=False, values=1, dtype="float32",
)  # fmt: skip
SIZES = Sizes((1, 224, 224, 3), 0, 12, (8, 7))


def config(sizes: PublishedConfig = TINY) -> dict[str, Any]:
    return {"class": "openvla", "vocabulary": sizes.language.vocab_size, **asdict(sizes)}


def really_kept(model: Any, samples: int) -> int:
    """Bytes of the tensors that the backward pass of a real forward pass holds, a sample."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: list[torch.Tensor] = []

    def add(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            known.add(tensor.untyped_storage().data_ptr())
            held.append(tensor)
        return tensor

    images = torch.zeros(samples, *SIZES.image, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(add, lambda tensor: tensor):
        model(images, torch.zeros(samples, 0), torch.full((samples, SIZES.prompt), 5))
    return sum(t.untyped_storage().nbytes() for t in held) // samples


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_forward_pass_keeps_is_what_it_really_keeps(checkpointing: bool) -> None:
    load = weigh(config(), SIZES)
    model: Any = build(config())
    if checkpointing:
        model.checkpoint_gradients()
    found = load.kept_checkpointed if checkpointing else load.kept
    assert found == pytest.approx(really_kept(model, 2), rel=0.05)
    assert load.kept_checkpointed is not None and load.kept_checkpointed + load.block < load.kept


def test_weights_and_optimizer() -> None:
    model, load = build(config()), weigh(config(), SIZES)
    numbers = sum(p.numel() for p in model.parameters())
    assert load.parameters == load.trained == numbers and load.gradients == 4 * numbers
    assert load.moments == 2 * load.gradients
    adapted = weigh(config(), SIZES, Lora(rank=4))
    assert 0 < adapted.trained < 0.1 * numbers and adapted.weights > load.weights
    whole, parts = (adapted.learner(1, False, count) for count in (1, 4))
    assert whole - parts == adapted.weights - adapted.weights // 4, "what is trained stays whole"
    assert load.learner(0, False, 4) == pytest.approx(load.learner(0, False) / 4, rel=1e-6)
    half = weigh(config(replace(TINY, dtype="bfloat16")), SIZES)
    assert half.weights + half.masters == pytest.approx(load.weights, rel=0.01)
    assert (half.gradients, half.moments, load.masters) == (load.gradients, load.moments, 0)
    assert half.weights == pytest.approx(load.weights / 2, rel=0.01) and half.kept < load.kept


def test_an_autoregressive_policy_has_a_cache() -> None:
    sizes = replace(TINY, decoding="autoregressive", chunk=1)
    load = weigh(config(sizes), replace(SIZES, chunk=(1, 7)))
    places = 1 + 256 + SIZES.prompt + 7  # BOS, patches, prompt, actions
    assert load.cache == 2 * 2 * places * 64 * 4  # keys and values, layers, places, width, bytes of a number
    assert weigh(config(), SIZES).cache == 0


def test_a_plan_tells_every_gpu_and_refuses_one_that_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hybrid = PlacementConfig("0-50%", "50-100%", "all", offload=True, stages=2, micro_batch=4)
    large = PlanConfig(Cluster(1, 2, 160.0), placement=hybrid, out=tmp_path / "plan.json")
    assert plan(large) == 0
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["seats"] == {"environments": [0], "policy": [1], "learner": [0, 1]}
    first, second = told["devices"]
    assert first["gib"]["environments"] is None and set(second["gib"]) == {"policy", "learner"}
    assert second["peak"] == max(second["gib"].values()) < 160
    assert told["load"]["parameters"] / 1e9 == pytest.approx(7.54, abs=0.01)
    assert told["load"]["weights"] / GIB == pytest.approx(14.1, abs=0.1)
    capsys.readouterr()
    small = replace(large, cluster=Cluster(1, 2, 24.0))
    assert plan(small) == 1
    text = capsys.readouterr().out
    assert "too small" in text and "lora.rank=32" in text and "gradient_checkpointing=true" in text
    assert "placement.shard=true" in text
    assert plan(replace(small, force=True)) == 0


def test_micro_batches_fill_the_memory_that_is_there() -> None:
    """As many samples as fit with what else sits on the device, and never more than the minibatch has."""
    algorithm = PPOConfig(gradient_checkpointing=True)
    load = weigh({"class": "openvla", "vocabulary": OFT.language.vocab_size, **asdict(OFT)}, SIZES, Lora(rank=32))

    def settled(gib: float, where: PlacementConfig) -> tuple[int, float]:
        cluster = Cluster(1, 2, gib)
        seats = seat({name: getattr(where, name) for name in COMPONENTS}, cluster)
        found = sized(64, 64, algorithm, where, cluster, seats, load)
        more = replace(found, micro_batch=(found.samples_at_a_time or 0) + 1)
        peaks = [max(d.peak for d in weigh_devices(64, 64, algorithm, p, cluster, seats, load)) for p in (found, more)]
        assert peaks[0] <= FILLED * gib or found.micro_batch == 1
        if where.micro_batch != AUTO:
            return where.micro_batch or 0, peaks[0]
        assert peaks[1] > FILLED * gib or found.micro_batch == 1024
        assert isinstance(found.micro_batch, int)
        return found.micro_batch, peaks[0]

    apart = PlacementConfig("cpu", "0", "1", micro_batch="auto")
    together = replace(apart, policy="0", learner="0")
    assert 1 < settled(24, apart)[0] < settled(80, apart)[0] < 1024
    assert settled(80, together)[0] < settled(80, replace(together, offload=True))[0] == settled(80, apart)[0]
    assert settled(1000, apart)[0] == 64 * 64 // algorithm.minibatches
    assert settled(8, apart)[0] == 1, "nothing fits: the check of the devices says so"
    fixed = replace(apart, micro_batch=7)
    assert settled(80, fixed)[0] == 7


def test_on_processors_micro_batches_take_half_of_what_is_free() -> None:
    load, algorithm = weigh(config(), SIZES), PPOConfig(minibatches=1)
    where = PlacementConfig(learners=2, micro_batch="auto")
    seats = seat({name: CPU for name in COMPONENTS}, Cluster(1, 0))
    found = sized(10_000, 1000, algorithm, where, Cluster(1, 0), seats, load)
    free = psutil.virtual_memory().available
    used = 2 * load.learner(found.samples_at_a_time or 0, False)
    assert 0.3 * free < used < 0.6 * free
    with pytest.raises(EngineError, match="micro_batch=auto has not been settled"):
        _ = where.samples_at_a_time
