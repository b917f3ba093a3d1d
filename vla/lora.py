"""Low-rank adapters (Hu et al. 2022) through peft: attached for training, read from published ones, merged for use.

peft takes seconds to import, so only who has adapters does.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from vla import schema
from vla.errors import CodedError, Fault

NAME = "default"
PREFIX = "base_model.model."
OURS = ("action_head", "proprio_projector", "value_head", "locator")  # trained as a whole


class AdapterError(CodedError):
    """An adapter does not fit the model, or is not one."""


@dataclass(frozen=True)
class Lora:
    """Adapters for training.

    rank: of the adapters; 0 trains all weights.
    alpha: their outputs are scaled by alpha / rank.
    target: regular expression of the names of the layers that get one.
    modules_to_save: names of parts of the model that are trained as a whole beside the heads, such as vision_backbone.
    """

    rank: int = 0
    alpha: int = 32
    target: str = (
        r"(vision_backbone|projector|language_model)\..*(qkv|proj|fc1|fc2|fc3|[qkvo]_proj|gate_proj|up_proj|down_proj)"
    )
    modules_to_save: list[str] = field(default_factory=list)


FULL = Lora()  # no adapters: all weights are trained


def attach(model: nn.Module, lora: Lora) -> int:
    """Freeze the model but for its heads and `modules_to_save`, and give its layers fresh adapters; how many."""
    from peft import LoraConfig, inject_adapter_in_model

    pattern, idle = re.compile(lora.target), tuple(getattr(model, "idle", ()))
    whole = tuple(f"{name}." for name in lora.modules_to_save)
    names = [f"{name}." for name, _ in model.named_parameters()]
    if missing := [part for part in whole if not any(name.startswith(part) for name in names)]:
        remedy = f"Name some of {', '.join(sorted({name.partition('.')[0] for name in names}))}."
        found = repr(missing[0][:-1])
        raise AdapterError(Fault("LORA_MODULES", "lora.modules_to_save", "parts of the model", found, remedy))
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.fullmatch(name) and not name.startswith((*idle, *whole))
    ]
    if not layers:
        remedy = "Correct lora.target; `model.named_modules()` lists the layers."
        raise AdapterError(Fault("LORA_TARGET", "lora.target", "names of layers", f"none for {lora.target!r}", remedy))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=layers,
        init_lora_weights="gaussian",
    )
    inject_adapter_in_model(config, model, NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name or name.startswith((*OURS, *whole))
    return len(layers)


def read(model: nn.Module, folder: str | Path) -> None:
    """Attach the adapter that peft wrote to a folder, old or new; it is not trained.

    Raises AdapterError if it is not one, or belongs to another model.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    root = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (root / name).is_file():
            found = "a pickle" if (root / "adapter_model.bin").exists() else "nothing"
            remedy = "Name the folder of an adapter saved by peft as safetensors."
            raise AdapterError(Fault("ADAPTER_MISSING", str(root / name), "a file", found, remedy))
    data = schema.parse((root / "adapter_config.json").read_text(), "adapter_config.json", AdapterError)
    if data.get("peft_type") != "LORA" or data.get("modules_to_save"):
        found = f"peft_type {data.get('peft_type')!r}, modules_to_save {data.get('modules_to_save')!r}"
        remedy = "Merge it with the code that made it, then import the whole checkpoint."
        raise AdapterError(Fault("ADAPTER_KIND", str(root), "a LoRA adapter", found, remedy))
    known = {f: data[f] for f in ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern",
                                  "alpha_pattern", "fan_in_fan_out") if f in data}  # fmt: skip
    apart = [name for name in OURS if getattr(model, name, None) is not None]  # never part of what peft wrapped
    known |= {"exclude_modules": rf"({'|'.join(apart)})(\..*)?"} if apart else {}
    config = LoraConfig(**known, inference_mode=True)
    inject_adapter_in_model(config, model, NAME)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.to(layer.get_base_layer().weight.dtype)
    stored = load_file(root / "adapter_model.safetensors")
    # With lm_head among the targets, old releases of peft store the layer itself, too.
    values = {_own_name(k): v for k, v in stored.items() if ".base_layer." not in k}
    own = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    faults = [
        Fault("ADAPTER_MISMATCH", name, str(tuple(own[name].shape)) if name in own else "no such layer",
              str(tuple(values[name].shape)) if name in values else "nothing", "Name the adapter of this model.")
        for name in sorted({*own, *values})
        if name not in own or name not in values or own[name].shape != values[name].shape
    ]  # fmt: skip
    if faults:
        raise AdapterError(*faults[:5])
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def merge(model: nn.Module, probe: Callable[[], torch.Tensor] | None = None) -> float | None:
    """Add the adapters to the weights and remove them; how far the numbers of `probe` then deviate at most."""
    from peft.tuners.lora import LoraLayer

    before = probe() if probe else None
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge()
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    return None if before is None or probe is None else float((probe() - before).abs().max())


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: the tensors that take gradients."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _own_name(stored: str) -> str:
    """`base_model.model.X.lora_A.weight` -> `X.lora_A.default.weight`."""
    return re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{NAME}.weight", stored.removeprefix(PREFIX))
