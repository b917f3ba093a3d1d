"""The ablations that are there: they compose, differ in what they are about, and run with a tiny model."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from point_env import MAX_STEPS, untrained

from training.algorithms.base import ActorCritic
from training.algorithms.groups import Grouped
from training.comparison.runs import flat
from training.pipeline.actors import ray_session
from training.pipeline.crew import Node
from training.pipeline.placement import PlacementConfig
from training.sweep import SweepConfig, runs
from training.train import _engine, _start
from vla import configuration, options

pytestmark = pytest.mark.timeout(600)  # runs of several processes, on a busy machine

ABLATIONS = {  # name -> the options in which its variants differ
    "ppo_vs_grpo": set(),  # all of an algorithm
    "value_level": {"values", "algorithm.gamma", "algorithm.lam"},
    "ratio_level": {"algorithm.ratio"},
    "group_filter": {"algorithm.filter_groups", "algorithm.refills"},
    "masks_and_normalization":
        {"algorithm.length_normalization", "algorithm.divide_by_std", "algorithm.normalize_advantages"},
    "lora_vs_full": {"lora.rank", "algorithm.learning_rate"},
    "learning_rate": {"algorithm.learning_rate"},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    untrained(folder)
    return folder


def ablation(name: str, *words: str) -> SweepConfig:
    return configuration.load(SweepConfig, "sweep", [f"experiment=ablation/{name}", "out=x", *words])


def test_every_ablation_is_here() -> None:
    folder = configuration.config_folder() / "experiment" / "ablation"
    assert {file.stem for file in folder.glob("*.yaml")} == set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_composes_and_its_variants_differ_in_what_it_is_about(name: str) -> None:
    config = ablation(name, "checkpoint=bundle", "iterations=2", "options=slots=16 placement.learners=1")
    found = runs(config)
    assert len(found) == 3 * len(config.variants) and len(config.variants) > 1
    first = [run for key, run in found.items() if key.endswith("seed_0")]
    assert {str(run.checkpoint) for run in first} == {"bundle"}
    assert {(run.iterations, run.slots, run.env.name) for run in first} == {(2, 16, "tabletop")}
    assert {run.placement.learners for run in first} == {1}
    told = [flat({k: v for k, v in options.write(run).items() if k not in ("out", "placement")}) for run in first]
    differing = {key for one in told for key in one if any(one[key] != other.get(key) for other in told)}
    if name == "ppo_vs_grpo":
        assert differing >= {"algorithm._target_", "algorithm.critic"}
        assert {key for key in differing if not key.startswith("algorithm.")} == {"decisions"}, "whole episodes"
    else:
        assert differing == ABLATIONS[name]
    whole = next(iter(runs(ablation(name, "checkpoint=bundle")).values()))
    assert (whole.iterations, whole.slots) == (25, 32)


@pytest.fixture(scope="module")
def session() -> Iterator[list[Node]]:
    with ray_session() as nodes:
        yield nodes


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_completes_an_iteration_in_small(
    name: str, checkpoint: Path, session: list[Node], tmp_path: Path
) -> None:
    """Its own algorithm and options with a tiny model in the point environment, whose groups are smaller."""
    for key, config in runs(ablation(name, f"checkpoint={checkpoint}", "seeds=[0]")).items():
        algorithm: Any = replace(config.algorithm, perception_steps=0)  # the point tells nothing
        if isinstance(algorithm, Grouped):  # a random policy need not succeed now and then
            algorithm = replace(algorithm, group_size=4, groups=4, reward="environment")
        if isinstance(algorithm, ActorCritic):
            algorithm = replace(algorithm, critic_iterations=0)
        config = replace(
            config, out=tmp_path / key, slots=8, decisions=MAX_STEPS, algorithm=algorithm, iterations=1,
            env=replace(config.env, name="point_env:make", settings={"image_size": 16, "chunk": 2}),
            lora=replace(config.lora, rank=min(2, config.lora.rank)),
            placement=PlacementConfig(environment_workers=1, learners=1, policy_threads=1),
        )  # fmt: skip
        config.out.mkdir(parents=True)
        begin = _start(config, tmp_path / f"{config.out.parent.name}_start")
        engine = _engine(config, begin, session)
        try:
            _, update = engine.iterate(0)
            assert update.metrics["updates"] > 0 and update.metrics["grad_norm"] > 0, key
            values = engine.shape.values
        finally:
            engine.close()
        assert values == (2 if key.startswith("action/") and name == "value_level" else 1)
