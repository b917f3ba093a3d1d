"""A policy of one's own, as docs/guide/bring-your-own-model.md explains it: a small transformer in plain torch."""

from dataclasses import dataclass

import torch
from torch import nn

from vla.models import ModelConfig, VLAOutput


@dataclass(frozen=True)
class OwnConfig(ModelConfig):
    """A transformer over patches, words, the state, and one query for each action.

    image_size: px. patch: side of a patch, px. vocabulary: rows of the word embedding. width: of a token.
    layers: of the transformer. heads: of a layer.
    """

    image_size: int = 64
    patch: int = 8
    vocabulary: int = 512
    width: int = 64
    layers: int = 2
    heads: int = 4

    def build(self) -> "OwnModel":
        return OwnModel(self)


class OwnModel(nn.Module):
    def __init__(self, c: OwnConfig):
        super().__init__()
        self.config = c.data()
        self.shape = (c.chunk, c.action_dim, c.n_bins)
        patches = (c.image_size // c.patch) ** 2
        self.patches = nn.Conv2d(3, c.width, c.patch, c.patch)
        self.words = nn.Embedding(c.vocabulary, c.width)
        self.state = nn.Linear(c.state_dim, c.width)
        self.queries = nn.Parameter(0.02 * torch.randn(c.chunk, c.width))
        self.places = nn.Parameter(0.02 * torch.randn(c.cameras * patches + c.prompt_length, c.width))
        layer = nn.TransformerEncoderLayer(
            c.width, c.heads, 4 * c.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, c.layers, enable_nested_tensor=False)
        self.head = nn.Linear(c.width, c.action_dim * c.n_bins)
        self.value_head = nn.Linear(c.width, c.values)

    def forward(self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor) -> VLAOutput:
        """images: uint8 `[B, K, H, W, 3]`; state: `[B, S]`, normalised; tokens: `[B, L]`, 0 is none."""
        batch = len(images)
        pixels = images.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        seen = self.patches(pixels).flatten(2).transpose(1, 2).reshape(batch, -1, self.places.shape[-1])
        told = torch.cat([seen, self.words(tokens)], 1) + self.places
        queries = self.queries.expand(batch, -1, -1)
        x = torch.cat([told, self.state(state)[:, None], queries], 1)
        absent = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        absent[:, seen.shape[1] : told.shape[1]] = tokens == 0
        answer = self.transformer(x, src_key_padding_mask=absent)[:, -len(self.queries) :]
        logits = self.head(answer).view(batch, *self.shape).float()
        return VLAOutput(logits, self.value_head(answer[:, 0].detach()).float())
