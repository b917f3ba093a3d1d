"""PolicyContract: what a policy needs from whoever feeds it and executes its actions.

A checkpoint stores its contract; a simulator, a robot or a recording offers one. `contract.check` compares
them before the first action. A mismatch is always an error, never a silent fix.
"""

import math
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Literal

from vla import schema
from vla.errors import CodedError, Fault
from vla.rig import Parent, Transform

CONTRACT_VERSION = 1
FOV_TOLERANCE_DEG = 0.5  # at 64 pixels and 45 degrees less than one pixel at the border
BARE_INSTRUCTION = "{task}"
GRIPPER_POLARITY = "1=open,0=closed"


@dataclass(frozen=True)
class Incompatibility(Fault):
    """A difference between the contract of a policy and the one that it is offered."""


class ContractError(CodedError):
    """A contract is malformed, or what is offered does not fit it."""

    @property
    def incompatibilities(self) -> tuple[Fault, ...]:
        return self.faults


@dataclass(frozen=True)
class Camera:
    """A camera, size in pixels, as the policy receives its image (uint8 `[height, width, 3]`).

    position_tolerance_m, rotation_tolerance_deg: in a policy's contract, how far the camera may stand from `pose`; in
        an offered one, how far it may in fact stand from where it is thought to.
    pose: of the optical frame; in a policy's contract where it stood in training, in an offered one where it stands by
        its calibration. None: unknown. parent: what it is told in, the robot's base or the tool centre.
    mirrored: left and right of the images are exchanged, as in LIBERO's published data.
    calibration_age_days: in a policy's contract, how old the calibration may be; it has to be there then. In an offered
        one, how old it is. None: not demanded, or not there.
    """

    name: str
    role: Literal["third_person", "wrist"]
    height: int
    width: int
    fov_y_deg: float
    position_tolerance_m: float
    rotation_tolerance_deg: float
    color: Literal["rgb"] = "rgb"
    parent: Parent = dataclass_field(default="base", metadata=schema.OPTIONAL)
    pose: Transform | None = dataclass_field(default=None, metadata=schema.OPTIONAL)
    calibration_age_days: float | None = dataclass_field(default=None, metadata=schema.OPTIONAL)
    mirrored: bool = dataclass_field(default=False, metadata=schema.OPTIONAL)


