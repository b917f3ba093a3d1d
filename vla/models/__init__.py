"""Models by name. Adding one is a module with a `build` or a class, and a line in `REGISTRY`."""

from importlib import import_module
from typing import Any

from torch import nn

from vla.errors import SimrealError

# Imported when it is needed: each brings its own part of transformers.
REGISTRY = {"nano": "nano.build", "openvla": "published.build", "pi0": "pi0.Pi0"}


def build_model(config: dict[str, Any]) -> nn.Module:
    """Build the model that `config["class"]` names, with random weights."""
    name = config.get("class")
    if name not in REGISTRY:
        raise SimrealError(f"unknown model class {name!r}; known: {', '.join(REGISTRY)}")
    module, _, builder = REGISTRY[name].partition(".")
    model: nn.Module = getattr(import_module(f"vla.models.{module}"), builder)(config)
    return model
