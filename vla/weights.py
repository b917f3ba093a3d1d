"""Weights from safetensors files into a model, tensor by tensor: there is never a second copy of them."""

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import nn

from vla.errors import CodedError, Fault

SHOWN = 5  # faults of one kind that are told
LARGE = 2**30  # bytes from which on moving them is shown
T = TypeVar("T")


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    """The model without memory for its parameters; buffers are there."""
    with init_empty_weights(include_buffers=False):
        return build().eval()


def fill(
    model: nn.Module, files: Sequence[Path], error: type[CodedError], remedy: str, device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None, stored: torch.dtype | None = None, elsewhere: Collection[str] = (),
    ignored: str | None = None,
) -> None:  # fmt: skip
    """Give every parameter of an `empty` model its values.

    dtype: to convert to, None to keep what is stored. stored: what has to be in the files, None for anything.
    elsewhere: names that the files need not have. ignored: beginning of the names in the files to pass over.
    Raises `error` for damaged files and for tensors that are missing, unknown, or of another shape or type.
    """
    own = {**dict(model.named_parameters()), **persistent(model)}
    missing, faults = set(own) - set(elsewhere), []
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in shown(list(opened.keys()), f"reading {file.name}", file.stat().st_size):
                    if ignored is not None and name.startswith(ignored):
                        continue
                    part = opened.get_slice(name)
                    shape = tuple(part.get_shape())
                    if name not in own or shape != tuple(own[name].shape):
                        expected = str(tuple(own[name].shape)) if name in own else "no such tensor"
                        faults.append(Fault("WEIGHTS_MISMATCH", name, expected, str(shape), remedy))
                        continue
                    tensor = opened.get_tensor(name)
                    if stored is not None and tensor.dtype != stored:
                        faults.append(Fault("WEIGHTS_MISMATCH", name, str(stored), str(tensor.dtype), remedy))
                        continue
                    put(model, name, tensor.to(device, dtype or tensor.dtype))
                    missing.discard(name)
        except SafetensorError as problem:
            raise error(Fault("WEIGHTS_DAMAGED", file.name, "a whole file", str(problem)[:160], remedy)) from problem
    if not faults and missing:
        found = f"none, and {len(missing)} are missing in all"
        faults = [Fault("WEIGHTS_MISMATCH", sorted(missing)[0], "a tensor", found, remedy)]
    if faults:
        raise error(*faults[:SHOWN])
    model.to(device)


def shown(items: Sequence[T], text: str, size: int) -> Iterable[T]:
    """The items, with a progress bar if there are many bytes to move (size) and somebody is at the terminal."""
    quiet = size < LARGE or not sys.stderr.isatty()
    return track(items, text, console=Console(stderr=True), transient=True, disable=quiet)


def persistent(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are part of a checkpoint."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        old = owner._parameters[leaf]
        assert old is not None
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
    else:
        owner._buffers[leaf] = tensor
