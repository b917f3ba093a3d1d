"""The hosts of a run: each has its own shared memory and bells, and whoever sits there uses no other.

What crosses hosts are the rows of a finished rollout and the weights after an update, as Ray objects that go from host
to host; the driver hands on their references. On one host nothing is copied: its learners read what the others write.
"""

import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from training.pipeline.actors import START_S, UPDATE_DEADLINE_S, actor, collect
from training.pipeline.bell import ABORT, Bell
from training.pipeline.block import RolloutBlock, RolloutShape, unlink
from training.pipeline.crew import Crew, Node, Place
from training.pipeline.placement import EngineError
from training.pipeline.weights import WeightsBlock, WeightsLayout

REMEDY = "The same command goes on after the last complete iteration, with the nodes that are there then."
CLOSE_S = 10.0


class HostMemory:
    """Shared memory and bells of one host: in the driver's process if that is there, else in an actor.

    name: of the block. bells: their names. own: columns of the slots that are played there.
    """

    def __init__(self, name: str, shape: RolloutShape, weights: WeightsLayout, bells: Sequence[str], own: slice):
        self.name, self.own = name, own
        self.folder = Path(tempfile.gettempdir()) / f"{name}_bells"  # a pipe needs no disk that others see
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.bells = [Bell(self.folder / bell) for bell in bells]
        self.block = RolloutBlock(shape, name, create=True)
        self.weights = WeightsBlock(weights, f"{name}_weights", create=True)

    def ready(self) -> int:
        """Answers as long as the host is there."""
        return 0

    def where(self) -> str:
        """Folder of the bells."""
        return str(self.folder)

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def begin(self, fresh: bool, gone: list[int]) -> None:
        """Forget an iteration that was given up, or go on after the last one; columns that are gone have no samples."""
        for bell in self.bells:
            bell.drain()
        if fresh:
            self.block.clear()
        else:
            self.block.carry_over()
        self.block["boundary"][:, gone] = True

    def rows(self) -> dict[str, np.ndarray]:
        """What was played here."""
        return {name: array[:, self.own] for name, array in self.block.arrays.items()}

    def put(self, first: int, rows: dict[str, np.ndarray]) -> None:
        """Copy what was played elsewhere into the columns from `first` on."""
        for name, array in rows.items():
            self.block[name][:, first : first + array.shape[1]] = array

    def newest(self) -> tuple[int, dict[str, np.ndarray]]:
        """Version and bytes of the weights."""
        return self.weights.pack()

    def offer(self, packed: tuple[int, dict[str, np.ndarray]]) -> None:
        self.weights.unpack(*packed)

    def abort(self) -> None:
        """Have everybody give the iteration up."""
        for bell in self.bells:
            bell.ring(*ABORT)

    def close(self) -> None:
        for bell in self.bells:
            bell.close()
        self.block.close()
        self.weights.close()
        unlink(self.name)
        unlink(f"{self.name}_weights")
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Host:
    """A node with processes of the run, their names `workers`; memory: a HostMemory or an actor of it.

    slots: that are played there. shape: of its block, the first column of which is slot `first`: it has all slots
        where there are learners; of fragments all hosts have all. block, weights: names. bells: their folder.
    """

    node: Node
    workers: frozenset[str]
    learns: bool
    slots: range
    first: int
    shape: RolloutShape
    block: str
    memory: Any
    bells: str

    @property
    def weights(self) -> str:
        return f"{self.block}_weights"

    def ask(self, method: str, *arguments: Any) -> Any:
        """A future of what a method of its memory returns; futures among the arguments are resolved there."""
        if not isinstance(self.memory, HostMemory):
            return getattr(self.memory, method).remote(*arguments)
        given = [ray.get(value) if isinstance(value, ray.ObjectRef) else value for value in arguments]
        return ray.put(getattr(self.memory, method)(*given))


