"""The policy over the state alone."""

import numpy as np
import torch

from vla.models import build_model, read_config
from vla.models.mlp import MLPConfig

SIZES = MLPConfig(state_dim=5, chunk=2, action_dim=3, n_bins=8, values=2, hidden=16, layers=2, frequencies=2)


def answer(model: torch.nn.Module, state: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    images, tokens = torch.zeros(len(state), 0, 0, 0, 3, dtype=torch.uint8), torch.zeros(len(state), 16).long()
    output = model(images, torch.from_numpy(state), tokens)
    return output.logits, output.values


def test_it_gives_logits_and_values_from_the_state() -> None:
    assert read_config(SIZES.data()) == SIZES and SIZES.data()["class"] == "mlp"
    model = build_model(SIZES.data())
    state = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    logits, values = answer(model, state)
    assert logits.shape == (4, 2, 3, 8) and values.shape == (4, 2)
    assert logits.abs().max() < 0.1, "actions are about equally likely at first"
    assert torch.allclose(answer(model, state[:1])[0], logits[:1], atol=1e-6)
    assert not torch.allclose(answer(model, state + 1)[0], logits)


def test_only_the_value_depends_on_the_value_head() -> None:
    model = build_model(SIZES.data())
    logits, values = answer(model, np.ones((2, 5), np.float32))
    logits.sum().backward(retain_graph=True)
    head = {name for name, p in model.named_parameters() if p.grad is None}
    assert head == {name for name, _ in model.named_parameters() if name.startswith("value_head")}
    model.zero_grad(set_to_none=True)
    values.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == head
