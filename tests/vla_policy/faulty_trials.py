"""`vla trials` as a process, with a faulty arm in place of the twin's graph.

python faulty_trials.py OUT: it says what code the command gives back; then the process has to end by itself.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vla_policy import trials
from vla_policy.deploy import DeployConfig

from vla.cli import main

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "put_on_plate"


class Graph:
    """One process in place of the graph's."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("faulty_arm.py"))])

    def ended(self) -> str:
        return "" if self.process.poll() is None else "the faulty arm has ended"


@contextmanager
def running(config: DeployConfig) -> Iterator[Graph]:
    graph = Graph()
    try:
        yield graph
    finally:
        graph.process.kill()
        graph.process.wait()


if __name__ == "__main__":
    trials.running = running
    words = ["protocol=twin_smoke", "use_sim=true", f"checkpoints=[{CHECKPOINT}]", f"out={sys.argv[1]}", "record=false"]
    code = main(["trials", *words])
    print("ended with", code, flush=True)
    sys.exit(code)
