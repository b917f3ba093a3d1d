"""The tabletop Franka, simulated or as a twin: plain arrays in MuJoCo's conventions <-> canonical units.

Native observation: a mapping with `third_person` and `wrist` (uint8 RGB `[H, W, 3]`), `eef_pos` `[3]` in m
and `eef_quat_wxyz` `[4]` (tool centre in the base frame, MuJoCo's order), `commanded_pos` `[3]` in m (the
reference that the controller follows), `gripper_width` in m, `time` in s. Other keys (`qpos`) are left alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.contract import (
    BARE_INSTRUCTION,
    CONTRACT_VERSION,
    ActionSemantics,
    Camera,
    Instruction,
    PolicyContract,
    StateField,
)
from vla.errors import CodedError, Fault
from vla.types import Observation

EMBODIMENT = "franka"
CAMERAS = ("third_person", "wrist")
THIRD_PERSON_FOV_Y_DEG = 34.0
WRIST_FOV_Y_DEG = 75.0
STATE = (
    StateField("eef_position", (3,), "m", "base"),
    StateField("eef_rotation", (4,), "quaternion_xyzw", "base"),
    StateField("commanded_position", (3,), "m", "base"),
    StateField("gripper_width", (1,), "m", "gripper"),
)
NATIVE_STATE = ("eef_pos", "eef_quat_wxyz", "commanded_pos", "gripper_width", "time")
GRIPPER_THRESHOLD = 0.5
TOOL_DOWN = np.array([1.0, 1.0, 0.0, 0.0])  # xyzw, not normalised: the hand's pose that all tasks begin near


class AdapterError(CodedError):
    """The native observation or the action is not what this embodiment gives or takes."""


@dataclass(frozen=True)
class TabletopCommand:
    """A control step of the tool centre in the base frame.

    delta_translation: `[3]` in m. delta_rotation: `[3]` rotation vector in rad. gripper_open: True opens.
    """

    delta_translation: np.ndarray
    delta_rotation: np.ndarray
    gripper_open: bool


def tabletop_contract(
    image_size: int,
    chunk: int,
    max_translation: float,
    max_rotation: float,
    rate_hz: float = 20.0,
    task_set: str | None = None,
) -> PolicyContract:
    """What the tabletop offers: square images of `image_size` pixels; bounds per step in m and rad.

    task_set: the task set that is played; None accepts a policy trained on any.
    """

    def camera(name: str, role: Any, fov_y_deg: float) -> Camera:
        return Camera(name, role, image_size, image_size, fov_y_deg, 0.02, 2.0)

    return PolicyContract(
        version=CONTRACT_VERSION,
        embodiment=EMBODIMENT,
        cameras=(
            camera("third_person", "third_person", THIRD_PERSON_FOV_Y_DEG),
            camera("wrist", "wrist", WRIST_FOV_Y_DEG),
        ),
        state=STATE,
        action=ActionSemantics(
            control_mode="delta_ee",
            rotation="rotvec",
            frame="base",
            max_translation=float(max_translation),
            max_rotation=float(max_rotation),
            rate_hz=float(rate_hz),
            chunk=chunk,
        ),
        instruction=Instruction(BARE_INSTRUCTION, task_set),
        statistics_hash=None,
    )


def observation(native: Mapping[str, Any], instruction: str) -> Observation:
    """Canonical observation; images are passed on, not copied. Everything is stamped with the native time."""
    missing = [key for key in (*CAMERAS, *NATIVE_STATE) if key not in native]
    if missing:
        remedy = "Read the whole state of the simulator before building the observation."
        raise AdapterError(
            Fault("NATIVE_KEY", ", ".join(missing), "the key in the native observation", "nothing", remedy)
        )
    state = {
        "eef_position": _vector(native, "eef_pos", 3),
        "eef_rotation": _rotation(_vector(native, "eef_quat_wxyz", 4)),
        "commanded_position": _vector(native, "commanded_pos", 3),
        "gripper_width": np.array([native["gripper_width"]], np.float64),
    }
    time = float(native["time"])
    return Observation(
        images={name: native[name] for name in CAMERAS},
        state=state,
        instruction=instruction,
        stamps=dict.fromkeys((*CAMERAS, *state), time),
    )


def command(action: np.ndarray) -> TabletopCommand:
    """One row `[7]` of an action chunk as a command: delta translation, delta rotation vector, gripper."""
    if action.shape != (7,) or not np.isfinite(action).all():
        remedy = "Pass one finite row of ActionChunk.actions at a time."
        raise AdapterError(Fault("ACTION_ROW", "action", "7 finite numbers", repr(action), remedy))
    row = action.astype(np.float64)
    return TabletopCommand(row[:3], row[3:6], bool(row[6] > GRIPPER_THRESHOLD))


def _vector(native: Mapping[str, Any], key: str, size: int) -> np.ndarray:
    vector = np.array(native[key], np.float64)
    if vector.shape != (size,):
        remedy = "Pass the vector of one environment."
        raise AdapterError(Fault("NATIVE_SHAPE", key, f"[{size}]", str(vector.shape), remedy))
    return vector


def _rotation(wxyz: np.ndarray) -> np.ndarray:
    """xyzw, of the two signs the one on the side of a tool that points down: so it never flips near that pose.

    There w is almost 0, so the usual choice, w >= 0, would flip all signs with the last digits of a measurement.
    """
    norm = float(np.linalg.norm(wxyz))
    if not abs(norm - 1.0) < 1e-3:
        remedy = "Pass a unit quaternion in the order w, x, y, z."
        raise AdapterError(Fault("NATIVE_QUATERNION", "eef_quat_wxyz", "norm 1", f"norm {norm:g}", remedy))
    xyzw = np.roll(wxyz, -1)
    side = float(xyzw @ TOOL_DOWN) or float(xyzw[np.flatnonzero(xyzw)[0]])
    return (-xyzw if side < 0 else xyzw) + 0.0  # the sum turns -0.0 into 0.0, for parity bit for bit
