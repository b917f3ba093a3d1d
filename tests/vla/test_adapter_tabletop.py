import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla.adapters.tabletop import AdapterError, command, observation, tabletop_contract
from vla.policy import Policy
from vla.types import ModelInputs


def assert_same_bits(one: ModelInputs, two: ModelInputs) -> None:
    for name in ("images", "state", "tokens"):
        a, b = getattr(one, name), getattr(two, name)
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name


def as_from_a_bus(raw: dict[str, Any]) -> dict[str, Any]:
    """The same readings as another path gives them: read-only strided images, lists, the other quaternion."""
    big = {key: np.repeat(raw[key], 2, axis=1) for key in ("third_person", "wrist")}
    images = {key: image[:, ::2] for key, image in big.items()}
    for image in images.values():
        image.flags.writeable = False
    vectors = {key: raw[key].tolist() for key in ("eef_pos", "commanded_pos", "qpos")}
    return {**raw, **images, **vectors, "eef_quat_wxyz": [-value for value in raw["eef_quat_wxyz"]]}


def test_every_path_gives_the_same_bits(
    policy: Policy, native: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    raws = [native(seed) for seed in range(3)]
    raws[0]["eef_quat_wxyz"] = np.array([0.0, -1.0, 0.0, 0.0])  # w = 0: the sign is not decided by w
    raws[1]["eef_quat_wxyz"] = np.array([1.0, 0.0, -0.0, 0.0])
    policy.save(tmp_path / "checkpoint")
    stored = Policy.load(tmp_path / "checkpoint", None)
    direct = [observation(raw, "put the carrot on the plate") for raw in raws]
    other = [observation(as_from_a_bus(raw), "Put the carrot on the plate ") for raw in raws]
    inputs = policy.codec.encode(direct)
    assert inputs.state.dtype == np.float32 and inputs.images.shape == (3, 2, 32, 32, 3)
    for codec in (policy.codec, pickle.loads(pickle.dumps(policy.codec)), stored.codec):
        assert_same_bits(codec.encode(other), inputs)
        for row, seen in enumerate(direct):
            alone = codec.encode([seen])
            part = slice(row, row + 1)
            assert_same_bits(alone, ModelInputs(inputs.images[part], inputs.state[part], inputs.tokens[part]))
    actions = [chunk.actions.tobytes() for chunk in policy.act(direct)]
    assert actions == [chunk.actions.tobytes() for chunk in stored.act(other)]


def test_state_in_canonical_units(native: Callable[[int], dict[str, Any]]) -> None:
    raw = native(5)
    seen = observation(raw, "lift")
    assert seen.state["eef_position"].tolist() == raw["eef_pos"].tolist()
    assert seen.state["commanded_position"].tolist() == raw["commanded_pos"].tolist()
    assert seen.state["gripper_width"].tolist() == [raw["gripper_width"]]
    xyzw = seen.state["eef_rotation"]
    reference = Rotation.from_quat(raw["eef_quat_wxyz"], scalar_first=True)
    assert xyzw[0] + xyzw[1] >= 0 and (Rotation.from_quat(xyzw) * reference.inv()).magnitude() < 1e-12
    assert all(value.dtype == np.float64 for value in seen.state.values())
    assert set(seen.stamps) == set(seen.images) | set(seen.state) and set(seen.stamps.values()) == {0.25}


def test_the_rotation_of_a_tool_that_points_down_does_not_flip_with_its_last_digits(
    native: Callable[[int], dict[str, Any]],
) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        tilted = Rotation.from_rotvec(random.normal(0, 0.1, 3)) * Rotation.from_quat([0.5**0.5, 0.5**0.5, 0.0, 0.0])
        wxyz = tilted.as_quat(scalar_first=True) * random.choice([-1, 1])
        seen = observation({**native(0), "eef_quat_wxyz": wxyz}, "lift").state["eef_rotation"]
        assert np.abs(seen - [0.707, 0.707, 0.0, 0.0]).max() < 0.4


@pytest.mark.parametrize("quaternion", [[1.0, 0.0, -0.0, 0.0], [0.0, 0.6, 0.0, -0.8], [0.5, -0.5, 0.5, -0.5]])
def test_both_quaternions_of_a_rotation_give_the_same_bits(
    native: Callable[[int], dict[str, Any]], quaternion: list[float]
) -> None:
    rotations = [
        observation({**native(0), "eef_quat_wxyz": [sign * q if q else q for q in quaternion]}, "lift").state[
            "eef_rotation"
        ]
        for sign in (1, -1)
    ]
    assert rotations[0].tobytes() == rotations[1].tobytes()


def test_state_fits_the_contract(native: Callable[[int], dict[str, Any]]) -> None:
    contract = tabletop_contract(32, 4, 0.02, 0.1)
    seen = observation(native(0), "lift")
    assert {field.name: field.shape for field in contract.state} == {k: v.shape for k, v in seen.state.items()}
    assert [camera.name for camera in contract.cameras] == list(seen.images)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"eef_quat_wxyz": [1.0, 1.0, 0.0, 0.0]}, "NATIVE_QUATERNION"),
        ({"eef_quat_wxyz": [np.nan, 0.0, 0.0, 0.0]}, "NATIVE_QUATERNION"),
        ({"eef_pos": [[0.0, 0.0, 0.0]]}, "NATIVE_SHAPE"),
        ({"wrist": None}, "NATIVE_KEY"),
        ({"time": None}, "NATIVE_KEY"),
    ],
)
def test_bad_native_observations(native: Callable[[int], dict[str, Any]], change: dict[str, Any], code: str) -> None:
    raw = {key: value for key, value in (native(0) | change).items() if value is not None}
    with pytest.raises(AdapterError) as error:
        observation(raw, "lift")
    assert error.value.codes == (code,)


def test_command() -> None:
    row = np.array([0.01, -0.02, 0.0, 0.1, 0.0, -0.1, 0.51])
    step = command(row)
    assert step.delta_translation.tolist() == [0.01, -0.02, 0.0]
    assert step.delta_rotation.tolist() == [0.1, 0.0, -0.1]
    assert step.gripper_open is True and command(row * [1, 1, 1, 1, 1, 1, 0.9]).gripper_open is False
    for wrong in (row[:6], row[None], row * np.nan):
        with pytest.raises(AdapterError) as error:
            command(wrong)
        assert error.value.codes == ("ACTION_ROW",)
