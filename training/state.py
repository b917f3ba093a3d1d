"""Weights and optimizer of an interrupted training as one safetensors file; nothing is pickled."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MODULE, OPTIMIZER = "module.", "optimizer."


def tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that a state consists of, by name."""
    found = {MODULE + name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        found.update({f"{OPTIMIZER}{index}.{key}": value.clone() for key, value in entry.items()})
    return found


def save(file: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write beside and rename."""
    temporary = file.with_suffix(".tmp")
    save_file(tensors(module, optimizer), temporary, metadata={"step": str(step)})
    temporary.rename(file)


def restore(file: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read what `save` wrote; returns the step."""
    weights: dict[str, torch.Tensor] = {}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(file, "pt") as data:
        step = int(data.metadata()["step"])
        for key in data.keys():  # noqa: SIM118 - not a dictionary
            if key.startswith(MODULE):
                weights[key.removeprefix(MODULE)] = data.get_tensor(key)
            else:
                index, name = key.removeprefix(OPTIMIZER).split(".", 1)
                moments.setdefault(int(index), {})[name] = data.get_tensor(key)
    module.load_state_dict(weights)
    put_back(optimizer, moments)
    return step


def put_back(optimizer: torch.optim.Optimizer, moments: dict[int, dict[str, torch.Tensor]]) -> None:
    """Give an optimizer what it remembered of each parameter."""
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
