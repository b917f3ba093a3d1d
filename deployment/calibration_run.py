"""The runs of a calibration: go, look, judge, keep. A `Station` moves and sees; the mathematics is `calibration`."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from calibration import board as boards
from calibration import coverage
from calibration.detection import DetectionError, View, detect, matched
from calibration.intrinsics import board_pose
from calibration.latency import Lag, Signal, along_main_axis, lag
from deployment.calibration_session import Session, Taken
from deployment.reference import Pose
from vla.errors import SimrealError
from vla.rig import BoardSize, Delay, Intrinsics, Measured, now

NEW_PX = 20.0  # a view counts as new, if its corners are so far from those of every other, on average
TRIES = 3  # images at a pose, and poses in a row at which the arm does not rest
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Motion:
    """A sinusoid. commanded, measured: times `[N]` s, positions `[N, 3]` m. frames: stamp, arrival, image of each."""

    commanded: tuple[np.ndarray, np.ndarray]
    measured: tuple[np.ndarray, np.ndarray]
    frames: list[tuple[float, float, np.ndarray]]


class Station(Protocol):
    """An arm and a camera."""

    def look(self) -> tuple[float, np.ndarray]:
        """The next image: stamp in s and RGB `[H, W, 3]`. Raises SimrealError if the camera sends none."""

    def tool(self, stamp: float) -> np.ndarray:
        """The tool's pose `[4, 4]` at a time. Raises SimrealError if none was told then."""

    def joints(self) -> np.ndarray:
        """`[7]` rad, newest."""

    def go(self, pose: Pose) -> None:
        """Drive there and come to rest."""

    def shake(self, seconds: float, frequency_hz: float, amplitude_m: float) -> Motion:
        """Move the tool along a line as a sinusoid and record everything."""


def views_at(station: Station, poses: Iterable[Pose], session: Session, board: BoardSize, wanted: int, tell: Tell
             ) -> None:  # fmt: skip
    """Drive to poses until the session has `wanted` views."""
    restless = 0
    for pose in poses:
        if len(session.taken) >= wanted:
            return
        try:
            station.go(pose)
        except SimrealError as error:
            restless += 1
            if error.code != "NO_REST" or restless == TRIES:
                raise
            tell(f"passed over: {error.args[0]}")
            continue
        restless = 0
        taken = _look(station, board, tell)
        if taken is not None:
            session.add(*taken)
            tell(f"{len(session.taken)}/{wanted}  {len(taken[0].view)} corners")


def views_by_hand(station: Station, session: Session, board: BoardSize, wanted: int, tell: Tell, with_tool: bool,
                  limit_s: float = 600.0) -> None:  # fmt: skip
    """Take each view that is new while somebody moves the board, or guides the arm."""
    end, reason = time.monotonic() + limit_s, ""
    while len(session.taken) < wanted:
        if time.monotonic() > end:
            raise SimrealError(
                f"{len(session.taken)} of {wanted} views after {limit_s:g} s", code="TOO_FEW_VIEWS",
                remedy="Run the same command again: it goes on where it stopped.",
            )  # fmt: skip
        stamp, image = station.look()
        try:
            view = detect(image, board)
        except DetectionError as error:
            if error.code != reason:
                tell(str(error.faults[0]))
            reason = error.code
            continue
        if not is_new(view, session.views) or not _still(station, board, view):
            continue
        tool = station.tool(stamp) if with_tool else None
        session.add(Taken(view, tool, station.joints() if with_tool else None, stamp), image)
        tell(f"{len(session.taken)}/{wanted}  {len(view)} corners")


