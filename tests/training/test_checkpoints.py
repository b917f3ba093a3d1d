"""The checkpoint that comes along: it solves the task in the simulator of this version, and needs its eyes for it."""

from pathlib import Path

import pytest

from training.envs.tabletop import Tabletop
from training.evaluate import play
from vla.policy import Policy

FOLDER = Path(__file__).parents[2] / "checkpoints" / "put_on_plate"
SEEDS = range(90_001, 90_017)


@pytest.mark.parametrize(("blind", "least", "most"), [(False, 12, 16), (True, 0, 1)])
def test_the_checkpoint_that_comes_along(blind: bool, least: int, most: int) -> None:
    env = Tabletop(8)
    policy = Policy.load(FOLDER, env.contract, "test")
    results = play(policy, env, "in_distribution", SEEDS, blind=blind)
    env.close()
    assert least <= sum(result.success for result in results) <= most
    assert policy.provenance.commit and policy.provenance.curve["env_steps"] > 0
