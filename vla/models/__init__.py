"""Models by name. Adding one is a module with a `ModelConfig` of its own; see docs/guide/bring-your-own-model.md."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vla import options
from vla.errors import SimrealError
from vla.models.base import FACTS, REGISTRY
from vla.models.base import ModelConfig as ModelConfig
from vla.models.base import VLAOutput as VLAOutput


def read_config(data: Mapping[str, Any]) -> ModelConfig:
    """What `ModelConfig.data` wrote, as the class that `data["class"]` names: in short, or as package.module.Class."""
    name = str(data.get("class"))
    target = REGISTRY.get(name, name)
    if "." not in target:
        raise SimrealError(f"unknown model class {name!r}; known: {', '.join(REGISTRY)}, or package.module.Class")
    cls = options.import_dataclass(target)
    if not issubclass(cls, ModelConfig):
        raise SimrealError(f"model class {target}: it is not a ModelConfig")
    known = cls.__dataclass_fields__
    return options.read(cls, {k: v for k, v in data.items() if k != "class" and (k in known or k not in FACTS)})


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """The model of a configuration, with random weights."""
    return read_config(config).build()
