"""The store of calibrations."""

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from vla.rig import BoardSize, CameraCalibration, Delay, Intrinsics, Measured, Mount, RigError, Store, Transform, now

MEASURED = Measured(now(), "ChArUco", 30, 0.31, None, {"fx_px": 0.4})
CALIBRATION = CameraCalibration(
    "third_person", Intrinsics("pinhole", 640, 480, 600.0, 601.0, 320.0, 240.0, (0.1, 0.0, 0.0, 0.0, 0.0)), MEASURED,
    Mount("base", Transform((0.9, 0.0, 0.5), (0.0, 0.0, 0.0, 1.0)), replace(MEASURED, error_mm=0.5)),
    Delay(0.031, (0.03, 0.032), 0.04, (0.03, 0.05), 0.06, (0.05, 0.07), MEASURED), "123456", BoardSize(),
)  # fmt: skip


def test_what_is_written_is_read_and_nothing_is_overwritten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.write(CALIBRATION)
    assert store.read("third_person") == CALIBRATION
    second = store.write(replace(CALIBRATION, serial="654321"))
    assert (first.name, second.name) == ("0001.yaml", "0002.yaml") and first.is_file()
    assert store.read("third_person").serial == "654321" and store.cameras() == ("third_person",)
    assert store.revisions("third_person") == (first, second) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text.replace("fx:", "focus:"), "unknown key"),
        (lambda text: text.replace("rotation_xyzw:", "rotation_xyzw: [0, 0, 0, 2]\n    ignored:"), "RIG_FILE"),
        (lambda text: text.replace("\nversion: 1", "\nversion: 9"), "RIG_VERSION"),
        (lambda text: text[: len(text) // 2] + "\n  : : [", "RIG_FILE"),
    ],
)
def test_a_damaged_file_is_told(tmp_path: Path, damage, told: str) -> None:
    store = Store(tmp_path)
    file = store.write(CALIBRATION)
    file.write_text(damage(file.read_text()))
    with pytest.raises(RigError, match=told) as caught:
        store.read("third_person")
    assert "calibrate" in str(caught.value).lower()


def test_a_camera_or_a_store_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RigError, match="STORE_MISSING"):
        Store(tmp_path / "none").cameras()
    Store(tmp_path).write(CALIBRATION)
    with pytest.raises(RigError, match="third_person"):
        Store(tmp_path).read("wrist")


def test_the_age_is_that_of_the_oldest_part() -> None:
    then = datetime.now(timezone.utc) - timedelta(days=10)
    old = replace(CALIBRATION, measured=replace(MEASURED, time=then.isoformat()))
    assert old.age_days() == pytest.approx(10, abs=0.01) and CALIBRATION.age_days() < 0.1


def test_the_newest_measurement_of_the_arms_delay_counts(tmp_path: Path) -> None:
    store, delay = Store(tmp_path), CALIBRATION.delay
    assert delay is not None and store.motion(["third_person", "wrist"]) is None
    before = (datetime.now(timezone.utc) - timedelta(days=3)).isoformat()
    store.write(replace(CALIBRATION, delay=replace(delay, measured=replace(MEASURED, time=before))))
    store.write(replace(CALIBRATION, camera="wrist", delay=replace(delay, motion_s=0.09)))
    store.write(replace(CALIBRATION, camera="other", delay=None))
    for cameras, motion_s in ((["third_person", "wrist", "other"], 0.09), (["third_person", "none"], 0.06)):
        found = store.motion(cameras)
        assert found is not None and found.motion_s == motion_s
    assert store.motion(["other"]) is None


def test_transforms_turn_and_shift() -> None:
    pose = Transform((1.0, 2.0, 3.0), (0.0, 0.0, np.sqrt(0.5), np.sqrt(0.5)))
    assert np.allclose(pose.matrix @ [1, 0, 0, 1], [1, 3, 3, 1]) and Transform.from_matrix(pose.matrix) == pose
    metres, degrees = pose.distance(Transform((1.0, 2.0, 3.1), (0.0, 0.0, 0.0, 1.0)))
    assert metres == pytest.approx(0.1) and degrees == pytest.approx(90)
    with pytest.raises(ValueError, match="length 1"):
        Transform((0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0))
