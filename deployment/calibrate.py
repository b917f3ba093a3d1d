"""The steps of `vla calibrate`: board, intrinsics, hand-eye, delay, check and alignment of one camera. No ROS."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from calibration import alignment, checking, handeye, intrinsics, pictures
from calibration import board as boards
from calibration.detection import DetectionError, View, detect, matched
from calibration.diagnosis import diagnose
from calibration.rigid import distance, inverse
from calibration.samples import Mode, prepare
from deployment import calibration_run as runs
from deployment import twin_board
from deployment.arm_geometry import ArmGeometry
from deployment.calibration_poses import LENS_DEG, Reach, Region, propose
from deployment.calibration_session import Session
from deployment.franka import ArmConfig
from vla import configuration
from vla.adapters.tabletop import camera_pose
from vla.errors import SimrealError
from vla.rig import BoardSize, CameraCalibration, Intrinsics, Measured, Mount, Store, Transform, now

What = Literal["board", "intrinsics", "handeye", "latency", "check", "align"]
CONSOLE = Console(soft_wrap=True)
LENS_SIGMA = ("fx_px", "fy_px", "cx_px", "cy_px")  # names in the store


@dataclass(frozen=True)
class CalibrateConfig:
    """Options of `vla calibrate`.

    what: board, intrinsics, handeye, latency, check or align.
    store: folder of the rig's calibrations.
    camera: name of the camera, and namespace of its topics.
    mode: eye_to_hand, the camera stands and the board is on the tool; eye_in_hand, the camera is on the arm and the
        board lies; null: eye_in_hand for the camera called wrist.
    board: the ChArUco board; the twin has its own.
    model: of the lens.
    views: of the board; null: 40 for intrinsics, 15 for handeye, 4 for check.
    drive: drive the arm to poses; else take new views while somebody moves board or arm by hand.
    arm: whether an arm takes part; intrinsics need none.
    session: folder in which views are kept, and a run that was broken off goes on; null: STORE/CAMERA/WHAT.
    fresh: begin anew, although the session has views.
    scale: find the size of the board's squares as well.
    expected: where the board hangs on the tool (eye_in_hand: the camera), roughly; reveals a wrong tool frame.
    limit_px: error of the corners from which on a check fails.
    seconds: of the latency's motion.
    frequency_hz: of the latency's motion.
    amplitude_m: of the latency's motion.
    serial: of the camera, written to the store.
    paper: of the printed board: a4, a3 or letter.
    out: PDF of the board, or folder of the pictures; null: board.pdf, or the session.
    use_sim: bring up the twin in place of arm and camera.
    twin: nominal or shifted.
    size: width and height of the twin's images, px.
    delay_s: of the twin's camera.
    robot_ip: address of the arm, if not use_sim.
    arm_id: fr3 or panda.
    load_gripper: whether the arm has a Franka Hand.
    namespace: of all nodes and topics.
    seed: of the poses.
    """

    what: What
    store: Path = Path("rig")
    camera: str = "third_person"
    mode: Mode | None = None
    board: BoardSize = field(default_factory=BoardSize)
    model: Literal["pinhole", "fisheye"] = "pinhole"
    views: int | None = None
    drive: bool = True
    arm: bool = True
    session: Path | None = None
    fresh: bool = False
    scale: bool = False
    expected: Transform | None = None
    limit_px: float = checking.LIMIT_PX
    seconds: float = 12.0
    frequency_hz: float = 0.5
    amplitude_m: float = 0.02
    serial: str = ""
    paper: str = "a4"
    out: Path | None = None
    use_sim: bool = False
    twin: Literal["nominal", "shifted"] = "nominal"
    size: int = 400
    delay_s: float = 0.0
    robot_ip: str = ""
    arm_id: Literal["fr3", "panda"] = "fr3"
    load_gripper: bool = True
    namespace: str = ""
    seed: int = 0

    @property
    def kind(self) -> Mode:
        return self.mode or ("eye_in_hand" if self.camera == "wrist" else "eye_to_hand")

    @property
    def target(self) -> BoardSize:
        """The board that is seen."""
        return twin_board.SIZE if self.use_sim else self.board

    @property
    def place(self) -> twin_board.Place:
        """Of the twin's board."""
        return "hand" if self.kind == "eye_to_hand" else "table"

    @property
    def folder(self) -> Path:
        return self.session or self.store / self.camera / self.what

    @property
    def pictures(self) -> Path:
        return self.out or self.folder


