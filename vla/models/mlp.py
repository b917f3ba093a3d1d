"""A policy over the state alone: two small networks, one for the action tokens and one for the value.

For tasks whose state tells everything. Images and words are taken, as of every model, and not looked at.
"""

from dataclasses import dataclass

import torch
from torch import nn

from vla.models.base import ModelConfig, VLAOutput
from vla.models.heads import BinHead, waves

WORDS = 512  # ids of a tokenizer that nobody reads


@dataclass(frozen=True)
class MLPConfig(ModelConfig):
    """Sizes of both networks.

    hidden: width of a layer.
    layers: hidden ones of each network.
    bin_basis: Gaussian bumps along the bins, see the nano model; 0 for free logits.
    frequencies: sines and cosines of every number of the state that join it, at 1, 2, 4, ... rad per unit.
    """

    cameras: int = 0
    state_dim: int = 42
    prompt_length: int = 16
    chunk: int = 1
    action_dim: int = 8
    n_bins: int = 16
    hidden: int = 256
    layers: int = 3
    bin_basis: int = 0
    frequencies: int = 0

    def build(self) -> "MLP":
        return MLP(self)

    def words(self) -> int:
        return WORDS


class MLP(nn.Module):
    """Tanh networks with orthogonal weights, as PPO has them since Schulman et al. 2017 (Andrychowicz et al. 2021)."""

    def __init__(self, c: MLPConfig):
        super().__init__()
        self.config = c.data()
        self.shape = (c.chunk, c.action_dim)
        self.frequencies = c.frequencies
        inputs = c.state_dim * (1 + 2 * c.frequencies)
        self.trunk = _hidden(inputs, c.hidden, c.layers)
        self.head = BinHead(c.hidden, c.chunk * c.action_dim, c.n_bins, c.bin_basis)
        nn.init.orthogonal_(self.head.weight, 0.01)  # almost every action is as likely at first
        last = nn.Linear(c.hidden, c.values)
        nn.init.orthogonal_(last.weight, 1.0)
        nn.init.zeros_(last.bias)
        self.value_head = nn.Sequential(*_hidden(inputs, c.hidden, c.layers), last)

    def forward(self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor) -> VLAOutput:
        """state: float32 `[B, S]`, normalised."""
        told = waves(state, self.frequencies)
        logits = self.head(self.trunk(told)).unflatten(1, self.shape)
        return VLAOutput(logits, self.value_head(told))


def _hidden(inputs: int, width: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(count):
        linear = nn.Linear(inputs, width)
        nn.init.orthogonal_(linear.weight, 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
        inputs = width
    return nn.Sequential(*layers)
