"""Intrinsics from views of a board: robust, with a split into training and test views."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from calibration.detection import MIN_CORNERS, View, matched
from calibration.rendering import project, rays
from vla.errors import CodedError, Fault
from vla.rig import BoardSize, Intrinsics

MIN_VIEWS = 8
TEST_EVERY = 5  # each fifth view is held out
OUTLIER = 4.0  # robust standard deviations, of a corner
BAD_VIEW = 3.0  # times the median error of a view
ROUNDS = 3  # of leaving out what does not fit
MIN_TILT_DEG = 12.0  # between the board's normals: of parallel boards the focal length can't be seen
PINHOLE = cv2.CALIB_FIX_K3  # k3 says nothing at ordinary fields of view and makes the rest uncertain
TANGENTIAL = 5e-4  # standard deviation of a lens's tangential coefficients
MAD = 1.4826


class IntrinsicsError(CodedError):
    """Views that no camera model can be found from."""


@dataclass(frozen=True)
class IntrinsicsResult:
    """What was found.

    intrinsics: from all views that fit, after the test.
    sigma: standard deviation of fx, fy, cx, cy, px.
    train_px, test_px: root mean square error of the training views, and of the held-out ones, which half of their
        corners give the pose of, and the other half the error.
    used: numbers of the views that fit. left_out: of those that don't, with their error in px.
    corners_left_out: corners that don't fit, of the training views.
    """

    intrinsics: Intrinsics
    sigma: tuple[float, float, float, float]
    train_px: float
    test_px: float
    used: tuple[int, ...]
    left_out: dict[int, float]
    corners_left_out: int


def calibrate(views: Sequence[View], board: BoardSize, image_size: tuple[int, int],
              model: Literal["pinhole", "fisheye"] = "pinhole") -> IntrinsicsResult:  # fmt: skip
    """The camera model that explains the views best. image_size: width and height, px."""
    enough = [i for i, view in enumerate(views) if len(view) >= MIN_CORNERS]
    if len(enough) < MIN_VIEWS:
        remedy = "Take more views of the board, in every part of the image and tilted in every direction."
        raise IntrinsicsError(Fault("TOO_FEW_VIEWS", "views", f"{MIN_VIEWS} or more", str(len(enough)), remedy))
    if (spread := tilt_spread(views, board, image_size)) < MIN_TILT_DEG:
        remedy = "Tilt the board by 20 to 40 degrees, in every direction: of parallel boards no focal length follows."
        found = f"{spread:.0f} deg"
        raise IntrinsicsError(Fault("NO_TILT", "views", f"boards tilted by {MIN_TILT_DEG:g} deg", found, remedy))
    held_out = [i for i in enough[TEST_EVERY - 1 :: TEST_EVERY] if len(views[i]) >= 2 * MIN_CORNERS]
    train = [i for i in enough if i not in held_out]
    kept = {i: views[i] for i in train}
    left_out: dict[int, float] = {}
    dropped = 0
    for last in (*([False] * ROUNDS), True):
        camera, sigma, errors = _solve(kept, board, image_size, model)
        if last:
            break
        before = dropped
        bad = _bad_views(errors)
        for i in bad:
            left_out[i] = float(np.sqrt((errors[i] ** 2).mean()))
        kept, fresh = _without_outliers(kept, errors, bad)
        dropped += fresh
        if len(kept) < MIN_VIEWS - 2:
            remedy = "Keep the board flat and still, and check its number of squares."
            found = f"{len(left_out)} of {len(train)} views that don't fit"
            raise IntrinsicsError(Fault("VIEWS_DISAGREE", "views", "views that one camera explains", found, remedy))
        if not bad and dropped == before:
            break
    residuals = np.concatenate([e.ravel() for e in errors.values()])
    test = {i: held_out_error(camera, views[i], board) for i in held_out}
    limit = BAD_VIEW * float(np.median(list(test.values()))) if test else 0.0
    left_out |= {i: error for i, error in test.items() if error > limit}
    final = {**kept, **{i: views[i] for i in held_out if i not in left_out}}
    camera, sigma, _ = _solve(final, board, image_size, model)
    kept_out = [error for i, error in test.items() if i not in left_out]
    test_px = float(np.sqrt(np.mean(np.square(kept_out)))) if kept_out else float("nan")
    return IntrinsicsResult(camera, sigma, _rms(residuals), test_px, tuple(sorted(final)), left_out, dropped)


def board_pose(camera: Intrinsics, corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The board's pose `[4, 4]` in the optical frame that fits corners `[N, 2]` px of points `[N, 3]` m best."""
    flat = np.ascontiguousarray(rays(camera, corners)[:, :2])
    points = np.ascontiguousarray(points, np.float64)
    found, turns, shifts, _ = cv2.solvePnPGeneric(points, flat, np.eye(3), None, flags=cv2.SOLVEPNP_IPPE)
    best, least = None, np.inf
    for turn, shift in zip(turns, shifts, strict=True) if found else ():
        turn, shift = cv2.solvePnPRefineLM(points, flat, np.eye(3), np.zeros(4), turn, shift)
        made = np.eye(4)
        made[:3, :3], made[:3, 3] = cv2.Rodrigues(turn)[0], shift.ravel()
        there = points @ made[:3, :3].T + made[:3, 3]  # the board's own corner may lie behind the camera
        size = float(((project(camera, there) - corners) ** 2).sum())
        if size < least and there[:, 2].min() > 0:
            best, least = made, size
    if best is None:
        remedy = "Take the view again, with more of the board in the image."
        raise IntrinsicsError(Fault("NO_POSE", "view", "a pose of the board", "none", remedy))
    return best


