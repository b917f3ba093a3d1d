"""The graph of nodes, once, for `ros2 launch` and for `vla deploy` alike. Imports no ROS."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARGUMENTS: Mapping[str, tuple[str, str]] = {
    "checkpoint": ("", "Folder of the checkpoint that acts"),
    "robot_ip": ("", "Address of the arm; with use_sim the twin's own"),
    "namespace": ("", "Namespace of all nodes and topics"),
    "arm_id": ("fr3", "Robot preset of configs/robot: fr3 or panda"),
    "load_gripper": ("true", "Whether the arm has a Franka Hand"),
    "use_sim": ("false", "Bring up the twin in place of arm and cameras, and start by itself"),
    "cameras": ("third_person,wrist", "Names of the cameras: namespaces of their image_raw and camera_info"),
    "dry_run": ("false", "Compute and publish everything, but do not move the arm"),
    "start": ("", "Go home and start without a call of ~/start; by default as use_sim"),
    "server": ("", "Address of `vla serve`, such as ws://gpu:8765, if the policy runs on another machine"),
    "contract": ("", "A contract.json, where the checkpoint lies on the server only"),
    "twin": ("nominal", "Preset of the twin: nominal or shifted"),
    "seed": ("90001", "Seed of the twin's episode"),
    "variant": ("in_distribution", "Variant of the task that the twin lays out"),
    "mode": ("asynchronous", "How chunks become motion: asynchronous, plain or synchronous"),
    "record": ("", "Folder in which every episode is recorded; empty: none"),
    "calibration": ("", "Store of the cameras' calibrations; empty: none"),
    "stop_on_success": ("true", "With use_sim: stop when the object is on the plate"),
}


@dataclass(frozen=True)
class NodeSpec:
    """executable: a module of this package, and the name of the node. parameters: its ROS parameters."""

    executable: str
    parameters: Mapping[str, Any]


class ArgumentError(ValueError):
    """An argument that can't be; the text says which and what to do."""


def nodes(arguments: Mapping[str, str]) -> list[NodeSpec]:
    """The nodes to start for these arguments (see ARGUMENTS), in order. Raises ArgumentError."""
    given = {name: arguments.get(name, default) for name, (default, _) in ARGUMENTS.items()}
    use_sim, dry_run = (_flag(given, name) for name in ("use_sim", "dry_run"))
    gripper = _flag(given, "load_gripper")
    start = _flag(given, "start") if given["start"] else use_sim
    if not given["checkpoint"] and not (given["server"] and given["contract"]):
        raise ArgumentError("checkpoint is missing: pass checkpoint:=FOLDER (or server and contract)")
    if not use_sim and not given["robot_ip"]:
        raise ArgumentError("robot_ip is missing: pass robot_ip:=ADDRESS of the arm, or use_sim:=true")
    cameras = [name.strip() for name in given["cameras"].split(",") if name.strip()]
    if not cameras:
        raise ArgumentError("cameras is empty: pass the names of the cameras, cameras:=third_person,wrist")
    common = {"arm_id": given["arm_id"], "cameras": cameras}
    found = []
    if use_sim:
        twin = {
            "preset": given["twin"], "seed": int(given["seed"]), "variant": given["variant"],
            "arm_id": given["arm_id"], "stop_on_success": _flag(given, "stop_on_success"),
        }  # fmt: skip
        found.append(NodeSpec("twin_node", twin))
    policy = {
        **common, "checkpoint": given["checkpoint"] if not given["server"] else "", "server": given["server"],
        "calibration": given["calibration"],
    }  # fmt: skip
    franka = {
        **common, "checkpoint": given["checkpoint"], "contract": given["contract"], "robot_ip": given["robot_ip"],
        "load_gripper": gripper, "dry_run": dry_run, "start": start, "mode": given["mode"],
        "calibration": given["calibration"],
    }  # fmt: skip
    found += [NodeSpec("policy_node", policy), NodeSpec("franka_node", franka)]
    if given["calibration"]:
        found.append(NodeSpec("rig_node", {**common, "calibration": given["calibration"]}))
    if given["record"]:
        recorder = {
            "folder": _writable(given["record"]), "cameras": cameras, "checkpoint": given["checkpoint"],
            "contract": given["contract"], "calibration": given["calibration"],
        }  # fmt: skip
        found.append(NodeSpec("recorder_node", recorder))
    return found


def calibration_nodes(
    camera: str,
    contract: str,
    arm_id: str,
    robot_ip: str,
    load_gripper: bool,
    board: str,
    twin: str,
    size: int,
    delay_s: float,
    with_arm: bool,
) -> list[NodeSpec]:
    """The nodes of a calibration; those of the twin, if `board` says where its board is ("hand" or "table")."""
    found = []
    if board:
        film = {"size": size, "rate_hz": 10.0, "delay_s": delay_s, "calibrate": [camera]}
        found.append(NodeSpec("twin_node", {"preset": twin, "arm_id": arm_id, "board": board, **film}))
    if with_arm:
        # Whoever calibrates stands by: a machine that is busy with images may be late, and the arm holds meanwhile.
        patience = {"heartbeat_s": 0.5, "hold_s": 1.0, "stop_s": 10.0, "camera_s": 10.0}
        franka = {"contract": contract, "robot_ip": robot_ip, "arm_id": arm_id, "load_gripper": load_gripper}
        found.append(NodeSpec("franka_node", {**franka, "cameras": [camera], **patience}))
    return found


def command_line(python: str, node: NodeSpec, namespace: str) -> list[str]:
    """The command that starts a node without ROS's launch system."""
    words = [python, "-m", "vla_policy.start", node.executable, "--ros-args"]
    if namespace:
        words += ["-r", f"__ns:=/{namespace.strip('/')}"]
    for name, value in node.parameters.items():
        if value != "":
            words += ["-p", f"{name}:={_text(value)}"]
    return words


def _flag(given: Mapping[str, str], name: str) -> bool:
    value = str(given[name]).lower()
    if value not in ("true", "false"):
        raise ArgumentError(f"{name} is {given[name]!r}: write true or false")
    return value == "true"


def _writable(folder: str) -> str:
    """The folder's absolute path, if it can be written, or made."""
    path = Path(folder).expanduser().absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ArgumentError(f"record is {folder!r}, which can't be written: pass a folder, record:=FOLDER")
    return str(path)


def _text(value: Any) -> str:
    """A parameter as YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(f"'{item}'" for item in value) + "]"
    return f"'{value}'" if isinstance(value, str) else str(value)