Stations = Callable[[CalibrateConfig], AbstractContextManager[runs.Station]]


def run(config: CalibrateConfig, stations: Stations) -> int:
    """Do a step; 1 if a check fails or a calibration is no good. stations: bring up an arm, at home and in control."""
    if config.what == "board":
        file = config.out or Path("board.pdf")
        boards.write_pdf(config.board, file, config.paper)
        CONSOLE.print(f"{file}: print it at 100%, measure the line of 100 mm, fix it on something flat")
        return 0
    if not config.use_sim and not config.robot_ip and (config.arm or config.what != "intrinsics"):
        raise SimrealError(
            "robot_ip is missing", code="ARGUMENT",
            remedy="Pass robot_ip=ADDRESS, use_sim=true, or arm=false for intrinsics without an arm.",
        )  # fmt: skip
    steps = {
        "intrinsics": _intrinsics, "handeye": _handeye, "latency": _latency, "check": _check, "align": _align,
    }  # fmt: skip
    return steps[config.what](config, stations)


def _session(config: CalibrateConfig, station: runs.Station) -> Session:
    _, image = station.look()
    size = image.shape[1], image.shape[0]
    if config.fresh and config.folder.is_dir():
        for file in (*config.folder.glob("[0-9]*.json"), *config.folder.glob("[0-9]*.png")):
            file.unlink()
        (config.folder / "session.json").unlink(missing_ok=True)
    session = Session(config.folder, config.camera, config.target, size)
    if session.taken:
        CONSOLE.print(f"{config.folder} has {len(session.taken)} views: going on (fresh=true begins anew)")
    return session


def _poses(config: CalibrateConfig, count: int, done: int) -> Any:
    """Proposed poses around home, more than are wanted: not every one shows the board."""
    robot = configuration.load(ArmConfig, config.arm_id, folder=configuration.config_folder() / "robot")
    home = np.array(robot.home)
    region = Region(ArmGeometry().pose(home))
    if config.what == "intrinsics":
        region = replace(region, turn_deg=LENS_DEG)
    rng = np.random.default_rng([config.seed, done])
    return propose(region, Reach(home, home, robot.limits), 3 * count, rng)


def _collect(config: CalibrateConfig, stations: Stations, wanted: int) -> Session:
    with stations(config) as station:
        session = _session(config, station)
        if config.drive:
            left = max(wanted - len(session.taken), 0)
            poses = _poses(config, left, len(session.taken)) if left else ()
            runs.views_at(station, poses, session, config.target, wanted, CONSOLE.print)
        else:
            runs.views_by_hand(station, session, config.target, wanted, CONSOLE.print, with_tool=True)
    return session


def _intrinsics(config: CalibrateConfig, stations: Stations) -> int:
    wanted = config.views or 40
    picture = config.pictures / "coverage.png"
    with stations(config) as station:
        session = _session(config, station)
        poses = _poses(config, wanted, len(session.taken)) if config.drive and (config.arm or config.use_sim) else None
        covered = runs.guided(station, poses, session, config.target, picture, wanted, CONSOLE.print)
        _, image = station.look()
    size = image.shape[1], image.shape[0]
    found = intrinsics.calibrate(session.views, config.target, size, config.model)
    lens = found.intrinsics
    sigma = dict(zip(LENS_SIGMA, found.sigma, strict=True))
    CONSOLE.print(
        f"fx {lens.fx:.2f} +- {found.sigma[0]:.2f}, fy {lens.fy:.2f} +- {found.sigma[1]:.2f}, cx {lens.cx:.2f} +- "
        f"{found.sigma[2]:.2f}, cy {lens.cy:.2f} +- {found.sigma[3]:.2f} px; error {found.train_px:.2f} px, of "
        f"held-out views {found.test_px:.2f} px; {len(found.left_out)} views left out"
    )
    for advice in covered.advice():
        CONSOLE.print(f"still missing: {advice}")
    measured = Measured(now(), f"ChArUco, {config.model}", len(found.used), found.test_px, None, sigma)
    store = Store(config.store)
    before = store.read(config.camera) if store.has(config.camera) else None
    serial = config.serial or (before.serial if before else "")
    delay = before.delay if before else None
    made = CameraCalibration(config.camera, lens, measured, None, delay, serial, config.target)
    if before and before.mount:
        CONSOLE.print("the camera's pose has to be found again: `vla calibrate handeye`")
    used = [session.views[number] for number in found.used]
    boards_seen = [intrinsics.board_pose(lens, v.corners, matched(v, config.target)) for v in used]
    _draw(config, session, pictures.residuals(used, pictures.errors(used, boards_seen, lens, config.target), lens))
    CONSOLE.print(f"{store.write(made)}; {picture}, views.png, residuals.png")
    return 0


