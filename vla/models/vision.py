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
    expected coordinates become one token (Levine et al. 2016), the last stage's cells become the other tokens;
    keypoint_stage: stage whose features the heat maps are computed from, 0 for the first.
    """

    image_size: int = 64
    widths: tuple[int, ...] = (16, 32, 64, 96, 128)
    keypoints: int = 32
    keypoint_stage: int = 1


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
        width = config.widths[config.keypoint_stage]
        self.refine = nn.Conv2d(width, width, 3, padding=1)
        self.heatmaps = nn.Conv2d(width, config.keypoints, 1)
        self.keypoint_token = nn.Linear(3 * config.keypoints, out_dim)
        self.cell_token = nn.Linear(config.widths[-1], out_dim)
        side = torch.linspace(-1, 1, config.image_size)
        y, x = torch.meshgrid(side, side, indexing="ij")
        self.grid: torch.Tensor
        self.register_buffer("grid", torch.stack([x, y])[None], persistent=False)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image: float `[B, 3, H, W]` in -1..1; text: `[B, text_dim]`.

        Returns tokens `[B, cells + 1, out_dim]` and keypoints `[B, keypoints, 2]` (x right, y down, -1..1).
        """
        x = torch.cat([image, self.grid.expand(len(image), -1, -1, -1)], 1)
        points = x
        for index, (conv, norm, film) in enumerate(zip(self.stages, self.norms, self.films, strict=True)):
            scale, shift = film(text)[..., None, None].chunk(2, 1)
            x = F.silu(norm(conv(x)) * (1 + scale) + shift)
            if index == self.config.keypoint_stage:
                points = x = x + F.silu(self.refine(x))
        cells = self.cell_token(x.flatten(2).transpose(1, 2))
        where, peak = self._keypoints(points)
        token = self.keypoint_token(torch.cat([where.flatten(1), peak], 1))
        return torch.cat([cells, token[:, None]], 1), where

    def _keypoints(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expected x and y `[B, P, 2]` and the peak `[B, P]` of every heat map."""
        maps = self.heatmaps(features).flatten(2)
        weights = maps.softmax(-1)
        size = features.shape[-1]
        side = (torch.arange(size, device=features.device, dtype=features.dtype) + 0.5) * (2 / size) - 1
        y, x = torch.meshgrid(side, side, indexing="ij")
        grid = torch.stack([x.flatten(), y.flatten()], -1)
        return weights @ grid, torch.tanh(maps.amax(-1) / 4)
