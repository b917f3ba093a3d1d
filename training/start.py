"""Where training begins without a bundle, or with another value head than the bundle's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.envs import EnvConfig
from vla.contract import ActionSemantics, PolicyContract
from vla.errors import SimrealError
from vla.models import ModelConfig
from vla.policy import Policy, model_settings
from vla.policy import build as build_model
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer


def untrained(model: ModelConfig, where: EnvConfig, seed: int) -> Policy:
    """A policy whose actions are spread over the contract's bounds, and which takes the state as it is."""
    env = where.make(1)
    try:
        contract, sentences, told = env.contract, env.instructions, env.privileged_size
    finally:
        env.close()
    statistics = Statistics(_bounds(contract.action), _as_it_is(contract))
    return build(model, contract, sentences, told, statistics, seed)


def build(
    model: ModelConfig, contract: PolicyContract, sentences: Sequence[str], told: int, statistics: Statistics, seed: int
) -> Policy:
    """A policy with random weights, its sizes fitted to the contract.

    sentences: what the tokenizer learns; told: numbers of privileged state that simulation tells.
    """
    action = contract.action
    sizes = replace(
        model if told else model.unaided(),
        cameras=len(contract.cameras), state_dim=contract.state_size, chunk=action.chunk, action_dim=action.dim,
    )  # fmt: skip
    tokenizer = train_tokenizer(list(sentences), model.words(), model.prompt_length)
    return Policy.untrained(sizes.data(), contract, statistics, tokenizer, seed)


def revalued(bundle: Path, values: int, seed: int) -> Policy | None:
    """The policy of a bundle with a fresh head of so many values; None if it has as many already."""
    policy = Policy.load(bundle, None, "vla train")
    settings = model_settings(policy.model)
    if settings.get("values") == values:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = build_model(settings | {"values": values})
    kept = {k: v for k, v in policy.model.state_dict().items() if not k.startswith("value_head.")}
    fresh = {k: v for k, v in model.state_dict().items() if k.startswith("value_head.")}
    model.load_state_dict(kept | fresh)
    return Policy(policy.codec, model.to(next(policy.model.parameters()).dtype).eval(), policy.provenance)


def _bounds(action: ActionSemantics) -> ArrayStatistics:
    if not action.bounded:
        raise SimrealError(
            f"an untrained policy needs bounds of its actions, and the control mode {action.control_mode} has none",
            code="START", remedy="Start from a bundle (checkpoint=), whose statistics tell its actions.",
        )  # fmt: skip
    high = np.ones(action.dim)
    for name, columns in action.bounded:
        high[columns] = getattr(action, name)
    low = -high
    low[[*action.grippers]] = 0.0  # commands of the grippers
    return ArrayStatistics.from_bounds(low, high)


def _as_it_is(contract: PolicyContract) -> ArrayStatistics:
    size = contract.state_size
    return replace(ArrayStatistics.from_bounds([-1.0] * size, [1.0] * size), mask=(False,) * size)
