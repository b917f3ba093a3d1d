"""Losses and advantages against float64 implementations in plain numpy, over random cases; gradients; bad options."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.algorithms import surrogate
from training.algorithms.base import Algorithm, Rollout, adapted, explained_variance
from training.algorithms.groups import collect
from training.algorithms.grpo import GRPOConfig
from training.algorithms.ppo import PPOConfig
from training.algorithms.reinforce_pp import ReinforcePPConfig
from training.algorithms.rewards import RewardForm
from training.algorithms.rloo import RLOOConfig
from training.train import TrainConfig
from vla import configuration
from vla.errors import ConfigError

EXACT = 1e-9  # relative
MANY = settings(max_examples=60, deadline=None, derandomize=True)


def same(found: torch.Tensor, expected: Any) -> None:
    assert found.dtype == torch.float64, "the reference is in float64"
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=EXACT, atol=EXACT)


@st.composite
def randoms(draw: st.DrawFn) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


# Losses


def mean_of(values: np.ndarray, weights: np.ndarray) -> float:
    total = 0.0
    for value, weight in zip(values.ravel(), weights.ravel(), strict=True):
        total += value * weight
    return total / max(weights.sum(), 1e-8)


def surrogate_of(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    """One term, case by case, as the papers have it."""
    if advantage >= 0:
        return min(ratio, 1 + high) * advantage
    term = max(ratio, 1 - low) * advantage
    return term if dual is None else max(term, dual * advantage)


def expected_loss(
    log_probs: np.ndarray, old: np.ndarray, acted: np.ndarray | None, advantage: np.ndarray, weight: np.ndarray,
    executed: np.ndarray, config: Algorithm,
) -> float:  # fmt: skip
    """Log-probabilities `[B, C, D]`; advantage `[B, V]`; weight, executed `[B, C]`."""
    count, chunk, dims = log_probs.shape
    terms, weights = [], []

    def add(which: Any, credit: float, share: float) -> None:
        new, was = log_probs[which].sum(), old[which].sum()
        term = surrogate_of(math.exp(new - was), credit, config.clip_low, config.clip_high, config.dual_clip)
        if acted is not None:
            term *= min(math.exp(was - acted[which].sum()), config.importance_cap)
        terms.append(term)
        weights.append(share)

    for b in range(count):
        per_action = [advantage[b, 0 if advantage.shape[1] == 1 else c] for c in range(chunk)]
        if config.ratio == "chunk":
            shares = weight[b]
            credit = float(np.dot(per_action, shares) / max(shares.sum(), 1e-8))
            add((b, executed[b]), advantage[b, 0] if advantage.shape[1] == 1 else credit, shares.max())
            continue
        for c in range(chunk):
            for d in range(dims if config.ratio == "token" else 1):
                add((b, c, d) if config.ratio == "token" else (b, c), per_action[c], weight[b, c])
    return -mean_of(np.array(terms), np.array(weights))


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    random = draw(randoms())
    count, chunk, dims = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    per_chunk = draw(st.booleans())
    executed = np.arange(chunk) < random.integers(1, chunk + 1, (count, 1))
    weight = executed * random.uniform(0.2, 3, (count, 1))
    old = -random.uniform(0.05, 3, (count, chunk, dims))
    return {
        "executed": executed, "weight": weight, "old": old,
        "new": old + random.normal(0, 0.5, old.shape),
        "acted": old + random.normal(0, 0.4, old.shape) if draw(st.booleans()) else None,
        "advantage": random.normal(0, 2, (count, 1 if per_chunk else chunk)),
        "config": PPOConfig(
            ratio=draw(st.sampled_from(["token", "action", "chunk"])), clip_low=draw(st.floats(0.05, 0.5)),
            clip_high=draw(st.floats(0.05, 0.6)), dual_clip=draw(st.sampled_from([None, 1.5, 3.0])),
        ),
    }  # fmt: skip


def loss_of(case: dict[str, Any], log_probs: torch.Tensor) -> torch.Tensor:
    """What the learner makes of a batch."""
    config, executed = case["config"], torch.from_numpy(case["executed"])
    old = torch.from_numpy(case["old"])
    new, was = (surrogate.group(x, executed, config.ratio) for x in (log_probs, old))
    importance = None
    if case["acted"] is not None:
        acted = surrogate.group(torch.from_numpy(case["acted"]), executed, config.ratio)
        importance, _ = surrogate.importance_weights(was, acted, config.importance_cap)
    advantage, weight = surrogate.per_unit(torch.from_numpy(case["advantage"]), torch.from_numpy(case["weight"]), new)
    return config.loss(new, was, advantage, weight, importance)[0]


@MANY
@given(batches())
def test_policy_loss_and_its_gradient(case: dict[str, Any]) -> None:
    log_probs = torch.from_numpy(case["new"]).requires_grad_()
    loss = loss_of(case, log_probs)

    def reference(new: np.ndarray) -> float:
        return expected_loss(
            new, case["old"], case["acted"], case["advantage"], case["weight"], case["executed"], case["config"]
        )

    same(loss, reference(case["new"]))
    loss.backward()
    assert log_probs.grad is not None
    # Central differences, where none of the kinks is near: the loss is smooth along a random direction or it is not.
    direction = np.random.default_rng(0).normal(size=case["new"].shape)
    slopes = [(reference(case["new"] + h * direction) - reference(case["new"] - h * direction)) / (2 * h)
              for h in (1e-5, 1e-6)]  # fmt: skip
    if abs(slopes[0] - slopes[1]) < 1e-6 * (1 + abs(slopes[0])):
        along = float((log_probs.grad.numpy() * direction).sum())
        assert along == pytest.approx(slopes[0], rel=1e-5, abs=1e-6)


@MANY
@given(randoms(), st.sampled_from([None, 0.2]), st.sampled_from([None, 0.5, 10.0]))
def test_value_loss_and_its_gradient(random: np.random.Generator, clip: float | None, huber: float | None) -> None:
    config = PPOConfig(value_clip=clip, huber=huber)
    values, old, returns = random.normal(0, 2, (3, 6, 2))
    weights = random.uniform(0, 1, (6, 2)) * (random.random((6, 2)) < 0.8)

    def reference(predicted: np.ndarray) -> float:
        def error(value: float, goal: float) -> float:
            apart = abs(value - goal)
            return 0.5 * apart**2 if huber is None or apart <= huber else huber * (apart - huber / 2)

        terms = []
        for value, was, goal in zip(predicted.ravel(), old.ravel(), returns.ravel(), strict=True):
            term = error(value, goal)
            if clip is not None:
                term = max(term, error(was + min(max(value - was, -clip), clip), goal))
            terms.append(term)
        return mean_of(np.array(terms), weights)

    given_ = torch.from_numpy(values).requires_grad_()
    loss = config.value_loss(given_, *(torch.from_numpy(x) for x in (old, returns, weights)))
    same(loss, reference(values))
    loss.backward()
    assert given_.grad is not None
    direction = np.random.default_rng(0).normal(size=values.shape)
    slopes = [(reference(values + h * direction) - reference(values - h * direction)) / (2 * h) for h in (1e-5, 1e-6)]
    if abs(slopes[0] - slopes[1]) < 1e-6 * (1 + abs(slopes[0])):
        assert float((given_.grad.numpy() * direction).sum()) == pytest.approx(slopes[0], rel=1e-5, abs=1e-6)


@MANY
@given(batches())
def test_divergence_weights_and_normalisation(case: dict[str, Any]) -> None:
    executed = case["executed"]
    found = surrogate.divergence(*(torch.from_numpy(case[k]) for k in ("new", "old")), torch.from_numpy(executed))
    apart = case["new"] - case["old"]
    chunks = [sum(math.exp(x) - 1 - x for x in apart[b][executed[b]].ravel()) for b in range(len(apart))]
    same(found, sum(chunks) / len(chunks))
    acted = case["old"] if case["acted"] is None else case["acted"]
    weights, cut = surrogate.importance_weights(torch.from_numpy(case["old"]), torch.from_numpy(acted), 1.3)
    ratio = np.exp(case["old"] - acted)
    same(weights, np.where(ratio > 1.3, 1.3, ratio))
    assert (cut.numpy() == (ratio > 1.3)).all()
    advantage, mask = case["weight"], executed
    scaled = surrogate.normalize(torch.from_numpy(advantage), torch.from_numpy(mask))
    if (count := mask.sum()) > 1:
        mean = advantage[mask].sum() / count
        spread = math.sqrt(((advantage[mask] - mean) ** 2).sum() / (count - 1))
        same(scaled, np.where(mask, (advantage - mean) / (spread + 1e-8), 0))


def test_explained_variance_of_a_scaled_prediction() -> None:
    returns = torch.linspace(-1, 2, 7, dtype=torch.float64)
    assert explained_variance(0.5 * returns, returns) == pytest.approx(0.75)


# Advantages


@st.composite
def streams(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    """Rewards, values, executed, terminated, valid: episodes end in all ways, at any action of a chunk."""
    random, steps, slots = draw(randoms()), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    chunk = draw(st.integers(1, 4))
    width = chunk if draw(st.booleans()) else 1
    executed = np.ones((steps, slots, chunk), bool)
    terminated, valid = np.zeros((steps, slots), bool), np.ones((steps, slots), bool)
    for n in range(slots):
        boundary = bool(random.random() < 0.2)
        for t in range(steps):
            if boundary:  # whatever was left in memory
                valid[t, n], boundary = False, False
                executed[t, n] = random.random(chunk) < 0.5
            elif random.random() < 0.4:
                executed[t, n, random.integers(1, chunk + 1) :] = False
                boundary = bool(random.random() < 0.5)
                terminated[t, n] = not boundary
    rewards, values = random.normal(size=(steps, slots, chunk)), random.normal(size=(steps + 1, slots, width))
    return rewards, values, executed, terminated, valid


@MANY
@given(streams(), st.floats(0.5, 1), st.floats(0, 1, allow_subnormal=False))
def test_ppo_credit_is_the_sum_of_the_errors_that_follow(
    case: tuple[np.ndarray, ...], gamma: float, lam: float
) -> None:
    rewards, values, executed, terminated, valid = case
    steps, slots, _ = rewards.shape
    width = values.shape[-1]
    expected = np.zeros((steps, slots, width))
    told = np.zeros((steps, slots, width), bool)
    for n in range(slots):
        chain: list[tuple[int, int]] = []
        errors: list[float] = []

        def settle(chain: list[tuple[int, int]], errors: list[float], n: int = n) -> None:
            for i, (t, c) in enumerate(chain):
                expected[t, n, c] = sum((gamma * lam) ** (j - i) * errors[j] for j in range(i, len(errors)))
            chain.clear()
            errors.clear()

        for t in range(steps):
            if not valid[t, n]:
                settle(chain, errors)
                continue
            actions = [0] if width == 1 else np.flatnonzero(executed[t, n]).tolist()
            for i, c in enumerate(actions):
                told[t, n, c] = True
                reward = (rewards[t, n] * executed[t, n]).sum() if width == 1 else rewards[t, n, c]
                last = i == len(actions) - 1
                if last and terminated[t, n]:
                    after = 0.0
                else:
                    after = values[t + 1, n, 0] if last else values[t, n, actions[i + 1]]
                chain.append((t, c))
                errors.append(reward + gamma * after - values[t, n, c])
            if terminated[t, n]:
                settle(chain, errors)
        settle(chain, errors)
    none = torch.zeros(steps, slots, dtype=torch.int32)
    arrays = [torch.from_numpy(x) for x in (rewards, executed, terminated, valid, values)]
    found = PPOConfig(gamma=gamma, lam=lam).credit(Rollout(*arrays, none))
    same(found.advantage, expected)
    same(found.returns, np.where(told, expected + values[:-1], 0))
    assert (found.keep.numpy() == valid).all()


@st.composite
def rounds(draw: st.DrawFn) -> dict[str, Any]:
    """Groups of episodes one after the other in the slots, some of them all alike, one perhaps incomplete."""
    random, size, groups = draw(randoms()), draw(st.integers(2, 4)), draw(st.integers(1, 4))
    slots, chunk, steps = draw(st.integers(1, 4)), draw(st.integers(1, 3)), 60
    rewards = random.normal(size=(steps, slots, chunk))
    executed, terminated = np.zeros((steps, slots, chunk), bool), np.zeros((steps, slots), bool)
    episodes = np.zeros((steps, slots), np.int32)
    uniform = random.random(groups) < 0.4
    rows: dict[int, list[tuple[int, int]]] = {}
    free = [0] * slots
    lost = int(random.integers(groups * size)) + 1 if draw(st.booleans()) else 0
    for number in range(1, groups * size + 1):
        if number == lost:
            continue
        n = int(np.argmin(free))
        length = int(random.integers(1, 4))
        rows[number] = [(t, n) for t in range(free[n], free[n] + length)]
        for t, _ in rows[number]:
            episodes[t, n], executed[t, n] = number, True
        free[n] += length
        end = free[n] - 1
        executed[end, n, random.integers(1, chunk + 1) :] = False
        terminated[end, n] = bool(random.random() < 0.5)
        if uniform[(number - 1) // size]:
            rewards[free[n] - length : free[n], n] = 0
            rewards[end, n, 0] = 1.5
    return {
        "rewards": rewards, "executed": executed, "terminated": terminated, "episodes": episodes, "rows": rows,
        "size": size, "groups": groups, "band": draw(st.sampled_from([None, (-0.5, 1.0)])),
    }  # fmt: skip


def credit_of(case: dict[str, Any], config: Algorithm) -> tuple[Any, Rollout]:
    episodes = torch.from_numpy(case["episodes"])
    told = (torch.from_numpy(case[k]) for k in ("rewards", "executed", "terminated"))
    values = torch.zeros(len(episodes) + 1, episodes.shape[1], 1, dtype=torch.float64)
    rollout = Rollout(*told, episodes > 0, values, episodes)
    return config.credit(rollout), rollout


@MANY
@given(rounds(), st.sampled_from(["grpo", "grpo without", "rloo", "reinforce++"]), st.booleans())
def test_group_relative_credit(case: dict[str, Any], which: str, filtered: bool) -> None:
    size = case["size"]
    options = {"group_size": size, "filter_groups": filtered, "band": case["band"]}
    config = {
        "grpo": GRPOConfig(**options), "grpo without": GRPOConfig(**options, divide_by_std=False),
        "rloo": RLOOConfig(**options), "reinforce++": ReinforcePPConfig(**options),
    }[which]  # fmt: skip
    shape = case["episodes"].shape
    expected, returns, keep = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for group in range(case["groups"]):
        members = [number for number in range(group * size + 1, (group + 1) * size + 1) if number in case["rows"]]
        if len(members) < size:
            continue
        totals = [
            sum(case["rewards"][t, n, c] for t, n in case["rows"][m] for c in np.flatnonzero(case["executed"][t, n]))
            for m in members
        ]
        mean = sum(totals) / size
        spread = math.sqrt(sum((x - mean) ** 2 for x in totals) / (size - 1))
        kept = not filtered or max(totals) - min(totals) > 1e-6
        kept = kept and (case["band"] is None or case["band"][0] <= mean <= case["band"][1])
        for member, total in zip(members, totals, strict=True):
            others = (sum(totals) - total) / (size - 1)
            credit = {
                "grpo": (total - mean) / (spread + 1e-6), "rloo": total - others,
            }.get(which, total - mean)  # fmt: skip
            for t, n in case["rows"][member]:
                expected[t, n], returns[t, n], keep[t, n] = credit, total, kept
    found, rollout = credit_of(case, config)
    same(found.returns[..., 0], returns)
    same(found.advantage[..., 0], expected)
    assert (found.keep.numpy() == keep).all()
    weights = config.weights(rollout)
    for cells in case["rows"].values():  # an episode weighs 1, however long it is and whatever is beside it
        assert sum(float(weights[t, n].sum()) for t, n in cells) == pytest.approx(1, rel=1e-9)


def test_reinforce_pp_without_groups_takes_the_returns() -> None:
    returns = torch.tensor([[1.0], [2.0]])
    config = ReinforcePPConfig()
    assert config.relative(returns).tolist() == returns.tolist() and config.informative(returns).all()
    assert config.normalize_advantages


def test_groups_in_any_order_and_with_any_numbers() -> None:
    """Fragments come out of order, and their episodes are counted over the whole run."""
    episodes = torch.tensor([[41, 42], [5, 6]])
    found = collect(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.ones(2, 2, 1, dtype=torch.bool), episodes, 2)
    assert found.returns.tolist() == [[3.0, 4.0], [1.0, 2.0]]
    assert found.member.tolist() == [[2, 3], [0, 1]]


def test_length_normalisation_of_streams_is_that_of_a_slot() -> None:
    executed = torch.tensor([[[True], [True]], [[False], [True]]])
    none = torch.zeros(2, 2)
    rollout = Rollout(none[..., None], executed, none > 0, none == 0, torch.zeros(3, 2, 1), none.int())
    weights = PPOConfig(length_normalization=True).weights(rollout)
    assert weights[..., 0].tolist() == [[2.0, 1.0], [0.0, 1.0]]


# Rewards


@MANY
@given(randoms(), st.booleans(), st.booleans(), st.floats(0.5, 5))
def test_reward_forms(random: np.random.Generator, success_only: bool, difference: bool, scale: float) -> None:
    """An episode in chunks of three, the last of which ends early, against the list of its rewards."""
    length = int(random.integers(1, 12))
    plain = random.normal(size=length).astype(np.float32)
    success = bool(random.random() < 0.5)
    form = RewardForm("success" if success_only else "environment", difference, scale)
    found: list[float] = []
    before = np.zeros(1)
    for first in range(0, length, 3):
        part = plain[first : first + 3]
        rewards, executed = np.full((1, 3), 9.0, np.float32), np.zeros((1, 3), bool)
        rewards[0, : len(part)], executed[0, : len(part)] = part, True
        ended = np.array([success and first + 3 >= length])
        told, before = form.of(rewards, executed, ended, before)
        found += told[0, : len(part)].tolist()
    raw = plain.astype(np.float64)
    if success_only:
        raw = np.array([0.0] * (length - 1) + [float(success)])
    if difference:
        raw = np.array([raw[0], *(b - a for a, b in pairwise(raw))])
    np.testing.assert_allclose(found, raw * np.float32(scale), rtol=2e-6, atol=2e-6)


# Options


def test_the_rate_follows_the_divergence() -> None:
    assert adapted(1.0, 0.3, 0.1) == pytest.approx(1 / 1.5) and adapted(1.0, 0.04, 0.1) == 1.5
    assert adapted(1.0, 0.1, 0.1) == 1.0 and adapted(0.01, 9.0, 0.1) == 0.01 and adapted(10.0, 0.0, 0.1) == 10.0


@pytest.mark.parametrize(("name", "kind"), [
    ("ppo", PPOConfig), ("ppo_privileged", PPOConfig), ("grpo", GRPOConfig), ("rloo", RLOOConfig),
    ("reinforce_pp", ReinforcePPConfig),
])  # fmt: skip
def test_every_algorithm_is_a_file_of_options(name: str, kind: type) -> None:
    config = configuration.load(TrainConfig, "train", ["out=x", "checkpoint=y", f"algorithm={name}"])
    assert type(config.algorithm) is kind


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["algorithm=grpo", "algorithm.group_size=1"], "group_size must be at least 2, found 1"),
        (["algorithm=grpo", "algorithm.groups=0"], "groups must be positive"),
        (["algorithm=grpo", "algorithm.refills=-1"], "refills not negative"),
        (["algorithm=grpo", "algorithm.band=[2,1]"], r"band must be \[low, high\]"),
        (["algorithm=grpo", "algorithm.gamma=0.9"], "unknown key 'algorithm.gamma'"),
        (["algorithm=ppo", "algorithm.group_size=8"], "unknown key 'algorithm.group_size'"),
        (["algorithm=ppo", "algorithm.temperature=0"], "temperature must be at least 1e-06, found 0.0"),
        (["algorithm=ppo", "algorithm.batch_size=0"], "batch_size must be at least 1, found 0"),
        (["algorithm=ppo", "algorithm.clip_low=1.5"], r"clip_low must be in \[0, 1\)"),
        (["algorithm=ppo", "algorithm.dual_clip=1"], "dual_clip must be above 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configuration.load(TrainConfig, "train", ["out=x", "checkpoint=y", *options])
