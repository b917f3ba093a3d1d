"""Ray: a session, actors with a number of threads, and answers of actors with a deadline and a name."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from training.pipeline.bell import REMEDY, PipelineTimeout
from training.pipeline.cluster import LOCAL, connect
from training.pipeline.crew import Node, here
from training.pipeline.placement import EngineError
from vla.errors import SimrealError

START_S = 600.0  # for a worker to be set up
UPDATE_DEADLINE_S = 1800  # for a learner to answer, whatever it is asked
LOOK_S = 0.5  # between looks at whoever is waited for
# Copies of 1 MiB and more go past the caches, which are smaller than a rollout: images of 16 environments take half the
# time. By itself the C library begins at most of the last cache's size. Others ignore it.
LARGE_COPIES = "glibc.cpu.x86_non_temporal_threshold=0x100000"


class WorkerLost(EngineError):
    """A worker died, hangs or does not answer: another in its place may do what it could not."""


@contextlib.contextmanager
def ray_session(cluster: str = LOCAL) -> Iterator[list[Node]]:
    """A local Ray instance for as long as the block lasts, or a connection to a cluster; its nodes."""
    try:
        yield _start() if cluster == LOCAL else connect(cluster)
    finally:
        ray.shutdown()


def _start() -> list[Node]:
    # Ray sizes its store by the machine and warns about /dev/shm; rollouts don't go through it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(
            address="local", include_dashboard=False, log_to_driver=True, logging_level="ERROR",
            num_cpus=max(2, os.cpu_count() or 1), object_store_memory=200 * 2**20, configure_logging=True,
        )  # fmt: skip
    except Exception as error:  # whatever Ray's start-up raises
        raise EngineError(
            f"Ray does not start: {error}", code="RAY",
            remedy="Check free memory, /dev/shm and /tmp (`vla doctor`); `ray stop` ends left-overs.",
        ) from error  # fmt: skip
    return here()


def actor(cls: type, threads: int, gpu: int | None = None, node: str = "", calls: int = 1) -> Any:
    """Ray's view of a worker class: no reserved cores, since phases share them, but a number of threads.

    gpu: the only one that it sees; None for all. Ray hands out none: who sits where is the placement's.
    node: Ray's name of the one that it has to be on; "" if there is one alone.
    calls: that it answers at a time, each in a thread and in any order.
    """
    environment = {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", LARGE_COPIES),
    }  # fmt: skip
    if gpu is not None:
        environment |= {"CUDA_VISIBLE_DEVICES": str(gpu), "MUJOCO_EGL_DEVICE_ID": str(gpu)}
    where = NodeAffinitySchedulingStrategy(node, soft=False) if node else "DEFAULT"
    several = {"max_concurrency": calls} if calls > 1 else {}
    return ray.remote(cls).options(
        num_cpus=0, runtime_env={"env_vars": environment}, scheduling_strategy=where, **several
    )  # fmt: skip


def end(worker: Any, process: int | None) -> None:
    """Kill an actor. One that is stopped does not hear Ray: the system has to end it, if its process is known."""
    ray.kill(worker)
    if process is not None:
        end_stopped(process)


def end_stopped(process: int) -> None:
    """Kill a process of this host if it is stopped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if (there := psutil.Process(process)).status() == psutil.STATUS_STOPPED:
            there.kill()


def collect(
    futures: dict[str, Any], seconds: float = UPDATE_DEADLINE_S, check: Callable[[], None] = lambda: None
) -> list[Any]:
    """Results of calls to the workers named; the error of one that failed, a dead one's before all others.

    check: raises an error when it is known that no answer will come.
    """
    names = {future: name for name, future in futures.items()}
    failures: dict[str, Exception] = {}
    waiting, end = list(names), time.monotonic() + seconds
    while waiting:  # whoever waits for a failed one in a collective may wait for ever
        left = end - time.monotonic()
        done, waiting = ray.wait(waiting, num_returns=1, timeout=5 if failures else max(0.0, min(LOOK_S, left)))
        if not done and failures:
            break
        if not done:
            check()
            if left <= 0:
                raise silence([names[future] for future in waiting], seconds)
            continue
        end = time.monotonic() + seconds
        try:
            ray.get(done[0])
        except RayError as error:
            failures[names[done[0]]] = error
    for name, error in sorted(failures.items(), key=lambda item: _raised(item[1])):
        cause = getattr(error, "cause", None)
        raise cause if isinstance(cause, SimrealError) else worker_error(name, error) from error
    return ray.get(list(names))


def silence(names: list[str], seconds: float) -> WorkerLost:
    """What to tell when workers do not answer."""
    remedy = f"{REMEDY} A smaller minibatch is quicker."
    return WorkerLost(f"no answer from {', '.join(names)} for {seconds:g} s", code="WORKER", remedy=remedy)


def stillness(names: list[str], seconds: float) -> WorkerLost:
    """What to tell when workers hang."""
    what = f"{', '.join(names)} has not used the processor for {seconds:.0f} s"
    return WorkerLost(what, code="WORKER", remedy=REMEDY)


def worker_error(name: str, error: Exception) -> EngineError:
    """What to tell when a worker fails: one that raised would raise again, one that died need not die again."""
    kind = EngineError if _raised(error) else WorkerLost
    return kind(f"the {name} failed: {reason(error)}", code="WORKER", remedy=REMEDY)


def reason(error: Exception) -> str:
    """Why a worker failed, in words."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return (
            str(cause.args[0]) if isinstance(cause, PipelineTimeout) else f"it raised {type(cause).__name__}: {cause}"
        )
    if _raised(error):
        return f"it does not start: {error}"
    if isinstance(error, OutOfMemoryError):
        return "Ray ended it because the machine is short of memory"
    return "its process died"


def _raised(error: Exception) -> bool:
    """Whether a worker's own code is at fault, in a call or while it was set up."""
    return isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False)
