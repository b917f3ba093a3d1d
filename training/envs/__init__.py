"""Simulators: one module each, behind the vector-environment interface of `training.envs.base`."""

import importlib
from typing import Any

from training.envs.base import VectorEnv
from vla.errors import SimrealError

REGISTRY = {"tabletop": "training.envs.tabletop:make"}


def make(name: str, num_envs: int, **options: Any) -> VectorEnv:
    """Build a registered simulator, or one named as `module:callable`, with `num_envs` environments."""
    target = REGISTRY.get(name, name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise SimrealError(
            f"unknown environment {name!r}; known: {', '.join(REGISTRY)}", code="ENVIRONMENT",
            remedy="Name a known one, or your own as package.module:callable.",
        )  # fmt: skip
    env: VectorEnv = getattr(importlib.import_module(module), attribute)(num_envs, **options)
    return env
