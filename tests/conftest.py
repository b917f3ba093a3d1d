"""A small, untrained, but real policy, what the robot's side records with it, a way to wait, cameras of ManiSkill."""

import io
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployment.executor import integrate
from deployment.franka import ArmConfig
from deployment.reference import Pose, Waypoints
from vla import configuration, graphics, message_types
from vla.adapters.tabletop import observation, tabletop_contract
from vla.decision import Decision
from vla.episodes import EpisodeInfo, EpisodeWriter
from vla.message_types import header
from vla.policy import Policy
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer
from vla.types import Observation

graphics.choose()  # before any test imports mujoco

SENTENCE = "put the red cube on the plate"


START = 1_795_280_550.25
KINDS = {
    "joint_states": "sensor_msgs/msg/JointState", "current_pose": "geometry_msgs/msg/PoseStamped",
    "commanded_pose": "geometry_msgs/msg/PoseStamped", "target_pose": "geometry_msgs/msg/PoseStamped",
    "chunk": "trajectory_msgs/msg/MultiDOFJointTrajectory", "decision": "std_msgs/msg/String",
    "policy_node/instruction": "std_msgs/msg/String",
    "franka_node/status": "std_msgs/msg/String", "third_person/image_raw/compressed": "sensor_msgs/msg/CompressedImage",
    "wrist/image_raw/compressed": "sensor_msgs/msg/CompressedImage", "twin_node/time": "sensor_msgs/msg/TimeReference",
}  # fmt: skip
Edit = Callable[[str, float, dict[str, Any]], dict[str, Any] | None]
Observe = Callable[[Mapping[str, Any], str], Observation]


def untrained() -> Policy:
    """64 px and chunks of 8, as the quickstart's; it moves the tool by 1 mm a step at most."""
    contract = tabletop_contract(
        image_size=64, chunk=8, max_translation=0.02, max_rotation=0.06, task_set="put_on_plate"
    )
    action = ArrayStatistics.from_bounds([-0.001] * 3 + [-0.002] * 3 + [0.0], [0.001] * 3 + [0.002] * 3 + [1.0])
    state = ArrayStatistics.from_bounds([-1.0] * contract.state_size, [1.0] * contract.state_size)
    model = {
        "class": "nano", "vision": {"image_size": 64, "widths": [8, 16], "keypoints": 4}, "hidden": 16,
        "layers": 1, "heads": 2, "intermediate": 32, "chunk": 8, "n_bins": 32, "prompt_length": 48,
    }  # fmt: skip
    return Policy.untrained(model, contract, Statistics(action, state), train_tokenizer([SENTENCE], 512, 48), 3)


@pytest.fixture
def policy() -> Policy:
    return untrained()


