"""What a contract demands of a camera's calibration."""

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from vla.adapters.tabletop import tabletop_contract
from vla.contract import ContractError, PolicyContract
from vla.rig import CameraCalibration, Intrinsics, Measured, Mount, Transform, as_calibrated


@pytest.fixture
def contract() -> PolicyContract:
    return tabletop_contract(64, 8, 0.02, 0.05)


def seen(contract: PolicyContract, turn_deg: float = 0.0, days: float = 0.0) -> PolicyContract:
    """What a robot offers whose store has the third-person camera turned, and calibrated so many days ago."""
    import numpy as np
    from scipy.spatial.transform import Rotation

    first, *rest = contract.cameras
    assert first.pose is not None
    turn = Rotation.from_quat(first.pose.rotation_xyzw) * Rotation.from_euler("y", turn_deg, degrees=True)
    pose = Transform(first.pose.translation_m, tuple(float(v) for v in turn.as_quat()))
    then = (datetime.now(timezone.utc) - timedelta(days=days)).isoformat()
    measured = Measured(then, "test", 15, 0.5)
    lens = Intrinsics.from_fov(64, 64, first.fov_y_deg)
    stored = CameraCalibration(first.name, lens, measured, Mount("base", pose, measured))
    bare = replace(first, pose=None, calibration_age_days=None)
    assert np.isclose(stored.age_days(), days, atol=0.01)
    return replace(contract, cameras=(as_calibrated(bare, stored), *rest))


def demanding(contract: PolicyContract, days: float) -> PolicyContract:
    first, *rest = contract.cameras
    return replace(contract, cameras=(replace(first, calibration_age_days=days), *rest))


def test_a_camera_that_stands_as_trained_is_accepted(contract: PolicyContract) -> None:
    contract.check(seen(contract, 1.0, 3.0), "robot")
    demanding(contract, 30.0).check(seen(contract, 1.0, 3.0), "robot")


def test_a_camera_turned_by_three_degrees_is_refused(contract: PolicyContract) -> None:
    with pytest.raises(ContractError, match=r"3\.0 deg") as caught:
        contract.check(seen(contract, 3.0), "robot")
    assert caught.value.codes == ("CAMERA_POSE",)


def test_an_old_calibration_or_none_is_refused_where_one_is_demanded(contract: PolicyContract) -> None:
    with pytest.raises(ContractError, match="CALIBRATION_AGE"):
        demanding(contract, 7.0).check(seen(contract, 0.0, 8.0), "robot")
    first, *rest = contract.cameras
    bare = replace(contract, cameras=(replace(first, pose=None), *rest))
    with pytest.raises(ContractError, match="vla calibrate handeye"):
        demanding(contract, 7.0).check(bare, "robot")
    contract.check(bare, "robot")  # not demanded


def test_a_camera_on_the_other_side_is_refused(contract: PolicyContract) -> None:
    first, *rest = contract.cameras
    other = replace(contract, cameras=(replace(first, parent="tool"), *rest))
    with pytest.raises(ContractError, match="CAMERA_PARENT"):
        contract.check(other, "robot")


def test_contracts_written_before_there_were_calibrations_are_read(contract: PolicyContract) -> None:
    data = json.loads(contract.to_json())
    for camera in data["cameras"]:
        for key in ("parent", "pose", "calibration_age_days"):
            camera.pop(key, None)
    old = PolicyContract.from_json(json.dumps(data))
    assert old.cameras[0].pose is None and old.cameras[0].fov_y_deg == contract.cameras[0].fov_y_deg
    old.check(contract, "simulator")
    assert PolicyContract.from_json(contract.to_json()) == contract


def test_the_arms_delay_in_training_is_told_and_demands_nothing(contract: PolicyContract) -> None:
    late = replace(contract, action=replace(contract.action, motion_s=0.073))
    assert PolicyContract.from_json(late.to_json()) == late and "motion_s" not in contract.to_json()
    late.check(contract, "robot")
    contract.check(late, "robot")
    with pytest.raises(ContractError, match="motion_s"):
        replace(contract, action=replace(contract.action, motion_s=-0.01))
