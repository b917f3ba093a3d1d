"""What a dense reward adds where one thing is put somewhere: how far reaching and carrying have come."""

import numpy as np

GRASP_REWARD = 0.1  # for the first grasp, and for the first time that the thing is held above where it stood


def progress_reward(distance: float, away: float, grasped: bool, success: bool) -> float:
    """Between 0 and 1: half for the tool at the thing, half for the held thing over its goal.

    distance: m from the tool to where the thing is grasped. away: m from the thing to its goal, in the plane.
    Two scales of the distance: one leads to the thing from anywhere, the other one centres the grasp.
    """
    reach = 1.0 if grasped or success else 1 - 0.5 * np.tanh(6 * distance) - 0.5 * np.tanh(40 * distance)
    carried = 1 - np.tanh(5 * away)
    return 0.5 * float(reach) + 0.5 * float(1.0 if success else carried * grasped)
