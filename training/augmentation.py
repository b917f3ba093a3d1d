"""Noise on what a policy sees, so that it learns what matters; positions in the image and the words stay."""

from typing import Any

import torch
from torch.nn.functional import interpolate

from vla.types import ModelInputs


def augment(inputs: ModelInputs, generator: torch.Generator) -> ModelInputs:
    """Photometric noise and stray tokens; positions in the image and the words stay."""
    images: Any = augment_images(torch.as_tensor(inputs.images), generator)
    tokens: Any = augment_tokens(torch.as_tensor(inputs.tokens), generator)
    return ModelInputs(images, inputs.state, tokens)


def augment_images(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness, colour cast and blotches on half of the samples; uint8 `[B, K, H, W, 3]`."""
    batch, cameras, height, width, _ = images.shape
    chosen = (torch.rand(batch, 1, 1, 1, 1, generator=generator) < 0.5).float()
    gain = 1 + chosen * 0.2 * (2 * torch.rand(batch, 1, 1, 1, 3, generator=generator) - 1)
    shift = chosen * 25 * (2 * torch.rand(batch, 1, 1, 1, 1, generator=generator) - 1)
    blotches = torch.rand(batch * cameras, 3, height // 8, width // 8, generator=generator)
    blotches = interpolate(blotches, (height, width)).view(batch, cameras, 3, height, width)
    mix = chosen * 0.3 * torch.rand(batch, 1, 1, 1, 1, generator=generator)
    mixed = (1 - mix) * images.float() * gain + shift + mix * 255 * blotches.permute(0, 1, 3, 4, 2)
    return mixed.clamp(0, 255).to(torch.uint8)


def augment_tokens(tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Stray byte tokens in a third of the prompts, so that unseen words don't derail the policy; int64 `[B, L]`."""
    result = tokens.clone()
    length = tokens.shape[1]
    for row in torch.nonzero(torch.rand(len(tokens), generator=generator) < 0.33).flatten().tolist():
        words = tokens[row][tokens[row] != 0].tolist()
        for _ in range(int(torch.randint(1, 6, (1,), generator=generator))):
            position = int(torch.randint(0, len(words) + 1, (1,), generator=generator))
            words.insert(position, int(torch.randint(3, 259, (1,), generator=generator)))
        words = words[-length:]
        result[row] = torch.tensor([0] * (length - len(words)) + words)
    return result
