"""Sharded learners: each holds its part of the weights, and of the optimizer's moments (torch's FSDP2).

With adapters it is the frozen weights that are split, and what is trained stays whole on every learner.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from training import state
from training.state import MODULE, OPTIMIZER
from vla.errors import SimrealError

METHODS = ("see", "perceive")  # of a model, beside `forward`: they need its weights, too


def shard(model: Any, device: torch.device, world: int, kind: torch.dtype | None, keep_trained: bool) -> None:
    """Split the weights over all learners; each calls it, and afterwards `parameters()` gives the parts.

    kind: in which weights travel and compute. keep_trained: what is trained stays whole.
    """
    mesh = init_device_mesh(device.type, (world,))
    untouched = {p for p in model.parameters() if p.requires_grad} if keep_trained else set()
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32 if kind else None)
    for part in (*model.blocks(), model):
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=untouched)
    for method in METHODS:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors put together; all learners have to call it."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def save(folder: Path, name: str, rank: int, world: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this learner's part of a state beside those of the others."""
    parts = state.tensors(module, optimizer)
    own = {k: (v.to_local() if isinstance(v, DTensor) else v).contiguous() for k, v in parts.items()}
    file = folder / f"{name}.{rank:04d}-of-{world:04d}.safetensors"
    save_file(own, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").rename(file)


def restore(folder: Path, name: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read a state that learners wrote, however many they were."""
    files = sorted(folder.glob(f"{name}.*-of-*.safetensors"))
    count = int(files[0].stem.rsplit("-", 1)[1]) if files else 0
    if len(files) != count or not files:
        raise SimrealError(
            f"{folder} has {len(files)} of {count} parts of {name}", code="STATE",
            remedy="Remove the folder: the run goes on from the state before it.",
        )  # fmt: skip
    opened = [safe_open(str(file), "pt") for file in files]
    known = sorted(opened[0].keys())  # in the same order on every learner, since each has its part sent to it

    def read(key: str, like: torch.Tensor) -> torch.Tensor:
        """The tensor of a name, split like another one; parts are along the first dimension."""
        if not isinstance(like, DTensor):
            return opened[0].get_tensor(key)
        joined = torch.cat([one.get_tensor(key) for one in opened]).to(like.to_local().device)
        return distribute_tensor(joined, like.device_mesh, like.placements)

    with torch.no_grad():
        for key, target in module.state_dict().items():
            target.copy_(read(MODULE + key, target))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            prefix = f"{OPTIMIZER}{index}."
            for key in (k for k in known if k.startswith(prefix)):
                entry = key.removeprefix(prefix)
                like = parameter if entry != "step" else torch.zeros(())
                moments.setdefault(index, {})[entry] = read(key, like)
    state.put_back(optimizer, moments)
