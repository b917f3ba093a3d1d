"""The scripted expert, told where everything is, without a simulator."""

import numpy as np
import pytest

from vla.tasks.expert import CENTERED, CLOSE_STEPS, HOVER, SETTLE_STEPS, Expert, Privileged

TARGET = np.array([0.5, 0.1, 0.022])
MAX_TRANSLATION = 0.03


def view(tool: np.ndarray) -> Privileged:
    """The object at `TARGET`, the tool standing at `tool`."""
    return Privileged(
        target=TARGET, goal=np.array([0.45, -0.1, 0.005]), goal_top=0.01, half_height=0.022, commanded=tool,
        measured=tool, tilt=np.zeros(3), width=0.08,
    )  # fmt: skip


def opens(expert: Expert, tool: np.ndarray) -> bool:
    return bool(expert.act(view(tool))[6] == 1.0)


def test_it_closes_only_after_it_has_settled_over_the_grasp() -> None:
    expert = Expert(MAX_TRANSLATION, 0.1)
    assert [opens(expert, TARGET) for _ in range(SETTLE_STEPS)] == [True] * (SETTLE_STEPS - 1) + [False]


def test_a_step_away_from_the_grasp_starts_the_settling_again() -> None:
    expert, beside = Expert(MAX_TRANSLATION, 0.1), TARGET + np.array([1.1 * CENTERED, 0, 0])
    tools = [TARGET] * (SETTLE_STEPS - 1) + [beside] + [TARGET] * SETTLE_STEPS
    assert [opens(expert, tool) for tool in tools] == [True] * (2 * SETTLE_STEPS - 1) + [False]


def test_it_comes_down_on_the_object_and_does_not_sweep() -> None:
    expert, tool = Expert(MAX_TRANSLATION, 0.1), TARGET + np.array([0.1, 0.0, 0.02])
    heights = []
    while expert.phase == "reach":
        step = expert.act(view(tool))[:3]
        assert np.linalg.norm(step) <= MAX_TRANSLATION + 1e-12
        tool = tool + step
        heights.append((np.linalg.norm(tool[:2] - TARGET[:2]), tool[2]))
    assert max(z for _, z in heights) > TARGET[2] + 0.5 * HOVER
    assert all(z > TARGET[2] + 0.02 for error, z in heights if error > 0.02)
    assert np.linalg.norm(tool - TARGET) < CENTERED


@pytest.mark.parametrize(("distance", "lost"), [(0.0, False), (0.06, True)])
def test_it_opens_and_reaches_again_when_the_grasp_is_lost(distance: float, lost: bool) -> None:
    expert = Expert(MAX_TRANSLATION, 0.1)
    for _ in range(SETTLE_STEPS + CLOSE_STEPS):
        expert.act(view(TARGET))
    tool = TARGET + np.array([0, 0, distance])
    assert opens(expert, tool) is lost
