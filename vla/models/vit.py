"""Vision transformers with the parameter names of OpenVLA's checkpoints, and the pair of them that OpenVLA sees with.

DINOv2 with registers (Darcet et al. 2024) and SigLIP (Zhai et al. 2023), as the timm library defines them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6  # of the layer norms


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer.

    width: of a token. depth: blocks; the features are those after the last but one. heads: of a block.
    intermediate: width of a block's feed-forward part. registers: tokens beside the class token; 0: neither.
    layer_scale: whether each block scales what it adds. attention_pool: whether the checkpoint has SigLIP's pooling,
    which is never used. patch: side of a patch, px. image_size: px.
    text: width of the language model's words that modulate every block (FiLM, as in OpenVLA-OFT+), 0 for none.
    """

    width: int
    depth: int
    heads: int
    intermediate: int
    registers: int = 0
    layer_scale: bool = False
    attention_pool: bool = False
    patch: int = 14
    image_size: int = 224
    text: int = 0


DINO = ViTConfig(1024, 24, 16, 4096, registers=4, layer_scale=True)
SIGLIP = ViTConfig(1152, 27, 16, 4304, attention_pool=True)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, width = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, count, width))


class MLP(nn.Module):
    def __init__(self, width: int, intermediate: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, intermediate), nn.Linear(intermediate, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_factor


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width = config.width
        self.norm1, self.attn = nn.LayerNorm(width, eps=EPS), Attention(width, config.heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=EPS), MLP(width, config.intermediate)
        scale: list[nn.Module] = [LayerScale(width) if config.layer_scale else nn.Identity() for _ in range(2)]
        self.ls1, self.ls2 = scale

    def forward(self, x: torch.Tensor, film: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """film: scale and shift `[B, 1, width]` between attention and feed-forward part."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        if film is not None:
            x = x * (1 + film[0]) + film[1]
        return x + self.ls2(self.mlp(self.norm2(x)))


class FilmBlock(nn.Module):
    """A block that the instruction modulates (FiLM, Perez et al. 2018)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.block = Block(config)
        self.scale, self.shift = nn.Linear(config.text, config.width), nn.Linear(config.text, config.width)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.block(x, (self.scale(text)[:, None], self.shift(text)[:, None]))


class AttentionPool(nn.Module):
    """The parameters of SigLIP's pooling; OpenVLA takes the patches before it."""

    def __init__(self, width: int, intermediate: int):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width, eps=EPS), MLP(width, intermediate)


class PatchEmbedding(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, config.patch)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[B, 3, H, W]` -> `[B, N, width]`, row by row."""
        return self.proj(pixels).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Patch features after the last block but one. The last block and what follows are there for the checkpoint."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, (config.image_size // config.patch) ** 2, config.width))
        if config.registers:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.width))
        block = FilmBlock if config.text else Block
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        if config.attention_pool:
            self.attn_pool = AttentionPool(config.width, config.intermediate)
        self.checkpointing = False

    @property
    def idle(self) -> tuple[str, ...]:
        """Beginnings of the names of parameters that nothing depends on."""
        return f"blocks.{self.config.depth - 1}.", "norm.", "attn_pool."

    def forward(self, pixels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """pixels: `[B, 3, H, W]`, normalised; text: `[B, text]`. Returns `[B, N, width]`."""
        x = self.patch_embed(pixels) + self.pos_embed
        prefix = 0
        if self.config.registers:
            tokens = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token)]
            x, prefix = torch.cat([*tokens, x], 1), 1 + self.config.registers
        arguments = (text,) if self.config.text else ()
        for block in list(self.blocks)[:-1]:
            if self.checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, *arguments, use_reentrant=False)
            else:
                x = block(x, *arguments)
        return x[:, prefix:]


class FusedBackbone(nn.Module):
    """DINOv2 and SigLIP side by side on the same images.

    mean, std: of each channel of each tower, `(dino, siglip)`, images in 0..1.
    """

    Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]

    def __init__(self, dino: ViTConfig, siglip: ViTConfig, mean: Normalisation, std: Normalisation):
        super().__init__()
        self.featurizer, self.fused_featurizer = VisionTransformer(dino), VisionTransformer(siglip)
        self.width = dino.width + siglip.width
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(mean).view(2, 1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(2, 1, 3, 1, 1), persistent=False)

    @property
    def idle(self) -> tuple[str, ...]:
        """Beginnings of the names of parameters that nothing depends on."""
        towers = {"featurizer": self.featurizer, "fused_featurizer": self.fused_featurizer}
        return tuple(f"{name}.{part}" for name, tower in towers.items() for part in tower.idle)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 `[B, H, W, 3]` -> what the two towers get, float32 `[2, B, 3, H, W]`."""
        return (images.permute(0, 3, 1, 2).float() / 255.0 - self.mean) / self.std

    def forward(self, images: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, None]:
        """images: uint8 `[B, K, H, W, 3]`; text: `[B, text]`. Returns tokens `[B, K N, width]` and no keypoints."""
        batch, views = images.shape[:2]
        dtype = self.featurizer.pos_embed.dtype
        dino, siglip = self.pixels(images.flatten(0, 1)).to(dtype)
        text = text.repeat_interleave(views, 0)
        seen = torch.cat([self.featurizer(dino, text), self.fused_featurizer(siglip, text)], -1)
        return seen.view(batch, -1, self.width), None
