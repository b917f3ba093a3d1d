"""Inference: the policy's side of the deployment. Streams come in, chunks as waypoints go out, in a thread of its own.

It acts when the driver wants it to (`due`), on the newest moment of which all parts are known. What keeps it from
acting is told as a fault; a call of the policy that takes too long counts as no sign of life.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Protocol

import numpy as np

from deployment.executor import integrate
from deployment.reference import Pose, Waypoints
from vla.adapters import tabletop as adapter
from vla.assembler import Assembler, AssemblerConfig, History, StreamError
from vla.contract import PolicyContract
from vla.decision import Decision
from vla.errors import CodedError, Fault
from vla.types import ActionChunk, Observation

WARM_UP = 5  # calls of the policy before it counts as ready
FAILURE_S = 1.0  # for so long a failed call is told


class Actor(Protocol):
    """Whatever answers observations: a Policy in this process, or one behind a connection."""

    @property
    def contract(self) -> PolicyContract: ...

    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]: ...


@dataclass(frozen=True)
class InferenceConfig:
    """limit_s: a call of the policy that takes longer counts as hung."""

    assembler: AssemblerConfig = field(default_factory=AssemblerConfig)
    limit_s: float = 0.1


class Inference:
    """See the module's docstring. on_chunk, on_decision: called in the inference's thread, in this order."""

    def __init__(self, actor: Actor, on_chunk: Callable[[Waypoints], None], config: InferenceConfig | None = None,
                 clock: Callable[[], float] = time.time,
                 on_decision: Callable[[Decision], None] = lambda decision: None):  # fmt: skip
        self.actor, self.config, self.clock = actor, config or InferenceConfig(), clock
        self.contract = actor.contract
        self.instruction = ""
        self.seconds: deque[float] = deque(maxlen=1000)  # of the calls
        self._on_chunk, self._on_decision = on_chunk, on_decision
        self._commanded = History()
        self._assembler = Assembler(self.contract, self._commanded.at, self.config.assembler)
        self._refused: dict[str, Fault] = {}  # camera -> why its last image can't be used
        self._failure: tuple[float, Fault] | None = None
        self._due: float | None = None
        self._answered = -np.inf
        self._busy_since: float | None = None
        self._changed = Condition()
        self._over = False
        self._thread = Thread(target=self._run, name="inference", daemon=True)

    def warm_up(self) -> float:
        """Call the policy on a blank observation, as the first calls are slow; seconds that the last one took."""
        blank = blank_observation(self.contract, self.clock())
        took = 0.0
        for _ in range(WARM_UP):
            began = time.perf_counter()
            self.actor.act([blank])
            took = time.perf_counter() - began
        return took

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(2.0)

    def image(self, camera: str, stamp: float, image: np.ndarray, encoding: str) -> None:
        """An image `[H, W, 3]` has come."""
        with self._changed:
            try:
                self._assembler.image(camera, stamp, image, encoding)
                self._refused.pop(camera, None)
            except StreamError as error:
                self._refused[camera] = error.faults[0]
            self._changed.notify()

    def state(self, stamp: float, tool: Pose, gripper_width: float) -> None:
        """The arm's state has come."""
        with self._changed:
            self._assembler.state(stamp, tool, gripper_width)

    def commanded(self, stamp: float, pose: Pose) -> None:
        """Where the chunks want the tool, as the driver says."""
        with self._changed:
            self._commanded.add(stamp, pose)

    def due(self, stamp: float | None) -> None:
        """Observations captured from this time on are to be answered; None: none."""
        with self._changed:
            self._due = stamp
            self._changed.notify()

    def fault(self) -> Fault | None:
        """What keeps the policy from acting."""
        now = self.clock()
        with self._changed:
            if self._failure is not None and now - self._failure[0] < FAILURE_S:
                return self._failure[1]
            return self._obstacle(now)

    def lives(self) -> bool:
        """Whether the inference makes progress: nothing hangs."""
        busy = self._busy_since
        return self._thread.is_alive() and (busy is None or time.monotonic() - busy < self.config.limit_s)

    def _obstacle(self, now: float) -> Fault | None:
        if self._refused:
            return next(iter(self._refused.values()))
        found = self._assembler.faults(now)
        if found:
            return found[0]
        if not len(self._commanded):
            return Fault("STATE_SILENT", "commanded pose", "the driver's", "none so far", "Start franka_node.")
        if not self.instruction.strip():
            remedy = "Publish a sentence such as 'put the red cube on the plate'."
            return Fault("INSTRUCTION_EMPTY", "instruction", "a sentence", "nothing", remedy)
        return None

    def _ready(self) -> Observation | None:
        """The observation to answer now, if there is one."""
        if self._due is None or self._obstacle(self.clock()) is not None:
            return None
        seen = self._assembler.observation(self.instruction)
        if seen is None:
            return None
        captured = max(seen.stamps[camera.name] for camera in self.contract.cameras)
        return seen if captured >= self._due and captured > self._answered else None

    def _run(self) -> None:
        while True:
            with self._changed:
                seen: Observation | None = None
                while not self._over and (seen := self._ready()) is None:
                    self._changed.wait(0.2)
                if self._over or seen is None:
                    return
                self._answered = max(seen.stamps[camera.name] for camera in self.contract.cameras)
            self._busy_since = time.monotonic()
            try:
                chunk, waypoints = self._answer(seen)
            except Exception as error:  # of whatever kind: the driver is told, and stops
                self._failure = self.clock(), failed(error)
                continue
            finally:
                self.seconds.append(time.monotonic() - self._busy_since)
                self._busy_since = None
            self._on_chunk(waypoints)
            self._on_decision(Decision.of(seen, chunk, self.seconds[-1]))

    def _answer(self, seen: Observation) -> tuple[ActionChunk, Waypoints]:
        chunk = self.actor.act([seen])[0]
        action = self.contract.action
        if chunk.actions.shape != (action.chunk, action.dim):
            wanted = f"[{action.chunk}, {action.dim}]"
            raise CodedError(
                Fault("CHUNK_SHAPE", "chunk", wanted, str(chunk.actions.shape), "Check the policy's server.")
            )
        with self._changed:
            anchor = self._commanded.at(chunk.stamp)
        return chunk, integrate(chunk, anchor, 1.0 / action.rate_hz)


def failed(error: Exception) -> Fault:
    """A failed call of the policy as a fault."""
    if isinstance(error, CodedError):
        return error.faults[0]
    remedy = getattr(error, "remedy", "") or "See the policy's log."
    return Fault(getattr(error, "code", "") or "POLICY_FAILED", "policy", "a chunk", f"{error}", remedy)


def blank_observation(contract: PolicyContract, now: float) -> Observation:
    """Grey images and an arm in the middle of its workspace."""
    x, y, z, w = adapter.TOOL_DOWN / np.linalg.norm(adapter.TOOL_DOWN)
    native = {
        **{camera.name: np.full((camera.height, camera.width, 3), 127, np.uint8) for camera in contract.cameras},
        "eef_pos": np.array([0.46, 0.0, 0.22]), "eef_quat_wxyz": np.array([w, x, y, z]),
        "commanded_pos": np.array([0.46, 0.0, 0.22]), "gripper_width": 0.08, "time": now,
    }  # fmt: skip
    cameras = [camera.name for camera in contract.cameras]
    return adapter.observation(native, "put the red cube on the plate", cameras)
