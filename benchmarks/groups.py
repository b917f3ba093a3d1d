"""What early exit and the filter of groups save: `python benchmarks/groups.py --out groups.json`.

Rollouts of GRPO on the tabletop with a policy that succeeds now and then, in two ways, with the same scenes: episodes
end by success, and their slots take others or rest; or they go on to their time limit, as where every episode has a
fixed number of steps. Counted are the processor's seconds of the policy's and the environments' processes, and the
decisions. Then the same update is done on the groups that teach something, and on all.
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from training.algorithms.grpo import GRPOConfig
from training.envs import tabletop
from training.envs.base import EpisodeRequest, StepResult
from training.pipeline.actors import ray_session
from training.pipeline.groups import Groups
from training.pipeline.placement import PlacementConfig
from training.workers.learner import Learner
from vla.results import commit, machine, write_json

SETTINGS: dict[str, Any] = {"image_size": 64, "chunk": 8, "reward": "dense"}
PLACEMENT = PlacementConfig(environment_workers=1, policy_threads=1, learners=1, deadline_s=600)


class Lasting:
    """An environment whose episodes go on after their success, up to their time limit."""

    def __init__(self, inner: tabletop.Tabletop):
        self.inner = inner
        self.succeeded = np.zeros(inner.num_envs, bool)
        self.steps = np.zeros(inner.num_envs, np.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def reset(self, index: int, request: EpisodeRequest) -> None:
        self.inner.reset(index, request)
        self.succeeded[index], self.steps[index] = False, 0

    def step(self, indices: Sequence[int], actions: np.ndarray) -> StepResult:
        chosen = np.asarray(indices)
        parts = []
        for column in range(actions.shape[1]):  # one by one: a chunk would stop at the success
            parts.append(self.inner.step(indices, actions[:, column : column + 1]))
            self.succeeded[chosen] |= parts[-1].success
            for index in indices:
                self.inner.slots[index].success = False  # it would rest from now on
        self.steps[chosen] += actions.shape[1]
        rewards, executed, states = (
            np.concatenate([getattr(part, name) for part in parts], 1)
            for name in ("rewards", "executed", "critic_states")
        )
        over = self.steps[chosen] >= self.inner.max_steps
        return StepResult(
            rewards, executed, np.zeros_like(over), over, self.succeeded[chosen].copy(), states
        )  # fmt: skip


def lasting(num_envs: int, **settings: Any) -> Any:
    return Lasting(tabletop.make(num_envs, **settings))


def roll_out(
    checkpoint: Path, environment: str, variant: str, algorithm: GRPOConfig, slots: int, rows: int, rounds: int
) -> dict[str, Any]:
    """Processor seconds and decisions of a few rounds, and what the learner makes of the last one."""
    with tempfile.TemporaryDirectory() as folder:
        made = Groups(
            checkpoint, Path(folder), environment, SETTINGS, variant, slots, rows, algorithm, PLACEMENT, 0, 100,
        )  # fmt: skip
        try:
            made.count = algorithm.groups
            made.rollout(0)  # the first one is slower
            spent: dict[str, list[float]] = {"policy": [], "environments": []}
            decisions, episodes, successes = 0, 0, 0
            for number in range(1, rounds + 1):
                before = cpu(made)
                log = made.rollout(number).episodes[0]
                for name, seconds in cpu(made).items():
                    spent[name].append(seconds - before[name])
                decisions += int((made.block["episodes"] > 0).sum())
                episodes, successes = episodes + len(log.successes), successes + sum(log.successes)
            if not 0 < successes < episodes:
                raise SystemExit(f"{successes} of {episodes} succeed: no group teaches, choose another --variant")
            found = {"cpu_s": spent, "decisions": decisions, "episodes": episodes, "success": successes / episodes}
            return found | {"update": update(made, algorithm)}
        finally:
            made.close()


def cpu(made: Groups) -> dict[str, float]:
    """Seconds of the processor so far."""
    names = {"policy": "policy worker 0", "environments": "environment worker 0"}
    return {k: sum(psutil.Process(made.processes[name]).cpu_times()[:2]) for k, name in names.items()}


def update(made: Groups, algorithm: GRPOConfig) -> dict[str, Any]:
    """Processor seconds of updates on the groups that teach something and on all, in turns."""
    seconds: dict[str, list[float]] = {"filtered": [], "all": []}
    samples = {}
    options = made.learner_options
    learners = {
        name: Learner(0, replace(options, config=replace(algorithm, filter_groups=name == "filtered")), "cpu",
                      made.shape, made.name)
        for name in seconds
    }  # fmt: skip
    torch.set_num_threads(1)
    for turn in range(4):
        for name, learner in learners.items():
            began = time.process_time()
            metrics = learner.update(turn).metrics
            if turn:
                seconds[name].append(time.process_time() - began)
            samples[name] = metrics["samples"]
    return {"cpu_s": seconds, "samples": samples}


def saved(part: Sequence[float], whole: Sequence[float]) -> float:
    """Share of the median."""
    return 1 - statistics.median(part) / statistics.median(whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/put_on_plate"))
    parser.add_argument("--variant", default="unseen_receptacle", help="one in which the policy succeeds now and then")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    algorithm = GRPOConfig(
        group_size=arguments.group_size, groups=arguments.groups, reward="success", perception_steps=0, epochs=1,
        minibatches=2, length_normalization=True,
    )  # fmt: skip
    rows = -(-arguments.groups * arguments.group_size // arguments.slots) * 10
    with ray_session():
        given = arguments.variant, algorithm, arguments.slots, rows, arguments.rounds
        early, late = (
            roll_out(arguments.checkpoint, environment, *given)
            for environment in ("tabletop", "benchmarks.groups:lasting")
        )
    result = {
        "policy_saved": saved(early["cpu_s"]["policy"], late["cpu_s"]["policy"]),
        "environments_saved": saved(early["cpu_s"]["environments"], late["cpu_s"]["environments"]),
        "decisions_saved": 1 - early["decisions"] / late["decisions"],
        "learner_saved": saved(early["update"]["cpu_s"]["filtered"], early["update"]["cpu_s"]["all"]),
        "samples_saved": 1 - early["update"]["samples"]["filtered"] / early["update"]["samples"]["all"],
        "early_exit": early,
        "to_the_limit": late,
    }
    print(
        f"early exit at {early['success']:.0%} success: {result['policy_saved']:.0%} of the policy's time, "
        f"{result['environments_saved']:.0%} of the environments' ({result['decisions_saved']:.0%} of the decisions)\n"
        f"filter: {result['learner_saved']:.0%} of the learner's time ({result['samples_saved']:.0%} of the samples)"
    )
    if arguments.out is not None:
        told = {"command": shlex.join(["python", *sys.argv]), "commit": commit(), "machine": machine("torch", "mujoco")}
        sizes = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "out"}
        write_json(arguments.out, {**told, **sizes, **result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
