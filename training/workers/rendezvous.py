"""Where learners find each other, on one host or on several."""

import os
import socket
from datetime import timedelta
from urllib.parse import urlsplit

import psutil
import torch
import torch.distributed as dist

COLLECTIVE = timedelta(hours=1)  # the driver gives up before, and knows who does not answer


def meet(url: str, rank: int, world: int, device: torch.device) -> None:
    """Join the other learners. url: file:// of one host, or tcp:// with address and port of rank 0's."""
    how = "nccl" if device.type == "cuda" else "gloo"
    if how == "nccl":
        torch.cuda.set_device(device)
    if url.startswith("tcp"):  # else gloo takes the interface of the host's name, which may lead nowhere
        name = _interface(url)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
    dist.init_process_group(how, init_method=url, rank=rank, world_size=world, timeout=COLLECTIVE)


def _interface(url: str) -> str:
    """Name of the network interface on the way to an address."""
    address = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address.hostname, address.port))  # sends nothing
        own = probe.getsockname()[0]
    return next(name for name, found in psutil.net_if_addrs().items() if any(entry.address == own for entry in found))
