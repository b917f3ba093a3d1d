"""The tabletop Franka, simulated or as a twin: plain arrays in MuJoCo's conventions <-> canonical units.

Native observation: a mapping with `third_person` and `wrist` (uint8 RGB `[H, W, 3]`), `eef_pos` `[3]` in m
and `eef_quat_wxyz` `[4]` (tool centre in the base frame, MuJoCo's order), `commanded_pos` `[3]` in m (the
reference that the controller follows), `gripper_width` in m, `time` in s. Other keys (`qpos`) are left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.adapters.native import TOOL_DOWN, AdapterError, rotation, row, vector
from vla.contract import (
    BARE_INSTRUCTION,
    CONTRACT_VERSION,
    ActionSemantics,
    Camera,
    Instruction,
    PolicyContract,
    StateField,
)
from vla.errors import Fault
from vla.rig import Parent, Transform
from vla.types import Observation

EMBODIMENT = "franka"
CAMERAS = ("third_person", "wrist")
THIRD_PERSON_FOV_Y_DEG = 34.0
WRIST_FOV_Y_DEG = 75.0
TOOL_OFFSET = 0.1034  # m from the hand frame to the tool centre
# Position in m and the image's right and upper direction: in the base, and in the hand.
THIRD_PERSON_PLACE = ((0.92, 0.0, 0.50), (0.0, 1.0, 0.0), (-0.70, 0.0, 0.714))
WRIST_PLACE = ((0.075, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.08))
STATE = (
    StateField("eef_position", (3,), "m", "base"),
    StateField("eef_rotation", (4,), "quaternion_xyzw", "base"),
    StateField("commanded_position", (3,), "m", "base"),
    StateField("gripper_width", (1,), "m", "gripper"),
)
NATIVE_STATE = ("eef_pos", "eef_quat_wxyz", "commanded_pos", "gripper_width", "time")
GRIPPER_THRESHOLD = 0.5


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
        parent, pose = camera_pose(name)
        return Camera(name, role, image_size, image_size, fov_y_deg, 0.02, 2.0, parent=parent, pose=pose)

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


def camera_pose(name: str) -> tuple[Parent, Transform]:
    """Where a camera of the scene stands: its optical frame in the base, or in the tool."""
    position, right, up = (np.array(v) for v in (THIRD_PERSON_PLACE if name == "third_person" else WRIST_PLACE))
    down = -up / np.linalg.norm(up)
    made = np.eye(4)
    made[:3, :3] = np.stack([right, down, np.cross(right, down)], 1)
    made[:3, 3] = position
    if name == "third_person":
        return "base", Transform.from_matrix(made)
    made[2, 3] -= TOOL_OFFSET
    return "tool", Transform.from_matrix(made)


def observation(native: Mapping[str, Any], instruction: str, cameras: Sequence[str] = CAMERAS) -> Observation:
    """Canonical observation; images are passed on, not copied. Everything is stamped with the native time.

    cameras: those that a robot has, where they are others.
    """
    missing = [key for key in (*cameras, *NATIVE_STATE) if key not in native]
    if missing:
        remedy = "Read the whole state of the simulator before building the observation."
        raise AdapterError(
            Fault("NATIVE_KEY", ", ".join(missing), "the key in the native observation", "nothing", remedy)
        )
    state = {
        "eef_position": vector(native, "eef_pos", 3),
        "eef_rotation": rotation(vector(native, "eef_quat_wxyz", 4), "eef_quat_wxyz", TOOL_DOWN),
        "commanded_position": vector(native, "commanded_pos", 3),
        "gripper_width": np.array([native["gripper_width"]], np.float64),
    }
    time = float(native["time"])
    return Observation(
        images={name: native[name] for name in cameras},
        state=state,
        instruction=instruction,
        stamps=dict.fromkeys((*cameras, *state), time),
    )


def command(action: np.ndarray) -> TabletopCommand:
    """One row `[7]` of an action chunk as a command: delta translation, delta rotation vector, gripper."""
    numbers = row(action, 7)
    return TabletopCommand(numbers[:3], numbers[3:6], bool(numbers[6] > GRIPPER_THRESHOLD))
