"""A policy trained in ManiSkill gets the same inputs in the simulator, from ROS 2 messages and from a recording."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vla_policy import messages

from deployment.franka import ArmState
from deployment.inference import Inference
from deployment.replay import play
from vla.adapters.maniskill import action_semantics, maniskill_contract, observation
from vla.adapters.tabletop import STATE
from vla.contract import ContractError
from vla.decision import Decision
from vla.episode_reader import Episode
from vla.policy import Policy
from vla.recording import Recording
from vla.statistics import ArrayStatistics, Statistics
from vla.streams import Streams
from vla.tokenizer import train_tokenizer
from vla.types import ActionChunk, ModelInputs, Observation, Pose

SENTENCE = "put the red cube on the plate"
DOWN = np.array([0.5**0.5, 0.5**0.5, 0.0, 0.0])  # xyzw


def as_in_maniskill(native: Mapping[str, Any], instruction: str) -> Observation:
    """The same readings as ManiSkill has them: poses in the world, two fingers, the base where the world begins."""
    tool = np.concatenate([native["eef_pos"], native["eef_quat_wxyz"]])
    raw = {
        "base_pose": np.array([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]), "tcp_pose": tool, "time": native["time"],
        "qpos": np.array([0.1] * 7 + [native["gripper_width"] / 2] * 2), "qvel": np.zeros(9), "extra": None,
        "images": {"third_person": native["third_person"]}, "commanded_pos": native["commanded_pos"],
    }  # fmt: skip
    return observation(raw, instruction)


def native(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "third_person": random.integers(0, 256, (64, 64, 3)).astype(np.uint8), "eef_pos": random.normal(size=3),
        "eef_quat_wxyz": DOWN[[3, 0, 1, 2]], "commanded_pos": random.normal(size=3), "gripper_width": 0.07,
        "time": messages.to_seconds(messages.to_time(100.0 + seed)),
    }  # fmt: skip


def trained_in_maniskill(control_mode: str = "pd_ee_target_delta_pose") -> Policy:
    seen = native(0)
    raw = {
        "base_pose": [0.0] * 3 + [1.0] + [0.0] * 3, "tcp_pose": [*seen["eef_pos"], *seen["eef_quat_wxyz"]],
        "qpos": np.zeros(9), "qvel": np.zeros(9), "time": 0.0, "extra": None, "commanded_pos": seen["commanded_pos"],
        "images": {"third_person": seen["third_person"]},
    }  # fmt: skip
    contract = maniskill_contract(raw, action_semantics(control_mode, 8, 20.0, 0.02, 0.05), {"third_person": 42.1})
    action = ArrayStatistics.from_bounds([-0.001] * 3 + [-0.002] * 3 + [0.0], [0.001] * 3 + [0.002] * 3 + [1.0])
    state = ArrayStatistics.from_bounds([-1.0] * contract.state_size, [1.0] * contract.state_size)
    model = {
        "class": "nano", "vision": {"image_size": 64, "widths": [8, 16], "keypoints": 4}, "hidden": 16, "cameras": 1,
        "layers": 1, "heads": 2, "intermediate": 32, "chunk": 8, "n_bins": 32, "prompt_length": 48, "auxiliary": 0,
        "pointing": 0, "state_dim": contract.state_size,
    }  # fmt: skip
    return Policy.untrained(model, contract, Statistics(action, state), train_tokenizer([SENTENCE], 512, 48), 3)


def served(policy: Policy, raw: Mapping[str, Any]) -> tuple[Decision, ModelInputs]:
    """What policy_node decides on messages of these readings, and on which inputs."""
    found: list[Decision] = []
    encoded: list[ModelInputs] = []

    class Actor:
        contract = policy.contract

        def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
            encoded.append(policy.codec.encode(observations))
            return policy.act(observations)

    stamp, tool = raw["time"], Pose(raw["eef_pos"], DOWN)
    inference = Inference(Actor(), lambda waypoints: None, clock=lambda: stamp, on_decision=found.append)
    inference.instruction = "Put the red cube on the plate "
    inference.warm_up()
    streams = Streams(inference)
    state = ArmState(stamp, np.full(7, 0.1), np.zeros(7), tool, raw["gripper_width"])
    streams.image("third_person", messages.image_message(raw["third_person"], stamp, "third_person"))
    streams.joints(messages.joint_message(state, "fr3", True))
    streams.pose(messages.pose_message(tool, stamp, "fr3_link0"))
    streams.commanded(messages.pose_message(Pose(raw["commanded_pos"], DOWN), stamp, "fr3_link0"))
    inference.start()
    inference.due(stamp)
    until = time.monotonic() + 10
    while not found and time.monotonic() < until:
        time.sleep(0.01)
    assert found, inference.fault()
    inference.close()
    return found[0], encoded[-1]


def test_simulator_and_policy_node_give_the_same_bits() -> None:
    policy = trained_in_maniskill()
    for seed in range(5):
        raw = native(seed)
        simulated = as_in_maniskill(raw, SENTENCE)
        (ours,), inputs = policy.act([simulated]), policy.codec.encode([simulated])
        decision, theirs = served(policy, raw)
        for name in ("images", "state", "tokens"):
            assert getattr(inputs, name).tobytes() == getattr(theirs, name).tobytes(), name
        assert decision.chunk.actions.tobytes() == ours.actions.tobytes() and decision.chunk.stamp == ours.stamp


def test_a_recording_gives_them_again(tmp_path: Path, record: Callable[..., Path]) -> None:
    policy = trained_in_maniskill()
    found = play(Recording(Episode(record(tmp_path, policy, observe=as_in_maniskill))), policy)
    assert found.has_decisions and found.decisions == 10 and not found.missing
    assert found.observations_equal == found.actions_equal == 10 and found.greatest == 0.0


def test_deltas_from_the_measured_pose_are_refused_by_an_arm_that_adds_them_to_the_commanded_one() -> None:
    offered = trained_in_maniskill().contract
    assert {field.name for field in offered.state} == {field.name for field in STATE}
    with pytest.raises(ContractError) as caught:
        trained_in_maniskill("pd_ee_delta_pose").contract.check(offered, "policy_node")
    assert caught.value.codes == ("ACTION_REFERENCE",)
