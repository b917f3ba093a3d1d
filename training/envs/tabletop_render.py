"""Off-screen images of the tabletop, and the noise that a variant lays over them."""

import os

import numpy as np

from training.envs.base import GraphicsError
from vla import graphics

graphics.choose()
try:
    import mujoco
except Exception as error:  # it loads GL at its import: an unknown name or a missing library ends here
    raise GraphicsError(
        f"MuJoCo cannot be imported (MUJOCO_GL={os.environ['MUJOCO_GL']}): {error}",
        code="GRAPHICS",
        remedy=graphics.REMEDY,
    ) from error


class Renderer:
    """Off-screen images of any slot: all scenes have the same meshes and textures and share a GL context."""

    def __init__(self, model: mujoco.MjModel, size: int):
        self.size = size
        try:
            self._gl = mujoco.GLContext(size, size)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # whatever the GL loader raises
            raise GraphicsError(
                f"MuJoCo cannot render off-screen (MUJOCO_GL={os.environ['MUJOCO_GL']}): {error}",
                code="GRAPHICS",
                remedy=graphics.REMEDY,
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=200)
        self._option = mujoco.MjvOption()
        self._option.geomgroup[:] = [1, 1, 1, 0, 0, 0]
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._view = mujoco.MjrRect(0, 0, size, size)
        self._pixels = np.zeros((size, size, 3), np.uint8)

    def image(self, model: mujoco.MjModel, data: mujoco.MjData, camera: str) -> np.ndarray:
        """RGB `[size, size, 3]` uint8."""
        self._gl.make_current()
        self._camera.fixedcamid = model.camera(camera).id
        mujoco.mjv_updateScene(model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene)
        mujoco.mjr_render(self._view, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._view, self._context)
        return self._pixels[::-1].copy()

    def mask(self, model: mujoco.MjModel, data: mujoco.MjData, camera: str, geom: int) -> np.ndarray:
        """Bool `[size, size]`, the pixels that show a geom."""
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = True
        self._scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = True
        try:
            colors = self.image(model, data, camera).astype(np.int32)
        finally:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = False
            self._scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = False
        ids = colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
        kind = mujoco.mjtObj.mjOBJ_GEOM
        shown = self._scene.geoms[: self._scene.ngeom]
        wanted = [g.segid + 1 for g in shown if g.objtype == kind and g.objid == geom]
        return np.isin(ids, wanted)

    def close(self) -> None:
        self._context.free()
        self._gl.free()


def blend(image: np.ndarray, noise: np.ndarray, mix: float) -> np.ndarray:
    return ((1 - mix) * image + mix * noise).astype(np.uint8)


def noise_image(key: list[int], size: int) -> np.ndarray:
    """A new coloured pattern of soft blotches `[size, size, 3]` for every frame."""
    rng = np.random.default_rng(key)
    layers = []
    for weight, blotch in ((0.6, 8), (0.4, 2)):
        count = -(-size // blotch)
        blotches = rng.uniform(0, 255, (count, count, 3))
        layers.append(weight * np.kron(blotches, np.ones((blotch, blotch, 1)))[:size, :size])
    return layers[0] + layers[1]
