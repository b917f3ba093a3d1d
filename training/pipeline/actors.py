"""Ray: a session, actors with a number of threads, and answers of actors with a deadline and a name."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from training.pipeline.bell import PipelineTimeout
from training.pipeline.cluster import LOCAL, connect
from training.pipeline.crew import Node, here
from training.pipeline.placement import EngineError
from vla.errors import SimrealError

UPDATE_DEADLINE_S = 1800  # for a learner to answer, whatever it is asked


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


def actor(cls: type, threads: int, gpu: int | None = None, node: str = "") -> Any:
    """Ray's view of a worker class: no reserved cores, since phases share them, but a number of threads.

    gpu: the only one that it sees; None for all. Ray hands out none: who sits where is the placement's.
    node: Ray's name of the one that it has to be on; "" if there is one alone.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if gpu is not None:
        environment |= {"CUDA_VISIBLE_DEVICES": str(gpu), "MUJOCO_EGL_DEVICE_ID": str(gpu)}
    where = NodeAffinitySchedulingStrategy(node, soft=False) if node else "DEFAULT"
    return ray.remote(cls).options(num_cpus=0, runtime_env={"env_vars": environment}, scheduling_strategy=where)


def wait_ready(name: str, worker: Any, seconds: float = 600.0) -> int:
    """The process id of an actor, once it is set up."""
    try:
        return int(ray.get(worker.ready.remote(), timeout=seconds))
    except Exception as error:
        cause = getattr(error, "cause", error)
        raise EngineError(
            f"the {name} does not start: {cause}", code="WORKER", remedy="See the error above."
        ) from error


def collect(futures: dict[str, Any]) -> list[Any]:
    """Results of calls to the workers named; the error of one that failed, a dead one's before all others."""
    names = {future: name for name, future in futures.items()}
    failures: dict[str, Exception] = {}
    waiting = list(names)
    while waiting:  # whoever waits for a failed one in a collective may wait for ever
        done, waiting = ray.wait(waiting, num_returns=1, timeout=5 if failures else UPDATE_DEADLINE_S)
        if not done and not failures:
            raise silence([names[future] for future in waiting])
        if not done:
            break
        try:
            ray.get(done[0])
        except (RayActorError, RayTaskError) as error:
            failures[names[done[0]]] = error
    for name, error in sorted(failures.items(), key=lambda item: not isinstance(item[1], RayActorError)):
        cause = getattr(error, "cause", None)
        raise cause if isinstance(cause, SimrealError) else worker_error(name, error) from error
    return ray.get(list(names))


def silence(names: list[str]) -> EngineError:
    """What to tell when workers do not answer."""
    remedy = "The same command goes on after the last complete iteration; a smaller minibatch is quicker."
    return EngineError(f"no answer from {', '.join(names)} for {UPDATE_DEADLINE_S} s", code="WORKER", remedy=remedy)


def worker_error(name: str, error: Exception) -> EngineError:
    """What to tell when a worker fails that is not replaced."""
    remedy = "The same command goes on after the last complete iteration."
    return EngineError(f"the {name} failed: {reason(error)}", code="WORKER", remedy=remedy)


def reason(error: Exception) -> str:
    """Why a worker failed, in words."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return (
            str(cause.args[0]) if isinstance(cause, PipelineTimeout) else f"it raised {type(cause).__name__}: {cause}"
        )
    return "its process died"
