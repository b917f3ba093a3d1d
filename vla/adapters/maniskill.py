"""ManiSkill's Panda and WidowX: their nested observations and actions between -1 and 1 <-> canonical units.

Native observation, of one environment, as plain arrays: `base_pose` and `tcp_pose` `[7]` (m, then wxyz, in the world),
`qpos` and `qvel` `[9]` (seven joints, the WidowX's six, and two fingers), `time` in s, `images`: camera name -> uint8
RGB `[H, W, 3]`, `commanded_pos` `[3]` (m, in the base frame) where the controller follows a pose that actions move, and
`extra`: what the task tells of its scene, by ManiSkill's names; None for a policy that has to see it. Names tell what
these are: `..._pose` is a pose in the world, `..._pos` a point, `..._to_..._pos` a way. Anything else is passed on.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from vla.adapters.native import TOOL_DOWN, UPRIGHT, AdapterError, rotation, row, vector
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

STEP = 0.1  # m or rad, what an action of 1 means to ManiSkill's controllers of the Panda
MAX_ROTATION = 0.057  # rad: it shortens rotations above 0.1 rad, which three components of this one do not reach
JOINTS, FINGERS = 7, 2
EMBODIMENTS = {JOINTS: "franka", 6: "widowx"}  # by the joints of the arm
CONTROL_MODES = {
    "pd_ee_delta_pose": ("delta_ee", "rotvec", 7, "measured"),
    "pd_ee_target_delta_pose": ("delta_ee", "rotvec", 7, "commanded"),
    "pd_joint_delta_pos": ("delta_joint", "none", 8, "measured"),
}
CAMERAS = {"third_person": "base_camera", "wrist": "hand_camera"}  # role -> ManiSkill's name


def action_semantics(
    control_mode: str, chunk: int, rate_hz: float, max_translation: float | None, max_rotation: float | None
) -> ActionSemantics:
    """Of one of ManiSkill's control modes; bounds per step in m and rad, None for the largest."""
    mode, turned, dim, reference = CONTROL_MODES[control_mode]
    largest = {"max_translation": STEP, "max_rotation": MAX_ROTATION if mode == "delta_ee" else STEP}
    asked = {"max_translation": max_translation, "max_rotation": max_rotation}
    bounds = {name: float(largest[name] if bound is None else bound) for name, bound in asked.items()}
    for name, bound in bounds.items():
        if not 0 < bound <= largest[name]:
            remedy = "Choose a smaller one; ManiSkill would cut what is above."
            raise AdapterError(Fault("ACTION_BOUND", name, f"0 to {largest[name]:g}", f"{bound:g}", remedy))
    kinds: Any = {"control_mode": mode, "rotation": turned, "relative_to": reference, **bounds}
    return ActionSemantics(**kinds, frame="base", rate_hz=float(rate_hz), chunk=chunk, dim=dim)


def maniskill_contract(
    native: Mapping[str, Any], action: ActionSemantics, fov_y_deg: Mapping[str, float]
) -> PolicyContract:
    """What a task offers, read off one of its native observations; fov_y_deg: of each camera."""

    def camera(role: Any, image: np.ndarray) -> Camera:
        return Camera(role, role, image.shape[0], image.shape[1], fov_y_deg[role], 0.02, 2.0)

    state = tuple(field for field, _ in _parts(native))
    return PolicyContract(
        version=CONTRACT_VERSION,
        embodiment=EMBODIMENTS[_joints(native)],
        cameras=tuple(camera(role, image) for role, image in native["images"].items()),
        state=state,
        action=action,
        instruction=Instruction(BARE_INSTRUCTION, None),
        statistics_hash=None,
    )


