"""Seats: which component of a run works on which device, from a placement's words to numbers, and what can't be."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from vla.errors import SimrealError

COMPONENTS = ("environments", "policy", "learner")
CPU = "cpu"


class SeatError(SimrealError):
    """A placement that this cluster, or none, can seat."""


@dataclass(frozen=True)
class Cluster:
    """The machines.

    nodes: how many; all are alike.
    gpus: of each node; null counts those of this machine.
    gpu_gib: memory of one, GiB; null asks this machine's GPU.
    """

    nodes: int = 1
    gpus: int | None = None
    gpu_gib: float | None = None

    @property
    def devices(self) -> int:
        """GPUs in all. Device i is GPU i % gpus of node i // gpus."""
        return self.nodes * (self.gpus or 0)


@dataclass(frozen=True)
class Seats:
    """Numbers of the devices of each component, counted through all nodes; empty for the processors."""

    environments: tuple[int, ...]
    policy: tuple[int, ...]
    learner: tuple[int, ...]

    def of(self, component: str) -> tuple[int, ...]:
        found: tuple[int, ...] = getattr(self, component)
        return found

    def together(self, one: str, other: str) -> tuple[int, ...]:
        """Devices that both have."""
        return tuple(sorted(set(self.of(one)) & set(self.of(other))))


def seat(words: Mapping[str, str], cluster: Cluster) -> Seats:
    """The devices that each component's words name: cpu, all, 0-3, 0,2,4-7, or a share of all, 25-50%.

    Raises SeatError for words that it does not understand, and for devices that are not there.
    """
    return Seats(**{name: _devices(name, words[name], cluster) for name in COMPONENTS})


def check(seats: Seats, stages: int, is_asynchronous: bool, offload: bool, devices: int) -> None:
    """Raise SeatError for components that would wait for each other's device although the schedule has them overlap.

    stages: groups of environments that take turns. offload: whether a component that rests leaves its device's memory.
    devices: of the cluster. Where there is one alone, policy and learner may share it in every schedule.
    """
    shared = seats.together("environments", "policy")
    if shared and (stages > 1 or is_asynchronous):
        why = f"{stages} stages" if stages > 1 else "the asynchronous schedule"
        raise SeatError(
            f"environments and policy share {_named(shared)}: {why} can't overlap them there", code="PLACEMENT_OVERLAP",
            remedy="Give them devices of their own, as placement=hybrid does, or set stages=1.",
        )  # fmt: skip
    if shared and set(seats.environments) != set(seats.policy):
        raise SeatError(
            f"environments and policy share {_named(shared)} and not all their devices: the others would wait for it",
            code="PLACEMENT_OVERLAP", remedy="Give both the same devices, or none in common.",
        )  # fmt: skip
    for name in ("environments", "policy") if is_asynchronous else ():
        alone = name == "policy" and devices == 1 and not offload
        if (both := seats.together(name, "learner")) and not alone:
            raise SeatError(
                f"{name} and learner share {_named(both)}, and the asynchronous schedule has both work all the time",
                code="PLACEMENT_OVERLAP",
                remedy="Give the learner devices of its own; a single GPU they may share with offload=false.",
            )  # fmt: skip
    resting = [name for name in ("environments", "policy") if seats.together(name, "learner")]
    if offload and not resting and not shared:
        raise SeatError(
            "offload=true, but no device is shared: nobody has to leave", code="PLACEMENT_OVERLAP",
            remedy="Set offload=false.",
        )  # fmt: skip


def _devices(component: str, words: str, cluster: Cluster) -> tuple[int, ...]:
    text, total = words.strip().lower(), cluster.devices
    if text == CPU:
        return ()
    if not total:
        raise SeatError(
            f"{component}: {words!r} asks for GPUs, and there is none", code="PLACEMENT_GPU",
            remedy="Choose placement=colocated or pipelined, which run on the processors, or name a cluster: "
            "cluster.gpus=8 cluster.nodes=2.",
        )  # fmt: skip
    if text == "all":
        return tuple(range(total))
    if share := re.fullmatch(r"(\d+)-(\d+)%", text):
        return _share(component, words, (int(share[1]), int(share[2])), total)
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise SeatError(
            f"{component}: {words!r} names no devices", code="PLACEMENT_GPU",
            remedy="Write cpu, all, 0-3, 0,2,4-7, or a share, 25-50%.",
        )  # fmt: skip
    numbers: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        numbers += range(int(low), int(high or low) + 1)
    if not numbers:
        raise SeatError(
            f"{component}: {words!r} leaves it without a device", code="PLACEMENT_EMPTY",
            remedy="Write the lower number first, as in 0-3.",
        )  # fmt: skip
    if max(numbers) >= total:
        raise SeatError(
            f"{component}: device {max(numbers)} of {words!r} is not there: {cluster.nodes} nodes x "
            f"{cluster.gpus or 0} GPUs have devices 0 to {total - 1}", code="PLACEMENT_GPU",
            remedy="Lower the numbers, or name the cluster as it is with cluster.nodes and cluster.gpus.",
        )  # fmt: skip
    return tuple(sorted(set(numbers)))


def _share(component: str, words: str, percent: tuple[int, int], total: int) -> tuple[int, ...]:
    low, high = (Fraction(part * total, 100) for part in percent)
    if high > total or low.denominator != 1 or high.denominator != 1:
        raise SeatError(
            f"{component}: {words!r} of {total} GPUs is no whole number of them", code="PLACEMENT_GPU",
            remedy="Name the devices by number, as in 0-2.",
        )  # fmt: skip
    if high <= low:
        raise SeatError(
            f"{component}: {words!r} of {total} GPUs leaves it without a device", code="PLACEMENT_EMPTY",
            remedy="Write the lower share first, as in 0-50%.",
        )  # fmt: skip
    return tuple(range(int(low), int(high)))


def _named(devices: tuple[int, ...]) -> str:
    """Devices in words."""
    if len(devices) == 1:
        return f"device {devices[0]}"
    return f"devices {', '.join(str(d) for d in devices)}"
