"""The learner's own parts: the memory of frames, the auxiliary phase, what a saved state brings back."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from point_env import MODEL, STEP, point_contract

from training.algorithms.ppo import PPOConfig
from training.pipeline.block import RolloutBlock, RolloutShape, unlink
from training.pipeline.weights import WeightsBlock, WeightsLayout, sent
from training.workers.learner import Learner, LearnerOptions
from training.workers.memory import Memory
from training.workers.seen import kept
from vla import lora
from vla.lora import FULL, Lora
from vla.models.published import LlamaSizes, PublishedConfig
from vla.models.vit import ViTConfig
from vla.policy import Policy
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer
from vla.types import ModelInputs

NANO = {
    **MODEL, "chunk": 2, "values": 1, "auxiliary": 2, "pointing": 2, "vision": {**MODEL["vision"], "cells": False},
}  # fmt: skip
OFT = PublishedConfig(
    cameras=1, state_dim=3, prompt_length=8, chunk=2, action_dim=4, n_bins=8, values=1, pad=0, dtype="float32",
    decoding="parallel", stop=False, dino=ViTConfig(16, 2, 2, 32, registers=2, patch=8, image_size=16),
    siglip=ViTConfig(16, 2, 2, 32, patch=8, image_size=16), language=LlamaSizes(576, 64, 128, 2, 4, 4),
)  # fmt: skip
SHAPE = RolloutShape(4, 6, (1, 16, 16, 3), 3, 8, chunk=2, action_dim=4, values=1, privileged=6, critic=2)
KEEPING = replace(SHAPE, seen={"tokens": (1, 32), "auxiliary": (6,)})  # what NANO makes of an image


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


Build = Callable[..., Learner]


@pytest.fixture
def shape() -> RolloutShape:
    return SHAPE


@pytest.fixture
def build(tmp_path: Path, shape: RolloutShape) -> Iterator[Build]:
    """A learner on a block of made-up episodes, in which the privileged target depends on the image's brightness."""
    statistics = Statistics(
        ArrayStatistics.from_bounds([-STEP] * 3 + [0.0], [STEP] * 3 + [1.0]),
        ArrayStatistics.from_bounds([-1.0] * 3, [1.0] * 3),
    )
    words = train_tokenizer(["go"], 512, 8)
    weights: list[WeightsBlock] = []
    block = RolloutBlock(shape, f"simreal_learner_{tmp_path.name}_{time.time_ns()}", create=True)
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

    def make(config: PPOConfig, model: dict[str, Any] = NANO, adapters: Lora = FULL, **more: Any) -> Learner:
        checkpoint = tmp_path / "checkpoint"
        if not checkpoint.exists():
            Policy.untrained(model, point_contract(), statistics, words, seed=1).save(checkpoint)
        policy = Policy.load(checkpoint, None)
        if adapters.rank:
            lora.attach(policy.model, adapters)
        layout = WeightsLayout.of(policy.model, adapters)
        weights.append(WeightsBlock(layout, f"simreal_weights_{tmp_path.name}_{time.time_ns()}", create=True))
        options = LearnerOptions(1, str(checkpoint), layout, weights[-1].name, config, 0, 10, 1, "", adapters=adapters)
        return Learner(0, replace(options, **more), "cpu", shape, block.name)

    yield make
    block.close()
    unlink(block.name)
    for part in weights:
        part.close()
        unlink(part.name)


CONFIG = PPOConfig(
    critic="privileged", critic_iterations=1, minibatches=2, perception_steps=5, perception_batch=8,
    perception_learning_rate=1e-2, value_learning_rate=3e-3, gamma=0.0,
)  # fmt: skip


def test_parts_of_an_update_change_what_they_train(build: Build) -> None:
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


def test_without_train_vision_the_passes_leave_the_eyes_alone(build: Build) -> None:
    learner = build(replace(CONFIG, train_vision=False, perception_steps=0, weight_decay=0.5))
    before = {k: v.clone() for k, v in learner.policy.model.named_parameters()}
    learner.update(1)
    moved = {k for k, v in learner.policy.model.named_parameters() if not torch.equal(v, before[k])}
    assert {"action_head.weight", "projector.0.weight", "proprio_projector.0.weight"} <= moved
    assert not any(name.startswith(("vision_backbone", "locator", "value_head")) for name in moved)


def test_critic_and_eyes_learn(build: Build) -> None:
    learner = build(CONFIG)
    first = learner.update(0).metrics
    for _ in range(8):
        last = learner.update(0).metrics
    assert last["explained_variance"] > 0.5 > first["explained_variance"]
    assert last["privileged_loss"] < 0.5 * first["privileged_loss"]


