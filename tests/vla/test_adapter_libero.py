"""LIBERO's observations and actions <-> canonical units, on plain arrays."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from deployment import wire
from vla.adapters import libero as adapter
from vla.adapters.native import AdapterError
from vla.adapters.tabletop import tabletop_contract
from vla.contract import ContractError
from vla.policy import Policy
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer


def native(height: int = 6) -> dict[str, Any]:
    images = np.random.default_rng(0).integers(0, 256, (2, height, 8, 3)).astype(np.uint8)
    return {
        "agentview_image": images[0],
        "robot0_eye_in_hand_image": images[1],
        "base_pos": np.array([-0.66, 0.0, 0.912]),
        "robot0_eef_pos": np.array([-0.21, -0.01, 1.17]),
        "robot0_eef_quat": np.array([-0.9997, 0.02, 0.01, 0.01]) / np.linalg.norm([-0.9997, 0.02, 0.01, 0.01]),
        "robot0_gripper_qpos": np.array([0.03, -0.02]),
        "time": 1.25,
        "robot0_joint_pos": np.zeros(7),
    }


def test_every_path_gives_the_same_bits(tmp_path: Path) -> None:
    """The simulator, a bundle that was stored, a codec that was pickled, other readings, a policy server's wire."""
    contract = adapter.libero_contract(8, 4, 0.05, 0.5)
    action = ArrayStatistics.from_bounds([-0.05] * 3 + [-0.5] * 3 + [0.0], [0.05] * 3 + [0.5] * 3 + [1.0])
    state = ArrayStatistics.from_bounds([-1.0] * contract.state_size, [1.0] * contract.state_size)
    model = {
        "class": "nano", "vision": {"image_size": 8, "widths": [8, 8], "keypoints": 4}, "cameras": 2, "state_dim": 8,
        "prompt_length": 12, "hidden": 16, "layers": 1, "heads": 2, "intermediate": 32, "chunk": 4, "action_dim": 7,
        "n_bins": 32, "auxiliary": 0, "pointing": 0,
    }  # fmt: skip
    words = train_tokenizer(["pick up the bowl"], 512, 12)
    own = Policy.untrained(model, contract, Statistics(action, state), words, 3)
    own.save(tmp_path / "bundle")
    stored = Policy.load(tmp_path / "bundle", contract, "test")
    raw = native(8)
    strided = {key: value[:, ::-1].copy()[:, ::-1] for key, value in raw.items() if "image" in key}
    other = {
        **raw, **strided, "base_pos": raw["base_pos"].tolist(), "robot0_eef_quat": [-v for v in raw["robot0_eef_quat"]]
    }  # fmt: skip
    direct, again = (adapter.observation(given, sentence) for given, sentence in
                     ((raw, "pick up the bowl"), (other, "Pick up the bowl ")))  # fmt: skip
    inputs = own.codec.encode([direct])
    sent = wire.observation_from(wire.unpack(wire.pack(wire.observation_data(again))))
    for codec, seen in ((stored.codec, again), (pickle.loads(pickle.dumps(own.codec)), again), (own.codec, sent)):
        found = codec.encode([seen])
        for name in ("images", "state", "tokens"):
            assert getattr(found, name).tobytes() == getattr(inputs, name).tobytes(), name
    assert own.act([direct])[0].actions.tobytes() == stored.act([sent])[0].actions.tobytes()


def test_a_robot_does_not_take_such_a_policy() -> None:
    """Its cameras mirror nothing, and its deltas are added to the pose that was commanded."""
    policy = adapter.libero_contract(64, 8, 0.02, 0.06).with_statistics("a" * 64)
    robot = tabletop_contract(64, 8, 0.02, 0.06)
    with pytest.raises(ContractError) as caught:
        policy.check(robot, "policy_node")
    assert {"CAMERA_MIRRORED", "ACTION_REFERENCE"} <= {*caught.value.codes}


def test_an_observation_is_canonical() -> None:
    given = native()
    seen = adapter.observation(given, "pick up the bowl")
    np.testing.assert_allclose(seen.state["eef_position"], [0.45, -0.01, 0.258])
    np.testing.assert_allclose(seen.state["eef_rotation"], -given["robot0_eef_quat"])  # the sign that points down
    np.testing.assert_allclose(seen.state["gripper_width"], [0.05])
    assert seen.instruction == "pick up the bowl" and set(seen.stamps.values()) == {1.25}
    contract = adapter.libero_contract(8, 4, 0.05, 0.5)
    assert [field.name for field in contract.state] == list(seen.state)
    assert [camera.name for camera in contract.cameras] == list(seen.images)


def test_images_are_turned_by_180_degrees_as_in_the_published_evaluations() -> None:
    given = native()
    seen = adapter.observation(given, "")
    for role, name in (("third_person", "agentview_image"), ("wrist", "robot0_eye_in_hand_image")):
        image = seen.images[role]
        assert image.flags.c_contiguous and image.dtype == np.uint8
        np.testing.assert_array_equal(image, np.rot90(given[name], 2))
        assert np.array_equal(image[0, 0], given[name][-1, -1])


def test_an_action_is_scaled_and_its_gripper_turned_round() -> None:
    action = np.array([0.05, -0.025, 0.0, 0.5, -0.25, 0.1, 1.0])
    np.testing.assert_allclose(adapter.command(action), [1, -0.5, 0, 1, -0.5, 0.2, -1])
    action[6] = 0.0
    assert adapter.command(action)[6] == 1.0
    assert adapter.command(10 * action)[:6].tolist() == [1, -1, 0, 1, -1, 1]  # as LIBERO's controller cuts
    assert action[0] == 0.05, "the caller's array is its own"


def test_what_is_wrong_is_told() -> None:
    incomplete = native()
    del incomplete["base_pos"]
    with pytest.raises(AdapterError, match=r"NATIVE_KEY.*base_pos"):
        adapter.observation(incomplete, "")
    with pytest.raises(AdapterError, match="NATIVE_QUATERNION"):
        adapter.observation(native() | {"robot0_eef_quat": np.array([2.0, 0, 0, 0])}, "")
    for action in (np.zeros(6), np.array([np.nan, 0, 0, 0, 0, 0, 1]), np.full(7, np.inf)):
        with pytest.raises(AdapterError, match="ACTION_ROW"):
            adapter.command(action)
    for bounds in ((0.06, 0.5), (0.05, 0.6), (0.0, 0.5)):
        with pytest.raises(AdapterError, match="ACTION_BOUND"):
            adapter.libero_contract(8, 4, *bounds)


def test_rotations_are_of_the_hand_in_the_base_frame() -> None:
    """The fingers close along the hand's y axis, and at robosuite's start the hand's x axis is the base's."""
    seen = adapter.observation(native() | {"robot0_eef_quat": np.array([1.0, 0, 0, 0])}, "")
    down = Rotation.from_quat(seen.state["eef_rotation"]).as_matrix()
    np.testing.assert_allclose(down, np.diag([1, -1, -1]), atol=1e-12)
