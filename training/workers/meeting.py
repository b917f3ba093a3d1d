"""How learners meet."""

from datetime import timedelta

import torch
import torch.distributed as dist

COLLECTIVE = timedelta(hours=1)  # the driver gives up before, and knows who does not answer


def meet(rendezvous: str, rank: int, world: int, device: torch.device) -> None:
    """Join the other learners, over a file that all can see."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    how = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(how, init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=COLLECTIVE)