def test_the_eyes_begin_slowly(build: Build) -> None:
    """At full rate a new optimizer's first steps move keypoints farther than the policy behind them can follow."""
    learner = build(replace(CONFIG, warmup_iterations=4, schedule="linear"))
    rates = []
    for iteration in (0, 1, 4, 9):
        learner.update(iteration)
        assert learner.seeing_optimizer is not None
        rates.append(learner.seeing_optimizer.param_groups[0]["lr"] / CONFIG.perception_learning_rate)
    assert rates == pytest.approx([0.25, 0.5, 0.64, 0.19])


def test_a_saved_state_brings_all_optimizers_back(build: Build, tmp_path: Path) -> None:
    learner = build(CONFIG)
    for iteration in (0, 1):
        learner.update(iteration)
    learner.save(str(tmp_path))
    other = build(CONFIG)
    other.restore(str(tmp_path), 2)
    for made in (learner, other):
        made.memory = Memory(100)  # frames are not saved: both begin without
        made.update(2)
    for a, b in ((learner.policy.model, other.policy.model), (learner.critic.network, other.critic.network)):
        assert a is not None and b is not None
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_adapters_and_their_optimizer_come_back(build: Build, tmp_path: Path) -> None:
    config = replace(CONFIG, critic="head", critic_iterations=0, perception_steps=0, learning_rate=1e-2)
    learner = build(config, OFT.data(), Lora(rank=2))
    fresh = {k: v.clone() for k, v in learner.policy.model.state_dict().items()}
    for iteration in (0, 1):
        learner.update(iteration)
    learner.save(str(tmp_path))
    moved = {k for k, v in learner.policy.model.state_dict().items() if not torch.equal(v, fresh[k])}
    assert moved == set(sent(learner.policy.model, learner.adapters)) and any(".lora_B." in name for name in moved)
    other = build(config, OFT.data(), Lora(rank=2))
    other.restore(str(tmp_path), 1)

    def same() -> bool:
        pairs = zip(learner.policy.model.state_dict().values(), other.policy.model.state_dict().values(), strict=True)
        one, two = (made.optimizer.state_dict()["state"] for made in (learner, other))
        moments = one.keys() == two.keys() and all(torch.equal(one[i][k], two[i][k]) for i in one for k in one[i])
        return moments and all(torch.equal(a, b) for a, b in pairs)

    assert same()
    learner.update(2)
    assert not same()
    other.update(2)
    assert same()


def test_the_auxiliary_phase_trains_a_vision_that_is_saved_beside_adapters(build: Build, tmp_path: Path) -> None:
    learner = build(replace(CONFIG, critic_iterations=0), adapters=Lora(rank=2, modules_to_save=["vision_backbone"]))
    before = {k: v.clone() for k, v in learner.policy.model.named_parameters()}
    assert not any(".lora_" in name for name in before if name.startswith("vision_backbone."))
    learner.update(0)
    moved = {k for k, v in learner.policy.model.named_parameters() if not torch.equal(v, before[k])}
    assert any("heatmaps" in name for name in moved) and any(".lora_B." in name for name in moved)
    assert not any(name.startswith("language_model.") and ".lora_" not in name for name in moved)
    assert moved <= set(sent(learner.policy.model, learner.adapters))
    learner.export(str(tmp_path / "out"), {}, {})
    saved = Policy.load(tmp_path / "out", None).model.state_dict()
    own = learner.policy.model.state_dict()
    vision = [name for name in saved if name.startswith("vision_backbone.")]
    assert vision and all(torch.equal(saved[name], own[name]) for name in vision)


def test_what_is_trained_stays_float32_beside_frozen_bfloat16(build: Build, tmp_path: Path) -> None:
    """Steps of 1e-5 are lost in bfloat16's roundings of most weights."""
    config = replace(CONFIG, critic="head", critic_iterations=0, perception_steps=0, learning_rate=1e-5)
    learner = build(config, replace(OFT, dtype="bfloat16").data(), Lora(rank=2))
    kinds = {name: p.dtype for name, p in learner.policy.model.named_parameters()}
    assert all((kind == torch.float32) == (".lora_" in name or "head" in name or "proprio" in name)
               for name, kind in kinds.items() if "lm_head" not in name), kinds  # fmt: skip
    before = {k: v.detach().clone() for k, v in learner.policy.model.named_parameters() if ".lora_A" in k}
    learner.update(0)
    learner.update(1)
    moved = [(p - before[k]).abs() > 0 for k, p in learner.policy.model.named_parameters() if k in before]
    assert np.mean([float(m.float().mean()) for m in moved]) > 0.9
    learner.export(str(tmp_path / "out"), {}, {})
    assert {p.dtype for p in Policy.load(tmp_path / "out", None).model.parameters()} == {torch.bfloat16}


