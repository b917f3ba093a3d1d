"""Models by name. Adding one is a module with a config dataclass and a `build`, and a line in `REGISTRY`."""

from collections.abc import Callable
from typing import Any

from torch import nn

from vla.errors import SimrealError
from vla.models import nano, published

REGISTRY: dict[str, Callable[..., nn.Module]] = {"nano": nano.build, "openvla": published.build}


def build_model(config: dict[str, Any]) -> nn.Module:
    """Build the model that `config["class"]` names, with random weights."""
    name = config.get("class")
    if name not in REGISTRY:
        raise SimrealError(f"unknown model class {name!r}; known: {', '.join(REGISTRY)}")
    return REGISTRY[name](config)
