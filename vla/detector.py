"""Whether a trial succeeded, as a camera beside the robot sees it: a suggestion, which whoever operates can overrule.

A detector is any function of this form, named by `vla trials detector=MODULE:FUNCTION`. `by_colour` finds the object by
the colour that it had where it was laid, so neither light nor lens need to be known; of the camera it needs the pose.
"""

import importlib
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
from PIL import Image, ImageDraw

from vla.errors import SimrealError
from vla.scene_picture import Viewpoint, outlines
from vla.tasks.put_on_plate import Episode, Placement

LEAST_PX = 8  # of the object, before the trial: below it a camera is too coarse
ALIKE = 0.09  # distance of chromaticities within which two pixels have one colour
COLOURED = 0.10  # chromaticity's distance from grey: an object with less can't be told by its colour
VISIBLE = 0.3  # share of the object's pixels that has to be seen again
OPEN_M = 0.065  # a gripper that is open wider than any object holds none
ON_GOAL = 0.85  # of its radius, as the task's own predicate


@dataclass(frozen=True)
class Detection:
    """success: None if the camera can't tell. distance_m: from the object to the goal's centre. said: in words."""

    success: bool | None
    distance_m: float | None
    said: str


class Detector(Protocol):
    """before, after: the camera's images uint8 `[H, W, 3]`, when the scene was laid and when the trial is over; the arm
    is at home in both. width_m: of the gripper when the policy was stopped; None if it is not known.
    """

    def __call__(
        self, before: np.ndarray, after: np.ndarray, scene: Episode, view: Viewpoint, width_m: float | None
    ) -> Detection: ...


def load(name: str) -> Detector:
    """A detector by its name, MODULE:FUNCTION."""
    module, _, function = name.partition(":")
    remedy = "Name an importable function, such as detector=vla.detector:by_colour."
    try:
        found = getattr(importlib.import_module(module), function, None) if function else None
    except ImportError as error:
        raise SimrealError(f"detector {name}: {error}", code="DETECTOR", remedy=remedy) from error
    if not callable(found):
        raise SimrealError(f"{name} is no function", code="DETECTOR", remedy=remedy)
    detector: Detector = found
    return detector


def by_colour(
    before: np.ndarray, after: np.ndarray, scene: Episode, view: Viewpoint, width_m: float | None = None
) -> Detection:
    """Where the object's colour is now; the goal is taken to be where it was laid.

    One camera can't tell an object on the goal from one that is held over it: that needs the gripper's width.
    """
    target, goal = scene.objects[0], scene.receptacles[0]
    was = silhouette(target, view, before.shape[:2])
    if was.sum() < LEAST_PX:
        return Detection(None, None, "the camera is too coarse for this object")
    own = np.median(_chromaticity(before)[was], axis=0)
    if np.linalg.norm(own - 1 / 3) < COLOURED:
        return Detection(None, None, "the object has no colour of its own")
    before_alike, now_alike = (_alike(image, own) for image in (before, after))
    expected = int((before_alike & was).sum())
    # What had this colour elsewhere is something else, as long as it stands where it stood.
    grown = cv2.dilate(was.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    mine = (now_alike & ~(before_alike & ~grown)).astype(np.uint8)
    count, parts, sizes, _ = cv2.connectedComponentsWithStats(mine, connectivity=8)
    if count < 2:  # the background is one
        return Detection(None, None, "the object is not seen")
    found = parts == 1 + int(np.argmax(sizes[1:, cv2.CC_STAT_AREA]))
    if found.sum() < VISIBLE * expected:
        return Detection(None, None, "the object is hidden")
    item = target.item
    place = on_plane(view, found, item.half_height + 2 * goal.item.half_height)
    distance = float(np.hypot(place[0] - goal.x, place[1] - goal.y))
    said = f"the object is {1e3 * distance:.0f} mm from the goal's centre"
    success = distance < ON_GOAL * goal.item.radius
    if success and width_m is not None and width_m < OPEN_M:
        return Detection(None, distance, f"{said}, and the gripper was not open: was it held?")
    return Detection(success, distance, said)


def silhouette(placement: Placement, view: Viewpoint, shape: tuple[int, int]) -> np.ndarray:
    """The pixels, bool `[H, W]`, that an item covers where it is laid, if nothing hides it."""
    height, width = shape
    picture = Image.new("1", (width, height))
    pen = ImageDraw.Draw(picture)
    lines = [view.project(line, width, height) for line in outlines(placement)]
    for bottom, top in zip(lines[::2], lines[1::2], strict=True):
        if not (np.isfinite(bottom).all() and np.isfinite(top).all()):
            continue
        for face in (bottom, top, *(bottom[[i - 1, i]].tolist() + top[[i, i - 1]].tolist() for i in range(len(top)))):
            pen.polygon([tuple(point) for point in face], fill=1)
    return np.asarray(picture)


def on_plane(view: Viewpoint, pixels: np.ndarray, z: float) -> np.ndarray:
    """x, y in m of the mean of these pixels, bool `[H, W]`, on a plane above the table; by Newton's method."""
    height, width = pixels.shape
    wanted = np.argwhere(pixels).mean(0)[::-1]
    place = np.array([0.5, 0.0])
    for _ in range(20):
        points = np.array([[*place, z], [place[0] + 1e-3, place[1], z], [place[0], place[1] + 1e-3, z]])
        seen = view.project(points, width, height)
        step = np.linalg.lstsq((seen[1:] - seen[0]).T / 1e-3, wanted - seen[0], rcond=None)[0]
        place = place + np.clip(step, -0.2, 0.2)
        if np.abs(step).max() < 1e-5:
            break
    return place


def _chromaticity(image: np.ndarray) -> np.ndarray:
    """Colour without brightness, `[H, W, 3]`, sums to 1."""
    light = image.astype(np.float64) + 1.0
    return light / light.sum(-1, keepdims=True)


def _alike(image: np.ndarray, own: np.ndarray) -> np.ndarray:
    return np.linalg.norm(_chromaticity(image) - own, axis=-1) < ALIKE
