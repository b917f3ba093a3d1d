"""The graph: which nodes run, with which parameters, and what is refused before anything starts."""

from dataclasses import replace
from pathlib import Path

import pytest
from vla_policy import graph
from vla_policy.deploy import DeployConfig, arguments, outcome, run

from vla.errors import SimrealError


def test_the_twin_takes_the_place_of_arm_and_cameras() -> None:
    nodes = {node.executable: node.parameters for node in graph.nodes({"checkpoint": "/c", "use_sim": "true"})}
    assert list(nodes) == ["twin_node", "policy_node", "franka_node"]
    assert nodes["franka_node"]["start"] is True and nodes["franka_node"]["robot_ip"] == ""
    assert nodes["policy_node"]["cameras"] == ["third_person", "wrist"]


def test_a_real_arm_starts_only_when_told_to() -> None:
    nodes = {n.executable: n.parameters for n in graph.nodes({"checkpoint": "/c", "robot_ip": "172.16.0.2"})}
    assert list(nodes) == ["policy_node", "franka_node"]
    assert nodes["franka_node"]["start"] is False and nodes["franka_node"]["robot_ip"] == "172.16.0.2"


def test_with_a_server_the_policy_node_needs_no_checkpoint() -> None:
    given = {"server": "ws://gpu:8765", "contract": "/c/contract.json", "robot_ip": "172.16.0.2"}
    policy, franka = graph.nodes(given)
    assert policy.parameters["checkpoint"] == "" and policy.parameters["server"] == "ws://gpu:8765"
    assert franka.parameters["contract"] == "/c/contract.json"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"use_sim": "true"}, "checkpoint is missing"),
        ({"checkpoint": "/c"}, "robot_ip is missing"),
        ({"checkpoint": "/c", "use_sim": "yes"}, "write true or false"),
        ({"checkpoint": "/c", "use_sim": "true", "cameras": " , "}, "cameras is empty"),
        ({"server": "ws://gpu:8765", "robot_ip": "1.2.3.4"}, "checkpoint is missing"),
    ],
)
def test_what_can_not_be_is_refused(given: dict[str, str], told: str) -> None:
    with pytest.raises(graph.ArgumentError, match=told):
        graph.nodes(given)


def test_a_recorder_joins_where_a_folder_is_given(tmp_path: Path) -> None:
    given = {"checkpoint": "/c", "use_sim": "true", "cameras": "a,b", "record": str(tmp_path / "new" / "folder")}
    *others, recorder = graph.nodes(given)
    assert recorder.executable == "recorder_node" and [n.executable for n in others][-1] == "franka_node"
    assert recorder.parameters["folder"] == given["record"] and recorder.parameters["cameras"] == ["a", "b"]
    assert recorder.parameters["checkpoint"] == "/c" and not (tmp_path / "new").exists()
    config = DeployConfig(checkpoint=tmp_path, use_sim=True, record=Path("relative"))
    assert arguments(config)["record"] == str(Path.cwd() / "relative")


def test_a_folder_that_can_not_be_written_is_refused_early(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(graph.ArgumentError, match="can't be written"):
            graph.nodes({"checkpoint": "/c", "use_sim": "true", "record": str(folder)})


def test_the_command_line_carries_parameters_and_namespace() -> None:
    node = graph.NodeSpec(
        "franka_node", {"cameras": ["a", "b"], "dry_run": True, "robot_ip": "", "arm_id": "fr3", "n": 3}
    )
    words = graph.command_line("python", node, "left")
    assert words[:5] == ["python", "-m", "vla_policy.start", "franka_node", "--ros-args"]
    assert "__ns:=/left" in words and "cameras:=['a', 'b']" in words and "dry_run:=true" in words
    assert "arm_id:='fr3'" in words and "n:=3" in words and not any("robot_ip" in w for w in words)


def test_trials_that_can_not_be_are_refused_before_anything_starts(tmp_path: Path) -> None:
    good = DeployConfig(checkpoint=tmp_path, use_sim=True, trials=1, out=tmp_path / "x.json")
    for change, code in (({"use_sim": False}, "TRIALS"), ({"out": None}, "OUT"), ({"variant": "dark"}, "VARIANT")):
        with pytest.raises(SimrealError) as caught:
            run(replace(good, **change))
        assert caught.value.code == code and caught.value.remedy


def test_the_outcome_is_told_also_when_every_trial_faulted() -> None:
    assert outcome({"episodes": 0, "faulted": 3}) == "no trial was scored: 3 faulted"
    scored = {
        "episodes": 4,
        "successes": 3,
        "rate": 0.75,
        "wilson95": [0.3, 0.95],
        "faulted": 1,
        "latency_ms": {"p99": None},
    }
    assert outcome(scored) == "3 of 4 (75.0%, 30 to 95), 1 faulted"


def test_a_store_is_checked_by_the_policy_and_published() -> None:
    given = {"checkpoint": "/c", "robot_ip": "1", "calibration": "/r"}
    nodes = {n.executable: n.parameters for n in graph.nodes(given)}
    assert all(nodes[name]["calibration"] == "/r" for name in ("policy_node", "franka_node", "rig_node"))
    assert "rig_node" not in [n.executable for n in graph.nodes({"checkpoint": "/c", "robot_ip": "1"})]


def test_a_calibration_starts_the_twin_with_a_board_and_no_policy() -> None:
    twin, franka = graph.calibration_nodes("wrist", "/c.json", "fr3", "", True, "table", "nominal", 400, 0.06, True)
    assert (twin.executable, franka.executable) == ("twin_node", "franka_node")
    assert twin.parameters["board"] == "table" and twin.parameters["calibrate"] == ["wrist"]
    assert franka.parameters["contract"] == "/c.json" and franka.parameters["cameras"] == ["wrist"]
    assert graph.calibration_nodes("wrist", "/c.json", "fr3", "1", True, "", "nominal", 400, 0.0, False) == []
