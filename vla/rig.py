"""Camera models and poses as calibrated, and the store that keeps them.

A store is a folder: `STORE/CAMERA/0001.yaml`, `0002.yaml`, ... Nothing is overwritten: each calibration writes the next
number, and the highest one counts. One store is one rig: its `rig.yaml` has what concerns no single camera.

Frames: a camera's pose is that of its optical frame (x right, y down, z forward). Units: m, rad, s, px; quaternions
xyzw. Pixel coordinates count from the centre of the upper left pixel, as OpenCV and ROS do.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from omegaconf import OmegaConf

from vla import options
from vla.errors import CodedError, ConfigError, Fault

if TYPE_CHECKING:
    from vla.contract import Camera  # which imports this module

RIG_VERSION = 1
DAY_S = 86400.0
Parent = Literal["base", "tool"]
DISTORTION = {"pinhole": 5, "fisheye": 4}  # numbers that each model has
T = TypeVar("T")


class RigError(CodedError):
    """A store or a calibration that can't be used."""


@dataclass(frozen=True)
class Transform:
    """A pose in a parent frame. translation_m: `[3]`. rotation_xyzw: unit quaternion."""

    translation_m: tuple[float, float, float]
    rotation_xyzw: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        numbers = (*self.translation_m, *self.rotation_xyzw)
        if not all(math.isfinite(v) for v in numbers) or abs(math.hypot(*self.rotation_xyzw) - 1) > 1e-3:
            raise ValueError(f"expected finite numbers and a quaternion of length 1, found {numbers}")

    @staticmethod
    def from_matrix(motion: np.ndarray) -> "Transform":
        """From `[4, 4]`."""
        from scipy.spatial.transform import Rotation  # takes a while, and every worker imports this module

        x, y, z = (float(v) for v in motion[:3, 3])
        a, b, c, d = (float(v) for v in Rotation.from_matrix(motion[:3, :3]).as_quat(canonical=True))
        return Transform((x, y, z), (a, b, c, d))

    @property
    def matrix(self) -> np.ndarray:
        """`[4, 4]`: takes points of this frame into the parent's."""
        x, y, z, w = np.array(self.rotation_xyzw) / math.hypot(*self.rotation_xyzw)
        crossed = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
        made = np.eye(4)
        made[:3, :3] += 2 * w * crossed + 2 * crossed @ crossed
        made[:3, 3] = self.translation_m
        return made

    def distance(self, other: "Transform") -> tuple[float, float]:
        """m and deg to another one."""
        ours, theirs = (np.array(t.rotation_xyzw) / math.hypot(*t.rotation_xyzw) for t in (self, other))
        apart = min(float(np.linalg.norm(ours - theirs)), float(np.linalg.norm(ours + theirs)))  # a chord
        return math.dist(self.translation_m, other.translation_m), math.degrees(4 * math.asin(min(apart / 2, 1.0)))


@dataclass(frozen=True)
class Intrinsics:
    """A camera model, px.

    model: pinhole with OpenCV's k1 k2 p1 p2 k3 (ROS: plumb_bob), or fisheye with k1 to k4 (ROS: equidistant).
    """

    model: Literal["pinhole", "fisheye"]
    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    distortion: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if min(self.width, self.height, self.fx, self.fy) <= 0:
            raise ValueError("expected a size and focal lengths above 0")
        if len(self.distortion) not in (0, DISTORTION[self.model]):
            raise ValueError(f"expected {DISTORTION[self.model]} numbers of distortion, found {len(self.distortion)}")

    @property
    def matrix(self) -> np.ndarray:
        """`[3, 3]`."""
        return np.array([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])

    @property
    def coefficients(self) -> np.ndarray:
        """Of the distortion, zeros if there is none."""
        return np.array(self.distortion or (0.0,) * DISTORTION[self.model])

    @property
    def fov_y_deg(self) -> float:
        """Vertical field of view of the undistorted image."""
        return math.degrees(2 * math.atan(self.height / 2 / self.fy))

    def scaled(self, width: int, height: int) -> "Intrinsics":
        """Of the same image, scaled to another size of the same proportions."""
        if self.width * height != self.height * width:
            fault = f"{self.width} x {self.height}"
            remedy = "Calibrate at this size, or crop the image first: a crop has other intrinsics."
            raise RigError(Fault("CAMERA_SIZE", "intrinsics", f"proportions of {width} x {height}", fault, remedy))
        scale = width / self.width
        return replace(
            self, width=width, height=height, fx=self.fx * scale, fy=self.fy * scale,
            cx=(self.cx + 0.5) * scale - 0.5, cy=(self.cy + 0.5) * scale - 0.5,
        )  # fmt: skip

    @staticmethod
    def from_fov(width: int, height: int, fov_y_deg: float) -> "Intrinsics":
        """A pinhole camera with square pixels, its axis in the middle of the image."""
        focal = height / 2 / math.tan(math.radians(fov_y_deg) / 2)
        return Intrinsics("pinhole", width, height, focal, focal, (width - 1) / 2, (height - 1) / 2)


