"""The twin's scene as a camera sees it, without physics: what an image is laid over, or found in."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from deployment import twin_board
from deployment.twin import Renderer
from deployment.twin_board import Place
from deployment.twin_physics import OBJECTS, RECEPTACLES, PhysicsOptions, lay_out
from vla import graphics
from vla.errors import SimrealError
from vla.rig import BoardSize, CameraCalibration
from vla.tasks import mjcf
from vla.tasks.put_on_plate import Episode

graphics.choose()  # mujoco reads it at its import
import mujoco  # noqa: E402


class View:
    """Renders one camera of a store. board: where its board is seen; it hangs where the calibration has found it."""

    def __init__(self, calibration: CameraCalibration, board: Place = "none", size: BoardSize | None = None):
        if calibration.mount is None:
            raise SimrealError(
                f"camera {calibration.camera} has no pose", code="CALIBRATION_MISSING",
                remedy=f"`vla calibrate handeye camera={calibration.camera}` finds it.",
            )  # fmt: skip
        intrinsics = calibration.intrinsics
        root = _scene(intrinsics.width, intrinsics.height)
        world, asset = root.find("worldbody"), root.find("asset")
        assert world is not None and asset is not None
        if board != "none" and size is not None:
            twin_board.add(world, asset, board, size, calibration.mount.board)
        self._model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
        if board != "none" and size is not None:
            twin_board.paint(self._model, size)
        start = self._model.tex_adr[self._model.texture("table0").id]
        pixels = mjcf.table_texture(0).reshape(-1)
        self._model.tex_data[start : start + pixels.size] = pixels
        self._camera = calibration.camera
        mjcf.place_camera(self._model, self._camera, calibration.mount.parent, calibration.mount.pose, intrinsics)
        self._gl = mujoco.GLContext(intrinsics.width, intrinsics.height)
        self._gl.make_current()
        self._renderer = Renderer(self._model, intrinsics.width, intrinsics.height)

    def image(self, joints: np.ndarray, width: float = 0.08) -> np.ndarray:
        """RGB `[H, W, 3]` uint8 with the arm at `joints` `[7]` rad and the gripper `width` m open."""
        self._gl.make_current()
        qpos = np.zeros(self._model.nq)
        qpos[:7], qpos[7:9] = joints, width / 2
        self._renderer.place(qpos)
        return self._renderer.image(self._camera).astype(np.uint8)

    def close(self) -> None:
        self._renderer.close()
        self._gl.free()


def _scene(width: int, height: int) -> ElementTree.Element:
    """The arm of the `franky-sim` package at the task's table."""
    found = importlib.util.find_spec("franky_sim")
    assert found is not None and found.origin is not None  # a dependency
    path = Path(found.origin).parent / "assets" / "fr3.xml"
    root = ElementTree.parse(path).getroot()
    compiler, asset, world = root.find("compiler"), root.find("asset"), root.find("worldbody")
    assert compiler is not None and asset is not None and world is not None
    compiler.set("meshdir", str(path.parent / "meshes"))
    used = mjcf.simplify_arm(root)
    for mesh in [m for m in asset.findall("mesh") if m.get("name") not in used]:
        asset.remove(mesh)
    for key in root.findall("keyframe"):
        root.remove(key)
    mjcf.add_table_looks(asset)
    mjcf.add_graphics(root)
    buffer = root.find("visual/global")
    assert buffer is not None
    buffer.attrib.update(offwidth=str(width), offheight=str(height))
    mjcf.add_surroundings(world)
    return root


class SceneView:
    """Images of the task's scene as a twin's third-person camera sees it, with the items wherever they are put."""

    def __init__(self, size: int, noise: float = 1.0, seed: int = 0):
        root = _scene(size, size)
        world = root.find("worldbody")
        assert world is not None
        mjcf.add_slots(world, OBJECTS, RECEPTACLES)
        self._model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
        for look in range(mjcf.TABLES):
            start = self._model.tex_adr[self._model.texture(f"table{look}").id]
            pixels = mjcf.table_texture(look).reshape(-1)
            self._model.tex_data[start : start + pixels.size] = pixels
        self._items = mujoco.MjModel.from_xml_string(mjcf.all_items())
        self._gl = mujoco.GLContext(size, size)
        self._gl.make_current()
        self._renderer = Renderer(self._model, size, size)
        self._noise, self._random = noise, np.random.default_rng(seed)

    def image(self, episode: Episode, target: tuple[float, float, float] | None, joints: np.ndarray) -> np.ndarray:
        """RGB `[H, W, 3]` uint8. target: where its object is now, m; None: where it was laid. joints: `[7]` rad."""
        self._gl.make_current()
        data = self._renderer.data
        lay_out(self._model, data, self._items, episode, PhysicsOptions())
        if target is not None:
            data.joint("object0_joint").qpos[:3] = target
        data.qpos[:7], data.qpos[7:9] = joints, 0.04
        self._renderer.place(data.qpos.copy())
        image = self._renderer.image("third_person")
        return np.clip(image + self._random.normal(0.0, self._noise, image.shape) + 0.5, 0, 255).astype(np.uint8)

    def close(self) -> None:
        self._renderer.close()
        self._gl.free()
