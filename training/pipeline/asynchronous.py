"""The asynchronous schedule: lanes, policy workers and learners go on side by side, within a bound of staleness."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from training.pipeline.actors import LOOK_S, UPDATE_DEADLINE_S, actor, collect, reason, silence
from training.pipeline.block import unlink
from training.pipeline.board import Board
from training.pipeline.dispatcher import Dispatcher
from training.pipeline.engine import RESTARTS, START_S, Engine, PolicyLog, Rollout
from training.pipeline.hosts import Host
from training.pipeline.placement import EngineError
from training.pipeline.relay import Line, Sitting
from training.pipeline.status import Clock, Doing
from training.pipeline.watch import LaneWatch
from training.workers.batching import BatchingPolicy
from training.workers.group_lanes import GroupLaneWorker
from training.workers.lanes import LaneOptions, LaneWorker
from training.workers.learner import Update
from training.workers.streaming import StreamingLearner


class Asynchronous(Engine):
    """Environment and policy workers serve without end; an iteration is an update of the learners."""

    def prepare(self) -> None:
        where, here = self.placement, self.hosts.first_learner
        self.board = Board(where.all_lanes, self.slots, f"{self.name}_board", create=True)
        self.dispatcher = Dispatcher(
            self.block,
            self.board,
            self.status,
            Path(here.bells),
            len(self.crew.learners),
            where.update_fragments,
            where.staleness,
            self.algorithm,
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
        self.served: dict[int, list[int]] = {index: [] for index in range(len(self.crew.policies))}
        for index in range(where.environment_workers):
            self.served[self.crew.policy_of(index)] += self._lanes(index)
        self.watches = {node: self._watch(node, host) for node, host in self.hosts.alive.items()}
        self.before = {"forwards": 0, "decided": 0}

    def _watch(self, node: int, host: Host) -> LaneWatch | Line:
        """Of a host; where the dispatcher is not, a relay sits."""
        environments = {i: self._lanes(i) for i in self.crew.at(node, "environment worker")}
        policies = {i: self.served[i] for i in self.crew.at(node, "policy worker")}
        patience = self.placement.deadline_s
        if host.node.is_here:
            return LaneWatch(self.board, self.status, environments, policies, patience)
        rows = [row for name in self.names() if name in host.workers for row in self.rows_of(name)]
        sitting = Sitting(environments, policies, rows, slice(host.slots.start, host.slots.stop))
        line = Line(host, self.board.lanes, sitting, self.dispatcher, lambda: self.hosts.offers.get(node), patience)
        self.dispatcher.far |= dict.fromkeys(sitting.lanes, line)
        return line

    def board_of(self, name: str) -> Any:
        watch = self.watches[self._node_of(name)]
        return watch.status_board() if isinstance(watch, Line) else self.status

    def rows_of(self, name: str) -> list[str]:
        if not name.startswith("environment"):
            return [name]
        return [f"lane {lane}" for lane in self._lanes(int(name.rsplit(" ", 1)[1]))]

    def start_environment(self, index: int) -> Any:
        kind = GroupLaneWorker if self.algorithm.groups else LaneWorker
        place = self.crew.environments[index]
        host = self.hosts.of(place)
        make: Any = actor(kind, 1, place.gpu, host.node.id)
        lanes = self._lanes(index)
        generation = self.dispatcher.generations[lanes[0]]
        options = replace(self.options, policy=self.crew.policy_of(index))
        return make.remote(lanes, generation, options, self.codec, self.shape, host.block, self.board.lanes, host.bells)

    def start_policy(self, index: int) -> Any:
        place, where = self.crew.policies[index], self.placement
        host = self.hosts.of(place)
        make: Any = actor(BatchingPolicy, where.policy_threads, None, host.node.id)
        return make.remote(
            index, replace(self.policy_options, weights=host.weights), place.device, self.shape, host.block,
            self.served[index], self.board.lanes, host.bells, where.batch_max, where.batch_wait_ms / 1000,
            UPDATE_DEADLINE_S, bool(self.algorithm.groups),
        )  # fmt: skip

    def start_learner(self, rank: int) -> Any:
        place = self.crew.learners[rank]
        host = self.hosts.of(place)
        make: Any = actor(StreamingLearner, self.placement.learner_threads, None, host.node.id)
        return make.remote(
            rank, self.learner_options, place.device, self.shape, host.block, host.bells,
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
        self.hosts.share_weights()  # a fragment that is granted on another host from now on waits for them
        self.dispatcher.release(iteration)
        for name, why in self.leaking().items():
            self._replace(name, why)
        self.failed = 0
        return self._report(iteration), updates[0]

    def close(self) -> None:
        for watch in self.watches.values():
            if isinstance(watch, Line):
                watch.close()
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
        for watch in self.watches.values():
            if isinstance(watch, Line):
                watch.start(self.board["begun"])
        self.serving = {w.serve.remote(): f"environment worker {i}" for i, w in self.environments.items()}
        self.serving |= {w.serve.remote(): f"policy worker {i}" for i, w in self.policies.items()}

    def _mend(self, ended: list[Any]) -> None:
        """Replace workers whose calls have ended, and those that are stuck. Policies come first: others need them.

        Whoever was on a host that is lost is left out from now on.
        """
        failures = {self.serving[future]: _failed(future) or "it stopped" for future in ended}
        gone = self._lose(ask=not all(self.is_here(name) for name in failures))
        for watch in self.watches.values():
            failures = watch.stuck() | failures
        for name, why in sorted(failures.items(), reverse=True):
            if name in gone:
                continue
            self.failed += 1
            if self.failed > RESTARTS:
                raise EngineError(
                    f"workers failed {self.failed} times in an iteration, at last the {name}: {why}", code="WORKER",
                    remedy="Run `vla eval` or the environment alone to see its error; the last checkpoint is kept.",
                )  # fmt: skip
            gone |= self._replace(name, why)

    def _lose(self, ask: bool) -> set[str]:
        """Find hosts that are lost and go on without them: their workers. ask: hosts that have not been silent, too."""
        silent = {node: watch for node, watch in self.watches.items() if isinstance(watch, Line) and watch.lost}
        for watch in silent.values():
            print(f"node {watch.host.node.name}: {watch.lost}", flush=True)
        gone = self.hosts.give_up(list(silent)) | (self.hosts.lost() if ask else {})
        lanes = []
        for name in gone:
            kind, number = name.rsplit(" ", 1)
            if kind == "environment worker":
                lanes += self._lanes(int(number))
            (self.environments if kind == "environment worker" else self.policies).pop(int(number))
            self.processes.pop(name, None)
            for row in self.rows_of(name):
                self.status.turn(row, Doing.IDLE)
        self.serving = {future: who for future, who in self.serving.items() if who not in gone}
        self.dispatcher.reclaim(self.dispatcher.discard(lanes))  # nobody there writes to the fragments here
        for node in [node for node in self.watches if node not in self.hosts.alive]:
            line = self.watches.pop(node)
            assert isinstance(line, Line)
            line.cut()
        return set(gone)

    def _replace(self, name: str, why: str) -> set[str]:
        """Start a worker anew. If its host is lost meanwhile: all workers of that."""
        print(f"{name} (process {self.processes[name]}) is restarted: {why}", flush=True)
        self.serving = {future: who for future, who in self.serving.items() if who != name}
        kind, number = name.rsplit(" ", 1)
        try:
            if kind == "policy worker":
                self._replace_policy(int(number))
            else:
                self._replace_environment(int(number))
        except (EngineError, RayError):
            if self.is_here(name) or name not in (gone := self._lose(ask=True)):
                raise
            return gone
        return set()

    def _replace_policy(self, index: int) -> None:
        """What lanes have asked of the one before stands on the board, and the last weights in their block."""
        name = f"policy worker {index}"
        self._end(name, self.policies[index])
        self.policies[index] = self.start_policy(index)
        self.set_up({name: self.policies[index]})
        self.serving[self.policies[index].serve.remote()] = name

    def _replace_environment(self, index: int) -> None:
        """Its fragments are begun anew by whoever is next; the other lanes go on."""
        name, lanes = f"environment worker {index}", self._lanes(index)
        watch = self.watches[self._node_of(name)]
        lost = self.dispatcher.discard(lanes)
        try:
            self._end(name, self.environments[index])
            forwards = watch.forget(index)
            self.environments[index] = self.start_environment(index)
            self.set_up({name: self.environments[index]})
            watch.leave(index, forwards)
        finally:
            self.dispatcher.reclaim(lost)
        self.serving[self.environments[index].serve.remote()] = name

    def _end(self, name: str, worker: Any) -> None:
        """End a worker that another follows."""
        self.end(name, worker)
        watch = self.watches[self._node_of(name)]
        if isinstance(watch, Line):
            watch.end(self.processes[name])
        watch.starting(self.rows_of(name))

    def _node_of(self, name: str) -> int:
        kind, number = name.rsplit(" ", 1)
        return self.crew.everyone[kind][int(number)].node

    def _report(self, iteration: int) -> Rollout:
        """Episodes of the fragments of this update, and times since the last report."""
        now = {key: int(self.board[key].sum()) for key in self.before}
        forwards, decided = (now[key] - self.before[key] for key in ("forwards", "decided"))
        self.before = now
        seconds, took_s = self.reported.lap()
        rows = self.status.rows
        lanes = seconds[[lane for i in self.environments for lane in self._lanes(i)]]  # they have the first rows
        policy = seconds[[rows.index(f"policy worker {i}") for i in self.policies]].mean(0)
        learners = seconds[[rows.index(f"learner {i}") for i in range(len(self.learners))]]
        traffic = self.dispatcher.read(iteration)
        log = traffic.episodes
        log.step_s = float(lanes[:, Doing.STEPPING].mean())
        log.wait_s = float(lanes[:, Doing.ASKING].mean())
        measures = {
            "rollout/slots": float(self.hosts.slots),
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
