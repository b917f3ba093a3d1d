"""What the adapters of all embodiments read: vectors, and quaternions with one sign for every rotation."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla.errors import CodedError, Fault

TOOL_DOWN = np.array([1.0, 1.0, 0.0, 0.0])  # xyzw, not normalised: the hand's pose that all tasks begin near
UPRIGHT = np.array([0.0, 0.0, 0.0, 1.0])  # xyzw: of what stands on the table


class AdapterError(CodedError):
    """The native observation or the action is not what this embodiment gives or takes."""


def vector(native: Mapping[str, Any], key: str, size: int) -> np.ndarray:
    """float64 `[size]`."""
    found = np.array(native[key], np.float64)
    if found.shape != (size,):
        remedy = "Pass the vector of one environment."
        raise AdapterError(Fault("NATIVE_SHAPE", key, f"[{size}]", str(found.shape), remedy))
    return found


def rotation(wxyz: np.ndarray, key: str, near: np.ndarray) -> np.ndarray:
    """xyzw, of the two signs the one on the side of `near`: so it never flips near that pose.

    For a tool that points down w is almost 0, so the usual choice, w >= 0, would flip all signs with the last digits
    of a measurement.
    """
    norm = float(wxyz @ wxyz) ** 0.5
    if not abs(norm - 1.0) < 1e-3:
        remedy = "Pass a unit quaternion in the order w, x, y, z."
        raise AdapterError(Fault("NATIVE_QUATERNION", key, "norm 1", f"norm {norm:g}", remedy))
    xyzw = wxyz[[1, 2, 3, 0]]
    side = float(xyzw @ near) or float(xyzw[np.flatnonzero(xyzw)[0]])
    return (-xyzw if side < 0 else xyzw) + 0.0  # the sum turns -0.0 into 0.0, for parity bit for bit


def row(action: np.ndarray, size: int) -> np.ndarray:
    """One row of an action chunk, float64 `[size]`."""
    if action.shape != (size,) or not np.isfinite(action).all():
        remedy = "Pass one finite row of ActionChunk.actions at a time."
        raise AdapterError(Fault("ACTION_ROW", "action", f"{size} finite numbers", repr(action), remedy))
    return action.astype(np.float64)
