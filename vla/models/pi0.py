"""pi0 (Black et al. 2024) through transformers' own classes: a chunk of actions by flow matching.

Images and prompt go through PaliGemma once; an action expert turns noise into normalised actions in a few steps.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PI0Config, PI0ForConditionalGeneration

from vla.models.base import ModelConfig, VLAOutput


@dataclass(frozen=True)
class Pi0Config(ModelConfig):
    """Sizes of pi0; n_bins has no meaning here.

    values: none.
    steps: of the integration.
    pad: id of the padding, on the left of the prompt.
    bos: id before the prompt.
    pi0: configuration of transformers' class.
    dtype: of the weights.
    """

    values: int = 0
    steps: int = 10
    pad: int = 0
    bos: int = 1
    pi0: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    def build(self) -> "Pi0":
        return Pi0(self)

    def facts(self) -> dict[str, Any]:
        settings: Any = PI0Config(**self.pi0).vlm_config
        return {"vocabulary": settings.image_token_id, "image_size": settings.vision_config.image_size}


class Pi0(nn.Module):
    """`config` is the JSON-able dict of a `Pi0Config`."""

    regresses = True
    network: Any

    def __init__(self, c: Pi0Config):
        super().__init__()
        self.config = c.data()
        self.network = PI0ForConditionalGeneration(PI0Config(**c.pi0))
        settings = self.network.config
        self.noise_shape = (settings.chunk_size, settings.max_action_dim)
        self.image_id = settings.vlm_config.image_token_id
        vision = settings.vlm_config.vision_config
        self.image_tokens = (vision.image_size // vision.patch_size) ** 2

    def forward(
        self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor
    ) -> VLAOutput:
        """images: uint8 `[B, K, H, W, 3]`; state: float `[B, S]`; tokens: int64 `[B, L]`, padded on the left.

        noise: `[B, *noise_shape]`, standard normal; the same noise gives the same actions.
        """
        given = self._inputs(images, state, tokens)
        actions = self.network.sample_actions(
            **given, noise=noise.to(given["state"].dtype), num_steps=self.config["steps"]
        )
        chunk, dim = self.config["chunk"], self.config["action_dim"]
        return VLAOutput(None, state.new_zeros(len(state), 0).float(), None, actions[:, :chunk, :dim].float())

    def loss(
        self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor, actions: torch.Tensor,
        noise: torch.Tensor | None = None, time: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Flow-matching loss, a number, of normalised actions `[B, C, D]`; noise and times are drawn if not given."""
        given = self._inputs(images, state, tokens)
        dim = self.noise_shape[1]
        padded = F.pad(actions, (0, dim - actions.shape[-1])).to(given["state"].dtype)
        return self.network(**given, actions=padded, noise=noise, timestep=time).loss

    def _inputs(self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """What transformers' class takes. Left or right padding is the same to it: positions count what is there."""
        batch, views = images.shape[:2]
        dtype = self.network.action_out_proj.weight.dtype
        pixels = (images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0).to(dtype)
        patches = tokens.new_full((batch, views * self.image_tokens), self.image_id)
        begin = tokens.new_full((batch, 1), self.config["bos"])
        valid = tokens != self.config["pad"]
        return {
            "input_ids": torch.cat([patches, begin, tokens], 1),
            "attention_mask": torch.cat([torch.ones_like(patches), torch.ones_like(begin), valid.long()], 1),
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(batch, views, dtype=torch.bool, device=images.device),
            "state": F.pad(state, (0, self.network.config.max_state_dim - state.shape[1])).to(dtype),
        }
