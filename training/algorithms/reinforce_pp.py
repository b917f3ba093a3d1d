"""REINFORCE++ (Hu 2025): returns, less the group's mean if there are groups, in units of the whole batch's spread."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from training.algorithms.groups import Grouped, deviation


@dataclass(frozen=True)
class ReinforcePPConfig(Grouped):
    """Options of REINFORCE++.

    group_size: episodes that begin alike; 1 for none that do.
    """

    normalize_advantages: bool = True
    group_size: int = 1
    groups: int = 256

    smallest: ClassVar[int] = 1

    def relative(self, returns: torch.Tensor) -> torch.Tensor:
        return deviation(returns) if self.group_size > 1 else returns
