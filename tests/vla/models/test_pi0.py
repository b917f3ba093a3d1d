"""pi0 at a tiny size: behind a contract, in a bundle, learning one chunk by heart."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.contract import ActionSemantics, Camera, Instruction, PolicyContract, StateField
from vla.policy import Policy, PolicyError
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer
from vla.types import ModelInputs, Observation

SENTENCE, SIDE, CHUNK = "put the mug on the plate", 28, 6
GEMMA = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
CONFIG: dict[str, Any] = {
    "class": "pi0", "chunk": CHUNK, "action_dim": 7, "state_dim": 3, "cameras": 2, "prompt_length": 12, "n_bins": 256,
    "values": 0, "steps": 10, "pad": 0, "bos": 1,
    "pi0": {
        "chunk_size": CHUNK, "max_action_dim": 8, "max_state_dim": 8,
        "vlm_config": {
            "model_type": "paligemma", "projection_dim": 32, "image_token_id": 600,
            "text_config": {"model_type": "gemma", "vocab_size": 601, **GEMMA},
            "vision_config": {
                "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "patch_size": 14,
                "image_size": SIDE, "num_hidden_layers": 2, "num_attention_heads": 2, "vision_use_head": False,
            },
        },
        "dit_config": {"model_type": "gemma", **GEMMA},
    },
}  # fmt: skip


@pytest.fixture
def policy() -> Policy:
    contract = PolicyContract(
        version=1, embodiment="tiny", state=(StateField("position", (3,), "m", "base"),),
        cameras=tuple(Camera(n, "third_person", SIDE, SIDE, 45.0, 0.01, 1.0) for n in ("left", "right")),
        action=ActionSemantics("delta_ee", "rotvec", "base", 0.1, 0.1, 10.0, CHUNK),
        instruction=Instruction("{task}", None), statistics_hash=None,
    )  # fmt: skip
    numbers = Statistics(
        ArrayStatistics.from_bounds([-0.1] * 6 + [0.0], [0.1] * 6 + [1.0]),
        ArrayStatistics.from_bounds([-1.0] * 3, [1.0] * 3),
    )
    return Policy.untrained(CONFIG, contract, numbers, train_tokenizer([SENTENCE], 512, 12), seed=0)


@pytest.fixture
def seen() -> Observation:
    random = np.random.default_rng(0)
    images = {name: random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for name in ("left", "right")}
    return Observation(
        images, {"position": np.array([0.1, 0.2, 0.3])}, SENTENCE, dict.fromkeys([*images, "position"], 5.0)
    )


def test_a_bundle_gives_the_same_chunk_and_other_noise_another(
    policy: Policy, seen: Observation, tmp_path: Path
) -> None:
    policy.save(tmp_path / "bundle")
    again = Policy.load(tmp_path / "bundle", None)
    (first,), (second,) = policy.act([seen]), again.act([seen])
    assert first.actions.shape == (CHUNK, 7) and first.stamp == 5.0
    assert np.array_equal(first.actions, second.actions)
    (other,) = again.act([seen], generator=torch.Generator().manual_seed(1))
    assert np.abs(other.actions - first.actions).max() > 1e-3


def test_padding_and_the_rest_of_the_batch_change_nothing(policy: Policy, seen: Observation) -> None:
    inputs = policy.codec.encode([seen, seen])
    tokens = inputs.tokens.copy()
    tokens[1] = policy.codec.tokenizer.encode("the mug")
    noise = torch.randn(2, *policy.model.noise_shape, generator=torch.Generator().manual_seed(0))

    def run(rows: slice, width: int) -> torch.Tensor:
        parts = (inputs.images[rows], inputs.state[rows], tokens[rows, -width:])
        return policy.model(*(torch.from_numpy(p) for p in parts), noise=noise[rows]).actions

    with torch.no_grad():
        together = run(slice(0, 2), 12)
        assert torch.allclose(run(slice(1, 2), 3), together[1:], atol=1e-5)
        assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_it_learns_a_chunk_by_heart(policy: Policy, seen: Observation) -> None:
    torch.manual_seed(0)
    inputs = policy.codec.encode([seen] * 16)
    wanted = torch.linspace(-0.8, 0.8, CHUNK * 7).reshape(1, CHUNK, 7)
    parts = tuple(torch.as_tensor(p) for p in (inputs.images, inputs.state, inputs.tokens))
    optimizer = torch.optim.AdamW(policy.model.parameters(), 3e-3)
    losses = []
    for _ in range(250):
        loss = policy.model.loss(*parts, wanted.expand(16, -1, -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:20])
    reached = policy.outputs(ModelInputs(inputs.images[:2], inputs.state[:2], inputs.tokens[:2]))
    assert (reached - wanted).abs().mean() < 0.15


def test_it_is_refused_for_rl(policy: Policy, seen: Observation) -> None:
    with pytest.raises(PolicyError, match="regression"):
        policy.sample(policy.codec.encode([seen]), 1.0)
