"""A model's load without the model, against what the model really keeps; and the plan made of it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from training.pipeline.placement import PlacementConfig
from training.pipeline.seats import Cluster
from training.pipeline.weigh import GIB, Sizes, weigh
from training.plan import PlanConfig, plan
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
