import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from vla.contract import Camera, ContractError, PolicyContract


@pytest.fixture
def contract(offered: PolicyContract) -> PolicyContract:
    """A policy's contract: with statistics and a task set, unlike the offered one."""
    return replace(offered, statistics_hash="a" * 64, instruction=replace(offered.instruction, task_set="put_on_plate"))


def with_camera(contract: PolicyContract, **change: Any) -> PolicyContract:
    first, *rest = contract.cameras
    return replace(contract, cameras=(replace(first, **change), *rest))


def with_state(contract: PolicyContract, **change: Any) -> PolicyContract:
    first, *rest = contract.state
    return replace(contract, state=(replace(first, **change), *rest))


def with_action(contract: PolicyContract, **change: Any) -> PolicyContract:
    return replace(contract, action=replace(contract.action, **change))


def with_instruction(contract: PolicyContract, **change: Any) -> PolicyContract:
    return replace(contract, instruction=replace(contract.instruction, **change))


MISMATCHES: dict[str, tuple[str, Callable[[PolicyContract], PolicyContract]]] = {
    "version": ("CONTRACT_VERSION", lambda c: replace(c, version=c.version + 1)),
    "embodiment": ("EMBODIMENT", lambda c: replace(c, embodiment="ur5")),
    "no camera": ("CAMERA_MISSING", lambda c: replace(c, cameras=c.cameras[1:])),
    "renamed camera": ("CAMERA_MISSING", lambda c: with_camera(c, name="left")),
    "role": ("CAMERA_ROLE", lambda c: with_camera(c, role="wrist")),
    "height": ("CAMERA_SIZE", lambda c: with_camera(c, height=33)),
    "width": ("CAMERA_SIZE", lambda c: with_camera(c, width=64)),
    "color": ("CAMERA_COLOR", lambda c: with_camera(c, color="bgr")),
    "field of view": ("CAMERA_FOV", lambda c: with_camera(c, fov_y_deg=c.cameras[0].fov_y_deg + 0.6)),
    "mirrored": ("CAMERA_MIRRORED", lambda c: with_camera(c, mirrored=True)),
    "position": ("CAMERA_POSE", lambda c: with_camera(c, position_tolerance_m=0.03)),
    "rotation": ("CAMERA_POSE", lambda c: with_camera(c, rotation_tolerance_deg=2.5)),
    "no state": ("STATE_FIELD", lambda c: replace(c, state=c.state[1:])),
    "shape": ("STATE_SHAPE", lambda c: with_state(c, shape=(4,))),
    "unit": ("STATE_UNIT", lambda c: with_state(c, unit="mm")),
    "state frame": ("STATE_FRAME", lambda c: with_state(c, frame="world")),
    "mode": ("ACTION_MODE", lambda c: with_action(c, control_mode="absolute_ee")),
    "representation": ("ACTION_ROTATION", lambda c: with_action(c, rotation="euler_xyz")),
    "action frame": ("ACTION_FRAME", lambda c: with_action(c, frame="tool")),
    "metres": ("ACTION_UNIT", lambda c: with_action(c, translation_unit="mm")),
    "radians": ("ACTION_UNIT", lambda c: with_action(c, rotation_unit="deg")),
    "reference of a delta": ("ACTION_REFERENCE", lambda c: with_action(c, relative_to="measured")),
    "rate": ("ACTION_RATE", lambda c: with_action(c, rate_hz=10.0)),
    "chunk": ("ACTION_CHUNK", lambda c: with_action(c, chunk=8)),
    "dimension": ("ACTION_DIM", lambda c: with_action(c, dim=8)),
    "translation bound": ("ACTION_BOUND", lambda c: with_action(c, max_translation=0.019)),
    "rotation bound": ("ACTION_BOUND", lambda c: with_action(c, max_rotation=0.05)),
    "polarity": ("GRIPPER_POLARITY", lambda c: with_action(c, gripper="1=closed,0=open")),
    "statistics": ("STATISTICS_HASH", lambda c: replace(c, statistics_hash="b" * 64)),
    "tasks": ("INSTRUCTION_TASKS", lambda c: with_instruction(c, task_set="libero_spatial")),
    "prompt filled twice": ("INSTRUCTION_TEMPLATE", lambda c: with_instruction(c, template="Please {task}!")),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_each_mismatch_has_its_code_and_a_remedy(contract: PolicyContract, case: str) -> None:
    code, change = MISMATCHES[case]
    with pytest.raises(ContractError) as error:
        contract.check(change(contract), "the left arm")
    assert error.value.codes == (code,)
    (found,) = error.value.incompatibilities
    assert found.expected != found.found and found.remedy and "the left arm" in found.field
    assert code in str(error.value) and found.remedy in str(error.value)


def test_accepts_itself_and_what_the_simulator_offers(contract: PolicyContract, offered: PolicyContract) -> None:
    contract.check(contract, "itself")
    contract.check(offered, "simulator")


def test_accepts_more_than_it_needs(contract: PolicyContract) -> None:
    extra = Camera("overhead", "third_person", 480, 640, 60.0, 0.1, 5.0)
    richer = replace(
        with_action(contract, max_translation=0.05),
        cameras=(extra, *reversed(contract.cameras)),
        state=(*reversed(contract.state), replace(contract.state[0], name="force")),
    )
    contract.check(richer, "richer robot")
    with pytest.raises(ContractError):
        richer.check(contract, "poorer robot")


def test_reports_all_mismatches_at_once_and_survives_pickling(contract: PolicyContract) -> None:
    other = with_action(with_camera(contract, height=16), chunk=2, rate_hz=5.0)
    with pytest.raises(ContractError) as error:
        contract.check(other, "robot")
    assert error.value.codes == ("CAMERA_SIZE", "ACTION_RATE", "ACTION_CHUNK")
    copy = pickle.loads(pickle.dumps(error.value))
    assert type(copy) is ContractError and copy.faults == error.value.faults and str(copy) == str(error.value)


def test_json_round_trip(contract: PolicyContract, offered: PolicyContract) -> None:
    for original in (contract, offered):
        copy = PolicyContract.from_json(original.to_json())
        assert copy == original and copy.to_json() == original.to_json()


BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "unknown key": ("UNKNOWN_KEY", lambda d: d | {"note": 1}),
    "unknown nested key": ("UNKNOWN_KEY", lambda d: d | {"action": d["action"] | {"note": 1}}),
    "missing key": ("MISSING_KEY", lambda d: {k: v for k, v in d.items() if k != "embodiment"}),
    "missing default": (
        "MISSING_KEY",
        lambda d: d | {"action": {k: v for k, v in d["action"].items() if k != "gripper"}},
    ),
    "text for a number": ("WRONG_TYPE", lambda d: d | {"action": d["action"] | {"chunk": "4"}}),
    "bool for a number": ("WRONG_TYPE", lambda d: d | {"version": True}),
    "unknown mode": ("WRONG_TYPE", lambda d: d | {"action": d["action"] | {"control_mode": "velocity"}}),
    "object for a list": ("WRONG_TYPE", lambda d: d | {"cameras": {}}),
    "a list": ("WRONG_TYPE", lambda d: [d]),
    "zero rate": ("CONTRACT_INVALID", lambda d: d | {"action": d["action"] | {"rate_hz": 0}}),
    "camera twice": ("CONTRACT_INVALID", lambda d: d | {"cameras": d["cameras"] * 2}),
    "no place for the task": (
        "CONTRACT_INVALID",
        lambda d: d | {"instruction": d["instruction"] | {"template": "go"}},
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_json_is_read_strictly(contract: PolicyContract, case: str) -> None:
    code, damage = BROKEN[case]
    with pytest.raises(ContractError) as error:
        PolicyContract.from_json(json.dumps(damage(json.loads(contract.to_json()))))
    assert code in error.value.codes


@pytest.mark.parametrize("text", ["", "{", '{"version": NaN}', '{"version": 1, "version": 1}'])
def test_damaged_json(text: str) -> None:
    with pytest.raises(ContractError) as error:
        PolicyContract.from_json(text)
    assert error.value.codes == ("NOT_JSON",)
