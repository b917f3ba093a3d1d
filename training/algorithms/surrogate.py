"""The clipped surrogate (Schulman et al. 2017) and what belongs to it: pure functions that every algorithm may use."""

from typing import Protocol

import torch


class Clipping(Protocol):
    """Bounds of the ratio; see the options of `Algorithm`."""

    @property
    def clip_low(self) -> float: ...
    @property
    def clip_high(self) -> float: ...
    @property
    def dual_clip(self) -> float | None: ...


def group(log_probs: torch.Tensor, mask: torch.Tensor, unit: str) -> torch.Tensor:
    """Sum of log-probabilities `[B, C, D]` over the unit of the ratio: `[B, C, D]`, `[B, C]` or `[B, 1]`.

    mask: bool `[B, C]`, executed actions; the others don't count in a chunk's sum.
    """
    if unit == "token":
        return log_probs
    per_action = log_probs.sum(-1)
    return per_action if unit == "action" else (per_action * mask).sum(-1, keepdim=True)


def per_unit(advantage: torch.Tensor, weight: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantage `[B, V]` and weight `[B, C]` in the ratio's shape: `[B, C, D]`, `[B, C]` or `[B, 1]`."""
    if like.dim() == 3:
        return advantage[..., None].expand_as(like), weight[..., None].expand_as(like)
    if like.shape[1] == 1:
        per_chunk = weight.amax(-1, keepdim=True)
        total = (advantage * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1e-8)
        return (advantage if advantage.shape[1] == 1 else total), per_chunk
    return advantage.expand_as(like), weight


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1e-8)


def policy_loss(
    log_probs: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    weights: torch.Tensor,
    config: Clipping,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate, averaged by `weights`; all of one shape. Statistics: clip_fraction, ratio.

    importance: of every sample, where `old` is not the policy that acted (decoupled PPO, Hilton et al. 2022): the
        ratio is kept near the proximal policy `old`, and `importance_weights` correct for the one that acted.
    """
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    if config.dual_clip is not None:
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, config.dual_clip * advantage), surrogate)
    if importance is not None:
        surrogate = importance * surrogate
    outside = ((ratio - clipped).abs() > 0).float()
    return -weighted_mean(surrogate, weights), {
        "clip_fraction": weighted_mean(outside, weights).detach(),
        "ratio": weighted_mean(ratio, weights).detach(),
    }


def importance_weights(proximal: torch.Tensor, acted: torch.Tensor, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """min(proximal / acted, cap) of log-probabilities of one shape, and a float mask of those above the cap."""
    ratio = (proximal - acted).exp()
    return ratio.clamp(max=cap), (ratio > cap).float()


def divergence(log_probs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL divergence of a chunk from the policy that sampled it, `[B, C, D]` -> scalar.

    Schulman's low-variance estimator r - 1 - log r of every token, summed over a chunk's executed tokens.
    """
    log_ratio = log_probs - old
    tokens = (log_ratio.exp() - 1 - log_ratio).sum(-1) * mask
    return tokens.sum() / mask.any(-1).sum().clamp(min=1)


def normalize(advantage: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over the masked entries; zero elsewhere."""
    chosen = advantage[mask]
    if chosen.numel() < 2:
        return torch.where(mask, advantage, torch.zeros_like(advantage))
    scaled = (advantage - chosen.mean()) / (chosen.std() + 1e-8)
    return torch.where(mask, scaled, torch.zeros_like(advantage))
