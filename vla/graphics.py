"""Which library draws MuJoCo's images off-screen; to be called before mujoco is imported, which settles it."""

import ctypes.util
import os

REMEDY = "Install libegl1 (or libosmesa6) and set MUJOCO_GL=egl (or osmesa) or leave it unset; `vla doctor` tests both."


def choose() -> str:
    """MUJOCO_GL, set to EGL or else OSMesa if it was empty: without a display mujoco finds no backend by itself."""
    if not os.environ.get("MUJOCO_GL"):
        os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "osmesa"
    return os.environ["MUJOCO_GL"]
