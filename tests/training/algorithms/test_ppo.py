"""The losses of PPO against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from training.algorithms import surrogate as losses
from training.algorithms.auxiliary import privileged_loss
from training.algorithms.base import explained_variance
from training.algorithms.ppo import PPOConfig

CONFIG = PPOConfig(clip_low=0.2, clip_high=0.3, dual_clip=None, value_clip=None, huber=None)


def surrogate(ratio: float, advantage: float, config: PPOConfig) -> float:
    """Minus the loss of a single sample."""
    one = torch.ones(1)
    told = torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage])
    loss, _ = losses.policy_loss(*told, one, config)
    return -float(loss)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.1, 2.0, 2.2),  # inside
        (2.0, 2.0, 1.3 * 2.0),  # above, good: clipped at 1 + clip_high
        (0.5, 2.0, 0.5 * 2.0),  # below, good: the smaller one is the plain one
        (0.5, -2.0, 0.8 * -2.0),  # below, bad: clipped at 1 - clip_low
        (2.0, -2.0, 2.0 * -2.0),  # above, bad: not clipped
    ],
)
def test_clipped_surrogate(ratio: float, advantage: float, expected: float) -> None:
    assert surrogate(ratio, advantage, CONFIG) == pytest.approx(expected)


def test_dual_clip_bounds_bad_samples_only() -> None:
    dual = replace(CONFIG, dual_clip=3.0)
    assert surrogate(10.0, -2.0, dual) == pytest.approx(3.0 * -2.0)
    assert surrogate(10.0, 2.0, dual) == pytest.approx(1.3 * 2.0)
    assert surrogate(2.0, -2.0, dual) == pytest.approx(2.0 * -2.0)


def test_a_clipped_sample_has_no_gradient() -> None:
    log_probs = torch.tensor([math.log(2.0), math.log(1.1)], requires_grad=True)
    loss, _ = losses.policy_loss(log_probs, torch.zeros(2), torch.tensor([1.0, 1.0]), torch.ones(2), CONFIG)
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([0.0, -1.1 / 2])


def test_weights_and_statistics_of_the_policy_loss() -> None:
    ratios = torch.tensor([1.1, 2.0, 0.5, 7.0])
    weights = torch.tensor([1.0, 2.0, 1.0, 0.0])
    loss, found = losses.policy_loss(ratios.log(), torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 1.0]), weights, CONFIG)
    assert float(loss) == pytest.approx(-(1.1 * 1 + 1.3 * 2 + 0.5 * 1) / 4)
    assert float(found["clip_fraction"]) == pytest.approx((0 * 1 + 1 * 2 + 1 * 1) / 4)
    assert float(found["ratio"]) == pytest.approx((1.1 * 1 + 2.0 * 2 + 0.5 * 1) / 4)


def test_decoupled_loss_by_hand() -> None:
    """Three samples; the proximal policy is between the one that acted and the present one."""
    acted = torch.tensor([0.5, 0.2, 0.4]).log()
    proximal = torch.tensor([0.6, 0.6, 0.1]).log()
    present = torch.tensor([0.66, 0.9, 0.05]).log().requires_grad_()
    importance, cut = losses.importance_weights(proximal, acted, cap=2.0)
    assert importance.tolist() == pytest.approx([1.2, 2.0, 0.25])  # the second one would be 3
    assert cut.tolist() == [0.0, 1.0, 0.0]
    advantage, weights = torch.tensor([1.0, 2.0, -4.0]), torch.tensor([1.0, 1.0, 2.0])
    loss, found = losses.policy_loss(present, proximal, advantage, weights, CONFIG, importance)
    # Ratios 1.1; 1.5, clipped at 1.3; 0.5, clipped at 0.8, which is the smaller one with a negative advantage.
    terms = [1.2 * 1.1 * 1.0, 2.0 * 1.3 * 2.0, 0.25 * 0.8 * -4.0]
    assert float(loss.detach()) == pytest.approx(-(terms[0] + terms[1] + 2 * terms[2]) / 4)
    assert float(found["clip_fraction"]) == pytest.approx((1 + 2) / 4)
    loss.backward()
    assert present.grad is not None
    assert present.grad.tolist() == pytest.approx([-1.2 * 1.1 / 4, 0.0, 0.0])


def test_where_the_proximal_policy_is_the_present_one_the_gradient_is_the_policy_gradient() -> None:
    present = torch.tensor([0.3, 0.8]).log().requires_grad_()
    proximal = present.detach()
    importance, _ = losses.importance_weights(proximal, torch.tensor([0.6, 0.2]).log(), cap=2.0)
    advantage = torch.tensor([1.0, -3.0])
    loss, _ = losses.policy_loss(present, proximal, advantage, torch.ones(2), PPOConfig(), importance)
    loss.backward()
    assert present.grad is not None
    assert present.grad.tolist() == pytest.approx([-0.5 * 1.0 / 2, -2.0 * -3.0 / 2])


def test_value_loss_plain_clipped_and_weighted() -> None:
    values, old, returns = (
        torch.tensor([[2.0], [5.0]]),
        torch.tensor([[1.0], [5.0]]),
        torch.tensor([[3.0], [1.0]]),
    )
    weights = torch.tensor([[3.0], [1.0]])
    plain = CONFIG.value_loss(values, old, returns, weights)
    assert float(plain) == pytest.approx((3 * 0.5 * 1.0**2 + 1 * 0.5 * 4.0**2) / 4)
    # The first prediction moved by 1, of which 0.2 count: 1.2 is 1.8 away from 3. The second did not move.
    clipped = replace(CONFIG, value_clip=0.2).value_loss(values, old, returns, weights)
    assert float(clipped) == pytest.approx((3 * 0.5 * 1.8**2 + 1 * 0.5 * 4.0**2) / 4)


def test_value_clip_takes_the_larger_error() -> None:
    """The prediction overshot from 1 to 4 where 1.1 is right; clipped it would look fine."""
    args = torch.tensor([[4.0]]), torch.tensor([[1.0]]), torch.tensor([[1.1]]), torch.ones(1, 1)
    assert float(replace(CONFIG, value_clip=0.2).value_loss(*args)) == pytest.approx(0.5 * 2.9**2)


def test_huber_is_linear_beyond_its_width() -> None:
    args = torch.tensor([[0.5], [5.0]]), torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2, 1)
    expected = (0.5 * 0.5**2 + 2.0 * (5.0 - 0.5 * 2.0)) / 2
    assert float(replace(CONFIG, huber=2.0).value_loss(*args)) == pytest.approx(expected)


def test_log_probs_by_token_action_and_chunk() -> None:
    log_probs = torch.tensor([[[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]]])
    mask = torch.tensor([[True, True, False]])
    assert losses.group(log_probs, mask, "token").tolist() == log_probs.tolist()
    assert losses.group(log_probs, mask, "action").tolist() == [[-3.0, -7.0, -11.0]]
    assert losses.group(log_probs, mask, "chunk").tolist() == [[-3.0 - 7.0]]


def test_advantage_and_weight_for_each_unit_of_the_ratio() -> None:
    """Chunks of three actions of two tokens, the third of which was not executed."""
    weight = torch.tensor([[1.0, 1.0, 0.0]])
    per_chunk, per_action = torch.tensor([[4.0]]), torch.tensor([[2.0, 6.0, 9.0]])
    token, action, chunk = torch.zeros(1, 3, 2), torch.zeros(1, 3), torch.zeros(1, 1)
    found = {
        (v, u): [x.tolist() for x in losses.per_unit(advantage, weight, like)]
        for v, advantage in (("chunk", per_chunk), ("action", per_action))
        for u, like in (("token", token), ("action", action), ("chunk", chunk))
    }
    assert found["chunk", "token"] == [[[[4.0, 4.0]] * 3], [[[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]]]
    assert found["chunk", "action"] == [[[4.0, 4.0, 4.0]], [[1.0, 1.0, 0.0]]]
    assert found["chunk", "chunk"] == [[[4.0]], [[1.0]]]
    assert found["action", "token"][0] == [[[2.0, 2.0], [6.0, 6.0], [9.0, 9.0]]]
    assert found["action", "action"] == [[[2.0, 6.0, 9.0]], [[1.0, 1.0, 0.0]]]
    assert found["action", "chunk"] == [[[(2.0 + 6.0) / 2]], [[1.0]]]


def test_divergence_by_hand() -> None:
    """Two chunks of two actions of one token; one action was not executed."""
    log_ratio = torch.tensor([[[0.1], [0.2]], [[-0.3], [5.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    terms = [math.exp(x) - 1 - x for x in (0.1, 0.2, -0.3)]
    assert float(losses.divergence(log_ratio, torch.zeros(2, 2, 1), mask)) == pytest.approx(sum(terms) / 2, rel=1e-4)


def test_divergence_estimates_the_kl_divergence() -> None:
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    exact = float((old * (old / new).log()).sum())
    expectation = sum(
        float(p)
        * float(losses.divergence(q.log().view(1, 1, 1), p.log().view(1, 1, 1), torch.ones(1, 1, dtype=torch.bool)))
        for p, q in zip(old, new, strict=True)
    )
    assert expectation == pytest.approx(exact, abs=1e-6)


def test_privileged_loss_leaves_out_what_is_unknown() -> None:
    nan = float("nan")
    predicted = torch.tensor([[0.01, 3.0], [1.0, 7.0]], requires_grad=True)
    loss = privileged_loss(predicted, torch.tensor([[0.0, nan], [0.5, nan]]))
    assert loss.item() == pytest.approx((0.5 * 0.01**2 / 0.05 + (0.5 - 0.5 * 0.05)) / 2)
    nothing = privileged_loss(predicted, torch.full((2, 2), nan))
    nothing.backward()
    assert nothing.item() == 0.0
    assert predicted.grad is not None
    assert not predicted.grad.any()


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns, returns) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(4), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(1 - 4)
    assert explained_variance(torch.arange(4.0), torch.ones(4)) == 0.0


def test_schedules() -> None:
    constant, linear, cosine = (replace(CONFIG, schedule=s) for s in ("constant", "linear", "cosine"))
    at = [0, 25, 50, 75, 100]
    assert [constant.rate_factor(i, 100) for i in at] == [1.0] * 5
    assert [linear.rate_factor(i, 100) for i in at] == pytest.approx([1, 0.775, 0.55, 0.325, 0.1])
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 100)) / 2 for i in at]
    assert [cosine.rate_factor(i, 100) for i in at] == pytest.approx(expected)
    warm = replace(CONFIG, warmup_iterations=4)
    assert [warm.rate_factor(i, 100) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