@dataclass(frozen=True)
class Measured:
    """How a part was found.

    time: UTC, ISO 8601.
    method: in words.
    views: images or poses used.
    error_px: root mean square reprojection error of held-out views.
    error_mm: of a pose, the same at the tool.
    sigma: standard deviations by name, with their unit.
    """

    time: str
    method: str
    views: int
    error_px: float
    error_mm: float | None = None
    sigma: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        datetime.fromisoformat(self.time)

    def age_days(self, now: datetime | None = None) -> float:
        made = datetime.fromisoformat(self.time)
        made = made if made.tzinfo else made.replace(tzinfo=timezone.utc)
        return ((now or datetime.now(timezone.utc)) - made).total_seconds() / DAY_S


@dataclass(frozen=True)
class Delay:
    """Seconds. capture_s: from the motion to the stamp of the image that shows it. arrival_s: to the image's arrival.

    motion_s: from a command to the arm's motion. The 95% intervals are (low, high).
    """

    capture_s: float
    capture_95: tuple[float, float]
    arrival_s: float
    arrival_95: tuple[float, float]
    motion_s: float
    motion_95: tuple[float, float]
    measured: Measured


@dataclass(frozen=True)
class Mount:
    """Where a camera stands. parent: the robot's base or its tool centre. board: of the board on the other side."""

    parent: Parent
    pose: Transform
    measured: Measured
    board: Transform | None = None


@dataclass(frozen=True)
class BoardSize:
    """A ChArUco board.

    squares_x: squares across.
    squares_y: squares down.
    square_m: edge of a square in m.
    marker_m: edge of a marker in m.
    dictionary: OpenCV's name of the markers' dictionary.
    """

    squares_x: int = 9
    squares_y: int = 7
    square_m: float = 0.025
    marker_m: float = 0.018
    dictionary: str = "DICT_4X4_50"

    def __post_init__(self) -> None:
        if self.squares_x < 3 or self.squares_y < 3 or not 0 < self.marker_m < self.square_m:
            raise ValueError("a board has 3 x 3 squares or more, and markers that are smaller than its squares")


@dataclass(frozen=True)
class CameraCalibration:
    """All that is known about a camera. serial: of the device; "" if it tells none. board: what it was found with."""

    camera: str
    intrinsics: Intrinsics
    measured: Measured
    mount: Mount | None = None
    delay: Delay | None = None
    serial: str = ""
    board: BoardSize | None = None
    version: int = RIG_VERSION

    def age_days(self, now: datetime | None = None) -> float:
        """Of its oldest part but the delay, which no drift of the camera changes."""
        parts = [self.measured, *([self.mount.measured] if self.mount else [])]
        return max(part.age_days(now) for part in parts)


