"""Where to take hold of a thing of LIBERO, and where to put it: what the scripted expert is told.

All collision shapes of LIBERO's things are boxes. A thing that fits between the fingers is grasped across its narrowest
side; a bowl or a mug at its rim, with one finger inside.
"""

from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from vla.tasks.expert import Manner

OPENING = 0.068  # m, widest thing that is grasped as a whole; the fingers open to 0.08
DEPTH = 0.035  # m that the fingertips go below the top of a thing
RIM_DEPTH = 0.02  # m that they go below a rim
FLOOR = 0.012  # m over its bottom, the lowest grasp of a flat thing
NEAR = 0.12  # m from the way from the grasp to the goal: what stands there is passed over
ROOM = 0.03  # m around an outer finger that should be free
INTO = 0.05  # m below the rim of a container at which the bottom of a thing is let go
MARGIN = 0.02  # m over what is passed
ANGLES = np.arange(0, 180, 5)  # degrees, directions in which the fingers may close


class Grasp:
    """A grasp, chosen for the present state of the scene; from then on it moves with the thing."""

    def __init__(self, env: Any, thing: str, place: str):
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self.thing = env.obj_body_id[thing]
        self.site = self.model.site(place).id if place in env.object_sites_dict else None
        parent = env.object_sites_dict[place].parent_name if self.site is not None else place
        self.place = env.obj_body_id[parent]
        self.base = self.data.body(env.robots[0].robot_model.root_body).xpos.copy()
        points = self._points(self.thing)
        low, high = points[:, 2].min(), points[:, 2].max()
        height = max(low + FLOOR, high - DEPTH)
        level = np.abs(points[:, 2] - height) < 0.012
        angle, centre, width = _narrowest(points[level] if level.any() else points)
        others = np.concatenate([self._points(body) for body in set(env.obj_body_id.values()) - {self.thing}])
        if width > OPENING:
            height = high - RIM_DEPTH
            angle, centre = _rim(points, others, height)
        self.half_height = height - low
        rotation = self._rotation(self.thing)
        self.point = rotation.inv().apply(np.array([*centre, height]) - self.data.xpos[self.thing])
        self.axis = np.array([np.cos(angle), np.sin(angle)])
        self.closing = rotation.inv().apply([*self.axis, 0.0])
        rim = self._points(self.place)[:, 2].max()
        # Into a container a thing is let go between its walls; onto anything else, on its surface.
        self.goal_top = rim - INTO if self.site is not None else self.data.xpos[self.place][2]
        way = _distance(others[:, :2], np.asarray(centre), self._goal()[:2])
        over = max(high, rim, others[way < NEAR, 2].max(initial=-np.inf))
        self.clear = over + self.half_height + MARGIN

    def view(self, native: dict[str, Any]) -> dict[str, Any]:
        """The fields of `Privileged`; native: as the adapter takes it."""
        rotation = self._rotation(self.thing)
        target = self.data.xpos[self.thing] + rotation.apply(self.point)
        goal = self._goal()
        goal[:2] += target[:2] - self.data.xpos[self.thing][:2]
        fingers = native["robot0_gripper_qpos"]
        width = float(fingers[0] - fingers[1])
        if width > OPENING:  # what is held turns with the hand
            self.axis = rotation.apply(self.closing)[:2]
        yaw = np.arctan2(self.axis[1], self.axis[0]) - np.pi / 2  # the fingers close along the hand's y axis
        turns = [self._turn(native["robot0_eef_quat"], angle) for angle in (yaw, yaw + np.pi)]  # either way round
        measured = native["robot0_eef_pos"] - self.base
        return {
            "target": target - self.base,
            "goal": goal - self.base,
            "goal_top": float(self.goal_top - self.base[2]),
            "half_height": float(self.half_height),
            "commanded": measured,  # robosuite adds a step to where the arm is
            "measured": measured,
            "tilt": min(turns, key=np.linalg.norm),
            "width": width,
            "manner": Manner(
                gain=1.0, lowest=-np.inf, clear=float(self.clear - self.base[2]), close_steps=10, open_steps=6
            ),
        }

    def privileged(self, native: dict[str, Any], cameras: tuple[str, ...]) -> np.ndarray:
        """float32 `[9 + 4 cameras]`, see `training.envs.libero.PRIVILEGED`."""
        view = self.view(native)
        positions = np.stack([view["target"], view["goal"], view["measured"]])
        pixels = [self._pixel(camera, point + self.base) for camera in cameras for point in positions[:2]]
        return np.concatenate([(positions - view["commanded"]).ravel() / 0.1, *pixels]).astype(np.float32)

    def _pixel(self, camera: str, point: np.ndarray) -> np.ndarray:
        """Where a policy sees a point in its turned image (x right, y down, -1..1 at the borders); NaN if outside."""
        number = self.model.camera(camera).id
        x, y, z = self.data.cam_xmat[number].reshape(3, 3).T @ (point - self.data.cam_xpos[number])
        if z > -1e-3:
            return np.full(2, np.nan)
        uv = np.array([x, y]) / (z * np.tan(np.deg2rad(self.model.cam_fovy[number]) / 2))
        return uv if np.abs(uv).max() <= 1.0 else np.full(2, np.nan)

    @staticmethod
    def _turn(measured: np.ndarray, yaw: float) -> np.ndarray:
        """Rotation vector that turns the hand from `measured`, xyzw, to where it points down with this yaw in rad."""
        wanted = Rotation.from_rotvec([0, 0, yaw]) * Rotation.from_quat([1.0, 0, 0, 0])
        return (wanted * Rotation.from_quat(measured).inv()).as_rotvec()

    def _goal(self) -> np.ndarray:
        where = self.data.xpos[self.place] if self.site is None else self.data.site_xpos[self.site]
        return np.array(where)

    def _rotation(self, body: int) -> Rotation:
        return Rotation.from_quat(self.data.xquat[body][[1, 2, 3, 0]])

    def _points(self, body: int) -> np.ndarray:
        """A grid of points `[n, 3]` in every box of a body and its parts, in the world."""
        model, data = self.model, self.data
        steps = np.linspace(-1, 1, 7)
        grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
        own = model.body_rootid[model.geom_bodyid] == model.body_rootid[body]
        geoms = np.flatnonzero(own & (model.geom_contype > 0))
        return np.concatenate([
            (grid * model.geom_size[geom]) @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
            for geom in geoms
        ])  # fmt: skip