@pytest.fixture
def acting() -> Policy:
    """The same, where a folder's tests have another `policy`."""
    return untrained()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a checkpoint."""
    folder = tmp_path_factory.mktemp("bundle") / "checkpoint"
    untrained().save(folder)
    return folder


@pytest.fixture
def record() -> Callable[..., Path]:
    """record(folder, policy, seconds, number, edit=...): an episode in which the policy acted, as it is recorded.

    The observations are made without the assembler, as the simulator makes them, whose adapter is `observe`.
    edit(topic, s since the beginning, message): another message in its place, or None for none. pace: of a twin,
    simulated over passed time. attached: more attachments, name -> text.
    """
    return recorded


def recorded(folder: Path, policy: Policy, seconds: float = 3.0, number: int = 1, close: bool = True,
             edit: Edit = lambda topic, since, message: message, pace: float | None = None,
             observe: Observe = observation,
             attached: Mapping[str, str] = {}, **known: Any) -> Path:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    info = EpisodeInfo(number, START, "/left", SENTENCE, **known)
    provenance = json.dumps({"commit": "", "config": {}, "seed": policy.provenance.seed, "curve": {}})
    files = {"contract.json": policy.contract.to_json(), "provenance.json": provenance, **attached}
    writer = EpisodeWriter(folder, info, files, reserve_bytes=0)
    channels = {t: writer.channel(f"/left/{t}", k, message_types.definition(k)) for t, k in KINDS.items()}
    random = np.random.default_rng(number)

    def write(topic: str, at: float, **fields: Any) -> None:
        message = edit(topic, at - START, fields)
        if message is not None:
            writer.write(channels[topic], message_types.encode(KINDS[topic], message), round(at * 1e9))

    def pose(position: np.ndarray, at: float) -> dict[str, Any]:
        turned = dict(zip("xyzw", (0.5**0.5, 0.5**0.5, 0.0, 0.0), strict=True))
        place = dict(zip("xyz", position.tolist(), strict=True))
        return {"header": header(at, "fr3_link0"), "pose": {"position": place, "orientation": turned}}

    write("policy_node/instruction", START, data=SENTENCE)
    write("franka_node/status", START, data="running")
    for tick in range(round(100 * seconds)):
        if tick % 50 == 0:
            writer.flush()  # which else follows the clock, and nobody waits here
        at = round(START * 100 + tick) / 100
        tool = np.array([0.46 + 0.05 * np.sin(tick / 100), 0.02 * np.cos(tick / 30), 0.22])
        wanted, width = tool + random.normal(0, 1e-3, 3), 0.08 if tick < 150 else 0.03
        fingers = {"name": ["fr3_finger_joint1", "fr3_finger_joint2"], "position": [width / 2] * 2}
        write("joint_states", at + 0.001, header=header(at), velocity=[0.0] * 2, effort=[], **fingers)
        write("current_pose", at + 0.001, **pose(tool, at))
        write("commanded_pose", at + 0.001, **pose(wanted, at))
        write("target_pose", at + 0.001, **pose(wanted, at))
        if pace is not None:
            simulated = header(100.0 + pace * tick / 100)["stamp"]
            write("twin_node/time", at, header=header(at), time_ref=simulated, source="twin")
        if tick % 5:
            continue
        images = {c.name: smooth(random, c.height) for c in policy.contract.cameras}
        for camera, image in images.items():
            file = io.BytesIO()
            Image.fromarray(image).save(file, "png")
            data = {"header": header(at), "format": "rgb8; png compressed bgr8", "data": file.getvalue()}
            write(f"{camera}/image_raw/compressed", at + 0.02, **data)
        if tick % 30 == 0:
            native = {
                **images, "eef_pos": tool, "eef_quat_wxyz": np.array([0.0, 0.5**0.5, 0.5**0.5, 0.0]),
                "commanded_pos": wanted, "gripper_width": width, "time": message_time(at),
            }  # fmt: skip
            seen = observe(native, SENTENCE)
            chunk = policy.act([seen])[0]
            reference = Pose(wanted, np.array([0.5**0.5, 0.5**0.5, 0.0, 0.0]))
            write("chunk", at + 0.05, **chunk_fields(integrate(chunk, reference, 1 / policy.contract.action.rate_hz)))
            write("decision", at + 0.05, data=Decision.of(seen, chunk, 0.02).to_json())
    write("franka_node/status", START + seconds, data="idle")
    return writer.close() if close else next(folder.glob(f"*{number:06d}_*.part"))


def chunk_fields(waypoints: Waypoints) -> dict[str, Any]:
    """As policy_node sends it, see vla_policy/messages.py."""
    opens = [bool(waypoints.gripper_open[0]), *waypoints.gripper_open]
    places = [waypoints.anchor.position, *waypoints.positions]
    turns = [waypoints.anchor.rotation, *waypoints.rotations]
    still = dict(zip("xyzw", (0.0, 0.0, 0.0, 1.0), strict=True))
    points = [
        {
            "transforms": [
                {"translation": dict(zip("xyz", place.tolist(), strict=True)),
                 "rotation": dict(zip("xyzw", turn.tolist(), strict=True))},
                {"translation": {"x": float(is_open), "y": 0.0, "z": 0.0}, "rotation": still},
            ],
            "velocities": [], "accelerations": [],
            "time_from_start": header(time - waypoints.stamp)["stamp"],
        } for time, place, turn, is_open in zip([waypoints.stamp, *waypoints.times], places, turns, opens, strict=True)
    ]  # fmt: skip
    names = ["fr3_hand_tcp", "fr3_gripper"]
    return {"header": header(waypoints.stamp, "fr3_link0"), "joint_names": names, "points": points}


def message_time(at: float) -> float:
    """A time as it comes out of a message."""
    stamp = header(at)["stamp"]
    return float(stamp["sec"]) + 1e-9 * float(stamp["nanosec"])


def smooth(random: np.random.Generator, size: int) -> np.ndarray:
    """An image `[size, size, 3]` that a video can keep."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(6 * (x * random.uniform(-1, 1) + y * random.uniform(-1, 1)) + k) for k in range(3)]
    return np.clip(128 + 90 * np.stack(waves, -1), 0, 255).astype(np.uint8)


@pytest.fixture
def until() -> Callable[..., bool]:
    """until(condition, seconds): waits for it; whether it came true in time."""

    def wait(condition: Callable[[], Any], seconds: float = 5.0) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    return wait


@pytest.fixture(scope="session")
def rendering() -> Callable[..., Any]:
    """Makes a ManiSkill environment with cameras. Where nothing renders the test is skipped; in CI something does."""
    from training import envs
    from training.envs.base import GraphicsError

    def make(**settings: Any) -> Any:
        try:
            return envs.make("maniskill", 1, **{"obs": "rgb", "image_size": 64} | settings)
        except GraphicsError as error:
            if os.environ.get("CI") == "true":
                raise
            return pytest.skip(str(error))

    return make


@pytest.fixture(scope="module")
def robot() -> ArmConfig:
    return configuration.load(ArmConfig, "fr3", folder=configuration.config_folder() / "robot")
