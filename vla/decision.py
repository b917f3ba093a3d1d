"""A decision: which parts a policy saw, and what it answered. A replay is held to those that were recorded.

The images stand in the recording already; a decision names their capture times. It travels as JSON, in which every
float64 comes back as it was, NaN too: what a broken policy said is worth keeping.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vla.errors import CodedError, Fault
from vla.types import ActionChunk, Observation


class DecisionError(CodedError):
    """A recorded decision can't be read."""


@dataclass(frozen=True)
class Decision:
    """instruction, stamps, state: of the observation, as in Observation. chunk: the answer.

    seconds: that the policy took. late: camera -> s that were taken off its stamps, as calibrated; None if that was
    not told.
    """

    instruction: str
    stamps: Mapping[str, float]
    state: Mapping[str, np.ndarray]
    chunk: ActionChunk
    seconds: float
    late: Mapping[str, float] | None = None

    @staticmethod
    def of(seen: Observation, chunk: ActionChunk, seconds: float) -> "Decision":
        return Decision(seen.instruction, seen.stamps, seen.state, chunk, seconds)

    def to_json(self) -> str:
        return json.dumps({
            "instruction": self.instruction, "stamps": {name: float(stamp) for name, stamp in self.stamps.items()},
            "state": {name: np.asarray(values, np.float64).tolist() for name, values in self.state.items()},
            "actions": np.asarray(self.chunk.actions, np.float64).tolist(), "stamp": float(self.chunk.stamp),
            "seconds": self.seconds, **({} if self.late is None else {"late": dict(self.late)}),
        })  # fmt: skip

    @staticmethod
    def from_json(text: str) -> "Decision":
        try:
            data = json.loads(text)
            state = {str(name): np.array(values, np.float64) for name, values in data["state"].items()}
            stamps = {str(name): float(stamp) for name, stamp in data["stamps"].items()}
            actions = np.array(data["actions"], np.float64)
            if actions.ndim != 2:
                raise ValueError(f"actions of the shape {actions.shape}")
            chunk = ActionChunk(actions, float(data["stamp"]))
            told = data.get("late")
            late = None if told is None else {str(camera): float(seconds) for camera, seconds in told.items()}
            return Decision(str(data["instruction"]), stamps, state, chunk, float(data["seconds"]), late)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}"
            remedy = "It was recorded by another release: replay it with that one."
            raise DecisionError(Fault("DECISION", "decision", "a policy's decision", found, remedy)) from error

    def agrees(self, seen: Observation) -> bool:
        """Whether an observation has the same sentence, capture times and numbers, bit for bit."""
        return (
            seen.instruction == self.instruction
            and dict(seen.stamps) == dict(self.stamps)
            and seen.state.keys() == self.state.keys()
            and all(np.asarray(seen.state[k], np.float64).tobytes() == v.tobytes() for k, v in self.state.items())
        )
