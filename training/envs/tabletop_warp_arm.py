"""Kinematics of many arms at once: tool pose, Jacobian and one step of inverse kinematics, in float64."""

from typing import Any

import numpy as np
import torch

from training.envs.tabletop import IK_DAMPING
from training.envs.tabletop_render import mujoco

JOINTS = 7


def turn(axis: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotation matrices `[n, 3, 3]` about unit axes `[n, 3]` or `[3]` by `angle` `[n]` rad (Rodrigues)."""
    axis = axis.expand(angle.shape[0], 3)
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
    eye = torch.eye(3, dtype=axis.dtype, device=axis.device)
    sine, cosine = angle.sin()[:, None, None], angle.cos()[:, None, None]
    return eye + sine * cross + (1 - cosine) * (cross @ cross)


def turn_by(vector: torch.Tensor) -> torch.Tensor:
    """Rotation matrices `[n, 3, 3]` of rotation vectors `[n, 3]` rad."""
    angle = vector.norm(dim=-1)
    return turn(vector / angle.clamp(min=1e-12)[:, None], angle)


def rotation_vector(matrix: torch.Tensor) -> torch.Tensor:
    """Rotation vectors `[n, 3]` rad, at most pi long, of matrices `[n, 3, 3]`; by quaternions, exact near pi too."""
    m = matrix.reshape(-1, 9).unbind(-1)
    xx, xy, xz, yx, yy, yz, zx, zy, zz = m
    # Four multiples of the same quaternion w, x, y, z (Shepperd 1978); the longest is the one that is accurate.
    candidates = torch.stack([
        torch.stack([1 + xx + yy + zz, zy - yz, xz - zx, yx - xy], -1),
        torch.stack([zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx], -1),
        torch.stack([xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy], -1),
        torch.stack([yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz], -1),
    ], 1)  # fmt: skip
    best = candidates.norm(dim=-1).argmax(1)
    quaternion = candidates[torch.arange(len(best), device=best.device), best]
    quaternion = torch.where(quaternion[:, :1] < 0, -quaternion, quaternion)
    sine = quaternion[:, 1:].norm(dim=-1)
    angle = 2 * torch.atan2(sine, quaternion[:, 0])
    return quaternion[:, 1:] * (angle / sine.clamp(min=1e-12))[:, None]


class Arm:
    """The chain from the base to the site `tool` of a compiled model; all its joints are hinges."""

    def __init__(self, model: Any, device: torch.device):
        def tensor(values: Any) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.float64, device=device).clone()

        site = model.site("tool")
        body, chain = int(model.site_bodyid[site.id]), []
        while body:
            chain.insert(0, body)
            body = int(model.body_parentid[body])
        self._links: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        for body in chain:
            joint = int(model.body_jntadr[body])
            axis = tensor(model.jnt_axis[joint]) if joint >= 0 else None
            self._links.append((tensor(model.body_pos[body]), tensor(_matrix(model.body_quat[body])), axis))
        self._tool = tensor(site.pos), tensor(_matrix(site.quat))
        self.lower, self.upper = tensor(model.jnt_range[:JOINTS, 0]), tensor(model.jnt_range[:JOINTS, 1])

    def tool(self, joints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Position `[n, 3]` m, rotation `[n, 3, 3]` and Jacobian `[n, 6, 7]` (m, then rad) at `joints` `[n, 7]` rad."""
        count = len(joints)
        rotation = torch.eye(3, dtype=torch.float64, device=joints.device).expand(count, 3, 3)
        position = torch.zeros(count, 3, dtype=torch.float64, device=joints.device)
        anchors, axes = [], []
        for offset, fixed, axis in self._links:
            position = position + rotation @ offset
            rotation = rotation @ fixed
            if axis is not None:
                anchors.append(position)
                axes.append(rotation @ axis)
                rotation = rotation @ turn(axis, joints[:, len(axes) - 1])
        position = position + rotation @ self._tool[0]
        axis_columns, levers = torch.stack(axes, -1), position[..., None] - torch.stack(anchors, -1)
        jacobian = torch.cat([torch.linalg.cross(axis_columns, levers, dim=1), axis_columns], 1)
        return position, rotation @ self._tool[1], jacobian

    def step(self, joints: torch.Tensor, position: torch.Tensor, rotation: torch.Tensor, limit: float) -> torch.Tensor:
        """A damped-least-squares step `[n, 7]` rad from `joints` towards the tool pose, as `tabletop` does it."""
        at, turned, jacobian = self.tool(joints)
        left = rotation @ turned.transpose(1, 2)
        skew = 0.5 * (left - left.transpose(1, 2))
        error = torch.cat([position - at, torch.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], -1)], -1)
        damping = IK_DAMPING**2 * torch.eye(6, dtype=torch.float64, device=joints.device)
        inner = jacobian @ jacobian.transpose(1, 2) + damping
        solved = torch.linalg.solve(inner, error)
        return (jacobian.transpose(1, 2) @ solved[..., None])[..., 0].clamp(-limit, limit)


def _matrix(quaternion: Any) -> Any:
    """Rotation matrix `[3, 3]` of a quaternion w, x, y, z."""
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)
