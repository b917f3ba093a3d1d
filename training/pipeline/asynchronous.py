"""The asynchronous schedule: lanes, policy workers and learners go on side by side, within a bound of staleness."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from training.pipeline.actors import LOOK_S, UPDATE_DEADLINE_S, actor, collect, end, reason, silence
from training.pipeline.block import unlink
from training.pipeline.board import Board
from training.pipeline.dispatcher import Dispatcher
from training.pipeline.engine import RESTARTS, START_S, Engine, PolicyLog, Rollout
from training.pipeline.placement import EngineError
from training.pipeline.status import Clock, Doing
from training.workers.batching import BatchingPolicy
from training.workers.group_lanes import GroupLaneWorker
from training.workers.lanes import LaneOptions, LaneWorker
from training.workers.learner import Update
from training.workers.streaming import StreamingLearner


class Asynchronous(Engine):
    """Environment and policy workers serve without end; an iteration is an update of the learners."""

    def prepare(self) -> None:
        self.bells, self.node = self.hosts.here.folder, self.hosts.first_learner.node.id  # there is no other host
        where = self.placement
        self.board = Board(where.all_lanes, self.slots, f"{self.name}_board", create=True)
        self.dispatcher = Dispatcher(
            self.block, self.board, self.status, self.bells, len(self.crew.learners), where.update_fragments,
            where.staleness, self.algorithm,
        )
        # A policy that hangs is found after deadline_s, and the lanes wait until another is there.
        self.options = LaneOptions(
            self.environment, self.settings, self.variant, self.seed, where.staleness,
            deadline_s=2 * where.deadline_s + START_S, throttle_s=UPDATE_DEADLINE_S, form=self.algorithm.reward_form(),
            group_size=self.algorithm.group_size,
        )  # fmt: skip
        self.serving: dict[Any, str] = {}  # calls that don't end unless their worker fails -> its name
        self.failed = 0  # workers since the last update
        self.reported = Clock(self.status)
        self.served = {  # policy worker -> its lanes
            policy: [
                lane for i in range(where.environment_workers) if self.crew.policy_of(i) == policy
                for lane in self._lanes(i)
            ]
            for policy in range(len(self.crew.policies))
        }  # fmt: skip
        self.before = {"forwards": 0, "decided": 0}

    def rows_of(self, name: str) -> list[str]:
        if not name.startswith("environment"):
            return [name]
        return [f"lane {lane}" for lane in self._lanes(int(name.rsplit(" ", 1)[1]))]

    def start_environment(self, index: int) -> Any:
        kind = GroupLaneWorker if self.algorithm.groups else LaneWorker
        make: Any = actor(kind, 1, self.crew.environments[index].gpu, self.node)
        lanes = self._lanes(index)
        generation = self.dispatcher.generations[lanes[0]]
        options = replace(self.options, policy=self.crew.policy_of(index))
        return make.remote(
            lanes, generation, options, self.codec, self.shape, self.name, self.board.lanes, str(self.bells)
        )

    def start_policy(self, index: int) -> Any:
        make: Any = actor(BatchingPolicy, self.placement.policy_threads, None, self.node)
        where = self.placement
        return make.remote(
            index, self.policy_options, self.crew.policies[index].device, self.shape, self.name, self.served[index],
            self.board.lanes, str(self.bells), where.batch_max, where.batch_wait_ms / 1000, UPDATE_DEADLINE_S,
            bool(self.algorithm.groups),
        )  # fmt: skip

    def start_learner(self, rank: int) -> Any:
        make: Any = actor(StreamingLearner, self.placement.learner_threads, None, self.node)
        return make.remote(
            rank, self.learner_options, self.crew.learners[rank].device, self.shape, self.name, str(self.bells),
            self.placement.update_fragments, UPDATE_DEADLINE_S,
        )  # fmt: skip

    def counters(self) -> np.ndarray:
        return self.board["begun"].copy()

    def resume(self, iteration: int, counters: np.ndarray) -> None:
        self.board["begun"][:] = counters

    def iterate(self, iteration: int) -> tuple[Rollout, Update]:
        """One update; lanes and policy workers go on before, meanwhile and after."""
        if not self.serving:
            self._open(iteration)
        futures = {w.update.remote(iteration): f"learner {i}" for i, w in enumerate(self.learners)}
        waiting = list(futures)
        self.row.turn_to(Doing.LEARNING, iteration)
        with self.patience.measuring(self.kind(iteration)) as seconds:
            end, check = time.monotonic() + UPDATE_DEADLINE_S, self.watch_learners(seconds)
            while waiting:
                check()
                if time.monotonic() > end:
                    raise silence([futures[future] for future in waiting], UPDATE_DEADLINE_S)
                self.dispatcher.check()
                done, rest = ray.wait([*waiting, *self.serving], num_returns=1, timeout=LOOK_S)
                waiting = [future for future in waiting if future in rest]
                if any(future in futures and _failed(future) for future in done):
                    break
                self._mend([future for future in done if future in self.serving])
            updates: list[Update] = collect({name: future for future, name in futures.items()})
        self.row.turn_to(Doing.IDLE)
        self.dispatcher.release(iteration)
        for name, why in self.leaking().items():
            self._replace(name, why)
        self.failed = 0
        return self._report(iteration), updates[0]

    def close(self) -> None:
        self.dispatcher.stop()
        super().close()
        self.board.close()
        unlink(f"{self.name}_board")

    def _lanes(self, index: int) -> list[int]:
        return list(range(index * self.placement.lanes, (index + 1) * self.placement.lanes))

    def _open(self, iteration: int) -> None:
        """Begin to roll out, for this update and those after it."""
        self.board.forget(range(self.board.lanes))
        self.reported.lap()
        self.dispatcher.start(iteration)
        self.serving = {w.serve.remote(): f"environment worker {i}" for i, w in self.environments.items()}
        self.serving |= {w.serve.remote(): f"policy worker {i}" for i, w in self.policies.items()}

    def _mend(self, ended: list[Any]) -> None:
        """Replace workers whose calls have ended, and those that are stuck. Policies come first: others need them."""
        failures: dict[str, str] = {}
        for future in ended:
            failures[self.serving[future]] = _failed(future) or "it stopped"
        patience = self.placement.deadline_s
        for index in range(self.placement.environment_workers):
            stuck = [lane for lane in self._lanes(index) if self.status.stuck(f"lane {lane}", patience)]
            if stuck:
                what = f"lane {', '.join(map(str, stuck))} has not finished a step for {patience:g} s"
                failures.setdefault(f"environment worker {index}", what)
        for index, lanes in self.served.items():
            name = f"policy worker {index}"
            if self.status.still(name, patience) and self.board.unheard(lanes, patience):
                failures.setdefault(name, f"it has not decided for {patience:g} s")
        for name, why in sorted(failures.items(), reverse=True):
            self.failed += 1
            if self.failed > RESTARTS:
                raise EngineError(
                    f"workers failed {self.failed} times in an iteration, at last the {name}: {why}", code="WORKER",
                    remedy="Run `vla eval` or the environment alone to see its error; the last checkpoint is kept.",
                )  # fmt: skip
            self._replace(name, why)

    def _replace(self, name: str, why: str) -> None:
        print(f"{name} (process {self.processes[name]}) is restarted: {why}", flush=True)
        self.serving = {future: who for future, who in self.serving.items() if who != name}
        kind, number = name.rsplit(" ", 1)
        if kind == "policy worker":
            self._replace_policy(int(number))
        else:
            self._replace_environment(int(number))

    def _replace_policy(self, index: int) -> None:
        """What lanes have asked of the one before stands on the board, and the last weights in their block."""
        name = f"policy worker {index}"
        end(self.policies[index], self.processes[name])
        self.status.turn(name, Doing.STARTING)
        self.policies[index] = self.start_policy(index)
        self.set_up({name: self.policies[index]})
        self.serving[self.policies[index].serve.remote()] = name

    def _replace_environment(self, index: int) -> None:
        """Its fragments are begun anew by whoever is next; the other lanes go on."""
        name, lanes = f"environment worker {index}", self._lanes(index)
        end(self.environments[index], self.processes[name])
        lost = self.dispatcher.discard(lanes)
        self.board.forget(lanes)
        for row in self.rows_of(name):
            self.status.turn(row, Doing.STARTING)
        policy = self.crew.policy_of(index)
        forwards = int(self.board["forwards"][policy])
        self.environments[index] = self.start_environment(index)
        self.set_up({name: self.environments[index]})
        # Its policy worker may still have been deciding for them.
        self._wait_until(lambda: self.board["forwards"][policy] > forwards or self._rests(policy))
        self.dispatcher.reclaim(lost)
        self.serving[self.environments[index].serve.remote()] = name

    def _rests(self, policy: int) -> bool:
        return int(self.status["doing"][self.status.rows.index(f"policy worker {policy}")]) == Doing.GATHERING

    def _wait_until(self, what: Callable[[], Any]) -> None:
        """At most until a policy worker that decides for so long would be replaced."""
        end = time.monotonic() + self.placement.deadline_s
        while not what() and time.monotonic() < end:
            time.sleep(0.01)

    def _report(self, iteration: int) -> Rollout:
        """Episodes of the fragments of this update, and times since the last report."""
        now = {key: int(self.board[key].sum()) for key in self.before}
        forwards, decided = (now[key] - self.before[key] for key in ("forwards", "decided"))
        self.before = now
        seconds, took_s = self.reported.lap()
        rows = self.status.rows
        lanes = seconds[: self.board.lanes]
        policy = seconds[[rows.index(f"policy worker {i}") for i in self.policies]].mean(0)
        learners = seconds[[rows.index(f"learner {i}") for i in range(len(self.learners))]]
        traffic = self.dispatcher.read(iteration)
        log = traffic.episodes
        log.step_s = float(lanes[:, Doing.STEPPING].mean())
        log.wait_s = float(lanes[:, Doing.ASKING].mean())
        measures = {
            "rollout/dropped_fragments": float(traffic.dropped),
            "rollout/batch_mean": decided / max(1, forwards),
            "time/env_throttled_s": float(lanes[:, Doing.THROTTLED].mean()),
            "time/policy_load_s": float(policy[Doing.LOADING]),
            "time/learner_wait_s": float(learners[:, Doing.AWAITING].mean()),
        }
        if self.algorithm.groups:
            measures |= {"rollout/groups": float(traffic.groups), "rollout/groups_kept": float(traffic.kept)}
        log_of_policy = PolicyLog(float(policy[Doing.DECIDING]), float(policy[Doing.GATHERING]), forwards)
        return Rollout([log], log_of_policy, took_s, measures)


def _failed(future: Any) -> str:
    """Why a call that has ended failed, in words; nothing if it did not."""
    try:
        ray.get(future)
    except ray.exceptions.RayError as error:
        return reason(error)
    return ""
