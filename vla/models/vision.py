"""Vision towers: images -> tokens."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ConvTowerConfig:
    """A convolutional patch stem with FiLM and spatial-softmax keypoints, for small models trained from scratch.

    image_size: px; widths: channels of the stages, each of which halves the resolution; keypoints: heat maps whose
    expected coordinates become one token (Levine et al. 2016); refinements: residual convolutions before the heat
    maps; fine: channels of the heat maps' features at twice the last stage's resolution, made of the last two stages
    (Lin et al. 2017); 0 for heat maps at the last stage's own; cells: whether the
    features of the last stage's cells become tokens too.
    """

    image_size: int = 64
    widths: tuple[int, ...] = (16, 32)
    keypoints: int = 2
    refinements: int = 1
    fine: int = 16
    cells: bool = False

    def __post_init__(self) -> None:
        if self.fine and len(self.widths) < 2:
            raise ValueError("heat maps of the last two stages (fine) need two widths or more: add one, or set fine=0")


class ConvTower(nn.Module):
    """One camera. The instruction modulates every stage (FiLM, Perez et al. 2018), as OpenVLA-OFT does in its ViT."""

    def __init__(self, config: ConvTowerConfig, text_dim: int, out_dim: int):
        super().__init__()
        self.config = config
        channels = (5, *config.widths)
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1)
            for i, (a, b) in enumerate(pairwise(channels))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, w) for w in config.widths)
        films = [nn.Linear(text_dim, 2 * w) for w in config.widths]
        for film in films:
            nn.init.normal_(film.weight, std=0.05)
            nn.init.zeros_(film.bias)
        self.films = nn.ModuleList(films)
        width = config.widths[-1]
        self.refine = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(config.refinements))
        if config.fine:
            self.top_down = nn.Conv2d(width, config.fine, 1)
            self.lateral = nn.Conv2d(config.widths[-2], config.fine, 1)
            self.merge = nn.Conv2d(config.fine, config.fine, 3, padding=1)
        self.heatmaps = nn.Conv2d(config.fine or width, config.keypoints, 1)
        self.keypoint_token = nn.Linear(4 * config.keypoints, out_dim)
        self.cell_token = nn.Linear(width, out_dim) if config.cells else None
        side = torch.linspace(-1, 1, config.image_size)
        y, x = torch.meshgrid(side, side, indexing="ij")
        self.grid: torch.Tensor
        self.register_buffer("grid", torch.stack([x, y])[None], persistent=False)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image: float `[B, 3, H, W]` in -1..1; text: `[B, text_dim]`.

        Returns tokens `[B, T, out_dim]` and keypoints `[B, keypoints, 4]`: x right and y down, -1..1, the spread of
        the heat map and its peak, which tell how far to trust them.
        """
        x = finer = torch.cat([image, self.grid.expand(len(image), -1, -1, -1)], 1)
        x = x.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU than channels first
        for conv, norm, film in zip(self.stages, self.norms, self.films, strict=True):
            finer = x
            scale, shift = film(text)[..., None, None].chunk(2, 1)
            x = F.silu(torch.addcmul(shift, norm(conv(x)), 1 + scale))
        for refine in self.refine:
            x = x + F.silu(refine(x))
        points = self._keypoints(self._finer(x, finer) if self.config.fine else x)
        token = self.keypoint_token(points.flatten(1))[:, None]
        if self.cell_token is not None:
            token = torch.cat([self.cell_token(x.flatten(2).transpose(1, 2)), token], 1)
        return token, points

    def _finer(self, coarse: torch.Tensor, finer: torch.Tensor) -> torch.Tensor:
        """Features `[B, fine, 2 h, 2 w]` of the last stage `[B, ., h, w]` and of the one before `[B, ., 2 h, 2 w]`."""
        x = F.interpolate(self.top_down(coarse), finer.shape[-2:], mode="bilinear") + self.lateral(finer)
        return x + F.silu(self.merge(F.silu(x)))

    def _keypoints(self, features: torch.Tensor) -> torch.Tensor:
        """Expected x and y, spread and peak of every heat map, `[B, P, 4]`."""
        maps = self.heatmaps(features).flatten(2)
        weights = maps.softmax(-1)
        size = features.shape[-1]
        side = (torch.arange(size, device=features.device, dtype=features.dtype) + 0.5) * (2 / size) - 1
        y, x = torch.meshgrid(side, side, indexing="ij")
        grid = torch.stack([x.flatten(), y.flatten()], -1)
        where = weights @ grid
        variance = (weights @ grid.square() - where.square()).sum(-1, keepdim=True)
        spread = variance.clamp(min=1e-6).sqrt()
        return torch.cat([where, spread, torch.tanh(maps.amax(-1, keepdim=True) / 4)], -1)