def held_out_error(camera: Intrinsics, view: View, board: BoardSize) -> float:
    """Root mean square error in px of every other corner, as on a chessboard, for the pose that the rest gives."""
    points = matched(view, board)
    row, column = np.divmod(view.ids, board.squares_x - 1)
    white = (row + column) % 2 == 0
    motion = board_pose(camera, view.corners[white], points[white])
    error = project(camera, points[~white] @ motion[:3, :3].T + motion[:3, 3]) - view.corners[~white]
    return float(np.sqrt((error**2).sum(1).mean()))


def tilt_spread(views: Sequence[View], board: BoardSize, image_size: tuple[int, int]) -> float:
    """The greatest angle between two boards' normals, deg, seen with a rough guess of the focal length."""
    width, height = image_size
    guess = Intrinsics("pinhole", width, height, width, width, (width - 1) / 2, (height - 1) / 2)
    normals = np.array([
        board_pose(guess, view.corners, matched(view, board))[:3, 2] for view in views if len(view) >= MIN_CORNERS
    ])  # fmt: skip
    return float(np.rad2deg(np.arccos(np.clip(normals @ normals.T, -1, 1)).max()))


def _solve(views: dict[int, View], board: BoardSize, image_size: tuple[int, int], model: str
           ) -> tuple[Intrinsics, tuple[float, float, float, float], dict[int, np.ndarray]]:  # fmt: skip
    """Camera, standard deviations, and the errors `[N, 2]` px of each view."""
    points = [matched(view, board).reshape(1, -1, 3) for view in views.values()]
    corners = [view.corners.reshape(1, -1, 2) for view in views.values()]
    solve = _solve_fisheye if model == "fisheye" else _solve_pinhole
    try:
        camera, sigma, turns, shifts = solve(points, corners, image_size)
    except cv2.error as error:
        remedy = "Take other views: tilted, in every part of the image, with most of the board in it."
        found = str(error).strip().splitlines()[-1]
        raise IntrinsicsError(Fault("NOT_SOLVED", "views", f"a {model} camera", found, remedy)) from error
    errors = {}
    for i, point, corner, turn, shift in zip(views, points, corners, turns, shifts, strict=True):
        there = point[0] @ cv2.Rodrigues(turn)[0].T + shift.ravel()
        errors[i] = project(camera, there) - corner[0]
    return camera, sigma, errors


