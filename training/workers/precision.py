"""Mixed precision: frozen weights and activations in their own type, weights that are trained in float32."""

from typing import Any

import torch
from torch import nn


class Precision:
    """Turns the weights of a model that are trained to float32, in which small steps are not rounded away."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._stored = {name: value.dtype for name, value in model.named_parameters()}
        self.kind = next((kind for kind in self._stored.values() if kind != torch.float32), None)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if self.kind is not None:
            from peft.tuners.lora import LoraLayer  # takes seconds, see vla/lora.py

            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.cast_input_dtype_enabled = False  # autocast takes the activations as they are

    def context(self, device: torch.device) -> Any:
        """In which the model computes in the type of its frozen weights."""
        return torch.autocast(device.type, self.kind or torch.float32, enabled=self.kind is not None)

    def undo(self) -> None:
        """Back to the types that the weights came in."""
        for name, parameter in self.model.named_parameters():
            if name in self._stored:
                parameter.data = parameter.data.to(self._stored[name])