@dataclass(frozen=True)
class StateField:
    """A part of the proprioceptive state, e.g. `StateField("eef_position", (3,), "m", "base")`."""

    name: str
    shape: tuple[int, ...]
    unit: str
    frame: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ActionSemantics:
    """What the `dim` numbers of an action mean: those of one arm after the other, the last of each arm its gripper.

    frame: the frame of translation and rotation, "base" or "tool".
    max_translation, max_rotation: bound of each component per control step, in the units given (joints: max_rotation).
    rate_hz: control steps per second. chunk: actions per decision. arms: of equal size.
    relative_to: what a delta is added to at each control step, the pose that was commanded or the one that is measured.
    motion_s: in a policy's contract, how much later than told the arm moved in training, on average; None: not known.
    """

    control_mode: Literal["delta_ee", "absolute_ee", "joint", "delta_joint"]
    rotation: Literal["rotvec", "euler_xyz", "quat_xyzw", "none"]
    frame: str
    max_translation: float
    max_rotation: float
    rate_hz: float
    chunk: int
    translation_unit: str = "m"
    rotation_unit: str = "rad"
    dim: int = 7
    gripper: str = GRIPPER_POLARITY
    arms: int = dataclass_field(default=1, metadata=schema.OPTIONAL)  # files of one arm do not tell it
    motion_s: float | None = dataclass_field(default=None, metadata=schema.OPTIONAL)
    relative_to: Literal["commanded", "measured"] = dataclass_field(default="commanded", metadata=schema.OPTIONAL)

    @property
    def grippers(self) -> tuple[int, ...]:
        """The columns of the grippers."""
        return tuple(range(self.dim // self.arms - 1, self.dim, self.dim // self.arms))

    @property
    def bounded(self) -> tuple[tuple[str, slice], ...]:
        """Columns of an action that a bound limits, with the name of that bound; none of an absolute action."""
        found: list[tuple[str, slice]] = []
        for end in self.grippers:
            start = end + 1 - self.dim // self.arms
            if self.control_mode == "delta_ee":
                found += [("max_translation", slice(start, start + 3)), ("max_rotation", slice(start + 3, end))]
            if self.control_mode == "delta_joint":
                found.append(("max_rotation", slice(start, end)))
        return tuple(found)


@dataclass(frozen=True)
class Instruction:
    """How the instruction reaches the model.

    template: the prompt, with `{task}` for the sentence; whoever offers a bare sentence offers "{task}".
    task_set: the set of tasks that the policy was trained on; None in an offered contract means any.
    """

    template: str
    task_set: str | None


@dataclass(frozen=True)
class PolicyContract:
    """The contract. statistics_hash: None in an offered contract means that the consumer does not care."""

    version: int
    embodiment: str
    cameras: tuple[Camera, ...]
    state: tuple[StateField, ...]
    action: ActionSemantics
    instruction: Instruction
    statistics_hash: str | None

    def __post_init__(self) -> None:
        faults = [
            Fault("CONTRACT_INVALID", field, expected, found, "Correct the contract where it is built.")
            for field, expected, found in _invalid(self)
        ]
        if faults:
            raise ContractError(*faults)

    @property
    def state_size(self) -> int:
        """Length S of the concatenated state."""
        return sum(field.size for field in self.state)

    def with_statistics(self, statistics_hash: str) -> "PolicyContract":
        return replace(self, statistics_hash=statistics_hash)

    def to_json(self) -> str:
        return schema.dump(self)

    @staticmethod
    def from_json(text: str) -> "PolicyContract":
        return schema.load(PolicyContract, text, "contract", ContractError)

    @staticmethod
    def read(path: str | Path) -> "PolicyContract":
        """The contract of a checkpoint's folder, or of a contract.json."""
        file = Path(path) / "contract.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            remedy = "Check the path; a checkpoint is a folder with a contract.json."
            raise ContractError(Fault("CONTRACT_MISSING", str(file), "a file", "nothing", remedy))
        return PolicyContract.from_json(file.read_text(encoding="utf-8"))

    def check(self, offered: "PolicyContract", consumer: str) -> None:
        """Raise ContractError, with every incompatibility, if the consumer can't run this policy.

        More cameras and state fields than the policy needs may be offered, and larger action bounds.
        """
        found = [
            *_check_header(self, offered),
            *(problem for camera in self.cameras for problem in _check_camera(camera, offered)),
            *(problem for field in self.state for problem in _check_state(field, offered)),
            *_check_action(self.action, offered.action),
        ]
        if found:
            raise ContractError(*(replace(fault, field=f"{consumer or 'consumer'}: {fault.field}") for fault in found))


def _invalid(contract: PolicyContract) -> list[tuple[str, str, str]]:
    """Field, expectation and finding of everything that can't be true of any contract."""
    action = contract.action
    positive: dict[str, float] = {
        "action.max_translation": action.max_translation,
        "action.max_rotation": action.max_rotation,
        "action.rate_hz": action.rate_hz,
        "action.chunk": action.chunk,
        "action.dim": action.dim,
        "action.arms": action.arms,
    }
    for camera in contract.cameras:
        positive |= {f"cameras.{camera.name}.{key}": getattr(camera, key) for key in ("height", "width", "fov_y_deg")}
    for field in contract.state:
        positive |= {f"state.{field.name}.shape[{i}]": size for i, size in enumerate(field.shape)}
    problems = [(key, "a number above 0", repr(value)) for key, value in positive.items() if not value > 0]
    if action.arms > 0 and action.dim % action.arms:
        problems.append(("action.dim", f"a multiple of its {action.arms} arms", repr(action.dim)))
    for kind, names in (
        ("cameras", [c.name for c in contract.cameras]),
        ("state", [s.name for s in contract.state]),
    ):
        if len(set(names)) != len(names):
            problems.append((kind, "names that occur once", repr(names)))
    if action.motion_s is not None and not action.motion_s >= 0:
        problems.append(("action.motion_s", "0 or more", repr(action.motion_s)))
    for camera in contract.cameras:
        if camera.calibration_age_days is not None and camera.calibration_age_days < 0:
            problems.append((f"cameras.{camera.name}.calibration_age_days", "0 or more", "a negative one"))
        if camera.position_tolerance_m < 0 or camera.rotation_tolerance_deg < 0:
            problems.append((f"cameras.{camera.name}", "tolerances of 0 or more", "a negative one"))
    if contract.instruction.template.count("{task}") != 1:
        problems.append(("instruction.template", "{task} exactly once", repr(contract.instruction.template)))
    return problems


def _differ(code: str, field: str, expected: object, found: object, remedy: str) -> list[Fault]:
    """No fault if equal (floats to six digits), else one."""
    if isinstance(expected, float) and isinstance(found, float):
        same = math.isclose(expected, found, rel_tol=1e-6)
    else:
        same = expected == found
    return [] if same else [Incompatibility(code, field, repr(expected), repr(found), remedy)]


def _check_header(policy: PolicyContract, offered: PolicyContract) -> list[Fault]:
    faults = _differ(
        "CONTRACT_VERSION",
        "version",
        policy.version,
        offered.version,
        "Export the checkpoint again with the version of this package that runs here.",
    )
    faults += _differ(
        "EMBODIMENT",
        "embodiment",
        policy.embodiment,
        offered.embodiment,
        "Load a checkpoint that was trained for this robot.",
    )
    if offered.statistics_hash is not None:
        faults += _differ(
            "STATISTICS_HASH",
            "statistics_hash",
            policy.statistics_hash,
            offered.statistics_hash,
            "Use the normalisation statistics that lie in the checkpoint; don't compute them anew.",
        )
    if offered.instruction.task_set is not None:
        faults += _differ(
            "INSTRUCTION_TASKS",
            "instruction.task_set",
            policy.instruction.task_set,
            offered.instruction.task_set,
            "Choose the task set that the policy was trained on, or a checkpoint trained on this one.",
        )
    if offered.instruction.template != BARE_INSTRUCTION:
        faults += _differ(
            "INSTRUCTION_TEMPLATE",
            "instruction.template",
            policy.instruction.template,
            offered.instruction.template,
            'Hand over the bare sentence (template "{task}"); the policy fills its own prompt.',
        )
    return faults


def _check_camera(camera: Camera, offered: PolicyContract) -> list[Fault]:
    field = f"cameras.{camera.name}"
    other = next((c for c in offered.cameras if c.name == camera.name), None)
    if other is None:
        names = ", ".join(c.name for c in offered.cameras) or "no camera"
        remedy = f"Add a camera named {camera.name!r} ({camera.role}), or rename the one that plays its part."
        return [Incompatibility("CAMERA_MISSING", field, camera.name, names, remedy)]
    faults = _differ(
        "CAMERA_ROLE",
        f"{field}.role",
        camera.role,
        other.role,
        "Swap the names of the cameras or fix the role.",
    )
    faults += _differ(
        "CAMERA_SIZE",
        f"{field}.size",
        (camera.height, camera.width),
        (other.height, other.width),
        "Render or crop the images at this height and width; images are not resized on the way.",
    )
    faults += _differ(
        "CAMERA_COLOR",
        f"{field}.color",
        camera.color,
        other.color,
        "Convert the images before handing them over.",
    )
    faults += _differ(
        "CAMERA_MIRRORED",
        f"{field}.mirrored",
        camera.mirrored,
        other.mirrored,
        "Load a checkpoint that was trained on such images; nothing is mirrored on the way.",
    )
    if abs(camera.fov_y_deg - other.fov_y_deg) > FOV_TOLERANCE_DEG:
        expected = f"{camera.fov_y_deg:g} +- {FOV_TOLERANCE_DEG:g} deg"
        remedy = "Rectify and crop the image to this vertical field of view, or change the camera."
        faults.append(Incompatibility("CAMERA_FOV", f"{field}.fov_y_deg", expected, f"{other.fov_y_deg:g} deg", remedy))
    faults += _check_calibration(camera, other, field)
    for key, unit in (("position_tolerance_m", "m"), ("rotation_tolerance_deg", "deg")):
        limit, actual = getattr(camera, key), getattr(other, key)
        if actual > limit + 1e-9:
            remedy = "Calibrate and mount the camera more exactly, or train with more camera variation."
            faults.append(
                Incompatibility(
                    "CAMERA_POSE", f"{field}.{key}", f"at most {limit:g} {unit}", f"{actual:g} {unit}", remedy
                )
            )
    return faults


def _check_calibration(camera: Camera, other: Camera, where: str) -> list[Fault]:
    """The pose is compared where both sides know one; it has to be known where the policy demands a calibration."""
    again = f"`vla calibrate handeye camera={camera.name}` finds it; pass its store with calibration=FOLDER."
    limit, age = camera.calibration_age_days, other.calibration_age_days
    if limit is not None and (age is None or age > limit):
        found = "none" if age is None else f"one of {age:.1f} days"
        code = "CALIBRATION_MISSING" if age is None else "CALIBRATION_AGE"
        return [Incompatibility(code, f"{where}.calibration_age_days", f"at most {limit:g} days", found, again)]
    if camera.pose is None or other.pose is None:
        return []
    if camera.parent != other.parent:
        return _differ("CAMERA_PARENT", f"{where}.parent", camera.parent, other.parent, again)
    metres, degrees = camera.pose.distance(other.pose)
    if metres <= camera.position_tolerance_m and degrees <= camera.rotation_tolerance_deg:
        return []
    expected = f"within {camera.position_tolerance_m:g} m and {camera.rotation_tolerance_deg:g} deg of the trained pose"
    remedy = "Move the camera back, calibrate it again, or train with more camera variation."
    return [Incompatibility("CAMERA_POSE", f"{where}.pose", expected, f"{metres:.3f} m and {degrees:.1f} deg", remedy)]


def _check_state(state: StateField, offered: PolicyContract) -> list[Fault]:
    field = f"state.{state.name}"
    other = next((s for s in offered.state if s.name == state.name), None)
    if other is None:
        names = ", ".join(s.name for s in offered.state) or "no field"
        remedy = f"Provide {state.name!r} in the adapter."
        return [Incompatibility("STATE_FIELD", field, state.name, names, remedy)]
    return [
        *_differ("STATE_SHAPE", f"{field}.shape", state.shape, other.shape, "Reshape the field in the adapter."),
        *_differ("STATE_UNIT", f"{field}.unit", state.unit, other.unit, "Convert the field in the adapter."),
        *_differ("STATE_FRAME", f"{field}.frame", state.frame, other.frame, "Transform the field in the adapter."),
    ]


def _check_action(action: ActionSemantics, offered: ActionSemantics) -> list[Fault]:
    train = "Set the controller to this, or load a checkpoint trained with the other."
    faults: list[Fault] = []
    for code, key, remedy in (
        ("ACTION_MODE", "control_mode", train),
        ("ACTION_ROTATION", "rotation", "Convert the rotation in the adapter."),
        ("ACTION_FRAME", "frame", "Transform the command in the adapter."),
        ("ACTION_UNIT", "translation_unit", "Convert the command in the adapter."),
        ("ACTION_UNIT", "rotation_unit", "Convert the command in the adapter."),
        ("ACTION_RATE", "rate_hz", train),
        ("ACTION_CHUNK", "chunk", train),
        ("ACTION_DIM", "dim", train),
        ("ACTION_ARMS", "arms", train),
        ("ACTION_REFERENCE", "relative_to", train),
        ("GRIPPER_POLARITY", "gripper", "Convert the gripper command in the adapter and state the polarity."),
    ):
        faults += _differ(code, f"action.{key}", getattr(action, key), getattr(offered, key), remedy)
    for key, unit in (("max_translation", action.translation_unit), ("max_rotation", action.rotation_unit)):
        needed, allowed = getattr(action, key), getattr(offered, key)
        if needed > allowed * (1 + 1e-6):
            remedy = "Raise the controller's bound to this or train with smaller steps; nothing is clipped."
            faults.append(
                Incompatibility(
                    "ACTION_BOUND",
                    f"action.{key}",
                    f"at least {needed:g} {unit}",
                    f"{allowed:g} {unit}",
                    remedy,
                )
            )
    return faults
