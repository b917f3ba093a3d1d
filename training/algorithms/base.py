"""The interface of an algorithm: its options, and what learner and engine ask of it.

An algorithm is a dataclass of options with pure functions on tensors, in one file, and one YAML file that names it.
Learner, workers and engine know the classes of this file and no others.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import huber_loss

from training.algorithms import surrogate
from training.algorithms.rewards import RewardForm


@dataclass(frozen=True)
class Rollout:
    """What was played: T decisions in N slots, chunks of C actions.

    rewards: `[T, N, C]`. executed: bool `[T, N, C]`. terminated: bool `[T, N]`.
    valid: bool `[T, N]`, rows with a sample: not the final observation of a truncated episode, nor an empty row.
    values: `[T + 1, N, V]` of the critic, V = 1 or C; those of an algorithm without one mean nothing.
    episodes: int `[T, N]`, where whole episodes are played: the number of a row's, from 1; 0 in an empty row.
    """

    rewards: torch.Tensor
    executed: torch.Tensor
    terminated: torch.Tensor
    valid: torch.Tensor
    values: torch.Tensor
    episodes: torch.Tensor


@dataclass(frozen=True)
class Credit:
    """advantage, returns: `[T, N, V]`. keep: bool `[T, N]`, the rows that are worth a forward and a backward pass."""

    advantage: torch.Tensor
    returns: torch.Tensor
    keep: torch.Tensor


@dataclass(frozen=True)
class Algorithm(ABC):
    """Options of every algorithm.

    ratio: unit of the probability ratio; token, action (sum over its dimensions) or chunk (all its tokens).
    clip_low: ratios below 1 - clip_low are clipped.
    clip_high: ratios above 1 + clip_high are clipped.
    dual_clip: bound of the ratio where the advantage is negative (Ye et al. 2020), null for none.
    importance_cap: asynchronous: bound of the importance weights, the proximal over the acting policy's probability.
    entropy_coef: weight of the entropy bonus.
    normalize_advantages: zero mean and unit variance over the valid steps.
    length_normalization: weigh an episode's steps by 1 / its share of valid steps, as in RLinf.
    epochs: passes over a rollout.
    minibatches: updates in a pass.
    batch_size: synchronous: samples of an update, in place of `minibatches`; null for those.
    target_kl: stop the passes when the KL divergence of a chunk exceeds it, null for never.
    adaptive_kl: lower the learning rate where an update moves a chunk by more than twice this KL divergence, raise it
        where by less than half of it; null keeps to the schedule.
    learning_rate: AdamW.
    train_vision: whether the passes reach what sees the images; if not, each frame of a rollout is looked at once.
    perception_steps: steps an iteration on the auxiliary loss alone, after the passes (Cobbe et al. 2021): keypoints
        and positions against the simulator's state, on frames of all rollouts so far; 0 for none.
    perception_batch: frames of such a step.
    perception_memory: frames that are remembered.
    perception_learning_rate: of such a step; schedule and warm-up are those of `learning_rate`.
    schedule: learning rate over the run; constant, linear or cosine, the last two down to a tenth.
    warmup_iterations: linear rise of the learning rate.
    weight_decay: AdamW.
    grad_clip: bound of the gradient's norm.
    gradient_checkpointing: compute the blocks of a large model again in the backward pass, to save memory.
    temperature: of sampling, in rollout and training alike.
    reward: environment, its own rewards; or success, 1 for a success and nothing else.
    reward_difference: learn from by how much a reward is above the one before it in its episode.
    reward_scale: factor of the rewards.
    """

    ratio: Literal["token", "action", "chunk"] = "action"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    importance_cap: float = 2.0
    entropy_coef: float = 0.0
    normalize_advantages: bool = True
    length_normalization: bool = False
    epochs: int = 2
    minibatches: int = 4
    batch_size: int | None = None
    target_kl: float | None = None
    adaptive_kl: float | None = None
    learning_rate: float = 1e-4
    train_vision: bool = True
    perception_steps: int = 24
    perception_batch: int = 64
    perception_memory: int = 24_000
    perception_learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_iterations: int = 0
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    gradient_checkpointing: bool = False
    temperature: float = 1.0
    reward: Literal["environment", "success"] = "environment"
    reward_difference: bool = False
    reward_scale: float = 1.0

    # Whole episodes of an iteration: so many groups of so many that begin alike. 0 groups: episodes without end.
    groups: ClassVar[int] = 0
    group_size: ClassVar[int] = 1
    filters: ClassVar[bool] = False  # whether groups may be left out

    def __post_init__(self) -> None:
        bounds = {"epochs": 1, "minibatches": 1, "batch_size": 1, "temperature": 1e-6, "reward_scale": 1e-12}
        for name, least in bounds.items():
            if (value := getattr(self, name)) is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least:g}, found {value}")
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            found = f"{self.clip_low} and {self.clip_high}"
            raise ValueError(f"clip_low must be in [0, 1) and clip_high not negative, found {found}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, found {self.dual_clip}")

    @abstractmethod
    def credit(self, rollout: Rollout) -> Credit:
        """How much better than expected each decision was, and which of them teach something."""

    def weights(self, rollout: Rollout) -> torch.Tensor:
        """Weight `[T, N, C]` of every control step in the loss; 0 where none was executed."""
        weights = (rollout.executed & rollout.valid[..., None]).float()
        if self.length_normalization:  # a slot's steps weigh as much as if all T x C had been valid
            share = weights.mean(dim=(0, 2), keepdim=True).clamp(min=1e-3)
            weights = weights / share
        return weights

    def loss(
        self, log_probs: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, weights: torch.Tensor,
        importance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """Of the policy, a mean by `weights`, and statistics. All of one shape, that of the unit of the ratio."""
        return surrogate.policy_loss(log_probs, old, advantage, weights, self, importance)

    def reward_form(self) -> RewardForm:
        return RewardForm(self.reward, self.reward_difference, self.reward_scale)

    def rate_factor(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rates at an iteration of the run."""
        if iteration < self.warmup_iterations:
            return (iteration + 1) / self.warmup_iterations
        progress = min(1.0, iteration / max(1, iterations))
        if self.schedule == "linear":
            return 1 - 0.9 * progress
        if self.schedule == "cosine":
            return 0.1 + 0.45 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))
        return 1.0