@dataclass(frozen=True)
class Store:
    """See the module's docstring."""

    folder: Path

    def cameras(self) -> tuple[str, ...]:
        if not self.folder.is_dir():
            remedy = "Check the path, or make it: `vla calibrate intrinsics store=FOLDER camera=NAME`."
            raise RigError(Fault("STORE_MISSING", str(self.folder), "a folder of calibrations", "nothing", remedy))
        return tuple(sorted(f.name for f in self.folder.iterdir() if f.is_dir() and self.revisions(f.name)))

    def revisions(self, camera: str) -> tuple[Path, ...]:
        """The files of a camera, the oldest first."""
        return tuple(sorted((self.folder / camera).glob("[0-9][0-9][0-9][0-9].yaml")))

    def has(self, camera: str) -> bool:
        return bool(self.revisions(camera))

    def read(self, camera: str) -> CameraCalibration:
        """The newest calibration of a camera."""
        found = self.revisions(camera)
        if not found:
            others = ", ".join(self.cameras()) or "none"
            remedy = f"`vla calibrate intrinsics camera={camera}` makes it; in this store: {others}."
            raise RigError(Fault("CALIBRATION_MISSING", f"camera {camera}", str(self.folder), "no file", remedy))
        calibration = load(CameraCalibration, found[-1])
        if calibration.version != RIG_VERSION:
            remedy = "Calibrate again, or use the version of simreal that wrote it."
            raise RigError(Fault("RIG_VERSION", str(found[-1]), str(RIG_VERSION), str(calibration.version), remedy))
        return calibration

    def motion(self, cameras: Iterable[str]) -> Delay | None:
        """The newest measurement of the arm's delay that came with one of these cameras'."""
        found = [delay for name in cameras if self.has(name) and (delay := self.read(name).delay) is not None]
        return min(found, key=lambda delay: delay.measured.age_days(), default=None)

    def write(self, calibration: CameraCalibration) -> Path:
        """As the camera's next revision."""
        folder = self.folder / calibration.camera
        folder.mkdir(parents=True, exist_ok=True)
        found = self.revisions(calibration.camera)
        file = folder / f"{int(found[-1].stem) + 1 if found else 1:04d}.yaml"
        dump(calibration, file)
        return file


def as_calibrated(camera: "Camera", calibration: CameraCalibration) -> "Camera":
    """A camera as a contract offers it, with its calibrated pose and the age of that."""
    mount = calibration.mount
    if mount is None:
        return camera
    age = calibration.age_days()
    return replace(camera, parent=mount.parent, pose=mount.pose, calibration_age_days=age)


def attachment(store: Path, cameras: Sequence[str]) -> str:
    """What a store knows of these cameras, as JSON for a recording."""
    return json.dumps({name: options.write(Store(store).read(name)) for name in cameras if Store(store).has(name)})


def provenance(store: Path, cameras: Sequence[str]) -> dict[str, dict[str, object]]:
    """Of each camera that the store has: when its oldest part was made, and how exact it is."""
    found: dict[str, dict[str, object]] = {}
    for name in cameras:
        if Store(store).has(name):
            own = Store(store).read(name)
            parts = [own.measured, *([own.mount.measured] if own.mount else [])]
            oldest = max(parts, key=lambda part: part.age_days())
            error_mm = own.mount.measured.error_mm if own.mount else None
            found[name] = {"made": oldest.time, "error_px": own.measured.error_px, "error_mm": error_mm}
    return found


def read_attachment(data: bytes | None, where: str) -> dict[str, CameraCalibration]:
    """Camera -> calibration, of a recording; empty if none was recorded."""
    if data is None:
        return {}
    try:
        return {str(name): options.read(CameraCalibration, found) for name, found in json.loads(data).items()}
    except Exception as error:  # of JSON, or the checks
        remedy = "It was recorded by another release: replay it with that one."
        raise RigError(Fault("RIG_FILE", f"{where}: calibration.json", "calibrations", str(error), remedy)) from error


def trained_with(cameras: Sequence["Camera"], stored: Mapping[str, CameraCalibration]) -> tuple["Camera", ...]:
    """Cameras of a contract, for whoever learns with those of a store: a robot's have to stand as they do."""
    return tuple(
        replace(as_calibrated(c, found), fov_y_deg=found.intrinsics.fov_y_deg, calibration_age_days=None)
        if (found := stored.get(c.name)) is not None else c
        for c in cameras
    )  # fmt: skip


def now() -> str:
    """The present time as the store writes it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def load(schema: type[T], file: Path) -> T:
    """A dataclass from YAML, every key checked."""
    remedy = "Correct the file, or delete it and calibrate again."
    try:
        data = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        if not isinstance(data, dict):
            raise ConfigError(f"expected a mapping, found {type(data).__name__}")
        return options.read(schema, {str(key): value for key, value in data.items()})
    except Exception as error:  # of the file, the YAML parser, or the checks
        raise RigError(Fault("RIG_FILE", str(file), f"a {schema.__name__}", str(error), remedy)) from error


def dump(value: object, file: Path) -> None:
    """Write beside and rename: whoever reads never sees half a file."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(options.write(value))), encoding="utf-8")
    temporary.rename(file)
