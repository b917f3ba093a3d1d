"""Simulators: one module each, behind the vector-environment interface of `training.envs.base`."""

import importlib
import inspect
from typing import Any

from training.envs.base import VectorEnv
from vla.errors import SimrealError

REGISTRY = {"maniskill": "training.envs.maniskill:make", "tabletop": "training.envs.tabletop:make"}


def make(name: str, num_envs: int, **options: Any) -> VectorEnv:
    """Build a registered simulator, or one named as `module:callable`, with `num_envs` environments."""
    target = REGISTRY.get(name, name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise SimrealError(
            f"unknown environment {name!r}; known: {', '.join(REGISTRY)}", code="ENVIRONMENT",
            remedy="Name a known one, or your own as package.module:callable.",
        )  # fmt: skip
    build = getattr(importlib.import_module(module), attribute)
    try:
        inspect.signature(build).bind(num_envs, **options)
    except TypeError as error:
        raise SimrealError(
            f"environment {name}: {error}; it takes {inspect.signature(build)}", code="ENVIRONMENT",
            remedy="Correct env.settings; env=null leaves out the settings of configs/env.",
        ) from error  # fmt: skip
    env: VectorEnv = build(num_envs, **options)
    return env
