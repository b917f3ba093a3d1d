"""What training alone is told of a LIBERO episode: a dense reward, and the state that a critic sees."""

from typing import Any

import numpy as np

from training.envs.libero_grasp import Grasp
from training.envs.progress import GRASP_REWARD, progress_reward

HELD_STEPS = 3  # control steps that a thing is held until it counts as lifted
LIFTED = 0.02  # m over where it stood
FAR, FAST = 1.0, 2.0  # m and m/s, at most what the critic is told: a thing may fall off the table
# Thing and goal as seen from the tool, heights of tool and thing over the goal's surface, opening of the fingers, half
# the thing's height (units of 0.1 m); its velocity (m/s); whether it is held, was held, was lifted; what the hand still
# has to turn (rotation vector, rad); share of the time that is left.
CRITIC = 20


class Teaching:
    """Follows an episode; made when it begins, and asked after every control step.

    goal: the thing and its place. limit: of the episode, in control steps. is_dense: whether progress is rewarded.
    """

    def __init__(self, scene: Any, goal: tuple[str, str], limit: int, is_dense: bool):
        self.scene, self.limit, self.is_dense = scene, limit, is_dense
        self.grasp: Grasp = scene.grasp_of(goal)
        model, (robot,) = scene.model, scene.env.robots
        root = model.body_rootid[self.grasp.thing]
        self.is_own = model.body_rootid[model.geom_bodyid] == root  # of all shapes
        names = (robot.gripper.important_geoms[side] for side in ("left_fingerpad", "right_fingerpad"))
        self.pads = [np.array([model.geom(name).id for name in pad]) for pad in names]
        self.velocity = slice(model.body_dofadr[root], model.body_dofadr[root] + 3)
        self.stood = float(scene.data.xpos[self.grasp.thing][2])
        self.steps = self.held_steps = 0
        self.was_held = self.was_lifted = False
        self.view = self._view()
        self.level = self._level(False)

    def judge(self, success: bool) -> tuple[float, np.ndarray]:
        """Reward of the control step that has just ended, and what the critic is told now."""
        self.steps += 1
        self.held_steps = self.held_steps + 1 if self._is_held() else 0
        self.was_held |= self.held_steps > 0
        above = float(self.scene.data.xpos[self.grasp.thing][2]) - self.stood
        self.was_lifted |= self.held_steps >= HELD_STEPS and above > LIFTED
        self.view = self._view()
        level = self._level(success)
        reward, self.level = level - self.level, level
        return (reward if self.is_dense else float(success)), self.state()

    def state(self) -> np.ndarray:
        """float32 `[CRITIC]`."""
        view = self.view
        tool, target, goal = (view[name] for name in ("measured", "target", "goal"))
        lengths = (
            *(target - tool), *(goal - tool), tool[2] - view["goal_top"], target[2] - view["goal_top"], view["width"],
            view["half_height"],
        )  # fmt: skip
        velocity = np.clip(self.scene.data.qvel[self.velocity], -FAST, FAST)
        flags = (self.held_steps > 0, self.was_held, self.was_lifted)
        others = (*velocity, *flags, *view["tilt"], 1 - self.steps / self.limit)
        return np.array([*np.clip(lengths, -FAR, FAR) / 0.1, *others], np.float32)

    def _view(self) -> dict[str, Any]:
        return self.grasp.view(self.scene.native(present=True))

    def _level(self, success: bool) -> float:
        target, goal, tool = (self.view[name] for name in ("target", "goal", "measured"))
        distance, away = (float(np.linalg.norm(way)) for way in (target - tool, (target - goal)[:2]))
        stages = GRASP_REWARD * self.was_held + GRASP_REWARD * self.was_lifted + 1.0 * success
        return stages + progress_reward(distance, away, self.held_steps > 0, success)

    def _is_held(self) -> bool:
        """Whether both fingers touch the thing."""
        pairs = self.scene.data.contact.geom
        touched = pairs[self.is_own[pairs[:, ::-1]]]
        return all(np.isin(touched, pad).any() for pad in self.pads)