def test_who_rests_leaves_its_device_and_learns_the_same(build: Build) -> None:
    config = replace(CONFIG, critic="head", critic_iterations=0, perception_steps=0, learning_rate=1e-2)
    learners = [build(config, OFT.data(), Lora(rank=2), offload=offload) for offload in (False, True)]
    for iteration in range(3):
        for learner in learners:
            learner.update(iteration)
    assert not learners[1].room._present and learners[0].room is None
    learners[1].room.enter()
    for a, b in zip(*(made.policy.model.state_dict().values() for made in learners), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks_learn_the_same(build: Build) -> None:
    config = replace(
        CONFIG, critic="head", critic_iterations=0, perception_steps=0, learning_rate=1e-3,
        gradient_checkpointing=True, value_learning_rate=1e-3,
    )  # fmt: skip
    learners = [build(config, OFT.data(), Lora(rank=2), compile=how) for how in (False, True)]
    for iteration in range(2):
        metrics = [learner.update(iteration).metrics for learner in learners]
        assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-3, abs=1e-5)
    for (name, a), b in zip(learners[0].policy.model.state_dict().items(),
                            learners[1].policy.model.state_dict().values(), strict=True):  # fmt: skip
        assert torch.allclose(a, b, atol=1e-3), name


def roll_out(learner: Learner, version: int) -> None:
    """Decide every row of the block, as the policy worker does; actions that are not executed get a wild number."""
    block = learner.block
    block["versions"][:] = version
    block["tokens"][:, ::2, -4:] = 7  # prompts of two lengths
    for row in range(SHAPE.decisions + 1):
        seen = ModelInputs(*(torch.from_numpy(block[k][row]) for k in ("images", "state", "tokens")))
        decided = learner.policy.sample(seen, 1.0, torch.Generator().manual_seed(row))
        if block.shape.seen:
            block["seen_tokens"][row], block["seen_auxiliary"][row] = learner.policy.see(seen)
        block["action_tokens"][row], block["log_probs"][row] = decided.tokens, decided.log_probs
    block["executed"][:, 1, 1] = False
    block["log_probs"][:-1, 1, 1] = 7.0


@pytest.mark.parametrize(
    ("model", "least", "most"),
    [
        (NANO, 0.0, 1e-5),
        (OFT.data(), 0.0, 1e-5),
        (replace(OFT, decoding="autoregressive").data(), 0.0, 1e-5),
        (replace(OFT, decoding="autoregressive", dtype="bfloat16").data(), 1e-7, 0.2),
    ],
    ids=["nano", "oft", "autoregressive", "bfloat16"],
)
def test_rollout_and_training_probabilities_are_compared_before_the_first_step(
    build: Build, model: dict[str, Any], least: float, most: float
) -> None:
    """Later minibatches, after steps of this size, are far off: they don't count."""
    learner = build(replace(CONFIG, critic_iterations=1, perception_steps=0, learning_rate=2e-2), model)
    assert math.isnan(learner.update(0).metrics["rollout_logprob_gap_max"]), "nothing was compared"
    learner.update(1)  # random weights hardly tell one token from another, whatever the rounding
    roll_out(learner, 2)
    found = learner.update(2).metrics
    assert least <= found["rollout_logprob_gap_mean"] <= found["rollout_logprob_gap_max"] <= most
    assert found["rollout_logprob_gap_max"] >= 2 * least and found["approx_kl"] > 0.25
    roll_out(learner, 2)
    learner.block["log_probs"][:-1][learner.block["executed"]] += 0.25
    found = learner.update(2).metrics
    assert abs(found["rollout_logprob_gap_mean"] - 0.25) <= most
    roll_out(learner, 2)
    learner.block["versions"][0] = 1  # by the weights before: that is no matter of rounding
    learner.block["log_probs"][0] += 0.25
    assert learner.update(2).metrics["rollout_logprob_gap_max"] <= most


@pytest.mark.parametrize("shape", [SHAPE, KEEPING], ids=["looked at anew", "as the policy saw it"])
def test_what_the_policy_saw_is_what_it_decided_on(build: Build, shape: RolloutShape) -> None:
    """Between a decision and its update the auxiliary phase moves keypoints and positions."""
    config = replace(CONFIG, train_vision=False, learning_rate=0.0, perception_steps=20)
    learner = build(config)
    head: Any = learner.policy.model.action_head
    seeded = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(head.weight, std=2.0, generator=seeded)  # decisive, as after an imitation
    roll_out(learner, 1)
    learner.update(0)  # critic and eyes alone
    found = learner.update(1).metrics
    gap, apart = found["rollout_logprob_gap_max"], found["approx_kl"]
    if shape is KEEPING:
        assert gap < 1e-4 and apart < 1e-4
    else:
        assert gap > 0.1 and apart > 0.01


def test_a_rollout_keeps_what_the_policy_saw_only_if_that_moves(build: Build) -> None:
    policy = build(CONFIG).policy
    still = replace(CONFIG, train_vision=False)
    assert kept(policy, still, privileged=6) == KEEPING.seen
    assert kept(policy, CONFIG, privileged=6) == {}, "the passes look themselves: they train the vision"
    assert kept(policy, replace(still, perception_steps=0), privileged=6) == {} == kept(policy, still, privileged=0)
