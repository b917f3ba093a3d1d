"""Which node and GPU every process gets, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from training.pipeline.crew import Crew, Node, Place, man, picture
from training.pipeline.placement import PlacementConfig
from training.pipeline.seats import SeatError

HEAD = Node("h", "10.0.0.1", 0, is_here=True)
A = Node("a", "10.0.0.2", 2, frozenset({"CPU", "simulator"}))
B = Node("b", "10.0.0.3", 4, frozenset({"CPU", "simulator"}))
NODES = [HEAD, A, B]


def seated(nodes: list[Node] = NODES, **words: Any) -> Crew:
    return man(PlacementConfig(**words), nodes)


def nodes_of(places: tuple[Place, ...]) -> list[int]:
    return [place.node for place in places]


def test_devices_are_counted_through_all_nodes() -> None:
    crew = seated(policy="1-2", learner="0,5", environment_workers=4)
    assert crew.policies == (Place(1, 1), Place(2, 0))
    assert crew.learners == (Place(1, 0), Place(2, 3))
    assert [place.device for place in crew.learners] == ["cuda:0", "cuda:3"]
    # Environments on processors are only where the policy has GPUs.
    assert nodes_of(crew.environments) == [1, 1, 2, 2]
    assert [crew.policy_of(i) for i in range(4)] == [0, 0, 1, 1]
    assert crew.nodes == [1, 2]


def test_environments_on_gpus_are_decided_for_on_their_node_and_their_gpu() -> None:
    two = [replace(A, gpus=2), replace(B, gpus=2)]
    crew = seated(two, environments="all", policy="all", learner="all", environment_workers=8, stages=1)
    assert nodes_of(crew.environments) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(crew.policies[crew.policy_of(i)] == place for i, place in enumerate(crew.environments))
    one = seated([A], environments="all", policy="all", environment_workers=3)
    assert one.environments == (Place(0, 0), Place(0, 1), Place(0, 0))


def test_processors_of_all_nodes_or_some_or_those_with_a_simulator() -> None:
    crew = seated(environment_workers=5, policy_workers=1, learners=2)
    assert nodes_of(crew.environments) == [0, 0, 1, 1, 2]
    assert nodes_of(crew.policies) == [0, 1, 2]
    assert crew.learners == (Place(0), Place(0))
    assert nodes_of(seated(environment_workers=4, environment_nodes=2).environments) == [0, 0, 1, 1]
    assert nodes_of(seated(environment_workers=4, environment_resource="simulator").environments) == [1, 1, 2, 2]
    assert nodes_of(seated(environment_workers=2).environments) == [0, 1]
    assert [crew.policy_of(i) for i in range(5)] == [0, 0, 1, 1, 2]
    assert nodes_of(seated(policy_workers=2, environment_workers=6).policies) == [0, 0, 1, 1, 2, 2]


def test_lanes_are_on_all_nodes_and_ask_a_policy_worker_of_theirs() -> None:
    crew = seated(schedule="asynchronous", environment_workers=6, lanes=2, policy_workers=2, learners=1)
    assert nodes_of(crew.environments) == nodes_of(crew.policies) == [0, 0, 1, 1, 2, 2]
    assert [crew.policy_of(i) for i in range(6)] == [0, 1, 2, 3, 4, 5]
    on_gpus = seated([replace(A, is_here=True), B], schedule="asynchronous", policy="1-2", learner="0")
    assert on_gpus.learners == (Place(0, 0),) and on_gpus.policies == (Place(0, 1), Place(1, 0))
    with pytest.raises(SeatError, match=r"has its learners on the node of the command, not on 10\.0\.0\.2") as caught:
        seated(schedule="asynchronous", policy="1-2", learner="0")
    assert "Give the command on 10.0.0.2" in caught.value.remedy


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ({"learner": "0-6"}, "device 6"),
        ({"environment_resource": "maniskill"}, "none of 3 nodes declares the resource 'maniskill'"),
        ({"environment_nodes": 4, "environment_workers": 8}, "can't be spread over 4 nodes: 3 can have some"),
        ({"environment_nodes": 3}, "2 environment workers can't be spread over 3 nodes"),
        ({"environments": "0", "environment_nodes": 1}, "names GPUs"),
        ({"environments": "0", "environment_resource": "maniskill"}, "10.0.0.2, which does not declare"),
    ],
)
def test_nodes_that_are_not_there_are_refused(words: dict[str, Any], what: str) -> None:
    with pytest.raises(SeatError, match=what) as caught:
        seated(**words)
    assert caught.value.remedy


def test_the_picture_names_every_process() -> None:
    crew = seated(policy="1-2", learner="0,5", environment_workers=4)
    table = picture(crew, NODES)
    cells = [list(column.cells) for column in table.columns]
    assert cells[1] == ["10.0.0.1 (here)", "10.0.0.2", "10.0.0.3"]
    assert cells[3] == ["", "2 on cpu", "2 on cpu"]
    assert cells[5] == ["", "1 on cuda:0", "1 on cuda:3"]