class Hosts:
    """All hosts of a run that are there.

    parts: first slot and last + 1 of every environment worker. patience: s until a host that does not answer is lost.
    """

    def __init__(
        self, crew: Crew, nodes: Sequence[Node], shape: RolloutShape, weights: WeightsLayout, name: str,
        parts: Sequence[tuple[int, int]], patience: float,
    ):  # fmt: skip
        self.patience, self.total = patience, parts[-1][1]
        self.alive = {n: _open(n, crew, nodes[n], shape, weights, name, parts) for n in crew.nodes}
        self.first_learner = self.alive[crew.learners[0].node]
        self.offers: dict[int, Any] = {}  # node -> future of the weights' arrival there

    def of(self, place: Place) -> Host:
        return self.alive[place.node]

    @property
    def here(self) -> HostMemory:
        """That of the driver's own host."""
        memory: HostMemory = next(h.memory for h in self.alive.values() if isinstance(h.memory, HostMemory))
        return memory

    @property
    def slots(self) -> int:
        """How many are played."""
        return sum(len(host.slots) for host in self.alive.values())

    def rendezvous(self) -> str:
        """Where the learners meet, as torch's URL."""
        first = self.first_learner
        if sum(host.learns for host in self.alive.values()) == 1:
            return f"file://{first.bells}/rendezvous"
        return f"tcp://{first.node.name}:{ray.get(first.ask('free_port'))}"

    def begin(self, fresh: bool) -> dict[str, str]:
        """Prepare all blocks for a rollout. Workers whose host is lost, and why, as from `lost`."""
        there = {slot for host in self.alive.values() for slot in host.slots}
        gone = [slot for slot in range(self.total) if slot not in there]
        return self._settle(lambda: [h.ask("begin", fresh, gone if h.learns else []) for h in self.alive.values()])

    def gather(self) -> dict[str, str]:
        """Copy the rows of all hosts to those of the learners. Workers whose host is lost, as from `lost`."""
        return self._settle(self._gather)

    def _gather(self) -> list[Any]:
        copies = []
        for source in self.alive.values():
            targets = [host for host in self.alive.values() if host.learns and host is not source]
            if source.slots and targets:
                rows = source.ask("rows")
                copies += [target.ask("put", source.slots.start, rows) for target in targets]
        return copies

    def share_weights(self) -> None:
        """Send the newest weights to all other hosts. Their policy workers wait for them, nobody else does."""
        others = {n: host for n, host in self.alive.items() if host is not self.first_learner}
        if not others:
            return
        try:
            packed = self.first_learner.ask("newest")
            self.offers = {n: host.ask("offer", packed) for n, host in others.items()}
        except RayError as error:  # the driver's own host had to wait for them
            self.lost()
            raise EngineError(f"the weights did not arrive: {error}", code="NODE", remedy=REMEDY) from error

    def abort(self) -> None:
        for host in self.alive.values():
            host.ask("abort")

    def lost(self) -> dict[str, str]:
        """Workers of hosts that do not answer any more, and why; these hosts are given up."""
        probes = {h.ask("ready"): n for n, h in self.alive.items() if not isinstance(h.memory, HostMemory)}
        if not probes:
            return {}
        done, _ = ray.wait(list(probes), num_returns=len(probes), timeout=self.patience)
        return self.give_up([n for future, n in probes.items() if future not in done or _failed(future)])

    def give_up(self, nodes: Sequence[int]) -> dict[str, str]:
        """Go on without these nodes. Their workers, and why, as from `lost`."""
        gone = [self.alive.pop(n) for n in nodes]
        for host in gone:
            if host.learns or not self.slots:
                what = "of learners" if host.learns else "with the last environments"
                raise EngineError(f"the node {host.node.name} {what} is lost", code="NODE", remedy=REMEDY)
            print(
                f"node {host.node.name} is lost with {', '.join(sorted(host.workers))}: the run goes on with "
                f"{self.slots} of {self.total} environments", flush=True,
            )  # fmt: skip
        return {worker: f"node {host.node.name} is lost" for host in gone for worker in host.workers}

    def _settle(self, work: Callable[[], list[Any]]) -> dict[str, str]:
        """Have hosts do something and wait for it."""
        try:
            ray.get(work(), timeout=UPDATE_DEADLINE_S)
        except RayError as error:
            if failures := self.lost():
                return failures
            raise EngineError(f"a host failed: {error}", code="NODE", remedy=REMEDY) from error
        return {}

    def close(self) -> None:
        futures = [host.ask("close") for host in self.alive.values()]
        ray.wait(futures, num_returns=len(futures), timeout=CLOSE_S)  # one that is lost has nothing to tidy up
        for host in self.alive.values():
            if not isinstance(host.memory, HostMemory):
                ray.kill(host.memory)


def _open(
    number: int, crew: Crew, node: Node, shape: RolloutShape, weights: WeightsLayout, name: str,
    parts: Sequence[tuple[int, int]],
) -> Host:  # fmt: skip
    """A host with its memory."""
    numbers = {kind: crew.at(number, kind) for kind in crew.everyone}
    environments, learns = numbers["environment worker"], bool(numbers["learner"])
    slots = range(parts[environments[0]][0], parts[environments[-1]][1]) if environments else range(0)
    first = 0 if learns else slots.start
    own = shape if learns or shape.fragments else replace(shape, slots=len(slots))
    block = name if node.is_here else f"{name}_{number}"  # nodes may be on one machine, for a test
    bells = [f"environment{i}" for i in environments] + [f"policy{i}" for i in numbers["policy worker"]]
    arguments = block, own, weights, bells, slice(slots.start - first, slots.stop - first)
    memory: Any = HostMemory(*arguments) if node.is_here else actor(HostMemory, 1, None, node.id).remote(*arguments)
    if not node.is_here:
        collect({f"memory of node {node.name}": memory.ready.remote()}, START_S)
    folder = memory.where() if node.is_here else ray.get(memory.where.remote())
    workers = frozenset(f"{kind} {i}" for kind, found in numbers.items() for i in found)
    return Host(node, workers, learns, slots, first, own, block, memory, folder)


def _failed(future: Any) -> bool:
    try:
        ray.get(future)
    except RayError:
        return True
    return False
