"""A `vla train` in a process of its own, on the point environment."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TINY = (
    "env=null", "env.name=point_env:make", "env.settings.image_size=16", "env.settings.chunk=2",
    "slots=8", "decisions=8",
    "algorithm.minibatches=2", "placement.environment_workers=1", "placement.policy_threads=1",
    "placement.learners=1",
)  # fmt: skip
START_S = 100  # at most, for all processes of a run, on a busy machine


class Run:
    """A `vla train` in a process of its own."""

    def __init__(self, out: Path, *options: str, **environment: str):
        self.out = out
        self.log = out.parent / f"{out.name}.{time.time_ns()}.log"
        command = [sys.executable, "-c", "import sys; from vla.cli import main; sys.exit(main())", "train"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, f"out={out}", *TINY, *options], stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def rows(self) -> list[dict[str, float]]:
        file = self.out / "metrics.jsonl"
        lines = file.read_text().splitlines(True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def workers(self) -> dict[str, int]:
        """Process ids by name."""
        return json.loads((self.out / "processes.json").read_text())

    def wait_for(self, what: Callable[[], Any], seconds: float = START_S) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < end, f"no progress:\n{self.text}"
            time.sleep(0.02)

    def wait_iterations(self, more: int) -> None:
        """Until the run has done this many iterations more."""
        there = len(self.rows)
        self.wait_for(lambda: len(self.rows) >= there + more)

    def finish(self) -> int:
        """Wait for its end, for as long as there are new iterations; the exit code."""
        while True:
            there = len(self.rows)
            try:
                return self.process.wait(START_S)
            except subprocess.TimeoutExpired:
                assert len(self.rows) > there, f"no progress:\n{self.text}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[..., Run]
