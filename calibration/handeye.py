"""Hand-eye calibration: where a camera stands, from poses of the tool and views of a board.

Closed forms (`calibration.closed_form`) give a start; from there the reprojection error is minimised, weighted by what
is known of the noise: corners by their scatter, the robot's poses by their stated deviation. Per view the error is
taken as quadratic around that view's own best pose, which is exact to first order in the noise, so that a fit takes
milliseconds. Views that don't fit count less, or not at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.stats import chi2

from calibration import board as boards
from calibration.closed_form import METHODS, pairs
from calibration.rendering import project
from calibration.rigid import average_rotation, cross, distance, exponential, inverse, logarithm
from calibration.samples import Mode, Sample, Seen, prepare
from vla.rig import BoardSize, Intrinsics

ROUNDS = 15
DOUBT = float(np.sqrt(chi2.ppf(0.975, 6)))  # Mahalanobis distance from which on a view counts less
REFUSE = 2.5 * DOUBT  # from which on it counts nothing
MIDDLE = float(chi2.ppf(0.5, 6))
RESAMPLES = 1000


@dataclass(frozen=True)
class RobotNoise:
    """Standard deviations of a pose the robot tells, along each axis: m and rad."""

    translation_m: float = 2e-4
    rotation_rad: float = float(np.deg2rad(0.05))

    @property
    def covariance(self) -> np.ndarray:
        """`[6, 6]`, rotation first."""
        return np.diag([self.rotation_rad**2] * 3 + [self.translation_m**2] * 3)


@dataclass(frozen=True)
class Fit:
    """A solution. camera: X. board: Z. scale: of the board's edges. weights: `[N]` of the views.

    errors: `[N, 6]`, predicted against seen pose of the board, on its left in the camera's frame. squares: `[N]`, the
    same as squared Mahalanobis distances. noise: scatter over the stated one. moved: motion of what has moved.
    """

    camera: np.ndarray
    board: np.ndarray
    scale: float
    weights: np.ndarray
    errors: np.ndarray
    squares: np.ndarray
    noise: float
    moved: np.ndarray = field(default_factory=lambda: np.eye(4))


@dataclass(frozen=True)
class Freedom:
    """What a fit may change beside X and Z.

    scale: the size of the board. camera_from, board_from: the camera, or the board on its mount, has stood elsewhere
    from this view on.
    """

    scale: bool = False
    camera_from: int | None = None
    board_from: int | None = None


@dataclass(frozen=True)
class HandEyeResult:
    """Where the camera stands in its parent (robot's base, or tool), and how well that is known.

    camera, board: `[4, 4]`.
    sigma: `[6]` standard deviations of the camera's pose: rotation vector in rad, translation in m, camera's frame.
    low, high: `[6]` ends of the 95% intervals of the true pose relative to the found one.
    held_out_px, held_out_mm: root mean square error of a view that the fit has not seen, of its corners and at the
        board's middle.
    weights: `[N]`. methods: pose of each closed form, method_px: its error at the board's outer corners.
    noise: scatter over the stated one. scale: of the board, 1 unless it was asked for.
    """

    camera: np.ndarray
    board: np.ndarray
    sigma: np.ndarray
    low: np.ndarray
    high: np.ndarray
    held_out_px: float
    held_out_mm: float
    weights: np.ndarray
    methods: dict[str, np.ndarray]
    method_px: dict[str, float]
    noise: float
    scale: float = 1.0

    @property
    def translation_mm(self) -> float:
        """Standard deviation of the position, mm."""
        return 1e3 * float(np.linalg.norm(self.sigma[3:]))

    @property
    def rotation_deg(self) -> float:
        return float(np.rad2deg(np.linalg.norm(self.sigma[:3])))


def calibrate(seen: Seen, noise: RobotNoise | None = None, with_scale: bool = False,
              rng: np.random.Generator | None = None) -> HandEyeResult:  # fmt: skip
    """The best pose of the camera. with_scale: find the size of the board's squares, too."""
    noise, rng = noise or RobotNoise(), rng or np.random.default_rng(0)
    methods = closed_forms(seen)
    free = Freedom(scale=with_scale)
    found = robust(seen, start(seen, methods), noise, free)
    low, high, sigma = bootstrap(seen, found, noise, free, rng)
    px, mm = held_out(seen, found, noise, free)
    corners = {name: _pixels(seen, pose, _board_for(seen, pose)) for name, pose in methods.items()}
    method_px = {name: float(np.sqrt(2 * np.mean(away**2))) for name, away in corners.items()}
    return HandEyeResult(
        found.camera, found.board, sigma, low, high, px, mm, found.weights, methods, method_px, found.noise, found.scale
    )


def closed_forms(seen: Seen) -> dict[str, np.ndarray]:
    """The camera's pose by each of the classic methods that gives one."""
    hand, eye = pairs(inverse(seen.chain), seen.board)
    found = {}
    for name, method in METHODS.items():
        solve: Callable[[np.ndarray, np.ndarray], np.ndarray] = method
        with np.errstate(all="ignore"):
            pose = solve(hand, eye)
        if np.isfinite(pose).all():
            found[name] = pose
    return found


def start(seen: Seen, methods: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Camera and board of the closed form that fits most views best: outliers don't decide."""

    def misfit(camera: np.ndarray) -> float:
        errors = np.linalg.norm(_pixels(seen, camera, _board_for(seen, camera)), axis=(1, 2))
        return float(np.median(errors))

    best = min(methods.values(), key=misfit)
    return best, _board_for(seen, best)


def robust(seen: Seen, begin: tuple[np.ndarray, np.ndarray], noise: RobotNoise, free: Freedom) -> Fit:
    """The fit in which views that are far off count less, those beyond all doubt nothing."""
    weights = np.ones(len(seen))
    found = fit(seen, begin, noise, free, weights)
    for _ in range(ROUNDS):
        limit = DOUBT * max(found.noise, 1.0)
        far = np.sqrt(found.squares)
        fresh = np.where(far > REFUSE * max(found.noise, 1.0), 0.0, np.minimum(1.0, limit / np.maximum(far, 1e-12)))
        if (fresh > 0).sum() < max(4, len(seen) // 2):
            break
        if np.abs(fresh - weights).max() < 1e-3:
            break
        weights = fresh
        found = fit(seen, (found.camera, found.board), noise, free, weights)
    return found


def fit(seen: Seen, begin: tuple[np.ndarray, np.ndarray], noise: RobotNoise, free: Freedom, weights: np.ndarray,
        rounds: int = 8) -> Fit:  # fmt: skip
    """Weighted least squares of the views' errors by Gauss-Newton."""
    camera, board = begin
    scale, moved = 1.0, np.eye(4)
    for _ in range(rounds):
        errors, design, white = linearise(seen, camera, board, scale, moved, noise, free)
        flat = design.reshape(-1, design.shape[-1])
        weighted = (white * weights[:, None, None] @ design).reshape(flat.shape)
        step = -np.linalg.lstsq(flat.T @ weighted, weighted.T @ errors.ravel(), rcond=1e-12)[0]
        camera, board = camera @ exponential(step[:6]), board @ exponential(step[6:12])
        if free.scale:
            scale += float(step[12])
        if free.camera_from is not None or free.board_from is not None:
            moved = moved @ exponential(step[-6:])
        if np.abs(step).max() < 1e-9:
            break
    errors, _, white = linearise(seen, camera, board, scale, moved, noise, free)
    squares = np.einsum("nk,nkl,nl->n", errors, white, errors)
    spread = float(np.sqrt(np.median(squares[weights > 0]) / MIDDLE))
    return Fit(camera, board, scale, weights, errors, squares, spread, moved)


def linearise(seen: Seen, camera: np.ndarray, board: np.ndarray, scale: float, moved: np.ndarray, noise: RobotNoise,
              free: Freedom) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Errors `[N, 6]`, their derivatives `[N, 6, P]` and the inverse of their covariance `[N, 6, 6]`.

    Parameters: a motion on the right of X, one on the right of Z, the scale, one on the right of the second pose.
    """
    count = len(seen)
    late = np.arange(count)
    cameras = np.broadcast_to(camera, (count, 4, 4))
    hung = np.broadcast_to(board, (count, 4, 4))
    if free.camera_from is not None:
        cameras = np.where((late >= free.camera_from)[:, None, None], camera @ moved, cameras)
    if free.board_from is not None:
        hung = np.where((late >= free.board_from)[:, None, None], board @ moved, hung)
    predicted = inverse(cameras) @ seen.chain @ hung
    measured = seen.board.copy()
    measured[:, :3, 3] *= scale
    errors = logarithm(predicted @ inverse(measured))
    own = -np.broadcast_to(np.eye(6), (count, 6, 6))
    other = adjoint(predicted)
    parts = [own, other]
    if free.camera_from is not None:
        parts[0] = np.where((late >= free.camera_from)[:, None, None], -adjoint(inverse(moved)), own)
        parts.append(np.where((late >= free.camera_from)[:, None, None], own, 0.0))
    if free.board_from is not None:
        shifted = (late >= free.board_from)[:, None, None]
        parts[1] = np.where(shifted, adjoint(predicted @ inverse(moved)), other)
        parts.append(np.where(shifted, other, 0.0))
    if free.scale:
        column = np.zeros((count, 6, 1))
        column[:, 3:, 0] = -seen.board[:, :3, 3]
        parts.insert(2, column)
    robot = adjoint(predicted @ inverse(hung)) if seen.mode == "eye_to_hand" else adjoint(inverse(cameras))
    covariance = np.linalg.inv(seen.information) + robot @ noise.covariance @ np.swapaxes(robot, -1, -2)
    return errors, np.concatenate(parts, -1), np.linalg.inv(covariance)


def adjoint(motions: np.ndarray) -> np.ndarray:
    """`[..., 4, 4]` -> `[..., 6, 6]`: takes a small motion on the right to the one on the left that does the same."""
    made = np.zeros((*motions.shape[:-2], 6, 6))
    turn = motions[..., :3, :3]
    made[..., :3, :3] = made[..., 3:, 3:] = turn
    made[..., 3:, :3] = cross(motions[..., :3, 3]) @ turn
    return made


def bootstrap(seen: Seen, found: Fit, noise: RobotNoise, free: Freedom, rng: np.random.Generator
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Ends of the 95% intervals of the camera's error `[6]`, and standard deviations.

    Resampling of residuals (Efron 1979): whitened, enlarged by what the fit took from them, drawn with replacement.
    """
    _, design, white = linearise(seen, found.camera, found.board, found.scale, found.moved, noise, free)
    used = np.flatnonzero(found.weights > 0)
    root = np.linalg.cholesky(white[used])  # white = root root'
    rows = np.swapaxes(root, -1, -2) @ design[used] * np.sqrt(found.weights[used])[:, None, None]
    flat = rows.reshape(-1, rows.shape[-1])
    solve = np.linalg.pinv(flat)
    whitened = np.einsum("nij,nj->ni", np.swapaxes(root, -1, -2), found.errors[used])
    whitened *= np.sqrt(found.weights[used])[:, None]
    freedom = max(whitened.size - flat.shape[1], 1)
    whitened = whitened - whitened.mean(0)
    whitened *= np.sqrt(whitened.size / freedom)
    drawn = whitened[rng.integers(0, len(used), (RESAMPLES, len(used)))].reshape(RESAMPLES, -1)
    errors = -(drawn @ solve.T)[:, :6]
    errors -= errors.mean(0)
    low, high = np.percentile(errors, [2.5, 97.5], axis=0)
    return low, high, errors.std(0)


def lens_doubt(
    samples: Sequence[Sample], camera: Intrinsics, deviations: tuple[float, float, float, float], size: BoardSize,
    mode: Mode, found: HandEyeResult, with_scale: bool = False,
) -> np.ndarray:  # fmt: skip
    """Standard deviations `[6]` of the camera's pose, as `HandEyeResult.sigma`, for those of its lens.

    deviations: of fx, fy, cx, cy in px, taken as independent: the pose is found again with each of them off by as much.
    """
    squares = np.zeros(6)
    for name, off in zip(("fx", "fy", "cx", "cy"), deviations, strict=True):
        seen = prepare(samples, replace(camera, **{name: getattr(camera, name) + off}), size, mode)
        other = robust(seen, (found.camera, found.board), RobotNoise(), Freedom(scale=with_scale))
        squares += logarithm(inverse(found.camera) @ other.camera) ** 2
    doubt: np.ndarray = np.sqrt(squares)
    return doubt


def held_out(seen: Seen, found: Fit, noise: RobotNoise, free: Freedom) -> tuple[float, float]:
    """Root mean square error of each view that counts, for the fit to the others: px, and mm at the board's middle."""
    squares, distances = [], []
    width, height = boards.extent(seen.size)
    middle = np.array([width / 2, height / 2, 0.0])
    for i in np.flatnonzero(found.weights > 0):
        weights = found.weights.copy()
        weights[i] = 0.0
        other = fit(seen, (found.camera, found.board), noise, free, weights, rounds=3)
        predicted = inverse(other.camera) @ seen.chain[i] @ other.board
        points = boards.points(seen.size)[seen.views[i].ids] * other.scale
        pixels = project(seen.camera, points @ predicted[:3, :3].T + predicted[:3, 3])
        squares.append(((pixels - seen.views[i].corners) ** 2).sum(1).mean())
        measured = seen.board[i].copy()
        measured[:3, 3] *= other.scale
        away = (predicted - measured) @ np.array([*(middle * other.scale), 1.0])
        distances.append(float(away @ away))
    return float(np.sqrt(np.mean(squares))), 1e3 * float(np.sqrt(np.mean(distances)))


def disagreement(methods: dict[str, np.ndarray]) -> tuple[float, float]:
    """Greatest distance between two closed forms: m and deg."""
    both = [distance(a, b) for a in methods.values() for b in methods.values()]
    return max(m for m, _ in both), max(d for _, d in both)


def base_offset(result: HandEyeResult, board: np.ndarray) -> np.ndarray:
    """With eye_in_hand: the robot's base `[4, 4]` in the frame that the board's pose `board` was surveyed in."""
    return board @ inverse(result.board)


def _board_for(seen: Seen, camera: np.ndarray) -> np.ndarray:
    """The board's pose on its mount that the views agree on, for a camera's pose."""
    found = inverse(seen.chain) @ camera @ seen.board
    made = np.eye(4)
    made[:3, :3] = average_rotation(found[:, :3, :3])
    made[:3, 3] = np.median(found[:, :3, 3], axis=0)
    return made


def _pixels(seen: Seen, camera: np.ndarray, board: np.ndarray) -> np.ndarray:
    """Errors `[N, 4, 2]` px of the board's outermost inner corners, against the views' own poses."""
    grid = boards.points(seen.size)
    across = seen.size.squares_x - 1
    outer = grid[[0, across - 1, len(grid) - across, len(grid) - 1]]
    predicted = inverse(camera) @ seen.chain @ board
    pixels = [
        project(seen.camera, outer @ a[:3, :3].T + a[:3, 3]) - project(seen.camera, outer @ b[:3, :3].T + b[:3, 3])
        for a, b in zip(predicted, seen.board, strict=True)
    ]
    return np.nan_to_num(np.array(pixels), nan=1e4)
