"""How well a simulated image lies on the real one: overlays, silhouettes, known points, and green screens."""

from dataclasses import dataclass

import cv2
import numpy as np

from calibration.detection import View
from vla.errors import CodedError, Fault
from vla.rig import Intrinsics

CHANGED = 24  # of 255, in any channel: a pixel shows something else than the background
LINE = (255, 60, 40)


class AlignmentError(CodedError):
    """Images that can't be compared."""


@dataclass(frozen=True)
class Alignment:
    """iou: of the arm's silhouettes, 1 is perfect. point_px: root mean square error of known points. NaN: no such."""

    iou: float
    point_px: float
    points: int


def same_size(real: np.ndarray, simulated: np.ndarray) -> None:
    if real.shape[:2] != simulated.shape[:2]:
        remedy = "Render at the size of the real image."
        raise AlignmentError(Fault("IMAGE_SIZE", "images", str(real.shape[:2]), str(simulated.shape[:2]), remedy))


def rectified(image: np.ndarray, camera: Intrinsics) -> np.ndarray:
    """Without the lens's distortion, as simulators render it: the same focal length and principal point."""
    if camera.model == "fisheye":
        return cv2.fisheye.undistortImage(image, camera.matrix, camera.coefficients, Knew=camera.matrix)
    return cv2.undistort(image, camera.matrix, camera.coefficients)


def silhouette(image: np.ndarray, background: np.ndarray, changed: int = CHANGED) -> np.ndarray:
    """Bool `[H, W]`: what an image shows before a background that was taken without it. Specks are removed."""
    same_size(image, background)
    apart = np.abs(image.astype(np.int16) - background.astype(np.int16)).max(-1) > changed
    kernel = np.ones((3, 3), np.uint8)
    cleaned = cv2.morphologyEx(apart.astype(np.uint8), cv2.MORPH_OPEN, kernel)
    return cv2.morphologyEx(cleaned, cv2.MORPH_CLOSE, kernel).astype(bool)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool images; NaN if both are empty."""
    same_size(a, b)
    union = int((a | b).sum())
    return float((a & b).sum()) / union if union else float("nan")


def point_error(real: View, simulated: View) -> tuple[float, int]:
    """Root mean square distance in px of the points that both show, and how many those are."""
    _, first, second = np.intersect1d(real.ids, simulated.ids, return_indices=True)
    if not len(first):
        return float("nan"), 0
    away = real.corners[first] - simulated.corners[second]
    return float(np.sqrt((away**2).sum(1).mean())), len(first)


def blend(real: np.ndarray, simulated: np.ndarray) -> np.ndarray:
    """Half of each, with the simulated image's edges drawn over it: `[H, W, 3]`."""
    same_size(real, simulated)
    shown = cv2.addWeighted(real, 0.5, simulated, 0.5, 0.0)
    edges = cv2.Canny(cv2.cvtColor(simulated, cv2.COLOR_RGB2GRAY), 60, 140) > 0
    shown[edges] = LINE
    return shown


def overlay(real: np.ndarray, simulated: np.ndarray) -> np.ndarray:
    """Real, simulated, and their blend beside each other: `[H, 3 W, 3]`."""
    return np.concatenate([real, simulated, blend(real, simulated)], 1)


def composite(simulated: np.ndarray, foreground: np.ndarray, background: np.ndarray) -> np.ndarray:
    """A green screen: the simulated arm and objects (bool `[H, W]`) before a real background; soft at the edge."""
    same_size(simulated, background)
    share = cv2.GaussianBlur(foreground.astype(np.float32), (0, 0), 0.7)[..., None]
    return np.clip(share * simulated + (1 - share) * background + 0.5, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class ColorMatch:
    """Per channel gain and offset that take simulated pixels to real ones."""

    gain: tuple[float, ...]
    offset: tuple[float, ...]

    @staticmethod
    def fit(simulated: np.ndarray, real: np.ndarray, where: np.ndarray | None = None) -> "ColorMatch":
        """From the pixels `where` both show the same thing (bool `[H, W]`), by means and standard deviations."""
        same_size(simulated, real)
        chosen = np.ones(real.shape[:2], bool) if where is None else where
        a, b = simulated[chosen].astype(np.float64), real[chosen].astype(np.float64)
        gain = b.std(0) / np.maximum(a.std(0), 1.0)
        offset = b.mean(0) - gain * a.mean(0)
        return ColorMatch(tuple(gain.tolist()), tuple(offset.tolist()))

    def apply(self, image: np.ndarray) -> np.ndarray:
        return np.clip(image * np.array(self.gain) + np.array(self.offset) + 0.5, 0, 255).astype(np.uint8)
