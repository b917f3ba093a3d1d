"""How a scene is to be laid, drawn over the live image of a camera: outlines of the items where they belong.

A picture, and the same in words. Positions are in the robot base frame, the table top is z = 0.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vla.rig import CameraCalibration, Intrinsics, Store
from vla.tasks.put_on_plate import UNSEEN_TABLES, Episode, Placement, Primitive

SIZE = 640  # px, of the longer edge of the picture
GOAL, TARGET, OTHER = "#00c853", "#ff1744", "#ffab00"
CIRCLE = 24  # corners that stand for a circle


@dataclass(frozen=True)
class Viewpoint:
    """A camera. position: m, and rotation_xyzw: of its optical frame in the base frame.

    intrinsics: as calibrated; without, a pinhole with square pixels. said: where this is from, in words.
    """

    position: tuple[float, float, float]
    rotation_xyzw: tuple[float, float, float, float]
    fov_y_deg: float
    intrinsics: Intrinsics | None = None
    said: str = "nominal camera: its pose is the protocol's, not calibrated"

    def project(self, points: np.ndarray, width: int, height: int) -> np.ndarray:
        """Points `[N, 3]` m in the base frame -> `[N, 2]` px; nan behind the camera."""
        from scipy.spatial.transform import Rotation  # takes a while

        inside = (np.asarray(points) - self.position) @ Rotation.from_quat(self.rotation_xyzw).as_matrix()
        if self.intrinsics is not None:
            return _distorted(inside, self.intrinsics.scaled(width, height))
        focal = height / 2 / np.tan(np.deg2rad(self.fov_y_deg) / 2)
        depth = np.where(inside[:, 2] > 1e-3, inside[:, 2], np.nan)[:, None]
        return focal * inside[:, :2] / depth + [(width - 1) / 2, (height - 1) / 2]


def seen_from(nominal: Viewpoint, store: Path | None, camera: str) -> Viewpoint:
    """The camera as the store has it; the nominal one, which says why, where there is nothing to take."""
    if store is None:
        return nominal
    if not Store(store).has(camera):
        return replace(nominal, said=f"nominal camera: {store} has no calibration of {camera}")
    found = Store(store).read(camera)
    if found.mount is None:
        return replace(nominal, said=f"nominal camera: the calibration of {camera} has no pose")
    if found.mount.parent != "base":
        return replace(nominal, said=f"nominal camera: {camera} moves with the tool")
    return calibrated(found)


def calibrated(found: CameraCalibration) -> Viewpoint:
    """A camera that stands beside the robot."""
    assert found.mount is not None
    pose, days = found.mount.pose, found.age_days()
    said = f"camera as calibrated, {days:.1f} days ago"
    return Viewpoint(pose.translation_m, pose.rotation_xyzw, found.intrinsics.fov_y_deg, found.intrinsics, said)


def _distorted(inside: np.ndarray, intrinsics: Intrinsics) -> np.ndarray:
    """Points `[N, 3]` in the optical frame -> `[N, 2]` px, with the lens's distortion."""
    import cv2  # takes a while

    before = inside[:, 2] > 1e-3
    ahead = np.where(before[:, None], inside, [0.0, 0.0, 1.0])[:, None]
    project = cv2.fisheye.projectPoints if intrinsics.model == "fisheye" else cv2.projectPoints
    pixels, _ = project(ahead, np.zeros(3), np.zeros(3), intrinsics.matrix, intrinsics.coefficients)
    return np.where(before[:, None], pixels.reshape(-1, 2), np.nan)


def outlines(placement: Placement) -> list[np.ndarray]:
    """The edges of an item where it is to stand: closed lines `[N, 3]` m, the bottom and the top of each part."""
    lines = []
    for part in placement.item.parts:
        flat, half_height = _footprint(part)
        for z in (-half_height, half_height):
            corners = np.column_stack([flat, np.full(len(flat), z)]) + part.offset
            cos, sin = np.cos(placement.yaw), np.sin(placement.yaw)
            turned = corners @ np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
            lines.append(turned + np.array([placement.x, placement.y, placement.item.half_height]))
    return lines


def _footprint(part: Primitive) -> tuple[np.ndarray, float]:
    if part.kind == "box":
        x, y, z = part.size
        return np.array([[-x, -y], [x, -y], [x, y], [-x, y]]), z
    angles = np.linspace(0, 2 * np.pi, CIRCLE, endpoint=False)
    circle = part.size[0] * np.column_stack([np.cos(angles), np.sin(angles)])
    return circle, part.size[1] if part.kind == "cylinder" else 0.0  # a ball: its equator


def draw(image: np.ndarray, episode: Episode, view: Viewpoint) -> Image.Image:
    """The camera's image `[H, W, 3]` uint8, enlarged, with every item's outline and name."""
    scale = max(1, round(SIZE / max(image.shape[:2])))
    picture = Image.fromarray(image).resize((image.shape[1] * scale, image.shape[0] * scale), Image.Resampling.BICUBIC)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for placement, color in placed(episode):
        lowest = 0.0
        for line in outlines(placement):
            seen = view.project(line, *picture.size)
            if np.isfinite(seen).all():
                pen.line([tuple(p) for p in (*seen, seen[0])], fill=color, width=2)
                lowest = max(lowest, float(seen[:, 1].max()))
        middle = view.project(np.array([[placement.x, placement.y, 0.0]]), *picture.size)[0]
        if np.isfinite(middle).all():
            place = float(middle[0]), min(lowest + 10, picture.height - 10.0)
            name = placement.item.name
            pen.text(place, name, fill=color, font=font, anchor="mm", stroke_width=2, stroke_fill="black")
    corner = 6.0, picture.height - 6.0
    pen.text(corner, view.said, fill="white", font=font, anchor="lb", stroke_width=2, stroke_fill="black")
    return picture


def placed(episode: Episode) -> list[tuple[Placement, str]]:
    """Every item with its colour in the picture: receptacles first, objects over them."""
    goal, *receptacles = episode.receptacles
    target, *objects = episode.objects
    others = [(p, OTHER) for p in (*receptacles, *objects)]
    return [(goal, GOAL), *others, (target, TARGET)]


def words(episode: Episode) -> list[str]:
    """The same for whoever has no picture: one line for each item, and the table."""
    roles = ["goal", *["beside it"] * (len(episode.receptacles) - 1)]
    roles += ["to be moved", *["beside it"] * (len(episode.objects) - 1)]
    lines = [
        f"{p.item.name} ({role}): x {100 * p.x:.1f} cm, y {100 * p.y:+.1f} cm, turned {np.rad2deg(p.yaw):.0f} degrees"
        for p, role in zip((*episode.receptacles, *episode.objects), roles, strict=True)
    ]
    unseen = " (unseen in training)" if episode.table in UNSEEN_TABLES else ""
    moved = episode.disturbance.move_to
    if moved is not None:
        lines.append(f"during the trial, move the object to x {100 * moved[0]:.1f} cm, y {100 * moved[1]:+.1f} cm")
    return [*lines, f"table top: number {episode.table}{unseen}"]
