"""What several modules of tests share: a simulator, episodes of the scripted expert in it, runs of `vla train`."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.envs.base import EpisodeRequest
from training.envs.tabletop import Tabletop
from vla.tasks.expert import Expert
from vla.tasks.put_on_plate import MAX_STEPS, Episode
from vla.types import Observation

# `point_env` has to be importable here, in processes that tests start, and in Ray's workers.
FOLDER = str(Path(__file__).parent)
sys.path.insert(0, FOLDER)
os.environ["PYTHONPATH"] = os.pathsep.join([FOLDER, *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass(frozen=True)
class Record:
    """An episode of the expert: actions `[T, 7]`, rewards `[T]`, an observation every few steps, its end."""

    actions: np.ndarray
    rewards: np.ndarray
    seen: list[Observation]
    success: bool
    truncated: bool

    def fingerprint(self) -> bytes:
        """Every bit of images, states, rewards and actions."""
        parts = [self.actions, self.rewards]
        for observation in self.seen:
            parts += [*observation.images.values(), *observation.state.values()]
        return b"".join(part.tobytes() for part in parts) + str([o.stamps for o in self.seen]).encode()


Play = Callable[..., Record]


@pytest.fixture(scope="module")
def env() -> Iterator[Tabletop]:
    tabletop = Tabletop(2)
    yield tabletop
    tabletop.close()


@pytest.fixture(scope="session")
def play_expert() -> Play:
    """play_expert(env, index, EpisodeRequest or Episode, every=steps between observations, 0 for none)."""

    def play(env: Tabletop, index: int, what: EpisodeRequest | Episode, every: int = 0) -> Record:
        if isinstance(what, Episode):
            env.lay_out(index, what)
        else:
            env.reset(index, what)
        expert = Expert(env.config.max_translation, env.config.max_rotation)
        actions, rewards, seen = [], [], []
        for t in range(MAX_STEPS):
            if every and t % every == 0:
                seen += env.observe([index])
            actions.append(expert.act(env.expert_view(index)))
            result = env.step([index], actions[-1][None, None])
            rewards.append(result.rewards[0, 0])
            if result.terminated[0] or result.truncated[0]:
                break
        if every:
            seen += env.observe([index])
        ends = bool(result.success[0]), bool(result.truncated[0])
        return Record(np.array(actions), np.array(rewards), seen, *ends)

    return play


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose outputs are the same whatever else is in the batch: all tokens alike, all values 0.

    A matrix product's last bits depend on the size of the batch, and stages and hosts change that size.
    """
    from point_env import untrained
    from torch import nn

    folder = tmp_path_factory.mktemp("policy")
    policy = untrained(folder / "random")
    nn.init.zeros_(policy.model.action_head.weight)
    for parameter in policy.model.value_head.parameters():
        nn.init.zeros_(parameter)
    policy.save(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """start(*options): a `vla train` from the `checkpoint` of the module, killed after the test."""
    from train_run import Run

    runs = []

    def begin(*options: str, **environment: str) -> Run:
        runs.append(Run(tmp_path / "run", f"checkpoint={checkpoint}", *options, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()
