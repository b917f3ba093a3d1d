"""Room on a device: who rests moves to the processor's memory and leaves it to the others that sit there."""

from itertools import chain

import torch
from torch import nn


class Room:
    """Moves a model, and what an optimizer remembers, off its device and back.

    What is frozen keeps its copy in the processor's memory, and is only dropped from the device. The copies are
    page-locked, so that a GPU fetches them at the full speed of the bus.
    """

    def __init__(self, model: nn.Module, device: str, *optimizers: torch.optim.Optimizer | None):
        self.model, self.device = model, torch.device(device)
        self.optimizers = [one for one in optimizers if one is not None]
        self._copies: dict[int, torch.Tensor] = {}
        self._present = True

    @torch.no_grad()
    def leave(self) -> None:
        """Give the device's memory back."""
        if not self._present:
            return
        for tensor, is_frozen in self._tensors():
            copy = self._copies.get(id(tensor))
            if copy is None:
                locked = self.device.type == "cuda"
                copy = torch.empty_like(tensor, device="cpu", pin_memory=locked)
                is_frozen = False
                self._copies[id(tensor)] = copy
            if not is_frozen:
                copy.copy_(tensor)
            tensor.data = copy
        for parameter in self.model.parameters():
            parameter.grad = None
        self._present = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def enter(self) -> None:
        """Come back to the device."""
        if self._present:
            return
        for tensor, _ in self._tensors():
            tensor.data = self._copies[id(tensor)].to(self.device, non_blocking=True, copy=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._present = True

    def _tensors(self) -> list[tuple[torch.Tensor, bool]]:
        """All tensors, and whether they never change."""
        kept = [(p, not p.requires_grad) for p in self.model.parameters()]
        kept += [(b, False) for b in self.model.buffers()]
        states = chain.from_iterable(one.state.values() for one in self.optimizers)
        kept += [(v, False) for state in states for v in state.values() if torch.is_tensor(v) and v.dim()]
        return kept
