"""The published models, against what the original code gives: the same tokens, every number within 1e-5."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vla import lora, weights
from vla.models import action_tokens
from vla.models.heads import value_head
from vla.models.published import PublishedConfig, assemble
from vla.policy import Policy
from vla.types import ModelInputs

TOP = 31999  # id of action token 0
LIBERO = "libero_spatial_no_noops"
OFT = {
    "discrete": ((), {"decoding": "parallel"}),
    "l1": (("l1",), {}),
    "l1_proprio_2img": (("l1", "proprio"), {"cameras": ("third_person", "wrist")}),
    "discrete_proprio_2img": (("proprio",), {"cameras": ("third_person", "wrist")}),
    "film_l1": (("l1", "film"), {}),
}
Close = Callable[..., None]
Numbers = Callable[[str], dict[str, np.ndarray]]
Published = Callable[..., Policy]
Inputs = Callable[..., ModelInputs]


def hidden_of(policy: Policy, run: Callable[[], Any]) -> torch.Tensor:
    """The language model's last hidden states during `run`."""
    model: Any = policy.model
    seen = []
    hook = model.trunk.register_forward_hook(lambda *a: seen.append(a[2].last_hidden_state))
    try:
        run()
    finally:
        hook.remove()
    return torch.cat(seen, 1)


def test_the_7b_layout_has_all_982_tensors_of_the_published_checkpoint(reference: Path) -> None:
    expected = json.loads((reference / "openvla7b_shapes.json").read_text())
    model = weights.empty(lambda: assemble(PublishedConfig()))
    assert len(expected) == 982
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) == 7_541_237_184


@pytest.mark.parametrize("sample", [0, 1, 2])
@torch.no_grad()
def test_openvla(published: Published, inputs: Inputs, numbers: Numbers, close: Close, sample: int) -> None:
    policy, data = published(), {k[2:]: v for k, v in numbers("openvla").items() if k.startswith(f"{sample}.")}
    given, model = inputs(policy, sample), policy.model
    assert given.tokens[0, -data["input_ids"].shape[1] + 1 :].tolist() == data["input_ids"][0, 1:].tolist()
    decided = policy.sample(given, 0.0)
    assert (TOP - decided.tokens).flatten().tolist() == data["action_token_ids"].flatten().tolist()
    close("actions", policy.actions(given)[0, 0], data["actions"])
    close("action logits", policy.logits(given, decided.tokens)[0].flip(-1), data["action_logits"])
    last = hidden_of(policy, lambda: policy.evaluate_actions(given, decided.tokens, 1.0))
    close("last hidden state", last, data["last_hidden"][:, : last.shape[1]])
    if sample == 0:
        vision: Any = model.vision_backbone
        pixels = torch.cat(list(vision.pixels(torch.from_numpy(given.images[0]))), 1)
        close("pixel values", pixels, data["pixel_values"])
        patches, _ = vision(torch.from_numpy(given.images), torch.zeros(1, 0))
        close("patch features", patches, data["patch_features"])
        close("projector features", model.projector(patches), data["projector_features"])


@pytest.mark.parametrize("kind", OFT)
@torch.no_grad()
def test_openvla_oft(published: Published, inputs: Inputs, numbers: Numbers, close: Close, kind: str) -> None:
    parts, options = OFT[kind]
    policy, data = published(*parts, unnorm_key=LIBERO, **options), numbers("openvla_oft")
    for sample in (0, 1, 2):
        if f"{sample}.{kind}.hidden" not in data:
            continue
        given = inputs(policy, sample)
        hidden = hidden_of(policy, lambda given=given: policy.outputs(given))
        start = hidden.shape[1] - 1 - 56 - 1  # the last prompt token; 56 placeholders and STOP follow
        close(f"{kind} hidden states", hidden[:, start : start + 56], data[f"{sample}.{kind}.hidden"])
        close(f"{kind} actions", policy.actions(given)[0], data[f"{sample}.{kind}.actions"])
        if not policy.regresses:
            decided = policy.sample(given, 0.0)
            assert (TOP - decided.tokens).flatten().tolist() == data[f"{sample}.{kind}.token_ids"].flatten().tolist()
            close(f"{kind} logits", policy.outputs(given).flatten(1, 2).flip(-1), data[f"{sample}.{kind}.logits"])


