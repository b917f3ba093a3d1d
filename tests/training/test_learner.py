"""The learner's own parts: the memory of frames, the auxiliary phase, what a saved state brings back."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from point_env import MODEL, STEP, point_contract

from training.algorithms.ppo import PPOConfig
from training.pipeline.block import RolloutBlock, RolloutShape, unlink
from training.pipeline.weights import WeightsBlock, WeightsLayout
from training.workers.learner import Learner, LearnerOptions
from training.workers.memory import Memory
from vla.lora import FULL
from vla.policy import Policy
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer

SHAPE = RolloutShape(4, 6, (1, 16, 16, 3), 3, 8, chunk=2, action_dim=4, values=1, privileged=6, critic=2)


def test_memory_keeps_the_last_frames_and_copies_them() -> None:
    memory = Memory(5)
    rows = {"images": torch.zeros(3, 1, 2, 2, 3, dtype=torch.uint8), "state": torch.zeros(3, 1),
            "tokens": torch.zeros(3, 4, dtype=torch.int64), "privileged": torch.zeros(3, 2)}  # fmt: skip
    for first in (0, 3, 6):
        rows["state"][:, 0] = torch.arange(first, first + 3)
        memory.add(rows)
        assert memory.count == min(5, first + 3)
    drawn = memory.sample(400, torch.Generator().manual_seed(0))
    assert set(drawn["state"][:, 0].tolist()) == {4.0, 5.0, 6.0, 7.0, 8.0}
    assert drawn["images"].dtype == torch.uint8 and drawn["tokens"].shape == (400, 4)


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[[PPOConfig], Learner]]:
    """A learner on a block of made-up episodes, in which the privileged target depends on the image's brightness."""
    statistics = Statistics(
        ArrayStatistics.from_bounds([-STEP] * 3 + [0.0], [STEP] * 3 + [1.0]),
        ArrayStatistics.from_bounds([-1.0] * 3, [1.0] * 3),
    )
    model = {**MODEL, "chunk": 2, "values": 1, "auxiliary": 2, "pointing": 2}
    model["vision"] = {**MODEL["vision"], "cells": False}
    words = train_tokenizer(["go"], 512, 8)
    policy = Policy.untrained(model, point_contract(), statistics, words, seed=1)
    policy.save(tmp_path / "checkpoint")
    layout = WeightsLayout.of(policy.model, FULL)
    weights = WeightsBlock(layout, f"simreal_weights_{tmp_path.name}_{time.time_ns()}", create=True)
    block = RolloutBlock(SHAPE, f"simreal_learner_{tmp_path.name}_{time.time_ns()}", create=True)
    random = np.random.default_rng(0)
    block["images"][:] = random.integers(0, 256, block["images"].shape)
    block["tokens"][..., -1] = 5
    block["privileged"][:] = 0.7
    block["privileged"][..., 0] = np.nan
    block["action_tokens"][:] = random.integers(0, 8, block["action_tokens"].shape)
    block["log_probs"][:] = np.log(1 / 8)
    block["executed"][:] = True
    block["critic_states"][:] = random.normal(size=block["critic_states"].shape)
    block["rewards"][:] = block["critic_states"][:-1, :, :, 0]

    def make(config: PPOConfig) -> Learner:
        options = LearnerOptions(1, str(tmp_path / "checkpoint"), layout, weights.name, config, 0, 10, 1, "")
        return Learner(0, options, SHAPE, block.name)

    yield make
    block.close()
    weights.close()
    unlink(block.name)
    unlink(weights.name)


CONFIG = PPOConfig(
    critic="privileged", critic_iterations=1, minibatches=2, perception_steps=5, perception_batch=8,
    perception_learning_rate=1e-2, value_learning_rate=3e-3, gamma=0.0,
)  # fmt: skip


def test_parts_of_an_update_change_what_they_train(build: Callable[[PPOConfig], Learner]) -> None:
    learner = build(CONFIG)
    seeing = {name for name, p in learner.policy.model.named_parameters() if any(p is q for q in learner.seeing)}
    assert any("heatmaps" in name for name in seeing) and any("locator" in name for name in seeing)
    assert not any("_token" in name or "language_model" in name for name in seeing)

    def changed(iteration: int) -> set[str]:
        before = {k: v.clone() for k, v in learner.policy.model.named_parameters()}
        learner.update(iteration)
        return {k for k, v in learner.policy.model.named_parameters() if not torch.equal(v, before[k])}

    assert changed(0) == seeing, "the critic's iterations leave the policy alone, but not its eyes"
    later = changed(1)
    assert "action_head.weight" in later and not any(name.startswith("value_head") for name in later)
    frozen = build(PPOConfig(critic="head", critic_iterations=1, minibatches=2, perception_steps=0))
    before = {k: v.clone() for k, v in frozen.policy.model.named_parameters()}
    frozen.update(0)
    moved = {k for k, v in frozen.policy.model.named_parameters() if not torch.equal(v, before[k])}
    assert moved and all(name.startswith("value_head") for name in moved)


def test_without_train_vision_the_passes_leave_the_eyes_alone(build: Callable[[PPOConfig], Learner]) -> None:
    learner = build(replace(CONFIG, train_vision=False, perception_steps=0, weight_decay=0.5))
    before = {k: v.clone() for k, v in learner.policy.model.named_parameters()}
    learner.update(1)
    moved = {k for k, v in learner.policy.model.named_parameters() if not torch.equal(v, before[k])}
    assert {"action_head.weight", "projector.0.weight", "proprio_projector.0.weight"} <= moved
    assert not any(name.startswith(("vision_backbone", "locator", "value_head")) for name in moved)


def test_critic_and_eyes_learn(build: Callable[[PPOConfig], Learner]) -> None:
    learner = build(CONFIG)
    first = learner.update(0).metrics
    for _ in range(8):
        last = learner.update(0).metrics
    assert last["explained_variance"] > 0.5 > first["explained_variance"]
    assert last["privileged_loss"] < 0.5 * first["privileged_loss"]


def test_a_saved_state_brings_all_optimizers_back(build: Callable[[PPOConfig], Learner], tmp_path: Path) -> None:
    learner = build(CONFIG)
    for iteration in (0, 1):
        learner.update(iteration)
    learner.save(str(tmp_path))
    other = build(CONFIG)
    other.restore(str(tmp_path), 2)
    for made in (learner, other):
        made.memory = Memory(100)  # frames are not saved: both begin without
        made.update(2)
    for a, b in ((learner.policy.model, other.policy.model), (learner.critic, other.critic)):
        assert a is not None and b is not None
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
