"""Stand-ins: they take the time they are told, and are trained through the engine in every schedule."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stand_in_runs import Side, iterate
from stand_ins import StandInEnv

from training.envs.base import EpisodeRequest
from training.pipeline.actors import ray_session
from training.pipeline.scenarios import (
    BatchedEnvironments,
    Inference,
    Learner,
    Scenario,
    Schedule,
    SeparateEnvironments,
    colocated,
    disaggregated,
    hybrid,
    pipelined,
)

BATCHED = Scenario(
    environments=8, decisions=4, environment=BatchedEnvironments(0.01, 0.02), inference=Inference(0.01, 0.001),
    learner=Learner(0.01, shared_speed=0.5), hands_s=0.05,
)  # fmt: skip
SEPARATE = Scenario(
    environments=8, decisions=4, environment=SeparateEnvironments(0.01, 1.0, reset_s=0.05, reset_every=4),
    inference=Inference(0.01, 0.001), learner=Learner(0.01),
)  # fmt: skip
STREAM = Schedule("asynchronous", 1, "dynamic", fragment=2, microbatch=4, staleness=1)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session():
        yield


def play(env: StandInEnv, indices: list[int]) -> tuple[float, np.ndarray]:
    """Seconds of a step, and which episodes ended."""
    began = time.monotonic()
    result = env.step(indices, np.zeros((len(indices), 1, 4)))
    return time.monotonic() - began, result.terminated


def begin(env: StandInEnv, episode: int) -> None:
    for index in range(env.num_envs):
        env.reset(index, EpisodeRequest(episode))


def test_an_environment_waits_from_its_second_episode_on() -> None:
    env = StandInEnv(4, BatchedEnvironments(0.1, 0.4), environments=8, length=2)
    begin(env, 0)
    assert not play(env, [0, 1])[1].any() and play(env, [0, 1])[1].all()
    assert env._seconds([0, 1]) == []
    begin(env, 1)
    assert play(env, [0, 1])[0] >= 0.1 + 0.4 * 2 / 8
    assert env._seconds([2]) == [0.1 + 0.4 / 8]


def test_an_episode_takes_equally_long_whenever_it_is_played() -> None:
    env = StandInEnv(3, SeparateEnvironments(0.02, 1.0, reset_s=0.3, reset_every=2), environments=3, length=2)
    begin(env, 5)
    assert env._seconds([0, 1, 2]) == []
    drawn = []
    for _ in range(2):
        begin(env, 6)
        env.steps[:] = 1
        drawn.append(env._seconds([0, 1, 2]))
        env.steps[:] = 2
        assert min(env._seconds([0, 1, 2])) > 0.3
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "side",
    [
        pytest.param(Side(BATCHED, colocated(2), Schedule()), id="colocated sequential", marks=pytest.mark.slow),
        pytest.param(Side(BATCHED, hybrid(1, 1), pipelined(2)), id="hybrid pipelined"),
        pytest.param(Side(SEPARATE, disaggregated(0, 1, 1), STREAM), id="asynchronous", marks=pytest.mark.slow),
    ],
)
def test_they_are_trained_through_the_engine(side: Side, session: None, tmp_path: Path) -> None:
    with side.engine(tmp_path) as engine:
        _, warm_up = engine.iterate(0)
        assert warm_up.metrics["updates"] == 1 and warm_up.metrics["grad_norm"] > 0
        seconds = iterate(engine, 1)
    if not side.streams:
        assert seconds >= side.predicted()