def with_value_head(policy: Policy, data: dict[str, np.ndarray], names: list[str]) -> None:
    model: Any = policy.model
    model.value_head = value_head(64, 1, bias=False)
    layers = [layer for layer in model.value_head if hasattr(layer, "weight")]
    for layer, name in zip(layers, names, strict=True):
        layer.weight.data = torch.from_numpy(data[f"value_head.{name}.weight"])
        if layer.bias is not None:
            layer.bias.data = torch.from_numpy(data[f"value_head.{name}.bias"])


@torch.no_grad()
def test_values_and_probabilities_of_rl4vla(
    published: Published, inputs: Inputs, numbers: Numbers, close: Close
) -> None:
    policy, data = published(), numbers("rl4vla")
    with_value_head(policy, data, ["head_l1", "head_l2", "head_l3"])
    given = as_tensors(policy, inputs(policy, 0, 1, 2), numbers("openvla")["images"], data, rounded=False)
    tokens = torch.from_numpy(TOP - data["action_token_ids"])[:, None]
    found = policy.evaluate_actions(given, tokens, 1.0)
    close("values", found.values, data["values"])
    close("values in training", found.values, data["eval_values"])
    close("log-probabilities", found.log_probs.sum((1, 2))[:, None], data["logprobs"])
    close("entropy", found.entropy.mean((1, 2))[:, None], data["eval_entropy"])
    sampled = policy.evaluate_actions(given, torch.from_numpy(TOP - data["sampled_ids"])[:, None], 1.0)
    close("log-probabilities of sampled actions", sampled.log_probs.sum((1, 2))[:, None], data["sampled_logprobs"])


def as_tensors(
    policy: Policy, given: ModelInputs, images: np.ndarray, data: dict[str, np.ndarray], rounded: bool
) -> ModelInputs:
    """These two resize images as float tensors; what they fed is put in place of what Pillow would give.

    Their prompts have BOS, which the model adds.
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True, align_corners=False)
    x = (x.round() if rounded else x).clamp(0, 255)
    vision: Any = policy.model.vision_backbone
    pixels = (x / 255.0 - vision.mean) / vision.std
    expected = torch.from_numpy(data["pixel_values"]).reshape(6, 224, 224)
    assert torch.allclose(torch.cat(list(pixels[:, 0])), expected, atol=2e-5)
    vision.pixels = lambda _: pixels
    return ModelInputs(given.images, given.state, np.where(data["attention_mask"], data["input_ids"], 32000)[:, 1:])


@torch.no_grad()
def test_values_and_probabilities_of_rlinf(
    published: Published, inputs: Inputs, numbers: Numbers, close: Close
) -> None:
    policy, data = published(), numbers("rlinf_openvla")
    with_value_head(policy, data, ["mlp.0", "mlp.2", "mlp.4"])
    given = as_tensors(policy, inputs(policy, 0, 1, 2), numbers("openvla")["images"], data, rounded=True)
    tokens = torch.from_numpy(TOP - data["action_token_ids"])
    for temperature, suffix in ((1.0, ""), (0.6, "_T0.6")):
        found = policy.evaluate_actions(given, tokens, temperature)
        close(f"log-probabilities at {temperature}", found.log_probs[:, 0], data[f"train_logprobs{suffix}"])
        close(f"entropy at {temperature}", found.entropy[:, 0], data[f"train_entropy{suffix}"])
        close(f"values at {temperature}", found.values, data[f"train_values{suffix}"])
    close(
        "log-probabilities of the rollout",
        policy.evaluate_actions(given, tokens, 1.0).log_probs[:, 0],
        data["logprobs"],
    )


@torch.no_grad()
def test_an_adapter_of_an_old_peft(
    published: Published, inputs: Inputs, numbers: Numbers, close: Close, reference: Path
) -> None:
    policy, data = published(), numbers("lora")
    given = inputs(policy, 0)
    said = torch.from_numpy(TOP - numbers("openvla")["0.action_token_ids"])[:, None]
    lora.read(policy.model, reference / "lora")
    close("logits with the adapter", policy.logits(given, said)[0].flip(-1), data["action_logits"])
    deviation = lora.merge(policy.model, lambda: policy.logits(given, said))
    assert deviation is not None and deviation < 1e-4
    assert not any(".lora_" in name for name in policy.model.state_dict())
    close("merged logits", policy.logits(given, said)[0].flip(-1), data["action_logits"], 3e-5)  # rounded once more


def test_the_top_token_is_the_last_before_the_padding_of_the_vocabulary(published: Published) -> None:
    model: Any = published().model
    assert model.top_id == TOP and model.language_model.config.vocab_size == 32064
    assert action_tokens.sample(torch.eye(256)[None, 3:4], 0.0).item() == 3