def _solve_pinhole(points: list[np.ndarray], corners: list[np.ndarray], size: tuple[int, int]) -> tuple:
    """The tangential distortion and the principal point stand in for one another where boards are tilted little: what
    lenses usually have of the former (`TANGENTIAL`) counts beside what the views say, each by its variance."""
    arrays = [[array.astype(np.float32) for array in given] for given in (points, corners)]
    _, matrix, distortion, *_, deviations, _, _ = cv2.calibrateCameraExtended(*arrays, size, None, None, flags=PINHOLE)
    free = deviations.ravel().copy()
    share = TANGENTIAL**2 / (TANGENTIAL**2 + free[6:8] ** 2)
    distortion.ravel()[2:4] *= share
    flags = PINHOLE | cv2.CALIB_USE_INTRINSIC_GUESS | cv2.CALIB_FIX_TANGENT_DIST
    _, matrix, distortion, turns, shifts, deviations, _, _ = cv2.calibrateCameraExtended(
        *arrays, size, matrix, distortion, flags=flags
    )
    fixed = deviations.ravel()
    sigma = np.sqrt(fixed[:4] ** 2 + share.mean() * np.maximum(free[:4] ** 2 - fixed[:4] ** 2, 0.0))
    numbers = tuple(float(v) for v in distortion.ravel()[:5])
    camera = Intrinsics("pinhole", *size, *_lens(matrix), numbers)
    return camera, tuple(float(v) for v in sigma), turns, shifts


def _solve_fisheye(points: list[np.ndarray], corners: list[np.ndarray], size: tuple[int, int]) -> tuple:
    space = cv2.fisheye if hasattr(cv2.fisheye, "CALIB_FIX_SKEW") else cv2  # OpenCV 5 has moved the flags
    flags = space.CALIB_RECOMPUTE_EXTRINSIC | space.CALIB_FIX_SKEW
    matrix, distortion = np.eye(3), np.zeros(4)
    _, matrix, distortion, turns, shifts = cv2.fisheye.calibrate(points, corners, size, matrix, distortion, flags=flags)
    numbers = tuple(float(v) for v in distortion.ravel())
    camera = Intrinsics("fisheye", *size, *_lens(matrix), numbers)
    sigma = _fisheye_sigma(camera, points, corners, turns, shifts)
    return camera, sigma, turns, shifts


def _lens(matrix: np.ndarray) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy."""
    return float(matrix[0, 0]), float(matrix[1, 1]), float(matrix[0, 2]), float(matrix[1, 2])


def _fisheye_sigma(camera: Intrinsics, points: list, corners: list, turns: Sequence, shifts: Sequence
                   ) -> tuple[float, float, float, float]:  # fmt: skip
    """Of fx, fy, cx, cy: OpenCV tells none for a fisheye. From its Jacobian, with the poses eliminated view by view."""
    left, total, count = np.zeros((8, 8)), 0.0, 0
    for point, corner, turn, shift in zip(points, corners, turns, shifts, strict=True):
        shaped = point.reshape(-1, 1, 3)
        there, jacobian = cv2.fisheye.projectPoints(shaped, turn, shift, camera.matrix, camera.coefficients)
        total, count = total + float(((there[:, 0] - corner[0]) ** 2).sum()), count + 2 * len(there) - 6
        own, pose = jacobian[:, :8], jacobian[:, 8:14]  # f, c, k; rotation, translation
        left += own.T @ own - own.T @ pose @ np.linalg.solve(pose.T @ pose, pose.T @ own)
    fx, fy, cx, cy = np.sqrt(np.diag(np.linalg.inv(left))[:4] * total / max(count - 8, 1))
    return float(fx), float(fy), float(cx), float(cy)


def _bad_views(errors: dict[int, np.ndarray]) -> list[int]:
    # By the middle of its errors, so that one wrong corner condemns no view.
    sizes = {i: MAD * float(np.median(np.abs(error))) for i, error in errors.items()}
    limit = BAD_VIEW * float(np.median(list(sizes.values())))
    return [i for i, size in sizes.items() if size > limit]


def _without_outliers(views: dict[int, View], errors: dict[int, np.ndarray], bad: list[int]
                      ) -> tuple[dict[int, View], int]:  # fmt: skip
    """The views without the bad ones and without corners that are far off; how many of those there were."""
    good = np.concatenate([errors[i].ravel() for i in views if i not in bad] or [np.zeros(1)])
    limit = OUTLIER * MAD * float(np.median(np.abs(good)))
    kept, dropped = {}, 0
    for i, view in views.items():
        if i in bad:
            continue
        fits = (np.abs(errors[i]) <= limit).all(1)
        if fits.sum() >= MIN_CORNERS:
            kept[i] = View(view.ids[fits], view.corners[fits])
            dropped += int((~fits).sum())
    return kept, dropped


def _rms(values: np.ndarray) -> float:
    """Of the distances that pairs of values make."""
    return float(np.sqrt(2 * (values**2).mean()))
