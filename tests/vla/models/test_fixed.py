"""The model with fixed shapes says what the model says, for prompts of any length; on a GPU as CUDA graphs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vla.policy import Policy, Speedup
from vla.types import ModelInputs

LIBERO = {"unnorm_key": "libero_spatial_no_noops"}
KINDS = {
    "OpenVLA": ((), {}),
    "OFT": ((), {"decoding": "parallel"}),
    "OFT, L1, proprioception, FiLM, two images": (
        ("l1", "proprio", "film"), {**LIBERO, "cameras": ("third_person", "wrist")},
    ),
}  # fmt: skip
Published = Callable[..., Policy]
Inputs = Callable[..., ModelInputs]
Close = Callable[..., None]


def said(policy: Policy, inputs: ModelInputs) -> dict[str, Any]:
    """What a policy that acts gives, by name, with the logits and values that lead to it."""
    found: dict[str, Any] = {"actions": policy.actions(inputs), "outputs": policy.outputs(inputs)}
    if not policy.regresses:
        decision = policy.sample(inputs, 0.0)
        drawn = policy.sample(inputs, 1.0, torch.Generator().manual_seed(3))
        found |= {
            "tokens": decision.tokens, "log-probabilities": decision.log_probs, "values": decision.values,
            "tokens drawn": drawn.tokens, "log-probabilities of tokens drawn": drawn.log_probs,
        }  # fmt: skip
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def compare(policy: Policy, how: Speedup, inputs: Inputs, close: Close, limit: float) -> None:
    """At three prompts, and at the first one again: nothing of the others is left."""
    given = [inputs(policy, sample) for sample in (0, 1, 2, 0)]
    short = given[1].tokens.copy()
    short[0, :-3] = policy.codec.tokenizer.pad_id
    given[1] = replace(given[1], tokens=short)
    assert len({int((g.tokens != policy.codec.tokenizer.pad_id).sum()) for g in given}) > 1
    plain = [said(policy, g) for g in given]
    policy.speed_up(how)
    for g, expected in zip(given, plain, strict=True):
        for name, found in said(policy, g).items():
            close(name, found, expected[name], 0.0 if name == "tokens" else limit)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, published: Published) -> Policy:
    parts, options = KINDS[request.param]
    return published(*parts, values=0 if "l1" in parts else 1, **options)


def test_the_same_tokens_and_probabilities(kind: Policy, inputs: Inputs, close: Close) -> None:
    compare(kind, "graph", inputs, close, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["OpenVLA", "OFT"], indirect=True)
def test_the_same_compiled(kind: Policy, inputs: Inputs, close: Close) -> None:
    compare(kind, "compile", inputs, close, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["graph", "compile"])
def test_the_same_from_cuda_graphs(kind: Policy, inputs: Inputs, close: Close, how: Speedup) -> None:
    kind.model.to("cuda")
    compare(kind, how, inputs, close, 1e-4)  # other kernels in another order
    graph = kind._fixed._next if kind.autoregressive else kind._fixed._whole
    assert graph._graph is not None, "the calls above are enough to capture one"


def test_a_small_model_has_fixed_shapes_too(policy: Policy, close: Close) -> None:
    given = policy.blank()
    plain = said(policy, given)
    policy.speed_up("graph")
    for name, found in said(policy, given).items():
        close(name, found, plain[name])


def test_it_is_used_for_one_observation_and_without_gradients_alone(kind: Policy, inputs: Inputs) -> None:
    one, two = inputs(kind, 0), inputs(kind, 0, 1)
    kind.speed_up("graph")
    fixed, calls = kind._fixed, []
    for name in ("forward", "decide"):
        run = getattr(fixed, name)
        setattr(fixed, name, lambda *given, run=run: calls.append(len(given[0])) or run(*given))
    assert len(kind.actions(two)) == 2 and calls == []
    kind.actions(one)
    assert calls == [1]
    if not kind.regresses:
        tokens = torch.zeros(1, *kind.codec.action_shape, dtype=torch.int64)
        assert kind.evaluate_actions(one, tokens, 1.0).log_probs.requires_grad and calls == [1]
    kind.speed_up("none").actions(one)
    assert calls == [1]
