"""The engine: starts the actors of a placement, runs rollouts and updates, replaces workers that fail."""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from training import envs
from training.algorithms.ppo import PPOConfig
from training.pipeline.bell import ABORT, Bell, PipelineAborted, PipelineTimeout
from training.pipeline.block import RolloutBlock, RolloutShape, unlink
from training.workers.environment import EnvironmentOptions, EnvironmentWorker, EpisodeLog
from training.workers.learner import Learner, Update
from training.workers.policy import PolicyLog, PolicyWorker
from vla.codec import Codec
from vla.errors import SimrealError
from vla.lora import FULL, Lora
from vla.policy import Policy

UPDATE_DEADLINE_S = 1800  # for a learner to answer, whatever it is asked
RESTARTS = 3  # of environment workers, for one iteration


class EngineError(SimrealError):
    """The engine can't start or go on."""


@dataclass(frozen=True)
class PlacementConfig:
    """Who runs where.

    environments: devices of the simulators: cpu, all, 0-3, 0,2,4-7, or a share of the cluster's GPUs, 25-50%.
    policy: devices of the policy, likewise.
    learner: devices of the learner, likewise.
    offload: whoever rests leaves its device's memory to the others that sit there.
    environment_workers: processes that step environments.
    stages: groups of environments of a worker that take turns; 1 is sequential, 2 and more pipelined.
    policy_threads: torch threads of the policy worker.
    learners: data-parallel learner processes.
    learner_threads: torch threads of each learner.
    deadline_s: a process that waits longer than this names whom it waits for.
    """

    environments: str = "cpu"
    policy: str = "cpu"
    learner: str = "cpu"
    offload: bool = False
    environment_workers: int = 2
    stages: int = 1
    policy_threads: int = 2
    learners: int = 2
    learner_threads: int = 1
    deadline_s: float = 60.0