def sentence(task: str) -> str:
    """An instruction from the id of a task: `PickCube-v1` -> "pick cube"."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+", re.sub(r"-v[0-9]+$", "", task))
    return " ".join(words).lower()


def observation(native: Mapping[str, Any], instruction: str) -> Observation:
    """Canonical observation, in the base frame; everything is stamped with the native time."""
    state = {field.name: value for field, value in _parts(native)}
    images = dict(native["images"])
    return Observation(images, state, instruction, dict.fromkeys((*images, *state), float(native["time"])))


def command(action: np.ndarray, semantics: ActionSemantics) -> np.ndarray:
    """One row `[D]` of an action chunk as ManiSkill takes it, float32 `[D]` between -1 and 1."""
    numbers = row(action, semantics.dim)
    if semantics.control_mode == "delta_ee":  # ManiSkill turns by angles about x, y, z, and the other way round
        numbers[3:6] = -Rotation.from_rotvec(numbers[3:6]).as_euler("XYZ")
    numbers[:-1] /= STEP
    numbers[-1] = 1.0 if numbers[-1] > 0.5 else -1.0
    return numbers.astype(np.float32)


def _joints(native: Mapping[str, Any]) -> int:
    """Of the arm; the Panda's unless there are as many as another one has."""
    found = np.size(native["qpos"]) - FINGERS
    return found if found in EMBODIMENTS else JOINTS


def _parts(native: Mapping[str, Any]) -> Iterator[tuple[StateField, np.ndarray]]:
    """Every field of the state and its value."""
    keys = ("base_pose", "tcp_pose", "qpos", "qvel", "time", "images", "extra")
    missing = [key for key in keys if key not in native]
    if missing:
        remedy = "Read the whole state of the simulator before building the observation."
        raise AdapterError(Fault("NATIVE_KEY", ", ".join(missing), "in the native observation", "nothing", remedy))
    base = _Base(vector(native, "base_pose", 7))
    joints = _joints(native)
    qpos, qvel = (vector(native, key, joints + FINGERS) for key in ("qpos", "qvel"))
    yield from base.pose("eef", vector(native, "tcp_pose", 7), TOOL_DOWN)
    if "commanded_pos" in native:
        yield StateField("commanded_position", (3,), "m", "base"), vector(native, "commanded_pos", 3)
    yield StateField("gripper_width", (1,), "m", "gripper"), qpos[joints:].sum(keepdims=True)
    if native["extra"] is None:  # the rest is what a state-based policy is told, and the arm's joints
        return
    yield StateField("joint_positions", (joints,), "rad", "joint"), qpos[:joints]
    yield StateField("joint_velocities", (joints,), "rad/s", "joint"), qvel[:joints]
    for key in native["extra"]:
        value = np.array(native["extra"][key], np.float64).reshape(-1)
        if key.endswith("_pose") and len(value) == 7:
            yield from base.pose(key.removesuffix("_pose"), value, UPRIGHT)
        elif key.endswith("_pos") and len(value) == 3:
            moved = base.turn(value) if "_to_" in key else base.point(value)
            yield StateField(key.removesuffix("_pos") + "_position", (3,), "m", "base"), moved
        else:
            yield StateField(key, (len(value),), "as in ManiSkill", "as in ManiSkill"), value


class _Base:
    """The frame of the robot's base, whose pose in the world is `[7]`."""

    def __init__(self, pose: np.ndarray):
        self.position = pose[:3]
        x, y, z, w = rotation(pose[3:], "base_pose", UPRIGHT)
        self.quaternion = np.array([[w, x, y, z], [-x, w, z, -y], [-y, -z, w, x], [-z, y, -x, w]])  # of its inverse
        self.matrix = np.array([
            [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)],
            [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)],
            [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)],
        ])  # fmt: skip

    def turn(self, way: np.ndarray) -> np.ndarray:
        return self.matrix @ way

    def point(self, place: np.ndarray) -> np.ndarray:
        return self.matrix @ (place - self.position)

    def pose(self, name: str, pose: np.ndarray, near: np.ndarray) -> Sequence[tuple[StateField, np.ndarray]]:
        """Position and rotation of a pose in the world."""
        turned = rotation(self.quaternion @ pose[3:], f"{name}_pose", near)
        return (
            (StateField(f"{name}_position", (3,), "m", "base"), self.point(pose[:3])),
            (StateField(f"{name}_rotation", (4,), "quaternion_xyzw", "base"), turned),
        )
