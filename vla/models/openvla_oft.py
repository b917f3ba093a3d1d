"""OpenVLA-OFT: vision towers, projector, Llama, and a chunk of action tokens decoded in one bidirectional pass.

Kim et al. 2025 (OpenVLA-OFT). The sequence is BOS, image tokens, proprioception, instruction, action placeholders; all
attend to all. The hidden state at the last prompt token feeds the value head, as in RLinf.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel

from vla.models.vision import ConvTower, ConvTowerConfig

BOS = 1


class VLAOutput(NamedTuple):
    """logits: `[B, C, D, bins]`; values: `[B, V]`; auxiliary: `[B, A]` or None."""

    logits: torch.Tensor
    values: torch.Tensor
    auxiliary: torch.Tensor | None


class Seen(NamedTuple):
    """What the language model gets of the images. tokens: `[B, N, h]`; auxiliary: `[B, A]` or None."""

    tokens: torch.Tensor
    auxiliary: torch.Tensor | None


@dataclass(frozen=True)
class OFTConfig:
    """Sizes of the model: `chunk * action_dim` tokens of `n_bins` come out.

    cameras: images of an observation.
    state_dim: numbers of the proprioceptive state.
    prompt_length: tokens of the padded instruction.
    vocabulary: rows of the word embedding.
    hidden: width of the language model.
    layers: of the language model.
    heads: attention heads of a layer.
    intermediate: width of its feed-forward part.
    chunk: actions decided at a time.
    action_dim: numbers of an action.
    tokens_per_placeholder: action tokens read from one position of the sequence.
    n_bins: values of an action token.
    bin_basis: Gaussian bumps along the bins, whose weights the head predicts, so that neighbouring bins share what they
    learn; 0 for free logits as published.
    values: 1 for a chunk-level value, `chunk` for one per action.
    detach_value: keep value gradients out of the trunk.
    frequencies: sines and cosines of each proprioceptive number and position that join it, at 1, 2, 4, ... rad per unit
        (Tancik et al. 2020): a small network is blind to a centimetre otherwise; 0 for none, as published.
    pointing: keypoints of each camera that learn to point at named things (the target, the goal), 0 for none.
    auxiliary: positions that are computed from those keypoints and the proprioception, and join the latter; 0 for
    none. Keypoints and positions are the auxiliary output, trained on privileged simulator state.
    """

    vision: ConvTowerConfig = field(default_factory=ConvTowerConfig)
    cameras: int = 2
    state_dim: int = 11
    prompt_length: int = 48
    vocabulary: int = 512
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    intermediate: int = 320
    chunk: int = 8
    action_dim: int = 7
    tokens_per_placeholder: int = 7
    n_bins: int = 256
    bin_basis: int = 64
    values: int = 1
    detach_value: bool = True
    frequencies: int = 4
    auxiliary: int = 9
    pointing: int = 2


def _mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size), nn.GELU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class OpenVLAOFT(nn.Module):
    """See the module's docstring. `config` is the JSON-able dict that `build_model` takes back."""

    def __init__(self, config: OFTConfig):
        super().__init__()
        self.settings = config
        self.config: dict[str, Any] = {"class": "openvla_oft", **asdict(config)}
        h = config.hidden
        self.placeholder_count = config.chunk * config.action_dim // config.tokens_per_placeholder
        self.vision_backbone = nn.ModuleList(ConvTower(config.vision, h, h) for _ in range(config.cameras))
        self.projector = _mlp(h, (2 * h,), h)
        named = 4 * config.cameras * config.pointing
        self.locator = _mlp(config.state_dim + named, (2 * h, 2 * h), config.auxiliary) if config.auxiliary else None
        proprioception = (config.state_dim + config.auxiliary) * (1 + 2 * config.frequencies)
        self.proprio_projector = _mlp(proprioception, (2 * h,), h)
        self.language_model = LlamaModel(
            LlamaConfig(
                vocab_size=config.vocabulary, hidden_size=h, intermediate_size=config.intermediate,
                num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.heads,
                max_position_embeddings=512, rms_norm_eps=1e-6, pad_token_id=0, bos_token_id=BOS,
            )
        )  # fmt: skip
        self.language_model.config._attn_implementation = "sdpa"
        self.language_model.config.is_causal = False
        self.placeholders = nn.Parameter(0.02 * torch.randn(self.placeholder_count, h))
        self.action_head = nn.Linear(h, config.tokens_per_placeholder * (config.bin_basis or config.n_bins), bias=False)
        self.basis: torch.Tensor
        self.register_buffer("basis", _bumps(config.bin_basis, config.n_bins), persistent=False)
        self.value_head = _mlp(h, (512, 128), config.values)
        # Words of unit size: with Llama's 0.02 the instruction hardly modulates the vision towers at first.
        nn.init.normal_(self.language_model.embed_tokens.weight, std=1.0)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "OpenVLAOFT":
        fields = {k: v for k, v in config.items() if k not in ("class", "vision")}
        vision = dict(config.get("vision", {}))
        if "widths" in vision:
            vision["widths"] = tuple(vision["widths"])
        return cls(OFTConfig(vision=ConvTowerConfig(**vision), **fields))

    @property
    def auxiliary_size(self) -> int:
        """Numbers of the auxiliary output, 0 for none."""
        c = self.settings
        return c.auxiliary and c.auxiliary + 2 * c.cameras * c.pointing

    def see(self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor) -> Seen:
        """Everything that depends on the images but the language model; arguments as in `forward`."""
        pixels = images.permute(1, 0, 4, 2, 3).to(state.dtype) / 127.5 - 1.0
        valid = tokens != 0
        embedded = self.language_model.embed_tokens(tokens)
        text = (embedded * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        seen = [tower(p, text) for tower, p in zip(self.vision_backbone, pixels, strict=True)]
        return Seen(torch.cat([s[0] for s in seen], 1), self.locate(torch.stack([s[1] for s in seen], 1), state))

    def locate(self, points: torch.Tensor, state: torch.Tensor) -> torch.Tensor | None:
        """Positions and named keypoints `[B, auxiliary + cameras * pointing * 2]` from keypoints and state."""
        if self.locator is None:
            return None
        named = points[:, :, : self.settings.pointing]
        positions = self.locator(torch.cat([state, named.flatten(1)], 1))
        return torch.cat([positions, named[..., :2].flatten(1)], 1).float()

    def perceive(self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The auxiliary output `[B, A]` alone, without the language model; arguments as in `forward`."""
        located = self.see(images, state, tokens).auxiliary
        if located is None:
            raise ValueError("this model has no auxiliary output: auxiliary is 0")
        return located

    def seeing(self) -> list[nn.Parameter]:
        """What the auxiliary output depends on, the word embeddings left out; empty if there is none."""
        if self.locator is None:
            return []
        towers = [p for n, p in self.vision_backbone.named_parameters() if "_token." not in n]
        return [*towers, *self.locator.parameters()]

    def behind_seen(self) -> list[nn.Parameter]:
        """What `forward` uses when it is given `seen`."""
        unused = {id(p) for part in (self.vision_backbone, self.locator) if part for p in part.parameters()}
        return [p for p in self.parameters() if id(p) not in unused]

    def forward(
        self,
        images: torch.Tensor,
        state: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        seen: Seen | None = None,
    ) -> VLAOutput:
        """images: uint8 `[B, K, H, W, 3]`; state: float `[B, S]`; tokens: int64 `[B, L]`, left padded with 0.

        positions: `[B, auxiliary]`, what the trunk is told in place of the positions found in the images (teacher
        forcing); those that are NaN are still the found ones.
        seen: what `see` returned for these inputs, to spare looking again.
        """
        c = self.settings
        # The batch's longest prompt sets the length: padding is on the left, so cutting it changes nothing else.
        tokens = tokens[:, -max(1, int((tokens != 0).sum(1).max())) :]
        vision, auxiliary = seen or self.see(images, state, tokens)
        valid = tokens != 0
        embedded = self.language_model.embed_tokens(tokens)
        bos = self.language_model.embed_tokens(tokens.new_full((len(tokens), 1), BOS))
        if auxiliary is not None:
            found = auxiliary[:, : c.auxiliary]
            told = found if positions is None else torch.where(positions.isnan(), found, positions)
            state = torch.cat([state, told], 1)
        prefix = torch.cat(
            [bos, self.projector(vision), self.proprio_projector(waves(state, c.frequencies))[:, None]], 1
        )
        steps = self.placeholder_count
        sequence = torch.cat([prefix, embedded, self.placeholders.expand(len(tokens), -1, -1)], 1)
        present = torch.cat([valid.new_ones(prefix.shape[:2]), valid, valid.new_ones(len(tokens), steps)], 1)
        positions = (present.long().cumsum(1) - 1).clamp(min=0)
        hidden = self.language_model(
            inputs_embeds=sequence,
            attention_mask=present[:, None, None, :].expand(-1, 1, sequence.shape[1], -1),
            position_ids=positions,
            use_cache=False,
            is_causal=False,
        ).last_hidden_state
        decoded = hidden[:, -steps - 1 : -1]  # read from the last prompt token on
        logits = self.action_head(decoded).float().reshape(len(tokens), c.chunk, c.action_dim, -1)
        if c.bin_basis:
            logits = logits @ self.basis
        summary = hidden[:, -steps - 1]
        values = self.value_head(summary.detach() if c.detach_value else summary).float()
        return VLAOutput(logits, values, auxiliary)


def waves(x: torch.Tensor, frequencies: int) -> torch.Tensor:
    """`[B, S]` -> `[B, S (1 + 2 F)]`: x, then sine and cosine of x, 2 x, 4 x, ..."""
    turns = [wave(2**k * x) for k in range(frequencies) for wave in (torch.sin, torch.cos)]
    return torch.cat([x, *turns], -1)


def _bumps(count: int, n_bins: int) -> torch.Tensor:
    """Gaussian bumps `[count, n_bins]` along the bins, as wide as they are apart, cut off at 6 standard deviations."""
    if not count:
        return torch.zeros(0, n_bins)
    centers = torch.linspace(0, n_bins - 1, count)[:, None]
    distance = (torch.arange(n_bins)[None] - centers) / (n_bins / count)
    # The tails would be denormal numbers, which a processor multiplies ten times more slowly.
    return torch.exp(-0.5 * distance**2) * (distance.abs() < 6)


def smoothed_cross_entropy(logits: torch.Tensor, tokens: torch.Tensor, sigma: float) -> torch.Tensor:
    """Cross-entropy against a Gaussian over neighbouring bins (HL-Gauss, Imani and White 2018), `tokens.shape`.

    sigma is in bins; 0 is the plain cross-entropy. It tells a small model that bins are ordered.
    """
    log_probs = F.log_softmax(logits, -1)
    if sigma == 0:
        return -log_probs.gather(-1, tokens[..., None])[..., 0]
    bins = torch.arange(logits.shape[-1], device=logits.device)
    weights = torch.softmax(-0.5 * ((bins - tokens[..., None]) / sigma) ** 2, -1)
    return -(weights * log_probs).sum(-1)