@dataclass(frozen=True)
class ActorCritic(Algorithm):
    """Options of an algorithm that learns values.

    value_clip: bound of a value's change, null for none.
    huber: width of the Huber loss on values, null for the squared error.
    value_coef: weight of the value loss.
    critic: head, the model's own value head; or privileged, a network in the learner that sees the simulator's state
        before every single action in place of images and chunks (Pinto et al. 2018); the policy never needs it.
    critic_epochs: passes of the privileged critic over a rollout.
    critic_iterations: first iterations, in which only the value head learns.
    value_learning_rate: of the critic.
    """

    value_clip: float | None = 0.2
    huber: float | None = 10.0
    value_coef: float = 0.5
    critic: Literal["head", "privileged"] = "head"
    critic_epochs: int = 8
    critic_iterations: int = 2
    value_learning_rate: float = 1e-3

    def value_loss(
        self, values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Squared or Huber error, the larger of the plain and the clipped prediction's; one shape `[B, V]`."""

        def error(predicted: torch.Tensor) -> torch.Tensor:
            if self.huber is None:
                return 0.5 * (predicted - returns) ** 2
            return huber_loss(predicted, returns, reduction="none", delta=self.huber)

        loss = error(values)
        if self.value_clip is not None:
            loss = torch.maximum(loss, error(old + (values - old).clamp(-self.value_clip, self.value_clip)))
        return surrogate.weighted_mean(loss, weights)


def value_weight(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weights `[B, C]` of control steps as weights `[B, V]` of values."""
    return weight if values.shape[-1] > 1 else weight.amax(-1, keepdim=True)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 for constant returns."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if float(variance) > 1e-12 else 0.0


def adapted(factor: float, kl: float, wanted: float) -> float:
    """Factor of the learning rate after an update that moved the policy by `kl` (Schulman et al. 2017, section 4)."""
    if kl > 2 * wanted:
        return max(factor / 1.5, 0.01)
    return min(factor * 1.5, 10.0) if kl < wanted / 2 else factor
