"""A discrete-event loop: simulated processes that wait for time, for signals, for lanes and for shared cores.

A process is a generator that yields the `Signal` it waits for. Nothing here knows what is simulated.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator

from vla.errors import SimrealError

Process = Generator["Signal", None, None]


class Stalled(SimrealError):
    """Nobody can move any more, and what was waited for has not happened."""


class Signal:
    """Happens once; wakes whoever waits for it."""

    def __init__(self, loop: "Loop"):
        self._loop = loop
        self._waiters: list[Callable[[], None]] = []
        self.fired = False

    def fire(self) -> None:
        self.fired = True
        for waiter in self._waiters:
            self._loop.at(self._loop.now, waiter)
        self._waiters.clear()

    def then(self, call: Callable[[], None]) -> None:
        """Call when it happens; at once if it has."""
        if self.fired:
            call()
        else:
            self._waiters.append(call)


class Loop:
    """Simulated time `now` in s. What happens at the same time happens in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time, next(self._order), call))

    def sleep(self, seconds: float) -> Signal:
        signal = Signal(self)
        self.at(self.now + seconds, signal.fire)
        return signal

    def all(self, signals: list[Signal]) -> Signal:
        """Happens with the last of `signals`."""
        if len(signals) == 1:
            return signals[0]
        both, left = Signal(self), itertools.count(len(signals) - 1, -1)
        for signal in signals:
            signal.then(lambda: both.fire() if next(left) == 0 else None)
        return both

    def start(self, process: Process) -> None:
        def resume() -> None:
            for signal in process:
                if not signal.fired:
                    signal.then(resume)
                    return

        self.at(self.now, resume)

    def run(self, until: Signal) -> None:
        while not until.fired:
            if not self._queue:
                raise Stalled(
                    f"after {self.now:g} s every simulated process waits for another", code="STALLED",
                    remedy="Look for a batch that never fills up, or for who should fire what is waited for.",
                )  # fmt: skip
            self.now, _, call = heapq.heappop(self._queue)
            call()


class Cores:
    """Processor cores that an operating system shares evenly: n running processes advance at min(1, cores / n)."""

    def __init__(self, loop: Loop, cores: float = math.inf):
        self._loop, self.cores = loop, cores
        self._work: list[tuple[float, int, Signal]] = []  # seconds at full speed that are left, processes, done
        self._since, self._turn = 0.0, 0

    def use(self, seconds: float, processes: int = 1) -> Signal:
        """Each of `processes` needs `seconds` of a core of its own."""
        if math.isinf(self.cores):
            return self._loop.sleep(seconds)
        self._advance()
        self._work.append((seconds, processes, Signal(self._loop)))
        self._plan()
        return self._work[-1][2]

    def _speed(self) -> float:
        return min(1.0, self.cores / max(1, sum(processes for _, processes, _ in self._work)))

    def _advance(self) -> None:
        done = (self._loop.now - self._since) * self._speed()
        self._since = self._loop.now
        self._work = [(left - done, processes, signal) for left, processes, signal in self._work]

    def _plan(self) -> None:
        """Come back when the next one is ready, unless something changes before."""
        self._turn += 1
        turn = self._turn
        if self._work:
            after = max(0.0, min(self._work, key=lambda w: w[0])[0]) / self._speed()
            self._loop.at(self._loop.now + after, lambda: self._finish() if turn == self._turn else None)

    def _finish(self) -> None:
        least = min(left for left, _, _ in self._work)
        ready = [signal for left, _, signal in self._work if left <= least + 1e-12]  # rounding
        self._advance()
        self._work = [w for w in self._work if w[2] not in ready]
        self._plan()
        for signal in ready:
            signal.fire()


class Lane:
    """`width` devices or processes that always work on the same call: one at a time, first come, first served."""

    def __init__(self, loop: Loop, width: int, cores: Cores):
        self.width = width
        self._loop, self._cores = loop, cores
        self._queue: deque[tuple[float, Callable[[], None], Signal]] = deque()
        self._busy = False

    def use(self, seconds: float, begin: Callable[[], None]) -> Signal:
        """`begin` is called when the turn comes."""
        done = Signal(self._loop)
        self._queue.append((seconds, begin, done))
        if not self._busy:
            self._next()
        return done

    def _next(self) -> None:
        self._busy = bool(self._queue)
        if self._busy:
            seconds, begin, done = self._queue.popleft()
            begin()
            self._cores.use(seconds, self.width).then(lambda: self._finish(done))

    def _finish(self, done: Signal) -> None:
        done.fire()
        self._next()