@dataclass(frozen=True)
class Rollout:
    """Logs of an iteration: of every environment worker and of the policy; seconds it took."""

    episodes: list[EpisodeLog]
    policy: PolicyLog
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A checkpoint and an environment that fit each other and the placement."""

    codec: Codec
    shape: RolloutShape


def plan(
    checkpoint: Path, environment: str, settings: dict[str, Any], slots: int, decisions: int,
    algorithm: PPOConfig, placement: PlacementConfig,
) -> Plan:  # fmt: skip
    """Check that everything fits, before any process is started and any file written."""
    workers, stages = placement.environment_workers, placement.stages
    if slots < workers * stages:
        raise EngineError(
            f"{slots} environments can't be split over {workers} workers x {stages} stages", code="PLACEMENT",
            remedy="Raise slots, or lower environment_workers or stages.",
        )  # fmt: skip
    # In the worst case every other row holds nothing but the final observation of an episode.
    needed, least = algorithm.minibatches * placement.learners, slots * decisions // 2
    if least < needed:
        raise EngineError(
            f"{slots} slots x {decisions} decisions give {least} samples at worst, too few for "
            f"{algorithm.minibatches} minibatches on {placement.learners} learners",
            code="PLACEMENT", remedy="Raise slots or decisions, or lower minibatches or learners.",
        )  # fmt: skip
    policy = Policy.load(checkpoint, None, "training")
    codec, contract = policy.codec, policy.contract
    probe = envs.make(environment, 1, **settings)
    contract.check(probe.contract, f"environment {environment}")
    privileged, critic = probe.privileged_size, probe.critic_size
    probe.close()
    if algorithm.critic == "privileged" and not critic:
        raise EngineError(
            f"environment {environment} has no state for a privileged critic", code="CRITIC",
            remedy="Choose algorithm=ppo, whose critic is the model's value head.",
        )  # fmt: skip
    if not algorithm.train_vision and not hasattr(policy.model, "see"):
        raise EngineError(
            f"{type(policy.model).__name__} has no `see` of its own, which algorithm.train_vision=false needs",
            code="VISION", remedy="Set algorithm.train_vision=true.",
        )  # fmt: skip
    tells = getattr(policy.model, "auxiliary_size", 0)
    if algorithm.perception_steps and tells and privileged and tells != privileged:
        raise EngineError(
            f"the model's auxiliary output has {tells} numbers, environment {environment} tells {privileged}",
            code="PRIVILEGED", remedy="Set algorithm.perception_steps=0, or train a model for this environment.",
        )  # fmt: skip
    if algorithm.gradient_checkpointing and not hasattr(policy.model, "checkpoint_gradients"):
        raise EngineError(
            f"{type(policy.model).__name__} has no `checkpoint_gradients`", code="MEMORY",
            remedy="Set algorithm.gradient_checkpointing=false.",
        )  # fmt: skip
    if not policy.model.config.get("values"):
        raise EngineError(
            "the model has no value head or gives no distribution", code="VALUES",
            remedy="Import it with values=1 (or one for each action of a chunk), with action tokens.",
        )  # fmt: skip
    shape = RolloutShape(
        decisions, slots, codec.image_shape, contract.state_size, codec.tokenizer.length, *codec.action_shape,
        values=int(policy.model.config["values"]), privileged=privileged, critic=critic,
    )  # fmt: skip
    return Plan(codec, shape)


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """A local Ray instance for as long as the block lasts."""
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
    try:
        yield
    finally:
        ray.shutdown()


class Engine:
    """Owns the actors, the rollout block and the bells of one run."""

    def __init__(
        self, checkpoint: Path, run: Path, environment: str, settings: dict[str, Any], variant: str,
        slots: int, decisions: int, algorithm: PPOConfig, placement: PlacementConfig, seed: int,
        iterations: int, lora: Lora = FULL,
    ):  # fmt: skip
        self.placement = placement
        checked = plan(checkpoint, environment, settings, slots, decisions, algorithm, placement)
        self.codec, self.shape = checked.codec, checked.shape
        self.name = "simreal_" + hashlib.sha1(str(run.resolve()).encode()).hexdigest()[:16]
        self.bells = run / "bells"
        shutil.rmtree(self.bells, ignore_errors=True)
        self.bells.mkdir(parents=True)
        self.block = RolloutBlock(self.shape, self.name, create=True)
        parts = np.array_split(np.arange(slots), placement.environment_workers)
        self.options = [
            EnvironmentOptions(
                environment,
                settings,
                variant,
                (int(p[0]), int(p[-1]) + 1),
                placement.stages,
                seed,
                2 * placement.deadline_s,  # the policy, which knows the culprit, speaks first
            )
            for p in parts
        ]
        self.counters = [np.zeros(len(p), np.int64) for p in parts]
        self.fresh = True
        stage_rows = [[[int(r) for r in stage] for stage in np.array_split(p, placement.stages)] for p in parts]
        self.environment_bells = [Bell(self.bells / f"environment{i}") for i in range(len(parts))]
        self.policy_bell = Bell(self.bells / "policy")
        shared = (self.shape, self.name)
        self.environments: list[Any] = [self._environment(i) for i in range(len(parts))]
        make_policy: Any = _actor(PolicyWorker, placement.policy_threads)
        self.policy = make_policy.remote(
            str(checkpoint), *shared, str(self.bells), stage_rows, algorithm.temperature, seed,
            placement.policy_threads, placement.deadline_s, lora,
        )  # fmt: skip
        rendezvous = self.bells / "rendezvous"
        make_learner: Any = _actor(Learner, placement.learner_threads)
        self.learners = [
            make_learner.remote(
                rank, placement.learners, str(checkpoint), *shared, algorithm, seed, iterations,
                placement.learner_threads, str(rendezvous.resolve()), lora,
            )
            for rank in range(placement.learners)
        ]  # fmt: skip
        everyone = {f"environment worker {i}": w for i, w in enumerate(self.environments)}
        everyone["policy worker"] = self.policy
        everyone.update({f"learner {i}": w for i, w in enumerate(self.learners)})
        self.processes = {name: _wait_ready(name, actor) for name, actor in everyone.items()}

    def _environment(self, index: int) -> Any:
        make: Any = _actor(EnvironmentWorker, 1)
        return make.remote(index, self.options[index], self.codec, self.shape, self.name, str(self.bells))

    def load(self, weights: dict[str, np.ndarray]) -> None:
        """Give the policy worker new weights."""
        _collect({"policy worker": self.policy.load.remote(weights)})

    def rollout(self, iteration: int) -> Rollout:
        """T decisions in every slot. Workers that crash or hang are replaced and the iteration begun anew."""
        for _ in range(RESTARTS + 1):
            began = time.perf_counter()
            if self.fresh:
                self.block.clear()
            else:
                self.block.carry_over()
            futures = self._launch(iteration)
            failures = self._watch(futures)
            if not failures:
                self.fresh = False
                *logs, policy = ray.get(list(futures))
                self.counters = [log.begun for log in logs]
                return Rollout(logs, policy, time.perf_counter() - began)
            self._replace(failures)
        raise EngineError(
            f"environment workers failed {RESTARTS + 1} times in iteration {iteration}: {failures}",
            code="ENVIRONMENT",
            remedy="Run `vla eval` or the environment alone to see its error; the last checkpoint is kept.",
        )  # fmt: skip

    def _launch(self, iteration: int) -> dict[Any, str]:
        begun = self.counters if self.fresh else [None] * len(self.environments)
        futures = {
            worker.rollout.remote(counters): f"environment worker {i}"
            for i, (worker, counters) in enumerate(zip(self.environments, begun, strict=True))
        }
        futures[self.policy.rollout.remote(iteration, self.fresh)] = "policy worker"
        return futures

    def _watch(self, futures: dict[Any, str]) -> dict[int, str]:
        """Wait for all; on a failure give the iteration up. Returns whom to replace, with reasons."""
        waiting = list(futures)
        failures: dict[int, str] = {}
        silent: PipelineTimeout | None = None
        patience = self.placement.deadline_s
        while waiting:
            if all(futures[f].startswith("environment") and self._number(futures[f]) in failures for f in waiting):
                break  # they hang, and it is known already
            done, waiting = ray.wait(waiting, num_returns=1, timeout=patience if failures or silent else None)
            if not done:  # asked to give up and still busy: it hangs
                for future in waiting:
                    failures.setdefault(self._number(futures[future]), "does not answer")
                break
            name = futures[done[0]]
            try:
                ray.get(done[0])
                continue
            except PipelineAborted:
                continue
            except PipelineTimeout as timeout:
                silent = silent or timeout
                for index in timeout.missing:
                    failures.setdefault(index, _reason(timeout))
            except (RayActorError, RayTaskError) as error:
                if not name.startswith("environment"):
                    raise _worker_error(name, error) from error
                failures.setdefault(self._number(name), _reason(error))
            if failures:
                self._abort()
        if silent is not None and not failures:
            raise silent
        return failures

    @staticmethod
    def _number(name: str) -> int:
        if not name.startswith("environment"):
            raise EngineError(f"the {name} does not answer", code="WORKER", remedy="The same command resumes.")
        return int(name.rsplit(" ", 1)[1])

    def _abort(self) -> None:
        for bell in (self.policy_bell, *self.environment_bells):
            bell.ring(*ABORT)

    def _replace(self, failures: dict[int, str]) -> None:
        for index, reason in sorted(failures.items()):
            name = f"environment worker {index}"
            print(f"{name} (process {self.processes[name]}) is restarted: {reason}", flush=True)
            ray.kill(self.environments[index])
            self.environments[index] = self._environment(index)
            self.processes[name] = _wait_ready(name, self.environments[index])
        for bell in (self.policy_bell, *self.environment_bells):
            bell.drain()
        # All begin fresh episodes, after those that they had begun.
        self.counters = [c + self.shape.decisions + 1 for c in self.counters]
        self.fresh = True

    def update(self, iteration: int) -> Update:
        """One update of all learners; the policy worker gets the new weights."""
        updates = _collect({f"learner {i}": w.update.remote(iteration) for i, w in enumerate(self.learners)})
        weights = updates[0].weights
        assert weights is not None
        self.load(weights)
        return updates[0]

    def save(self, folder: Path) -> None:
        _collect({"learner 0": self.learners[0].save.remote(str(folder))})

    def restore(self, folder: Path, counters: list[list[int]]) -> None:
        """Weights and optimizer of a saved state; every slot goes on with its next episode."""
        _collect({f"learner {i}": w.restore.remote(str(folder)) for i, w in enumerate(self.learners)})
        self.load(_collect({"learner 0": self.learners[0].weights.remote()})[0])
        flat = np.concatenate([np.asarray(c, np.int64) for c in counters])
        self.counters = [flat[o.slots[0] : o.slots[1]] for o in self.options]

    def export(self, folder: Path, curve: dict[str, Any], config: dict[str, Any]) -> None:
        _collect({"learner 0": self.learners[0].export.remote(str(folder), curve, config)})

    def close(self) -> None:
        for actor in (*self.environments, self.policy, *self.learners):
            ray.kill(actor)
        self.block.close()
        unlink(self.name)
        shutil.rmtree(self.bells, ignore_errors=True)


def _actor(cls: type, threads: int) -> Any:
    """Ray's view of a worker class: no reserved cores, since phases share them, but a number of threads."""
    environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return ray.remote(cls).options(num_cpus=0, runtime_env={"env_vars": environment})


