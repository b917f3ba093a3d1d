"""Proximal policy optimisation (Schulman et al. 2017) on action tokens, with the options of VLA recipes."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import huber_loss


@dataclass(frozen=True)
class PPOConfig:
    """Options of PPO.

    gamma: discount per chunk, or per action where the values are per action.
    lam: of the advantage estimation.
    ratio: unit of the probability ratio; token, action (sum over its dimensions) or chunk (all its tokens).
    clip_low: ratios below 1 - clip_low are clipped.
    clip_high: ratios above 1 + clip_high are clipped.
    dual_clip: bound of the ratio where the advantage is negative (Ye et al. 2020), null for none.
    importance_cap: asynchronous: bound of the importance weights, the proximal over the acting policy's probability.
    value_clip: bound of a value's change, null for none.
    huber: width of the Huber loss on values, null for the squared error.
    value_coef: weight of the value loss.
    entropy_coef: weight of the entropy bonus.
    critic: head, the model's own value head; or privileged, a network in the learner that sees the simulator's state
        before every single action in place of images and chunks (Pinto et al. 2018); the policy never needs it.
    critic_epochs: passes of the privileged critic over a rollout.
    normalize_advantages: zero mean and unit variance over the valid steps.
    length_normalization: weigh an episode's steps by 1 / its share of valid steps, as in RLinf.
    epochs: passes over a rollout.
    minibatches: updates in a pass.
    target_kl: stop the passes when the KL divergence of a chunk exceeds it, null for never.
    learning_rate: AdamW.
    value_learning_rate: of the critic.
    train_vision: whether the passes reach what sees the images; if not, each frame of a rollout is looked at once.
    perception_steps: steps an iteration on the auxiliary loss alone, after the passes (Cobbe et al. 2021): keypoints
        and positions against the simulator's state, on frames of all rollouts so far; 0 for none.
    perception_batch: frames of such a step.
    perception_memory: frames that are remembered.
    perception_learning_rate: of such a step.
    schedule: learning rate over the run; constant, linear or cosine, the last two down to a tenth.
    warmup_iterations: linear rise of the learning rate.
    critic_iterations: first iterations, in which only the value head learns.
    weight_decay: AdamW.
    grad_clip: bound of the gradient's norm.
    gradient_checkpointing: compute the blocks of a large model again in the backward pass, to save memory.
    temperature: of sampling, in rollout and training alike.
    """

    gamma: float = 0.97
    lam: float = 0.9
    ratio: Literal["token", "action", "chunk"] = "action"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    importance_cap: float = 2.0
    value_clip: float | None = 0.2
    huber: float | None = 10.0
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    critic: Literal["head", "privileged"] = "head"
    critic_epochs: int = 8
    normalize_advantages: bool = True
    length_normalization: bool = False
    epochs: int = 2
    minibatches: int = 4
    target_kl: float | None = None
    learning_rate: float = 1e-4
    value_learning_rate: float = 1e-3
    train_vision: bool = True
    perception_steps: int = 24
    perception_batch: int = 64
    perception_memory: int = 24_000
    perception_learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_iterations: int = 0
    critic_iterations: int = 2
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    gradient_checkpointing: bool = False
    temperature: float = 1.0


def group(log_probs: torch.Tensor, mask: torch.Tensor, unit: str) -> torch.Tensor:
    """Sum of log-probabilities `[B, C, D]` over the unit of the ratio: `[B, C, D]`, `[B, C]` or `[B, 1]`.

    mask: bool `[B, C]`, executed actions; the others don't count in a chunk's sum.
    """
    if unit == "token":
        return log_probs
    per_action = log_probs.sum(-1)
    return per_action if unit == "action" else (per_action * mask).sum(-1, keepdim=True)


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1e-8)


def policy_loss(
    log_probs: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    weights: torch.Tensor,
    config: PPOConfig,
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


def value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, weights: torch.Tensor, config: PPOConfig
) -> torch.Tensor:
    """Squared or Huber error, the larger of the plain and the clipped prediction's; one shape `[B, V]`."""

    def error(predicted: torch.Tensor) -> torch.Tensor:
        if config.huber is None:
            return 0.5 * (predicted - returns) ** 2
        return huber_loss(predicted, returns, reduction="none", delta=config.huber)

    loss = error(values)
    if config.value_clip is not None:
        loss = torch.maximum(loss, error(old + (values - old).clamp(-config.value_clip, config.value_clip)))
    return weighted_mean(loss, weights)


def divergence(log_probs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL divergence of a chunk from the policy that sampled it, `[B, C, D]` -> scalar.

    Schulman's low-variance estimator r - 1 - log r of every token, summed over a chunk's executed tokens.
    """
    log_ratio = log_probs - old
    tokens = (log_ratio.exp() - 1 - log_ratio).sum(-1) * mask
    return tokens.sum() / mask.any(-1).sum().clamp(min=1)


def privileged_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Huber loss on the privileged targets that are known (not NaN), `[B, A]`; 0 if none is."""
    known = ~target.isnan()
    if not known.any():
        return predicted.sum() * 0
    return torch.nn.functional.smooth_l1_loss(predicted[known], target[known], beta=0.05)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 for constant returns."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if float(variance) > 1e-12 else 0.0


def learning_rate_factor(config: PPOConfig, iteration: int, iterations: int) -> float:
    """Factor of the learning rates at an iteration of the run."""
    if iteration < config.warmup_iterations:
        return (iteration + 1) / config.warmup_iterations
    progress = min(1.0, iteration / max(1, iterations))
    if config.schedule == "linear":
        return 1 - 0.9 * progress
    if config.schedule == "cosine":
        return 0.1 + 0.45 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))
    return 1.0
