"""Groups: whole episodes that begin alike, each judged by the others' returns. No values are learned.

All steps of an episode share its advantage; nothing is discounted.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from training.algorithms.base import Algorithm, Credit, Rollout

SPREAD = 1e-6  # returns of a group that differ by less are all the same


class Groups(NamedTuple):
    """K complete groups of G episodes. returns: `[K, G]`, member: int `[T, N]`, a row's place in the flattened
    `[K, G]`, -1 for none."""

    returns: torch.Tensor
    member: torch.Tensor


def collect(rewards: torch.Tensor, executed: torch.Tensor, episodes: torch.Tensor, size: int) -> Groups:
    """The returns of whole episodes, group by group in the order of their numbers.

    rewards: `[T, N, C]`. executed: bool `[T, N, C]`. episodes: int `[T, N]`, from 1, so that each `size` that follow
    each other are a group; 0 for none. A group that lacks an episode is left out.
    """
    member = torch.full(episodes.shape, -1, dtype=torch.int64)
    played = episodes > 0
    numbers, rows = torch.unique(episodes[played].long() - 1, return_inverse=True)
    sums = rewards.new_zeros(len(numbers)).index_add(0, rows, (rewards * executed).sum(-1)[played])
    _, index, count = torch.unique(numbers // size, return_inverse=True, return_counts=True)
    whole = count == size
    place = whole.cumsum(0) - 1  # of a group among the complete ones
    known = whole[index]
    spot = torch.where(known, place[index] * size + numbers % size, -1)
    member[played] = spot[rows]
    returns = rewards.new_zeros(int(whole.sum()) * size)
    returns[spot[known]] = sums[known]
    return Groups(returns.view(-1, size), member)


def deviation(returns: torch.Tensor) -> torch.Tensor:
    """From the group's mean, `[K, G]`."""
    return returns - returns.mean(-1, keepdim=True)


def leave_one_out(returns: torch.Tensor) -> torch.Tensor:
    """From the mean of the others of the group, `[K, G]` (Kool et al. 2019)."""
    size = returns.shape[-1]
    return deviation(returns) * (size / (size - 1))


@dataclass(frozen=True)
class Grouped(Algorithm):
    """Options of an algorithm that compares whole episodes.

    group_size: episodes that begin alike.
    groups: of an iteration.
    filter_groups: learn nothing from a group whose returns are all the same, all right or all wrong: its samples cost
        no forward and no backward pass.
    band: nor from one whose mean return is outside of this band, null for no bounds.
    refills: so many further rounds are played at most until as many groups as wanted are left.
    """

    group_size: int = 8
    groups: int = 32
    filter_groups: bool = True
    band: tuple[float, float] | None = None
    refills: int = 3
    normalize_advantages: bool = False
    length_normalization: bool = True

    smallest: ClassVar[int] = 2  # with fewer there is nobody to compare with

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < self.smallest:
            raise ValueError(f"group_size must be at least {self.smallest}, found {self.group_size}")
        if self.groups < 1 or self.refills < 0:
            raise ValueError(f"groups must be positive and refills not negative, found {self.groups}, {self.refills}")
        if self.band is not None and not self.band[0] <= self.band[1]:
            raise ValueError(f"band must be [low, high], found {list(self.band)}")

    @property
    def filters(self) -> bool:
        return self.band is not None or (self.filter_groups and self.group_size > 1)

    @abstractmethod
    def relative(self, returns: torch.Tensor) -> torch.Tensor:
        """Advantages of the episodes of groups, from their returns, both `[K, G]`."""

    def informative(self, returns: torch.Tensor) -> torch.Tensor:
        """Whether anything can be learned from a group `[K]`."""
        kept = torch.ones(len(returns), dtype=torch.bool)
        if self.filter_groups and self.group_size > 1:
            kept &= returns.amax(-1) - returns.amin(-1) > SPREAD
        if self.band is not None:
            mean = returns.mean(-1)
            kept &= (mean >= self.band[0]) & (mean <= self.band[1])
        return kept

    def credit(self, rollout: Rollout) -> Credit:
        found = collect(rollout.rewards, rollout.executed, rollout.episodes, self.group_size)
        known = found.member >= 0
        place = found.member.clamp(min=0)

        def rows(values: torch.Tensor) -> torch.Tensor:
            """Of episodes `[K, G]`, in the rows `[T, N]` of those; 0 elsewhere."""
            flat = values.flatten()
            spread = flat[place] if len(flat) else values.new_zeros(place.shape)
            return torch.where(known, spread, torch.zeros_like(spread))

        kept = self.informative(found.returns)
        keep = rows(kept[:, None].expand_as(found.returns)) & rollout.valid
        return Credit(rows(self.relative(found.returns))[..., None], rows(found.returns)[..., None], keep)

    def weights(self, rollout: Rollout) -> torch.Tensor:
        weights = (rollout.executed & rollout.valid[..., None]).to(rollout.rewards.dtype)
        if self.length_normalization:  # an episode weighs 1, however soon it was over
            played = rollout.valid & (rollout.episodes > 0)
            numbers, row = torch.unique(rollout.episodes[played], return_inverse=True)
            steps = weights.new_zeros(len(numbers)).index_add(0, row, weights.sum(-1)[played])
            length = torch.ones_like(weights[..., 0])
            length[played] = steps[row].clamp(min=1)
            weights = weights / length[..., None]
        return weights
