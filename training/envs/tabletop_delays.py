"""Delays of the tabletop, drawn for each episode: of the arm behind its commands, and of images beside the state.

Without a calibration the arm's are those of a simulator that knows no robot, and images are of the state's moment. With
one both lie around what was measured, docs/decisions/0013.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vla.rig import CameraCalibration
from vla.tasks.put_on_plate import RATE_HZ

PIECES = 5  # joint targets are interpolated in this many pieces per control step
PIECE_S = 1.0 / RATE_HZ / PIECES
FIXED_S = 0.002  # of control and physics, beside damping and whole pieces: measured
NOMINAL_S = 0.073  # mean of what is drawn without a calibration
DAMPED_S = 0.03, 0.1  # least and greatest lag by damping: below, joints swing; above, they creep


@dataclass(frozen=True)
class Delays:
    """Of one episode. pieces: by which commands are late. lag_s: of damping over stiffness; None: as drawn otherwise.

    images, state: how many pieces each camera's image, and tool and gripper, are older than the moment.
    """

    pieces: int
    lag_s: float | None
    images: Mapping[str, int]
    state: int = 0

    @property
    def oldest(self) -> int:
        return max(self.state, *self.images.values(), 0)


def motion_s(cameras: Sequence[CameraCalibration]) -> float | None:
    """The arm's delay as measured, the mean if it was with several cameras; None: it wasn't."""
    measured = [camera.delay.motion_s for camera in cameras if camera.delay is not None]
    return float(np.mean(measured)) if measured else None


def trained_s(cameras: Sequence[CameraCalibration], spread_s: float) -> float:
    """The mean delay of the arm that a policy learns with: the measured one, as far as this arm is that quick."""
    measured = motion_s(cameras)
    if measured is None:
        return NOMINAL_S
    return max(measured, DAMPED_S[0] + FIXED_S + spread_s)


def draw(cameras: Sequence[CameraCalibration], spread_s: float, random: np.random.Generator) -> Delays:
    """Of an episode. spread_s: largest distance from what was measured."""
    if motion_s(cameras) is None:
        return Delays(int(random.integers(0, 4)), None, {})
    arm = trained_s(cameras, spread_s) + random.uniform(-spread_s, spread_s) - FIXED_S
    # Dead time or damping: a measurement doesn't tell which.
    least, most = (max((arm - lag) / PIECE_S, 0.0) for lag in reversed(DAMPED_S))
    pieces = int(random.integers(math.ceil(least), max(math.floor(most), math.ceil(least)) + 1))
    # Stamps are put right by what was measured: what is left has either sign, and nothing is seen before it is there.
    late = {c.camera: round(random.uniform(-spread_s, spread_s) / PIECE_S) for c in cameras if c.delay is not None}
    state = -min(0, *late.values())
    return Delays(pieces, arm - pieces * PIECE_S, {name: value + state for name, value in late.items()}, state)


class Past:
    """The last configurations `qpos` of an environment, one for each piece of a control step."""

    def __init__(self, oldest: int, qpos: np.ndarray):
        self._kept = deque([qpos.copy()] * (oldest + 1), maxlen=oldest + 1)

    def add(self, qpos: np.ndarray) -> None:
        self._kept.append(qpos.copy())

    def before(self, pieces: int) -> np.ndarray:
        """So many pieces ago; 0: now."""
        return self._kept[-1 - pieces]
