"""Trials: what came out of one, and what all of them say together."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from vla.results import commit, machine, score

PAUSE_SPEED = 0.005  # m/s: below it the tool stands still
PAUSE_S = 0.05
FINGERS = 0.002  # m, of the gripper's width: below it the fingers stand still


@dataclass(frozen=True)
class Trace:
    """Where the tool was to be during a trial: times `[N]` s, positions `[N, 3]` m. widths: of the gripper `[N]` m."""

    times: np.ndarray
    positions: np.ndarray
    widths: np.ndarray

    def pauses(self) -> int:
        """How often the tool stood still for more than 50 ms, from its first motion to its last."""
        return len(self._pauses())

    def idle_pauses(self) -> int:
        """The same without those in which the fingers moved: there it has something to wait for."""
        return sum(np.ptp(self.widths[pause]) < FINGERS for pause in self._pauses())

    def _pauses(self) -> list[slice]:
        dt = np.maximum(np.diff(self.times), 1e-4)
        speed = np.linalg.norm(np.diff(self.positions, axis=0), axis=1) / dt
        moving = np.flatnonzero(speed > PAUSE_SPEED)
        # The samples between which it moved: what lies between two of them that are not neighbours is a pause.
        pauses = [slice(a + 1, b + 1) for a, b in pairwise(moving) if b > a + 1]
        return [pause for pause in pauses if self.times[pause.stop - 1] - self.times[pause.start] > PAUSE_S]

    def squared_jerk(self, rate_hz: float = 100.0) -> float:
        """Integral of the squared jerk, m2/s5, of the positions resampled at `rate_hz`."""
        if len(self.times) < 8:
            return 0.0
        grid = np.arange(self.times[0], self.times[-1], 1 / rate_hz)
        resampled = np.stack([np.interp(grid, self.times, column) for column in self.positions.T], 1)
        jerk = np.diff(resampled, 3, axis=0) * rate_hz**3
        return float((jerk**2).sum() / rate_hz)


@dataclass(frozen=True)
class Trial:
    """One trial. seconds: until success, or the time limit. fault: why it is not to be scored; "" if it is.

    distance_m: from the object to the goal's centre at the end.
    """

    seed: int
    variant: str
    instruction: str
    success: bool
    seconds: float
    distance_m: float
    fault: str = ""
    trace: Trace | None = field(default=None, repr=False, compare=False)


def summary(trials: Sequence[Trial], latency_ms: Sequence[float], period_error_ms: Sequence[float]) -> dict[str, Any]:
    """The result as JSON data; faulted trials are listed, not scored."""
    scored = [trial for trial in trials if not trial.fault]
    rate = score(sum(t.success for t in scored), len(scored)) if scored else score(0, 1) | {"episodes": 0, "rate": None}
    return {
        **rate,
        "faulted": len(trials) - len(scored),
        "latency_ms": _quantiles(latency_ms, (0.5, 0.99)),
        "period_error_ms": _quantiles(period_error_ms, (0.99,)),
        "trials": [{k: v for k, v in asdict(t).items() if k != "trace"} for t in trials],
        "commit": commit(),
        "machine": machine("mujoco", "torch", "franky-control", "franky-sim"),
    }


def _quantiles(values: Sequence[float], at: Sequence[float]) -> dict[str, float | None]:
    return {f"p{100 * q:.0f}": float(np.quantile(values, q)) if len(values) else None for q in at}
