"""The synchronous schedules, sequential and pipelined: a rollout of all environments, then an update."""

from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from training.pipeline.actors import WorkerLost, actor, collect, end, reason, worker_error
from training.pipeline.bell import ABORT, REMEDY, Bell, PipelineAborted, PipelineTimeout
from training.pipeline.engine import RESTARTS, Engine, PolicyLog, Rollout
from training.pipeline.placement import EngineError
from training.pipeline.status import Clock, Doing
from training.workers.environment import EnvironmentOptions, EnvironmentWorker
from training.workers.episodes import EpisodeLog
from training.workers.learner import Learner, Update
from training.workers.policy import PolicyWorker


class Synchronous(Engine):
    """Environment workers that take turns with the policy, stage by stage."""

    def prepare(self) -> None:
        workers, stages = self.placement.environment_workers, self.placement.stages
        parts = np.array_split(np.arange(self.slots), workers)
        self.options = [
            EnvironmentOptions(
                self.environment,
                self.settings,
                self.variant,
                (int(p[0]), int(p[-1]) + 1),
                stages,
                self.seed,
                2 * self.placement.deadline_s,  # the policy, which knows the culprit, speaks first
                i % len(self.crew.policies),
            )
            for i, p in enumerate(parts)
        ]
        self.begun = [np.zeros(len(p), np.int64) for p in parts]
        self.fresh = True
        self.stage_rows = [[[int(r) for r in stage] for stage in np.array_split(p, stages)] for p in parts]
        self.environment_bells = [Bell(self.bells / f"environment{i}") for i in range(workers)]

    def start_environment(self, index: int) -> Any:
        make: Any = actor(EnvironmentWorker, 1, self.crew.environments[index])
        return make.remote(index, self.options[index], self.codec, self.shape, self.name, str(self.bells))

    def start_policy(self, index: int) -> Any:
        make: Any = actor(PolicyWorker, self.placement.policy_threads)
        served = {i: self.stage_rows[i] for i, options in enumerate(self.options) if options.policy == index}
        return make.remote(
            index, self.policy_options, self.crew.policies[index], self.shape, self.name, str(self.bells), served
        )

    def start_learner(self, rank: int) -> Any:
        make: Any = actor(Learner, self.placement.learner_threads)
        return make.remote(rank, self.learner_options, self.crew.learners[rank], self.shape, self.name)

    def iterate(self, iteration: int) -> tuple[Rollout, Update]:
        return self.rollout(iteration), self.update(iteration)

    def counters(self) -> np.ndarray:
        return np.concatenate(self.begun)

    def resume(self, iteration: int, counters: np.ndarray) -> None:
        self.begun = [counters[o.slots[0] : o.slots[1]] for o in self.options]

    def close(self) -> None:
        for bell in self.environment_bells:
            bell.close()
        super().close()

    def rollout(self, iteration: int) -> Rollout:
        """T decisions in every slot. Workers that crash or hang are replaced and the iteration begun anew.

        So are workers that have grown too large, before it begins: all slots lose the episodes that they are in.
        """
        if leaking := {self._number(name): why for name, why in self.leaking().items()}:
            self._replace(leaking)
        for _ in range(RESTARTS + 1):
            clock = Clock(self.status)
            if self.fresh:
                self.block.clear()
            else:
                self.block.carry_over()
            futures = self._launch(iteration)
            with self.row.during(Doing.ROLLING_OUT, iteration):
                failures = self._watch(futures)
            if not failures:
                self.fresh = False
                found = ray.get(list(futures))
                logs, forwards = found[: len(self.environments)], sum(found[len(self.environments) :])
                self.begun = [log.begun for log in logs]
                return self._report(logs, forwards, *clock.lap())
            self._replace(failures)
        raise EngineError(
            f"environment workers failed {RESTARTS + 1} times in iteration {iteration}: {failures}",
            code="ENVIRONMENT",
            remedy="Run `vla eval` or the environment alone to see its error; the last checkpoint is kept.",
        )  # fmt: skip

    def _report(self, logs: list[EpisodeLog], forwards: int, seconds: np.ndarray, passed: float) -> Rollout:
        """seconds `[rows, Doing]` that passed meanwhile."""
        for log, row in zip(logs, seconds, strict=False):  # environment workers have the first rows
            log.step_s, log.wait_s = float(row[Doing.STEPPING]), float(row[Doing.ASKING])
        begin = len(logs)
        policy = seconds[begin : begin + len(self.policies)].mean(0)  # theirs are the next ones
        spent = float(policy[Doing.DECIDING]), float(policy[Doing.GATHERING])
        return Rollout(logs, PolicyLog(*spent, forwards), passed, {"time/policy_load_s": float(policy[Doing.LOADING])})

    def update(self, iteration: int) -> Update:
        """One update of all learners; the policy workers take the new weights over before their next decision."""
        with self.row.during(Doing.LEARNING, iteration):
            updates = collect({f"learner {i}": w.update.remote(iteration) for i, w in enumerate(self.learners)})
        first: Update = updates[0]
        return first

    def _launch(self, iteration: int) -> dict[Any, str]:
        begun = self.begun if self.fresh else [None] * len(self.environments)
        futures = {
            worker.rollout.remote(counters): f"environment worker {i}"
            for i, (worker, counters) in enumerate(zip(self.environments, begun, strict=True))
        }
        futures |= {p.rollout.remote(iteration, self.fresh): f"policy worker {i}" for i, p in enumerate(self.policies)}
        return futures

    def _watch(self, futures: dict[Any, str]) -> dict[int, str]:
        """Wait for all; on a failure give the iteration up. Returns whom to replace, with reasons."""
        waiting = list(futures)
        failures: dict[int, str] = {}
        silent: PipelineTimeout | None = None
        patience = self.placement.deadline_s
        turns = 0
        while waiting:
            if all(futures[f].startswith("environment") and self._number(futures[f]) in failures for f in waiting):
                break  # they hang, and it is known already
            done, waiting = ray.wait(waiting, num_returns=1, timeout=patience if failures or silent else 3 * patience)
            if not done and not failures and silent is None and turns != (turns := int(self.status["turns"].sum())):
                continue  # nobody is ready, but there is progress
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
                    failures.setdefault(index, reason(timeout))
            except RayError as error:
                if not name.startswith("environment"):
                    raise worker_error(name, error) from error
                failures.setdefault(self._number(name), reason(error))
            if failures:
                self._abort()
        if silent is not None and not failures:
            raise silent
        return failures

    @staticmethod
    def _number(name: str) -> int:
        if not name.startswith("environment"):
            raise WorkerLost(f"the {name} does not answer", code="WORKER", remedy=REMEDY)
        return int(name.rsplit(" ", 1)[1])

    def _abort(self) -> None:
        for bell in (*self.policy_bells, *self.environment_bells):
            bell.ring(*ABORT)

    def _replace(self, failures: dict[int, str]) -> None:
        for index, why in sorted(failures.items()):
            name = f"environment worker {index}"
            print(f"{name} (process {self.processes[name]}) is restarted: {why}", flush=True)
            end(self.environments[index], self.processes[name])
            self.status.turn(name, Doing.STARTING)
            self.environments[index] = self.start_environment(index)
            self.set_up({name: self.environments[index]})
        for bell in (*self.policy_bells, *self.environment_bells):
            bell.drain()
        # All begin fresh episodes, after those that they had begun.
        self.begun = [c + self.shape.decisions + 1 for c in self.begun]
        self.fresh = True