def guided(station: Station, poses: Iterable[Pose] | None, session: Session, board: BoardSize, picture: Path,
           wanted: int, tell: Tell) -> coverage.Coverage:  # fmt: skip
    """Views for intrinsics; after each one the coverage is told and drawn, which a viewer may reload."""

    def told(text: str) -> None:
        tell(text)
        if session.taken:
            image = session.image(len(session.taken) - 1)
            covered = coverage.cover(session.views, board, (image.shape[1], image.shape[0]))
            drawn = coverage.draw(image, session.views, covered, session.views[-1])
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn).save(picture)
            if advice := covered.advice():
                tell(f"    {advice[0]}")

    if poses is None:
        views_by_hand(station, session, board, wanted, told, with_tool=False)
    else:
        views_at(station, poses, session, board, wanted, told)
    image = session.image(0)
    return coverage.cover(session.views, board, (image.shape[1], image.shape[0]))


def delay(station: Station, camera: Intrinsics, board: BoardSize, seconds: float, frequency_hz: float,
          amplitude_m: float) -> tuple[Delay, dict[str, Signal]]:  # fmt: skip
    """Shake the arm, and compare command, motion and images."""
    motion = station.shake(seconds, frequency_hz, amplitude_m)
    stamps, arrivals, places = [], [], []
    for stamp, arrival, image in motion.frames:
        try:
            view = detect(image, board)
        except DetectionError:  # a gap is told by the signal's own check
            continue
        place = board_pose(camera, view.corners, matched(view, board)) @ np.array([*_middle(board), 1.0])
        stamps.append(stamp)
        arrivals.append(arrival)
        places.append(place[:3])
    if len(places) < 10:
        raise SimrealError(
            f"the board is seen in {len(places)} of {len(motion.frames)} images", code="BOARD_NOT_SEEN",
            remedy="Start with the board in the middle of the image, and add light.",
        )  # fmt: skip
    signals = {
        "commanded": along_main_axis(*motion.commanded), "measured": along_main_axis(*motion.measured),
        "stamped": along_main_axis(np.array(stamps), np.array(places)),
        "arrived": along_main_axis(np.array(arrivals), np.array(places)),
    }  # fmt: skip
    captured = lag(signals["measured"], signals["stamped"], frequency_hz, "image stamps")
    arrived = lag(signals["measured"], signals["arrived"], frequency_hz, "image arrivals")
    moved = lag(signals["commanded"], signals["measured"], frequency_hz, "motion")
    measured = Measured(now(), f"sinusoid of {frequency_hz:g} Hz, {1e3 * amplitude_m:g} mm", len(places), 0.0)
    return Delay(*_interval(captured), *_interval(arrived), *_interval(moved), measured), signals


def _interval(found: Lag) -> tuple[float, tuple[float, float]]:
    return found.seconds, (found.low, found.high)


def is_new(view: View, others: list[View]) -> bool:
    """Whether a view is far from each of the others."""
    for other in others:
        _, first, second = np.intersect1d(view.ids, other.ids, return_indices=True)
        if len(first) and np.linalg.norm(view.corners[first] - other.corners[second], axis=1).mean() < NEW_PX:
            return False
    return True


def _look(station: Station, board: BoardSize, tell: Tell) -> tuple[Taken, np.ndarray] | None:
    for attempt in range(TRIES):
        stamp, image = station.look()
        try:
            view = detect(image, board)
        except DetectionError as error:
            if attempt == TRIES - 1:
                tell(f"passed over: {error.faults[0]}")
            continue
        try:
            tool = station.tool(stamp)
        except SimrealError as error:  # a gap in the poses, if the next image has one
            if error.code != "STALE_POSE" or attempt == TRIES - 1:
                raise
            tell(f"another image: {error}")
            continue
        return Taken(view, tool, station.joints(), stamp), image
    return None


def _still(station: Station, board: BoardSize, view: View) -> bool:
    """Whether the next image shows the corners at the same place: within a pixel."""
    _, image = station.look()
    try:
        second = detect(image, board)
    except DetectionError:  # seen, and gone again
        return False
    _, a, b = np.intersect1d(view.ids, second.ids, return_indices=True)
    return bool(len(a)) and float(np.linalg.norm(view.corners[a] - second.corners[b], axis=1).mean()) < 1.0


def _middle(board: BoardSize) -> tuple[float, float, float]:
    width, height = boards.extent(board)
    return width / 2, height / 2, 0.0
