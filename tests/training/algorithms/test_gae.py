"""Advantages against numbers worked out by hand and against the definition, term by term."""

import numpy as np
import pytest
import torch

from training.algorithms.gae import advantages
from training.algorithms.surrogate import normalize

T, F = True, False


def run(rewards, values, executed, terminated, valid, gamma, lam):
    return advantages(
        torch.tensor(rewards),
        torch.tensor(values),
        torch.tensor(executed),
        torch.tensor(terminated),
        torch.tensor(valid),
        gamma,
        lam,
    )


def test_three_chunks_by_hand() -> None:
    """One slot, chunks of two actions, a value for each chunk, nothing ends."""
    advantage, returns = run(
        [[[1.0, 2.0]], [[0.0, 1.0]], [[0.5, 0.5]]],
        [[[10.0]], [[8.0]], [[6.0]], [[4.0]]],
        [[[T, T]], [[T, T]], [[T, T]]],
        [[F], [F], [F]],
        [[T], [T], [T]],
        0.5,
        0.5,
    )
    delta2 = 1.0 + 0.5 * 4.0 - 6.0  # -3
    delta1 = 1.0 + 0.5 * 6.0 - 8.0  # -4
    delta0 = 3.0 + 0.5 * 8.0 - 10.0  # -3
    expected = [delta0 + 0.25 * delta1 + 0.0625 * delta2, delta1 + 0.25 * delta2, delta2]
    assert expected == [-4.1875, -4.75, -3.0]
    assert advantage.flatten().tolist() == expected
    assert returns.flatten().tolist() == [10.0 - 4.1875, 8.0 - 4.75, 6.0 - 3.0]


def test_termination_takes_neither_the_next_value_nor_the_next_advantage() -> None:
    advantage, returns = run(
        [[[1.0]], [[2.0]]], [[[3.0]], [[5.0]], [[7.0]]], [[[T]], [[T]]], [[T], [F]], [[T], [T]], 0.9, 0.8
    )
    assert advantage.flatten().tolist() == pytest.approx([1.0 - 3.0, 2.0 + 0.9 * 7.0 - 5.0])
    assert returns.flatten().tolist() == pytest.approx([1.0, 2.0 + 0.9 * 7.0])


def test_truncation_bootstraps_from_the_boundary_row_and_stops_there() -> None:
    """Row 1 holds the final observation (value 5) of the episode that ends in row 0; row 2 is another's."""
    advantage, returns = run(
        [[[1.0]], [[99.0]], [[2.0]]],
        [[[3.0]], [[5.0]], [[7.0]], [[11.0]]],
        [[[T]], [[T]], [[T]]],
        [[F], [F], [F]],
        [[T], [F], [T]],
        0.5,
        0.9,
    )
    assert advantage.flatten().tolist() == pytest.approx([1.0 + 0.5 * 5.0 - 3.0, 0.0, 2.0 + 0.5 * 11.0 - 7.0])
    assert returns.flatten().tolist() == pytest.approx([3.5, 0.0, 7.5])


def test_a_value_for_each_action_by_hand() -> None:
    """Chunks of two; the second chunk ends after its first action, whose successor counts nowhere."""
    advantage, returns = run(
        [[[1.0, 2.0]], [[3.0, 50.0]]],
        [[[10.0, 20.0]], [[30.0, 40.0]], [[60.0, 70.0]]],
        [[[T, T]], [[T, F]]],
        [[F], [T]],
        [[T], [T]],
        0.5,
        0.5,
    )
    last = 3.0 - 30.0  # terminated: no bootstrap
    second = 2.0 + 0.5 * 30.0 - 20.0 + 0.25 * last
    first = 1.0 + 0.5 * 20.0 - 10.0 + 0.25 * second
    assert advantage.tolist() == [[[first, second]], [[last, 0.0]]]
    assert returns.tolist() == [[[10.0 + first, 20.0 + second]], [[3.0, 0.0]]]


def test_an_action_that_was_not_executed_gives_no_reward_to_its_chunk() -> None:
    advantage, _ = run([[[1.0, 50.0]]], [[[2.0]], [[4.0]]], [[[T, F]]], [[T]], [[T]], 0.9, 0.9)
    assert advantage.item() == 1.0 - 2.0


def reference(rewards, values, executed, terminated, valid, gamma, lam):
    """The definition: sum over k of (gamma lam)^k delta_k, along the list of steps of every episode."""
    steps, slots, _ = rewards.shape
    width = values.shape[-1]
    result = np.zeros((steps, slots, width))
    for n in range(slots):
        chains: list[list[tuple[int, int, float, float, bool]]] = [[]]  # t, c, reward, value, terminal
        tails: list[float] = []  # value after the last step of each chain
        for t in range(steps):
            if not valid[t, n]:
                tails.append(values[t, n, 0])
                chains.append([])
                continue
            if width == 1:
                total = float((rewards[t, n] * executed[t, n]).sum())
                chains[-1].append((t, 0, total, values[t, n, 0], bool(terminated[t, n])))
            else:
                done = [c for c in range(width) if executed[t, n, c]]
                for c in done:
                    ends = bool(terminated[t, n]) and c == done[-1]
                    chains[-1].append((t, c, rewards[t, n, c], values[t, n, c], ends))
            if terminated[t, n]:
                tails.append(0.0)
                chains.append([])
        tails.append(values[steps, n, 0])
        for chain, tail in zip(chains, tails, strict=True):
            following = ([step[3] for step in chain[1:]] + [tail])[: len(chain)]
            deltas = [
                r + (0.0 if ends else gamma * after) - v
                for (_, _, r, v, ends), after in zip(chain, following, strict=True)
            ]
            for i, (t, c, *_) in enumerate(chain):
                result[t, n, c] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
    return result


@pytest.mark.parametrize("action_level", [False, True])
def test_random_rollouts_against_the_definition(action_level: bool) -> None:
    random = np.random.default_rng(5)
    steps, slots, chunk = 12, 6, 3
    width = chunk if action_level else 1
    for _ in range(20):
        rewards = random.normal(size=(steps, slots, chunk))
        values = random.normal(size=(steps + 1, slots, width))
        terminated = np.zeros((steps, slots), bool)
        valid = np.ones((steps, slots), bool)
        executed = np.ones((steps, slots, chunk), bool)
        for n in range(slots):
            boundary = bool(random.random() < 0.2)
            for t in range(steps):
                if boundary:
                    valid[t, n], boundary = False, False
                    executed[t, n] = random.random(chunk) < 0.5  # whatever was left in memory
                    continue
                if random.random() < 0.4:
                    executed[t, n, random.integers(1, chunk + 1) :] = False
                    boundary = bool(random.random() < 0.5)
                    terminated[t, n] = not boundary
        arrays = (rewards, values, executed, terminated, valid)
        advantage, returns = advantages(*map(torch.from_numpy, arrays), 0.9, 0.8)
        expected = reference(*arrays, 0.9, 0.8)
        np.testing.assert_allclose(advantage.numpy(), expected, atol=1e-12)
        mask = executed & valid[..., None]
        mask = mask if action_level else mask.any(-1, keepdims=True)
        np.testing.assert_allclose(returns.numpy(), np.where(mask, expected + values[:-1], 0), atol=1e-12)


def test_normalize_counts_the_masked_entries_only() -> None:
    found = normalize(torch.tensor([1.0, 2.0, 3.0, 1000.0]), torch.tensor([T, T, T, F]))
    assert found.tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0])


def test_normalize_leaves_a_single_entry() -> None:
    assert normalize(torch.tensor([5.0, 7.0]), torch.tensor([T, F])).tolist() == [5.0, 0.0]
