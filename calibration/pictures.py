"""Pictures of a calibration's views: the boards that were found, and how far each corner is from where it should be."""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from calibration.detection import View, matched
from calibration.rendering import project
from vla.rig import BoardSize, Intrinsics

TILE = 160  # px, width of an image in the sheet
COLUMNS = 6
ARROW_PX = 28  # of a corner that is off by the root mean square
FOUND, LINE, INK = (255, 220, 0), (200, 60, 60), (40, 40, 40)


def sheet(images: Sequence[np.ndarray], views: Sequence[View], columns: int = COLUMNS) -> np.ndarray:
    """All images `[H, W, 3]`, small, beside and below each other, with the corners that were found: RGB."""
    height, width = images[0].shape[:2]
    rows, tall = math.ceil(len(images) / columns), round(TILE * height / width)
    made = np.full((rows * (tall + 4), columns * (TILE + 4), 3), 255, np.uint8)
    for number, (image, view) in enumerate(zip(images, views, strict=True)):
        small = cv2.resize(image, (TILE, tall), interpolation=cv2.INTER_AREA)
        for x, y in (view.corners + 0.5) * TILE / width:
            cv2.circle(small, (round(x), round(y)), 2, FOUND, 1, cv2.LINE_AA)
        row, column = divmod(number, columns)
        made[row * (tall + 4) :, column * (TILE + 4) :][:tall, :TILE] = small
    return made


def errors(views: Sequence[View], boards: Sequence[np.ndarray], camera: Intrinsics, size: BoardSize
           ) -> list[np.ndarray]:  # fmt: skip
    """Of each view `[N, 2]` px, from the corners that were seen to where the board's pose `[4, 4]` puts them."""
    found = []
    for view, motion in zip(views, boards, strict=True):
        found.append(project(camera, matched(view, size) @ motion[:3, :3].T + motion[:3, 3]) - view.corners)
    return found


def residuals(views: Sequence[View], away: Sequence[np.ndarray], camera: Intrinsics) -> np.ndarray:
    """RGB `[H, W, 3]`: an arrow at each corner, towards where it should be, much longer than it is."""
    scale = 640 / camera.width
    made = np.full((round(camera.height * scale), 640, 3), 255, np.uint8)
    rms = float(np.sqrt((np.concatenate(away) ** 2).sum(1).mean()))
    longer = ARROW_PX / max(rms, 1e-6)
    for view, error in zip(views, away, strict=True):
        for begin, step in zip((view.corners + 0.5) * scale, error * longer, strict=True):
            ends = [(round(float(x)), round(float(y))) for x, y in (begin, begin + step)]
            cv2.arrowedLine(made, *ends, LINE, 1, cv2.LINE_AA, tipLength=0.25)
    text = f"{sum(map(len, views))} corners of {len(views)} views: {rms:.2f} px rms, {longer / scale:.0f} times as long"
    cv2.putText(made, text, (8, made.shape[0] - 10), cv2.FONT_HERSHEY_SIMPLEX, 0.5, INK, 1, cv2.LINE_AA)
    return made
