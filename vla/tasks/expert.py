"""A scripted expert for put-on-plate, from privileged positions; it knows no simulator."""

from dataclasses import dataclass, field

import numpy as np

HOVER = 0.075  # m above the object or the goal
CARRY = 0.10  # m, lowest height of the tool while carrying
REACHED = 0.008  # m
CLOSE_STEPS = 4
OPEN_STEPS = 3


@dataclass(frozen=True)
class Privileged:
    """What the expert is told; positions `[3]` in m, robot base frame.

    target, goal: centres of the object and of the receptacle; goal_top: height of the receptacle's surface;
    half_height: of the object; commanded, measured: tool centre as commanded and as measured;
    tilt: rotation vector `[3]` rad that turns the commanded orientation upright; width: gripper opening in m.
    """

    target: np.ndarray
    goal: np.ndarray
    goal_top: float
    half_height: float
    commanded: np.ndarray
    measured: np.ndarray
    tilt: np.ndarray
    width: float


@dataclass
class Expert:
    """Approach, descend, close, lift, carry, lower, open, retreat; starts again when the grasp is lost.

    max_translation, max_rotation: bounds of one control step in m (Euclidean) and rad (per axis).
    """

    max_translation: float
    max_rotation: float
    phase: str = field(default="approach", init=False)
    wait: int = field(default=0, init=False)
    grasp_offset: float = field(default=0.0, init=False)

    def act(self, now: Privileged) -> np.ndarray:
        """The next action `[7]`: translation m, rotation vector rad, gripper 1 = open, 0 = closed."""
        self._advance(now)
        goal_xy = now.goal[:2]
        release = now.goal_top + now.half_height + 0.006 + self.grasp_offset
        waypoint = {
            "approach": np.array([*now.target[:2], now.target[2] + HOVER]),
            "descend": np.array([*now.target[:2], self._grasp_height(now)]),
            "close": np.array([*now.commanded[:2], now.commanded[2]]),
            "lift": np.array([*now.commanded[:2], max(CARRY, release + 0.03)]),
            "carry": np.array([*goal_xy, max(CARRY, release + 0.03)]),
            "lower": np.array([*goal_xy, release]),
            "open": now.commanded.copy(),
            "retreat": np.array([*goal_xy, release + 0.10]),
        }[self.phase]
        step = waypoint - now.commanded
        distance = float(np.linalg.norm(step))
        if distance > self.max_translation:
            step *= self.max_translation / distance
        turn = np.clip(now.tilt, -self.max_rotation, self.max_rotation)
        is_open = self.phase in ("approach", "descend", "open", "retreat")
        return np.array([*step, *turn, 1.0 if is_open else 0.0])

    def _grasp_height(self, now: Privileged) -> float:
        return max(float(now.target[2]), 0.018)

    def _advance(self, now: Privileged) -> None:
        if self.phase == "approach":
            near = np.linalg.norm(now.target[:2] - now.commanded[:2]) < 0.015
            if near and now.commanded[2] - now.target[2] < HOVER + 0.02:
                self.phase = "descend"
        if self.phase == "descend":
            wanted = np.array([*now.target[:2], self._grasp_height(now)])
            if np.linalg.norm(wanted[:2] - now.commanded[:2]) > 0.03:
                self.phase = "approach"
            elif np.linalg.norm(wanted - now.measured) < REACHED:
                self.phase, self.wait = "close", CLOSE_STEPS
                self.grasp_offset = float(now.commanded[2] - now.target[2])
        elif self.phase == "close":
            self.wait -= 1
            if self.wait <= 0:
                self.phase = "lift"
        elif self.phase == "lift":
            if now.commanded[2] > CARRY - 0.01:
                self.phase = "carry"
        elif self.phase == "carry":
            if np.linalg.norm(now.goal[:2] - now.commanded[:2]) < 0.01:
                self.phase = "lower"
        elif self.phase == "lower":
            release = now.goal_top + now.half_height + 0.006 + self.grasp_offset
            settled = np.linalg.norm(now.goal[:2] - now.measured[:2]) < 0.015
            if settled and now.measured[2] - release < 0.006:
                self.phase, self.wait = "open", OPEN_STEPS
        elif self.phase == "open":
            self.wait -= 1
            if self.wait <= 0:
                self.phase = "retreat"
        elif self.phase == "retreat" and now.commanded[2] > now.goal_top + now.half_height + 0.08:
            self.phase = "approach"
        lost = np.linalg.norm(now.target - now.measured) > 0.04
        if lost and self.phase in ("lift", "carry", "lower"):
            self.phase = "approach"
