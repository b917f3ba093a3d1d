"""LIBERO's Panda: robosuite's observations and actions between -1 and 1 <-> canonical units.

Native observation: robosuite's own keys and conventions, `agentview_image` and `robot0_eye_in_hand_image` (uint8 RGB
`[H, W, 3]`, lowest row first), `robot0_eef_pos` `[3]` in m and `robot0_eef_quat` `[4]` (xyzw) in the world,
`robot0_gripper_qpos` `[2]` in m; and `base_pos` `[3]`, the robot's base in the world, along whose axes it stands;
`time` in s. Other keys are left alone.

An action of 1 means 0.05 m or 0.5 rad to robosuite's OSC_POSE, added to the pose that is measured when the step begins:
a translation along the world's axes, and a rotation vector in the world's frame that turns the tool from the left.
"""

from collections.abc import Mapping
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
from vla.types import Observation

EMBODIMENT = "franka"
RATE_HZ = 20.0
MAX_TRANSLATION, MAX_ROTATION = 0.05, 0.5  # m and rad that an action of 1 means
NATIVE_CAMERAS = {"third_person": "agentview", "wrist": "robot0_eye_in_hand"}  # name and role -> robosuite's name
FOV_Y_DEG = {"third_person": 45.0, "wrist": 75.0}
STATE = (
    StateField("eef_position", (3,), "m", "base"),
    StateField("eef_rotation", (4,), "quaternion_xyzw", "base"),
    StateField("gripper_width", (1,), "m", "gripper"),
)
NATIVE_STATE = ("base_pos", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "time")


def libero_contract(image_size: int, chunk: int, max_translation: float, max_rotation: float) -> PolicyContract:
    """What LIBERO offers: square images of `image_size` pixels; bounds per step in m and rad."""
    largest = {"max_translation": MAX_TRANSLATION, "max_rotation": MAX_ROTATION}
    for name, bound in (("max_translation", max_translation), ("max_rotation", max_rotation)):
        if not 0 < bound <= largest[name]:
            remedy = "Choose a smaller one; LIBERO would cut what is above."
            raise AdapterError(Fault("ACTION_BOUND", name, f"0 to {largest[name]:g}", f"{bound:g}", remedy))

    def camera(role: Any) -> Camera:
        return Camera(role, role, image_size, image_size, FOV_Y_DEG[role], 0.02, 2.0, mirrored=True)

    return PolicyContract(
        version=CONTRACT_VERSION,
        embodiment=EMBODIMENT,
        cameras=tuple(camera(role) for role in NATIVE_CAMERAS),
        state=STATE,
        action=ActionSemantics(
            control_mode="delta_ee",
            rotation="rotvec",
            frame="base",
            max_translation=float(max_translation),
            max_rotation=float(max_rotation),
            rate_hz=RATE_HZ,
            chunk=chunk,
            relative_to="measured",
        ),
        instruction=Instruction(BARE_INSTRUCTION, None),
        statistics_hash=None,
    )


def observation(native: Mapping[str, Any], instruction: str) -> Observation:
    """Canonical observation; everything is stamped with the native time.

    Images are turned by 180 degrees, as in all published evaluations. As the rows of the native ones run upwards, what
    the policy sees is upright, and its left and right are exchanged.
    """
    names = {role: f"{camera}_image" for role, camera in NATIVE_CAMERAS.items()}
    missing = [key for key in (*names.values(), *NATIVE_STATE) if key not in native]
    if missing:
        remedy = "Read the whole state of the simulator before building the observation."
        raise AdapterError(Fault("NATIVE_KEY", ", ".join(missing), "in the native observation", "nothing", remedy))
    quaternion = vector(native, "robot0_eef_quat", 4)
    fingers = vector(native, "robot0_gripper_qpos", 2)  # one opens to positive, the other to negative numbers
    state = {
        "eef_position": vector(native, "robot0_eef_pos", 3) - vector(native, "base_pos", 3),
        "eef_rotation": rotation(quaternion[[3, 0, 1, 2]], "robot0_eef_quat", TOOL_DOWN),
        "gripper_width": np.array([fingers[0] - fingers[1]]),
    }
    images = {role: np.ascontiguousarray(native[name][::-1, ::-1]) for role, name in names.items()}
    return Observation(images, state, instruction, dict.fromkeys((*images, *state), float(native["time"])))


def command(action: np.ndarray) -> np.ndarray:
    """One row `[7]` of an action chunk as LIBERO takes it: between -1 and 1, gripper -1 = open, 1 = closed."""
    numbers = row(action, 7)
    numbers[:3] /= MAX_TRANSLATION
    numbers[3:6] /= MAX_ROTATION
    numbers[:6] = np.clip(numbers[:6], -1.0, 1.0)
    numbers[6] = -1.0 if numbers[6] > 0.5 else 1.0
    return numbers
