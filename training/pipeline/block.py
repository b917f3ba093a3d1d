"""A rollout as named arrays in shared memory: written once, in place, by whoever makes the data.

Environment workers write observations and rewards, the policy worker writes tokens and values, learners read.
Nothing is copied or pickled on the way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker, shared_memory

import numpy as np

ALIGNMENT = 64  # bytes
_MADE_HERE: set[str] = set()  # blocks that this process made and has to remove


@dataclass(frozen=True)
class RolloutShape:
    """Sizes: T decisions, N slots, K cameras, S state, L prompt, C x D actions, V values, A privileged.

    critic: numbers of the state that a privileged critic is told.
    """

    decisions: int
    slots: int
    image: tuple[int, int, int, int]  # K, H, W, 3
    state: int
    prompt: int
    chunk: int
    action_dim: int
    values: int
    privileged: int
    critic: int

    def arrays(self) -> Mapping[str, tuple[tuple[int, ...], type]]:
        """Name -> shape and type. Observations have one row more: the last one is the bootstrap's."""
        t, n = self.decisions, self.slots
        after, tokens = (t + 1, n), (t + 1, n, self.chunk, self.action_dim)
        return {
            "images": ((*after, *self.image), np.uint8),
            "state": ((*after, self.state), np.float32),
            "tokens": ((*after, self.prompt), np.int64),
            "privileged": ((*after, self.privileged), np.float32),
            "critic_states": ((*after, self.chunk, self.critic), np.float32),  # before each action
            "boundary": (after, np.bool_),  # holds only the final observation of a truncated episode
            "action_tokens": (tokens, np.int16),
            "log_probs": (tokens, np.float32),
            "values": ((*after, self.values), np.float32),
            "rewards": ((t, n, self.chunk), np.float32),
            "executed": ((t, n, self.chunk), np.bool_),
            "terminated": ((t, n), np.bool_),
            "truncated": ((t, n), np.bool_),
        }

    @property
    def nbytes(self) -> int:
        total = 0
        for shape, kind in self.arrays().values():
            total += -(-int(np.prod(shape)) * np.dtype(kind).itemsize // ALIGNMENT) * ALIGNMENT
        return total


class RolloutBlock:
    """The arrays of a `RolloutShape` in a named block of shared memory, as its `arrays`."""

    def __init__(self, shape: RolloutShape, name: str, create: bool = False):
        self.shape = shape
        self.name = name
        if create:
            unlink(name)
        self._memory = shared_memory.SharedMemory(name, create=create, size=shape.nbytes if create else 0)
        if create:
            _MADE_HERE.add(name)
        elif name not in _MADE_HERE:  # the tracker of a process that only reads would remove the block too early
            resource_tracker.unregister(self._memory._name, "shared_memory")
        self.arrays: dict[str, np.ndarray] = {}
        offset = 0
        for key, (dimensions, kind) in shape.arrays().items():
            array = np.ndarray(dimensions, kind, self._memory.buf, offset)
            offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
            self.arrays[key] = array

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def clear(self) -> None:
        """Forget what an earlier rollout, or one that was given up, has left."""
        for array in self.arrays.values():
            array[:] = 0

    def carry_over(self) -> None:
        """Make the last row the first: its observation is decided already, by the bootstrap's forward."""
        for array in self.arrays.values():
            if len(array) == self.shape.decisions + 1:
                array[0] = array[-1]
            else:
                array[:] = 0

    def close(self) -> None:
        self.arrays.clear()
        self._memory.close()


def unlink(name: str) -> None:
    """Remove a block by name, if it exists: one that a killed run left behind, say."""
    try:
        old = shared_memory.SharedMemory(name)
    except FileNotFoundError:
        return
    old.close()
    old.unlink()