def _handeye(config: CalibrateConfig, stations: Stations) -> int:
    store = Store(config.store)
    stored = store.read(config.camera)
    session = _collect(config, stations, config.views or 15)
    lens = _lens(stored, session)
    told = diagnose(session.samples, lens, config.target, config.kind, expected=_expected(config))
    seen = prepare(session.samples, lens, config.target, config.kind)
    found = handeye.calibrate(seen, with_scale=config.scale)
    scale = lens.width / stored.intrinsics.width
    fx, fy, cx, cy = (scale * stored.measured.sigma.get(name, 0.0) for name in LENS_SIGMA)
    off = (fx, fy, cx, cy)
    doubt = handeye.lens_doubt(session.samples, lens, off, config.target, config.kind, found, config.scale)
    found = replace(found, sigma=np.hypot(found.sigma, doubt))
    table = Table("method", "position, mm", "apart, mm", "apart, deg", "error, px")
    rows = {"refined": found.camera, **found.methods}
    for name, pose in rows.items():
        metres, degrees = distance(found.camera, pose)
        position = ", ".join(f"{1e3 * v:.1f}" for v in pose[:3, 3])
        error = f"{found.method_px[name]:.2f}" if name in found.method_px else f"{found.held_out_px:.2f} (held out)"
        table.add_row(name, position, f"{1e3 * metres:.2f}", f"{degrees:.3f}", error)
    CONSOLE.print(table)
    CONSOLE.print(
        f"{config.camera}: +- {found.translation_mm:.2f} mm, {found.rotation_deg:.3f} deg; views held out "
        f"{found.held_out_px:.2f} px, {found.held_out_mm:.2f} mm"
    )
    where = inverse(found.camera) @ seen.chain @ found.board
    away = pictures.errors(seen.views, list(where), lens, config.target)
    _draw(config, session, pictures.residuals(seen.views, away, lens))
    CONSOLE.print(f"{told.kind}: {told.text}. {told.remedy}")
    if told.kind != "good":
        CONSOLE.print("not written to the store")
        return 1
    sigma = {"translation_mm": found.translation_mm, "rotation_deg": found.rotation_deg}
    measured = Measured(now(), config.kind, len(seen), found.held_out_px, found.held_out_mm, sigma)
    parent: Literal["base", "tool"] = "base" if config.kind == "eye_to_hand" else "tool"
    mount = Mount(parent, Transform.from_matrix(found.camera), measured, Transform.from_matrix(found.board))
    CONSOLE.print(str(store.write(replace(stored, mount=mount, board=config.target))))
    return 0


def _latency(config: CalibrateConfig, stations: Stations) -> int:
    store = Store(config.store)
    stored = store.read(config.camera)
    with stations(config) as station:
        _, image = station.look()
        lens = stored.intrinsics.scaled(image.shape[1], image.shape[0])
        found, _ = runs.delay(
            station, lens, config.target, config.seconds, config.frequency_hz, config.amplitude_m
        )  # fmt: skip
    for name, value, (low, high) in (
        ("motion to image stamp", found.capture_s, found.capture_95),
        ("motion to image arrival", found.arrival_s, found.arrival_95),
        ("command to motion", found.motion_s, found.motion_95),
    ):
        CONSOLE.print(f"{name}: {1e3 * value:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})")
    CONSOLE.print(str(store.write(replace(stored, delay=found))))
    return 0


