"""Many runs, some at a time, on this machine or as tasks of a Ray cluster; one that fails does not end the others."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from training import metrics

POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """name: for people. file: what training/sweep_run.py is told. run: folder. iterations: of the run."""

    name: str
    file: Path
    run: Path
    iterations: int

    @property
    def log(self) -> Path:
        return self.file.with_suffix(".log")

    @property
    def done(self) -> int:
        """Iterations so far."""
        return min(self.iterations, len(metrics.read(self.run)))


class Handle(Protocol):
    """A job that has begun."""

    def poll(self) -> int | None:
        """Its exit code, None while it goes on."""

    def terminate(self) -> None: ...


class Here:
    """Processes of this machine."""

    def start(self, job: Job) -> Handle:
        with job.log.open("a") as log:
            return subprocess.Popen(_words(job.file), stdout=log, stderr=subprocess.STDOUT)


class Elsewhere:
    """Tasks of the cluster that this process is connected to; its nodes see the same folders and code.

    resources: that Ray sets aside for each, such as CPU and GPU. A task whose node is lost goes on with another.
    """

    def __init__(self, resources: Mapping[str, float]):
        own = {k: v for k, v in resources.items() if k not in ("CPU", "GPU")}
        self.task = ray.remote(_task).options(
            num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0), resources=own
        )

    def start(self, job: Job) -> Handle:
        return _Task(self.task.remote(_words(job.file.absolute()), str(job.log.absolute()), os.getcwd()), job.log)


class _Task:
    def __init__(self, reference: Any, log: Path):
        self.reference, self.log = reference, log

    def poll(self) -> int | None:
        if not ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            return int(ray.get(self.reference))
        except RayError as error:
            with self.log.open("a") as log:
                log.write(f"{error}\n")
            return 1

    def terminate(self) -> None:
        ray.cancel(self.reference, force=True)


def _words(file: Path) -> list[str]:
    return [sys.executable, "-m", "training.sweep_run", str(file)]


def _task(words: list[str], log: str, folder: str) -> int:
    """A run that starts a Ray of its own must not take the worker that it is in for its cluster."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with open(log, "a") as out:
        done = subprocess.run(words, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=environment, check=False)
    return done.returncode


def work(jobs: Sequence[Job], at_once: int, place: Here | Elsewhere, console: Console) -> dict[str, int]:
    """Play out all jobs, so many at a time; name -> exit code of those that failed."""
    waiting, going, failed = list(jobs), dict[str, tuple[Job, Handle, float]](), dict[str, int]()
    reached = {job.name: job.done for job in jobs}
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=sum(job.iterations for job in jobs))
        try:
            while waiting or going:
                while waiting and len(going) < at_once:
                    job = waiting.pop(0)
                    going[job.name] = job, place.start(job), time.monotonic()
                for job, handle, began in list(going.values()):
                    if (code := handle.poll()) is None:
                        continue
                    del going[job.name]
                    if code:
                        failed[job.name] = code
                    told = f"failed, see {job.log}" if code else "finished"
                    took = f"{(time.monotonic() - began) / 60:.1f} min"
                    console.print(f"{job.name} {told} after {took}", highlight=False, soft_wrap=True)
                    reached[job.name] = job.done
                reached |= {name: job.done for name, (job, _, _) in going.items()}
                now = ", ".join(f"{name} {reached[name]} of {job.iterations}" for name, (job, _, _) in going.items())
                over = f"{len(jobs) - len(waiting) - len(going)} of {len(jobs)} runs"
                progress.update(bar, completed=sum(reached.values()), description=f"{over}; {now}")
                time.sleep(POLL_S if going else 0)
        finally:
            for _, handle, _ in going.values():
                handle.terminate()
    return failed


def why(job: Job) -> str:
    """The last words of a job that failed."""
    lines = [line for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
    return " ".join(lines[-2:]) or "it said nothing"