def _wait_ready(name: str, actor: Any, seconds: float = 120.0) -> int:
    try:
        return int(ray.get(actor.ready.remote(), timeout=seconds))
    except Exception as error:
        cause = getattr(error, "cause", error)
        raise EngineError(
            f"the {name} does not start: {cause}", code="WORKER", remedy="See the error above."
        ) from error


def _collect(futures: dict[str, Any]) -> list[Any]:
    """Results of calls to the workers named; the error of one that failed, a dead one's before all others."""
    names = {future: name for name, future in futures.items()}
    failures: dict[str, Exception] = {}
    waiting = list(names)
    while waiting:  # whoever waits for a failed one in a collective may wait for ever
        done, waiting = ray.wait(waiting, num_returns=1, timeout=5 if failures else UPDATE_DEADLINE_S)
        if not done and not failures:
            silent = ", ".join(names[future] for future in waiting)
            remedy = "The same command goes on after the last complete iteration; a smaller minibatch is quicker."
            raise EngineError(f"no answer from {silent} for {UPDATE_DEADLINE_S} s", code="WORKER", remedy=remedy)
        if not done:
            break
        try:
            ray.get(done[0])
        except (RayActorError, RayTaskError) as error:
            failures[names[done[0]]] = error
    for name, error in sorted(failures.items(), key=lambda item: not isinstance(item[1], RayActorError)):
        cause = getattr(error, "cause", None)
        raise cause if isinstance(cause, SimrealError) else _worker_error(name, error) from error
    return ray.get(list(names))


def _worker_error(name: str, error: Exception) -> EngineError:
    """What to tell when a worker fails that is not replaced."""
    remedy = "The same command goes on after the last complete iteration."
    return EngineError(f"the {name} failed: {_reason(error)}", code="WORKER", remedy=remedy)


def _reason(error: Exception) -> str:
    if isinstance(error, RayTaskError):
        cause = error.cause
        return (
            str(cause.args[0]) if isinstance(cause, PipelineTimeout) else f"it raised {type(cause).__name__}: {cause}"
        )
    return "its process died"