def _check(config: CalibrateConfig, stations: Stations) -> int:
    store = Store(config.store)
    stored = store.read(config.camera)
    if stored.mount is None or stored.mount.board is None:
        raise SimrealError(
            f"camera {config.camera} has no pose", code="CALIBRATION_MISSING",
            remedy=f"`vla calibrate handeye camera={config.camera}` finds it.",
        )  # fmt: skip
    session = _collect(replace(config, fresh=True), stations, config.views or 4)
    lens = _lens(stored, session)
    kind: Mode = "eye_to_hand" if stored.mount.parent == "base" else "eye_in_hand"
    seen = prepare(session.samples, lens, stored.board or config.target, kind, least=1)
    others = {
        name: other.mount.pose.matrix
        for name in store.cameras() if name != config.camera
        if (other := store.read(name)).mount is not None and other.mount.parent == stored.mount.parent
    }  # fmt: skip
    camera, board = stored.mount.pose.matrix, stored.mount.board.matrix
    found = checking.check(seen, camera, board, config.limit_px, others)
    CONSOLE.print(f"{'passed' if found.passed else 'FAILED'} ({found.verdict}): {found.text}. {found.remedy}")
    CONSOLE.print(f"calibrated {stored.age_days():.1f} days ago")
    return 0 if found.passed else 1


def _align(config: CalibrateConfig, stations: Stations) -> int:
    from deployment.twin_view import View as Rendered  # loads the simulator

    stored = Store(config.store).read(config.camera)
    session = _collect(replace(config, fresh=True), stations, max(config.views or 2, 2))
    lens = _lens(stored, session)
    rendered = Rendered(replace(stored, intrinsics=replace(lens, distortion=())), config.place, config.target)
    pairs = []
    for number, taken in enumerate(session.taken):
        assert taken.joints is not None
        pairs.append((alignment.rectified(session.image(number), lens), rendered.image(taken.joints)))
    rendered.close()
    points = [alignment.point_error(*(_seen(image, config.target) for image in pair)) for pair in pairs]
    (real, simulated), (real_later, simulated_later) = pairs[0], pairs[1]
    # What changes between two poses is the arm, before whatever background.
    overlap = alignment.iou(
        alignment.silhouette(real, real_later), alignment.silhouette(simulated, simulated_later)
    )  # fmt: skip
    matched = [error for error, count in points if count]
    error = float(np.sqrt(np.mean(np.square(matched)))) if matched else float("nan")
    picture = config.pictures / "align.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(alignment.overlay(real, simulated)).save(picture)
    CONSOLE.print(f"silhouette IoU {overlap:.3f}; known points {error:.2f} px off; {picture}")
    return 0


def _draw(config: CalibrateConfig, session: Session, residuals: np.ndarray) -> None:
    """The views with what was found in them, and how well that fits."""
    config.pictures.mkdir(parents=True, exist_ok=True)
    images = [session.image(number) for number in range(len(session.taken))]
    Image.fromarray(pictures.sheet(images, session.views)).save(config.pictures / "views.png")
    Image.fromarray(residuals).save(config.pictures / "residuals.png")


def _seen(image: np.ndarray, board: BoardSize) -> View:
    try:
        return detect(image, board, "aligned image")
    except DetectionError as error:  # so far off that it isn't in the image: the score says so
        CONSOLE.print(f"no known points: {error.faults[0]}")
        return View(np.zeros(0, int), np.zeros((0, 2)))


def _lens(stored: CameraCalibration, session: Session) -> Intrinsics:
    image = session.image(0)
    return stored.intrinsics.scaled(image.shape[1], image.shape[0])


def _expected(config: CalibrateConfig) -> Transform | None:
    if config.expected is not None or not config.use_sim:
        return config.expected
    return twin_board.pose("hand", config.target) if config.kind == "eye_to_hand" else camera_pose(config.camera)[1]
