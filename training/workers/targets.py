"""What a rollout says: advantages, returns and weights of its rows, and which of them are learned from."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from training.algorithms.base import Algorithm, Rollout
from training.workers.critic import PrivilegedCritic
from vla.errors import SimrealError


@dataclass(frozen=True)
class Targets:
    """Of T decisions: all but `values` `[T, N, ...]`.

    keep: bool `[T, N]`, rows that are learned from. executed, weight: `[T, N, C]` control steps, and how much they
    count. values: `[T + 1, N, V]`. advantage, returns, mask: `[T, N, V]`, mask where they mean something.
    """

    keep: torch.Tensor
    executed: torch.Tensor
    weight: torch.Tensor
    values: torch.Tensor
    advantage: torch.Tensor
    returns: torch.Tensor
    mask: torch.Tensor


class DataError(SimrealError):
    """A rollout that can't be learned from."""


def targets(
    block: Mapping[str, torch.Tensor], algorithm: Algorithm, critic: PrivilegedCritic | None, has_values: bool
) -> Targets:
    """Of the rows of a rollout block. has_values: whether those of the model's head count. Raises DataError."""
    valid = ~block["boundary"][:-1]
    if algorithm.groups:
        valid = valid & (block["episodes"][:-1] > 0)
    executed = block["executed"] & valid[..., None]
    if critic is not None:
        values = critic.values(block["critic_states"])
    elif has_values:
        values = block["values"]
    else:
        values = block["rewards"].new_zeros(*block["boundary"].shape, 1)
    _check_finite(block["rewards"], executed, values)
    rollout = Rollout(block["rewards"], block["executed"], block["terminated"], valid, values, block["episodes"][:-1])
    credit = algorithm.credit(rollout)
    mask = executed if values.shape[-1] > 1 else executed.any(-1, keepdim=True)
    return Targets(
        credit.keep, executed, algorithm.weights(rollout), values, credit.advantage, credit.returns,
        mask & credit.keep[..., None],
    )  # fmt: skip


def _check_finite(rewards: torch.Tensor, executed: torch.Tensor, values: torch.Tensor) -> None:
    wrong = executed & ~rewards.isfinite()
    if wrong.any():
        t, n, c = torch.nonzero(wrong)[0].tolist()
        raise DataError(
            f"{int(wrong.sum())} rewards are not finite, the first in decision {t}, slot {n}, action {c}: "
            f"{float(rewards[t, n, c])}",
            code="NAN_REWARD", remedy="Mend the environment's reward; the iteration before is kept.",
        )  # fmt: skip
    if not values.isfinite().all():
        t, n, _ = torch.nonzero(~values.isfinite())[0].tolist()
        raise DataError(
            f"{int((~values.isfinite()).sum())} values are not finite, the first in decision {t}, slot {n}",
            code="NAN_VALUE", remedy="The iteration before is kept. Lower value_learning_rate and start anew.",
        )  # fmt: skip
