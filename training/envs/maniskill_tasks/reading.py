"""Plain numbers of a ManiSkill scene with one environment."""

from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from vla.rig import Intrinsics


def place(actor: Any) -> np.ndarray:
    """`[3]` m."""
    return np.asarray(actor.pose.p[0], np.float64)


def rotation(pose: Any) -> Rotation:
    w, x, y, z = pose.q[0].tolist()
    return Rotation.from_quat([x, y, z, w])


def wxyz(turn: Rotation) -> np.ndarray:
    x, y, z, w = turn.as_quat()
    return np.array([w, x, y, z])


def speed(actor: Any) -> float:
    """m/s."""
    return float(torch.linalg.norm(actor.linear_velocity))


def force(scene: Any, one: Any, other: Any) -> float:
    """Between two bodies, N."""
    return float(torch.linalg.norm(scene.get_pairwise_contact_forces(one, other)))


def pixel(camera: Any, lens: Intrinsics, point: np.ndarray) -> np.ndarray:
    """Image coordinates `[2]` of a point (x right, y down, -1..1 at the borders); NaN if outside."""
    w, x, y, z = camera.q
    ahead, left, up = Rotation.from_quat([x, y, z, w]).inv().apply(point - camera.p)
    if ahead < 1e-3:
        return np.full(2, np.nan)
    seen = np.array([lens.fx * -left, lens.fy * -up]) / ahead + (lens.cx + 0.5, lens.cy + 0.5)
    uv = 2 * seen / (lens.width, lens.height) - 1
    return uv if np.abs(uv).max() <= 1.0 else np.full(2, np.nan)
