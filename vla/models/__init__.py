"""Models by name. Adding one is a module with a config dataclass and a class, and a line in `REGISTRY`."""

from collections.abc import Callable
from typing import Any

from torch import nn

from vla.errors import SimrealError
from vla.models.openvla_oft import OpenVLAOFT

REGISTRY: dict[str, Callable[..., nn.Module]] = {"openvla_oft": OpenVLAOFT.from_config}


def build_model(config: dict[str, Any]) -> nn.Module:
    """Build the model that `config["class"]` names, with random weights."""
    name = config.get("class")
    if name not in REGISTRY:
        raise SimrealError(f"unknown model class {name!r}; known: {', '.join(REGISTRY)}")
    return REGISTRY[name](config)
