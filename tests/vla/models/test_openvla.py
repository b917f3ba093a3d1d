"""What RL needs of the published models: batches, probabilities, adapters, gradients; on the tiny checkpoint."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vla import lora
from vla.models import openvla
from vla.models.heads import rows_of
from vla.policy import Policy, PolicyError
from vla.types import ModelInputs

VOCABULARY, BINS = 32064, 256
Published = Callable[..., Policy]
Inputs = Callable[..., ModelInputs]
Close = Callable[..., None]
KINDS = [{}, {"decoding": "parallel"}, {"decoding": "parallel", "stop": False}]


class Watch(TorchDispatchMode):
    """Bytes of tensors that are alive at once at most, and the most rows of logits over the action tokens.

    wide: whether a tensor of a batch had more columns than any part of the trunk.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.rows = 0
        self.wide = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                size = tensor.nbytes
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(tensor.untyped_storage(), self._gone, size)
                if tensor.dim() > 2 and tensor.shape[-1] == BINS:
                    self.rows = max(self.rows, tensor.numel() // BINS)
                self.wide |= tensor.dim() > 2 and tensor.shape[-1] > VOCABULARY / 10
        return result

    def _gone(self, size: int) -> None:
        self.alive -= size


@pytest.mark.parametrize("options", KINDS)
@torch.no_grad()
def test_a_padded_batch_gives_what_each_sample_gives_alone(
    published: Published, inputs: Inputs, close: Close, options: dict[str, Any]
) -> None:
    policy = published(values=1, **options)
    together, batch = inputs(policy, 0, 1, 2), policy.sample(inputs(policy, 0, 1, 2), 0.0)
    logits = policy.logits(together, batch.tokens)
    for i in range(3):
        alone = policy.sample(inputs(policy, i), 0.0)
        assert torch.equal(alone.tokens[0], batch.tokens[i])
        close("values", alone.values[0], batch.values[i])
        close("log-probabilities", alone.log_probs[0], batch.log_probs[i])
        close("logits", policy.logits(inputs(policy, i), alone.tokens)[0], logits[i])


@pytest.mark.parametrize(("options", "limit"), [({}, 1e-5), ({"decoding": "parallel"}, 0.0)])
@torch.no_grad()
def test_rollout_and_training_see_the_same_probabilities(
    published: Published, inputs: Inputs, options: dict[str, Any], limit: float
) -> None:
    policy = published(values=1, **options)
    given = inputs(policy, 0, 1, 2)
    for temperature in (1.0, 0.6):
        drawn = policy.sample(given, temperature, torch.Generator().manual_seed(1))
        again = policy.evaluate_actions(given, drawn.tokens, temperature)
        assert (drawn.log_probs - again.log_probs).abs().max() <= limit
        assert (drawn.values - again.values).abs().max() <= limit
        assert drawn.tokens.unique().numel() > 5


def measured(policy: Policy, inputs: Inputs, counts: tuple[int, int]) -> tuple[float, bool, float]:
    """Bytes that a sample more takes at the peak, whether a tensor was of the vocabulary's size, logits a sample."""
    peaks = []
    for count in counts:
        given = inputs(policy, *[0] * count)
        tokens = torch.zeros(count, *policy.codec.action_shape, dtype=torch.int64)
        with Watch() as watch:
            policy.evaluate_actions(given, tokens, 1.0)
            policy.sample(given, 1.0, torch.Generator().manual_seed(0))
        peaks.append(watch.peak)
    return (peaks[1] - peaks[0]) / (counts[1] - counts[0]), watch.wide, watch.rows / counts[1]


@pytest.mark.parametrize("options", KINDS[:2])
@torch.no_grad()
def test_nothing_of_the_size_of_the_vocabulary_grows_with_the_batch(
    published: Published, inputs: Inputs, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what would be wasteful is found to be: the vocabulary's logits, or those of the whole sequence."""
    policy = published(**options)
    model: Any = policy.model
    model.vision_backbone = Blank()  # the towers' own memory is not in question
    decided = policy.codec.contract.action.chunk * 7
    logits, trunk = 4 * BINS * decided, 4 * 64 * (1 + 4 + 40 + decided + 1)  # bytes, float32
    # Logits are held a few times over, as probabilities and their sums in float64; so is the trunk's width, in a
    # block's parts and in the cache.
    limit = 8 * logits + 40 * trunk

    def frugal(counts: tuple[int, int]) -> bool:
        per_sample, wide, rows = measured(policy, inputs, counts)
        return 0 < per_sample < limit and not wide and rows == decided

    assert frugal((64, 256))
    head, few = model.language_model.lm_head, (8, 24)
    assert frugal(few)
    with monkeypatch.context() as wasteful:
        wasteful.setattr(openvla, "rows_of", lambda layer, hidden, low, high: layer(hidden)[..., low:high])
        assert not frugal(few), "the whole vocabulary at the action tokens"
    for rows in (BINS, VOCABULARY):

        def everywhere(_: Any, given: Any, output: Any, rows: int = rows) -> None:
            head(output.last_hidden_state) if rows == VOCABULARY else rows_of(head, output.last_hidden_state, 0, rows)

        hook = model.trunk.register_forward_hook(everywhere)
        assert not frugal(few), f"{rows} rows for the whole sequence"
        hook.remove()


class Blank(torch.nn.Module):
    """Towers that see nothing, with few tokens."""

    def forward(self, images: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros(len(images), 4, 136), None


@pytest.mark.parametrize("options", KINDS[:2])
def test_only_adapters_and_heads_take_gradients_and_merging_keeps_the_function(
    published: Published, inputs: Inputs, close: Close, options: dict[str, Any]
) -> None:
    policy, layers = published(values=1, **options), lora.Lora(rank=4)
    given = inputs(policy, 0, 1)
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    untouched = policy.logits(given, torch.zeros(2, *policy.codec.action_shape, dtype=torch.int64))
    assert lora.attach(policy.model, layers) > 20
    tokens = policy.sample(given, 1.0, torch.Generator().manual_seed(0)).tokens
    fresh = policy.logits(given, torch.zeros_like(tokens))
    assert torch.equal(fresh, untouched)  # an adapter begins as nothing
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        evaluation = policy.evaluate_actions(given, tokens, 1.0)
        (evaluation.values.square().mean() - evaluation.log_probs.mean()).backward()
        assert all(p.grad is not None for n, p in policy.model.named_parameters() if p.requires_grad), "idle adapters"
        optimizer.step()
        optimizer.zero_grad()
    after = policy.model.state_dict()
    base = {k.replace(".base_layer", ""): v for k, v in after.items() if ".lora_" not in k}
    assert base.keys() == before.keys()
    changed = {k for k in before if not torch.equal(before[k], base[k])}
    assert changed and all(k.startswith("value_head.") for k in changed)
    assert set(lora.trained(policy.model)) == {n for n, p in policy.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        trained = policy.logits(given, tokens)
        assert (trained - untouched).abs().max() > 0.05
        deviation = lora.merge(policy.model, lambda: policy.logits(given, tokens))
        assert deviation is not None and deviation < 1e-4
        close("merged logits", policy.logits(given, tokens), trained, 1e-4)
    assert policy.model.state_dict().keys() == before.keys()


def test_parts_that_are_saved_as_a_whole_get_no_adapters(published: Published) -> None:
    model = published().model
    with pytest.raises(lora.AdapterError, match=r"found 'project'.*Name some of .*projector") as caught:
        lora.attach(model, lora.Lora(rank=4, modules_to_save=["project"]))
    assert caught.value.code == "LORA_MODULES"
    lora.attach(model, lora.Lora(rank=4, modules_to_save=["projector"]))
    kinds = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    projector = [name for name in kinds if name.startswith("projector.")]
    assert projector and all(kinds[name] for name in projector) and not any(".lora_" in name for name in projector)
    trunk = [name for name in kinds if name.startswith("language_model.")]
    assert all(kinds[name] == (".lora_" in name) for name in trunk) and any(kinds[name] for name in trunk)


class Kept:
    """Bytes that autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self.bytes = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes += tensor.nbytes
        return tensor


@pytest.mark.parametrize("options", KINDS[:2])
def test_checkpointed_gradients_are_the_same_and_keep_less(
    published: Published, inputs: Inputs, options: dict[str, Any]
) -> None:
    policy = published(values=1, **options)
    given, tokens, found = inputs(policy, 0, 1), torch.zeros(2, *policy.codec.action_shape, dtype=torch.int64), []
    for _ in range(2):
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            loss = policy.evaluate_actions(given, tokens, 1.0).log_probs.mean()
        loss.backward()
        found.append(
            (
                loss.detach(),
                {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None},
                kept.bytes,
            )
        )
        policy.model.zero_grad(set_to_none=True)
        policy.model.checkpoint_gradients()
    (loss, gradients, whole), (again, recomputed, less) = found
    assert torch.equal(loss, again) and gradients.keys() == recomputed.keys() and len(gradients) > 50
    assert all(torch.allclose(gradients[n], recomputed[n], atol=1e-6) for n in gradients)
    assert less < 0.5 * whole


def test_a_head_of_values_for_each_action(published: Published, inputs: Inputs) -> None:
    policy = published(decoding="parallel", values=8)
    assert policy.sample(inputs(policy, 0, 1), 1.0, torch.Generator().manual_seed(0)).values.shape == (2, 8)


@torch.no_grad()
def test_a_regression_acts_and_is_refused_for_rl(published: Published, inputs: Inputs) -> None:
    policy = published("l1", unnorm_key="libero_spatial_no_noops")
    given = inputs(policy, 0)
    assert policy.actions(given).shape == (1, 8, 7) and np.isfinite(policy.actions(given)).all()
    with pytest.raises(PolicyError, match="regression"):
        policy.sample(given, 1.0)


def test_an_autoregressive_model_wants_the_tokens(published: Published, inputs: Inputs) -> None:
    policy = published()
    given = inputs(policy, 0)
    with pytest.raises(ValueError, match="decide"):
        policy.model(*(torch.from_numpy(a) for a in (given.images, given.state, given.tokens)))
