"""Memory of environment workers: a simulator that leaks is ended before it takes the machine with it."""

from collections.abc import Mapping

import psutil

from training.pipeline.placement import EngineError


def grown(processes: Mapping[str, int], bound_gib: float | None) -> dict[str, float]:
    """Which processes have more memory of their own than the bound, and how much in GiB.

    The block of the rollout, which they share, is not counted.
    """
    found = {}
    for name, process in processes.items() if bound_gib is not None else ():
        try:
            memory = psutil.Process(process).memory_info()
        except psutil.NoSuchProcess:
            continue  # whoever waits for its answer finds out
        own = (memory.rss - memory.shared) / 2**30
        if own > bound_gib:
            found[name] = own
    return found


def refuse_grown(processes: Mapping[str, int], bound_gib: float | None) -> None:
    """New workers have to stay within the bound, or they would be replaced for ever."""
    for name, own in grown(processes, bound_gib).items():
        raise EngineError(
            f"the {name} takes {own:.2f} GiB as soon as it is set up, and worker_memory_gib is {bound_gib:g}",
            code="PLACEMENT", remedy="Raise placement.worker_memory_gib, or set it to null.",
        )  # fmt: skip
