"""The ablations that are there: they compose, differ in what they are about, and run with a tiny model."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from point_env import MAX_STEPS, untrained

from training.algorithms.base import ActorCritic
from training.algorithms.groups import Grouped
from training.comparison.runs import flat
from training.pipeline.block import RolloutBlock, unlink
from training.pipeline.placement import PlacementConfig, plan
from training.pipeline.weights import WeightsBlock
from training.sweep import SweepConfig, runs
from training.train import TrainConfig, _start
from training.workers.environment import EnvironmentOptions, EnvironmentWorker
from training.workers.groups import GroupWorker, Order
from training.workers.learner import Learner, LearnerOptions, Update
from training.workers.policy import PolicyOptions, PolicyWorker
from vla import configuration, options

pytestmark = pytest.mark.timeout(600)  # on a busy machine

ABLATIONS = {  # name -> the options in which its variants differ
    "ppo_vs_grpo": set(),  # all of an algorithm
    "value_level": {"values", "algorithm.gamma", "algorithm.lam"},
    "ratio_level": {"algorithm.ratio"},
    "group_filter": {"algorithm.filter_groups", "algorithm.refills"},
    "masks_and_normalization":
        {"algorithm.length_normalization", "algorithm.divide_by_std", "algorithm.normalize_advantages"},
    "lora_vs_full": {"lora.rank", "lora.modules_to_save", "algorithm.learning_rate"},
    "learning_rate": {"algorithm.learning_rate"},
    "auxiliary_phase": {"algorithm.learning_rate", "algorithm.perception_steps", "algorithm.train_vision"},
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


def iterate(config: TrainConfig, checkpoint: Path, folder: Path) -> tuple[int, Update]:
    """An iteration as the engine has it, with the real workers as threads of this process; values of the head."""
    a, slots, name = config.algorithm, config.slots, f"simreal_ablation_{time.time_ns()}"
    env = config.env.name, config.env.settings
    found = plan(checkpoint, *env, slots, config.decisions, a, config.placement, config.lora)
    given = str(checkpoint), found.weights, f"{name}_weights"
    block, weights = RolloutBlock(found.shape, name, create=True), WeightsBlock(*given[1:], create=True)
    try:
        kind = GroupWorker if a.groups else EnvironmentWorker
        options = EnvironmentOptions(*env, "in_distribution", (0, slots), 1, 3, 60.0, a.reward_form(),
                                     group_size=a.group_size)  # fmt: skip
        worker: Any = kind(0, options, found.codec, found.shape, name, str(folder))
        policy = PolicyWorker(
            0, PolicyOptions(*given, a.temperature, 3, 1, 60.0, config.lora), "cpu", found.shape, name, str(folder),
            {0: [list(range(slots))]}, 0, whole=bool(a.groups),
        )  # fmt: skip
        learns = LearnerOptions(1, *given, a, 3, 1, 1, "", adapters=config.lora)
        learner = Learner(0, learns, "cpu", found.shape, name)
        block.clear()
        with ThreadPoolExecutor(1) as thread:
            begin: Any = Order(list(range(a.groups)), 0) if a.groups else np.zeros(slots, np.int64)
            log = thread.submit(worker.play if a.groups else worker.rollout, begin)
            policy.rollout(0, None, 0)
            assert log.result(60).successes
        if a.groups:
            learner.judge(0)
        return found.shape.values, learner.update(0)
    finally:
        for part in (block, weights):
            part.close()
            unlink(part.name)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_completes_an_iteration_in_small(name: str, checkpoint: Path, tmp_path: Path) -> None:
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
        values, update = iterate(config, _start(config, tmp_path / key.replace("/", "_")), config.out)
        assert update.metrics["updates"] > 0 and update.metrics["grad_norm"] > 0, key
        assert values == (2 if name == "value_level" and key == "action/seed_0" else 1)
