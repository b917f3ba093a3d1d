"""Where training begins without a bundle: a policy with random weights for an environment's contract."""

from dataclasses import replace
from typing import Any

import numpy as np

from training import envs
from training.envs.base import EpisodeRequest, VectorEnv
from vla.contract import ActionSemantics, PolicyContract
from vla.errors import SimrealError
from vla.models import ModelConfig
from vla.policy import Policy
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer

EPISODES = 16  # whose instructions the tokenizer learns
FIRST_SEED = 1_000_000  # evaluation has those below


def untrained(model: ModelConfig, environment: str, settings: dict[str, Any], variant: str, seed: int) -> Policy:
    """A policy whose actions are spread over the contract's bounds, and which takes the state as it is."""
    env = envs.make(environment, 1, **settings)
    try:
        contract, sentences = env.contract, _sentences(env, variant)
    finally:
        env.close()
    action = contract.action
    sizes = replace(
        model, cameras=len(contract.cameras), state_dim=contract.state_size, chunk=action.chunk, action_dim=action.dim
    )
    statistics = Statistics(_bounds(action), _as_it_is(contract))
    tokenizer = train_tokenizer(sentences, model.words(), model.prompt_length)
    return Policy.untrained(sizes.data(), contract, statistics, tokenizer, seed)


def _sentences(env: VectorEnv, variant: str) -> list[str]:
    """Instructions of some episodes."""
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + EPISODES):
        env.reset(0, EpisodeRequest(seed, variant))
        found.append(env.observe([0])[0].instruction)
    return found


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
    low[-1] = 0.0  # the gripper's command
    return ArrayStatistics.from_bounds(low, high)


def _as_it_is(contract: PolicyContract) -> ArrayStatistics:
    size = contract.state_size
    return replace(ArrayStatistics.from_bounds([-1.0] * size, [1.0] * size), mask=(False,) * size)
