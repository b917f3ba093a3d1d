"""The crew: which node and which GPU of it every process of a run gets."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from training.pipeline.seats import COMPONENTS, CPU, Cluster, SeatError, check, seat

if TYPE_CHECKING:
    from training.pipeline.placement import PlacementConfig


@dataclass(frozen=True)
class Node:
    """A machine. id: Ray's, "" for this one without a cluster. name: its address, or what to call it. gpus: how many.

    resources: names of what it declares to Ray. is_here: whether the command runs on it.
    """

    id: str
    name: str
    gpus: int
    resources: frozenset[str] = frozenset()
    is_here: bool = False


@dataclass(frozen=True)
class Place:
    """Of a process. node: its number. gpu: its number on that node, None for the processors."""

    node: int
    gpu: int | None = None

    @property
    def device(self) -> str:
        """Torch's name."""
        return CPU if self.gpu is None else f"cuda:{self.gpu}"


@dataclass(frozen=True)
class Crew:
    """Places of a run's processes, by their numbers. Environment workers of a node follow each other."""

    environments: tuple[Place, ...]
    policies: tuple[Place, ...]
    learners: tuple[Place, ...]

    @property
    def everyone(self) -> Mapping[str, tuple[Place, ...]]:
        return {"environment worker": self.environments, "policy worker": self.policies, "learner": self.learners}

    @property
    def nodes(self) -> list[int]:
        """Numbers of the nodes that have a process."""
        return sorted({place.node for places in self.everyone.values() for place in places})

    def at(self, node: int, kind: str) -> list[int]:
        """Numbers of the processes of a kind on a node."""
        return [i for i, place in enumerate(self.everyone[kind]) if place.node == node]

    def policy_of(self, worker: int) -> int:
        """The policy worker that decides for an environment worker: one of the same node, in turns."""
        node = self.environments[worker].node
        policies = self.at(node, "policy worker")
        return policies[self.at(node, "environment worker").index(worker) % len(policies)]


def here() -> list[Node]:
    """This machine alone."""
    return [Node("", "this machine", torch.cuda.device_count() if torch.cuda.is_available() else 0, is_here=True)]


def man(placement: "PlacementConfig", nodes: Sequence[Node]) -> Crew:
    """The processes of a placement on the GPUs and processors of these nodes.

    Device d of a placement is the dth GPU, counted through all nodes. Raises SeatError for devices that are not there,
    for components that would be in each other's way, for nodes that lack what the environments need, and for learners
    of the asynchronous schedule that the driver's dispatcher does not reach.
    """
    gpus = [Place(number, gpu) for number, node in enumerate(nodes) for gpu in range(node.gpus)]
    alike = len({node.gpus for node in nodes}) == 1
    cluster = Cluster(len(nodes), nodes[0].gpus) if alike else Cluster(1, len(gpus))
    seats = seat({name: getattr(placement, name) for name in COMPONENTS}, cluster)
    check(seats, placement.stages, placement.schedule == "asynchronous", placement.offload, cluster.devices)
    policies = [gpus[device] for device in seats.policy]
    if seats.environments:
        environments = _in_turns(placement, nodes, [gpus[device] for device in seats.environments])
    else:
        environments = _spread(placement, nodes, {place.node for place in policies})
    if not policies:
        hosts = sorted({place.node for place in environments})
        policies = [Place(host) for host in hosts for _ in range(placement.policy_workers)]
    learners = [gpus[device] for device in seats.learner] or [Place(0)] * placement.learners
    elsewhere = [nodes[place.node].name for place in learners if not nodes[place.node].is_here]
    if placement.schedule == "asynchronous" and elsewhere:
        raise SeatError(
            f"the asynchronous schedule has its learners on the node of the command, not on {elsewhere[0]}",
            code="PLACEMENT_NODES", remedy=f"Give the command on {elsewhere[0]}, name other devices for the learners, "
            "or choose the synchronous schedule.",
        )  # fmt: skip
    return Crew(tuple(environments), tuple(policies), tuple(learners))


def _in_turns(placement: "PlacementConfig", nodes: Sequence[Node], gpus: Sequence[Place]) -> list[Place]:
    """Environment workers on these GPUs."""
    if placement.environment_nodes is not None:
        raise SeatError(
            f"environments={placement.environments} names GPUs, environment_nodes={placement.environment_nodes} nodes",
            code="PLACEMENT_NODES", remedy="Set environment_nodes=null.",
        )  # fmt: skip
    lacking = [nodes[place.node].name for place in gpus if not _has(nodes[place.node], placement)]
    if lacking:
        raise SeatError(
            f"environments={placement.environments} are GPUs of {lacking[0]}, which does not declare the resource "
            f"{placement.environment_resource!r}", code="PLACEMENT_NODES",
            remedy="Name other GPUs, or start Ray there with --resources.",
        )  # fmt: skip
    places = [gpus[i % len(gpus)] for i in range(placement.environment_workers)]
    return sorted(places, key=lambda place: place.node)  # the order on a node stays


def _spread(placement: "PlacementConfig", nodes: Sequence[Node], deciding: set[int]) -> list[Place]:
    """Environment workers on processors of nodes that have what they need, and GPUs of the policy if it has some."""
    workers, wanted = placement.environment_workers, placement.environment_nodes
    resource = placement.environment_resource
    able = [i for i, node in enumerate(nodes) if _has(node, placement) and (not deciding or i in deciding)]
    if not able:
        raise SeatError(
            f"none of {len(nodes)} nodes {'with GPUs of the policy ' if deciding else ''}declares the resource "
            f"{resource!r}", code="PLACEMENT_NODES",
            remedy=f"""Start Ray on nodes that have the simulator with --resources='{{"{resource}": 1}}', or set """
            'placement.environment_resource="".',
        )  # fmt: skip
    if wanted is not None and not 1 <= wanted <= min(len(able), workers):
        raise SeatError(
            f"{workers} environment workers can't be spread over {wanted} nodes: {len(able)} can have some",
            code="PLACEMENT_NODES", remedy="Lower environment_nodes, or raise environment_workers.",
        )  # fmt: skip
    count = min(len(able), workers) if wanted is None else wanted
    return [Place(able[i * count // workers]) for i in range(workers)]


def _has(node: Node, placement: "PlacementConfig") -> bool:
    return not placement.environment_resource or placement.environment_resource in node.resources


def picture(crew: Crew, nodes: Sequence[Node]) -> Table:
    """Who sits where."""
    table = Table(title="nodes", title_justify="left")
    for name in ("", "node", "GPUs", *(f"{kind}s" for kind in crew.everyone)):
        table.add_column(name)
    for number, node in enumerate(nodes):
        cells = []
        for places in crew.everyone.values():
            found = Counter(place.device for place in places if place.node == number)
            cells.append(", ".join(f"{count} on {device}" for device, count in sorted(found.items())))
        table.add_row(str(number), node.name + (" (here)" if node.is_here else ""), str(node.gpus), *cells)
    return table