def _narrowest(points: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Direction in rad along which points are narrowest, the middle `[2]` of their extent, and their width in m.

    Of directions that are as good but for a few millimetres, the one to which the hand turns least.
    """
    best: tuple[float, float, np.ndarray, float] | None = None
    for degrees in ANGLES:
        angle = np.deg2rad(degrees)
        axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        along = points[:, :2] @ axes.T
        low, high = along.min(0), along.max(0)
        width = float(high[0] - low[0])
        cost = width + 0.006 * abs(degrees - 90) / 90
        if best is None or cost < best[0]:
            best = cost, angle, axes.T @ ((low + high) / 2), width
    assert best is not None
    return best[1:]


def _rim(points: np.ndarray, others: np.ndarray, height: float) -> tuple[float, np.ndarray]:
    """Direction in rad along which the fingers close on a rim, and the place `[2]` of the grasp.

    Where an outer finger has room; of such places the one to which the hand turns least.
    """
    top = points[points[:, 2] > points[:, 2].max() - 0.008][:, :2]
    centre = (top.min(0) + top.max(0)) / 2
    near = others[(others[:, 2] > height - 0.005) & (others[:, 2] < height + 0.1)][:, :2]
    best = np.inf, 0.0, centre  # of a thing that stands on its head, whose top is a point
    for degrees in range(0, 360, 15):
        angle = np.deg2rad(degrees)
        out = np.array([np.cos(angle), np.sin(angle)])
        sector = top[(top - centre) @ out > 0.97 * np.linalg.norm(top - centre, axis=1)]
        if not len(sector):
            continue
        reach = np.linalg.norm(sector - centre, axis=1)
        place = centre + out * (reach.min() + reach.max()) / 2
        room = np.linalg.norm(near - (place + 0.04 * out), axis=1).min(initial=np.inf)
        turn = abs((degrees + 90) % 180 - 180) if (degrees + 90) % 180 > 90 else (degrees + 90) % 180
        cost = turn / 90 + 10 * max(0.0, ROOM - room) / ROOM
        if cost < best[0]:
            best = cost, angle, place
    return best[1:]


def _distance(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of points `[n, 2]` from a straight way."""
    way = end - start
    share = np.clip((points - start) @ way / max(float(way @ way), 1e-9), 0.0, 1.0)
    return np.linalg.norm(points - start - share[:, None] * way, axis=1)
