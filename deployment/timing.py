"""What the control loop measures about itself."""

from collections import deque

KEPT = 4000  # of the measured times


class Timing:
    """Measured times in s: from capture to the first command that uses it, and the error of the command's period."""

    def __init__(self, rate_hz: float, step_s: float):
        self._stride, self._step_s = max(1, round(rate_hz * step_s)), step_s
        self._last: float | None = None
        self._cycles = 0
        self.latency: deque[float] = deque(maxlen=KEPT)
        self.period_error: deque[float] = deque(maxlen=KEPT)
        self._fresh: tuple[list[float], list[float]] = [], []

    def cycle(self, now: float) -> None:
        """A control cycle begins."""
        self._cycles += 1
        if self._cycles % self._stride == 0:
            if self._last is not None:
                error = abs(now - self._last - self._step_s)
                self.period_error.append(error)
                self._fresh[1].append(error)
            self._last = now

    def arrived(self, delay: float) -> None:
        """A chunk was taken over."""
        self.latency.append(delay)
        self._fresh[0].append(delay)

    def fresh(self) -> tuple[list[float], list[float]]:
        """Latencies and period errors since the last call."""
        values, self._fresh = self._fresh, ([], [])
        return values
