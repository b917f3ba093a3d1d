"""The weights that are trained, on their way from the learner to the policy worker: two copies in shared memory.

The learner writes one copy while the policy worker may still read the other, so neither waits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from training.pipeline.block import SharedArrays
from vla import lora
from vla.lora import Lora


@dataclass(frozen=True)
class WeightsLayout:
    """Shape and type of every tensor that is sent, by name."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @staticmethod
    def of(model: nn.Module, adapters: Lora) -> "WeightsLayout":
        """Of a model that has its adapters already."""
        return WeightsLayout({k: (tuple(v.shape), v.dtype) for k, v in sent(model, adapters).items()})

    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Two copies as bytes, and the number of the update that is complete and of the one being written."""
        sizes = {k: int(np.prod(shape)) * kind.itemsize for k, (shape, kind) in self.tensors.items()}
        copies: dict[str, tuple[tuple[int, ...], Any]] = {k: ((2, size), np.uint8) for k, size in sizes.items()}
        return {**copies, "complete": ((1,), np.int64), "begun": ((1,), np.int64)}


def sent(model: nn.Module, adapters: Lora) -> dict[str, torch.Tensor]:
    """What has to be sent after an update: everything, or the adapters and heads."""
    return lora.trained(model) if adapters.rank else model.state_dict()


class WeightsBlock:
    """One writer, any number of readers."""

    def __init__(self, layout: WeightsLayout, name: str, create: bool = False):
        self.name = name
        self._shared = SharedArrays(layout.arrays(), name, create)
        self._copies = {
            k: [torch.from_numpy(self._shared[k][i]).view(kind).view(shape) for i in (0, 1)]
            for k, (shape, kind) in layout.tensors.items()
        }

    @property
    def version(self) -> int:
        """How many updates the newest weights have seen; 0 while they are those of the checkpoint."""
        return int(self._shared["complete"][0])

    @torch.no_grad()
    def write(self, weights: dict[str, torch.Tensor], version: int) -> None:
        """Offer the weights after `version` updates."""
        self._shared["begun"][0] = version
        for name, value in weights.items():
            self._copies[name][version % 2].copy_(value)
        self._shared["complete"][0] = version

    @torch.no_grad()
    def read(self, own: dict[str, torch.Tensor]) -> int:
        """Copy the newest weights over `own`; returns their version."""
        while True:
            version = self.version
            for name, copies in self._copies.items():
                own[name].copy_(copies[version % 2])
            if self._shared["begun"][0] < version + 2:  # else this copy was written anew while it was read
                return version

    def pack(self) -> tuple[int, dict[str, np.ndarray]]:
        """Version and bytes of the newest weights, for a block on another host."""
        version = self.version
        return version, {name: self._shared[name][version % 2] for name in self._copies}

    def unpack(self, version: int, packed: dict[str, np.ndarray]) -> None:
        """Offer what another host's block packed."""
        self._shared["begun"][0] = version
        for name, value in packed.items():
            self._shared[name][version % 2] = value
        self._shared["complete"][0] = version

    def close(self) -> None:
        self._copies.clear()
        self._shared.close()
