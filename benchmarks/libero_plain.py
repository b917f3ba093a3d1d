"""LIBERO as it comes, in a process that answers calls: what ours is compared with, in speed and bit by bit."""

import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from training.envs.libero_process import serve
from vla import graphics

graphics.choose()  # mujoco, which these import, reads it at its import
import libero.libero  # noqa: E402
from libero.libero.envs import OffScreenRenderEnv  # noqa: E402

STAY_OPEN = [0.0] * 6 + [-1.0]
SETTLING = 10


class Plain:
    """The loop of the published evaluations around LIBERO's own environment, which renders after every step."""

    def __init__(self, assets: str, image_size: int, bddl: str):
        libero.libero._assets_path_cache = assets
        self.env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=image_size, camera_widths=image_size)

    def reset(self, state: np.ndarray, seed: int) -> float:
        """Seconds that it takes to begin an episode."""
        began = time.perf_counter()
        np.random.seed(seed)
        self.env.reset()
        self.env.set_init_state(state)
        for _ in range(SETTLING):
            self.seen = self.env.step(STAY_OPEN)[0]
        return time.perf_counter() - began

    def step(self, actions: np.ndarray) -> float:
        """Seconds of these actions `[T, 7]`."""
        began = time.perf_counter()
        for action in actions:
            self.seen, _, self.done, _ = self.env.step(action)
        return time.perf_counter() - began

    def observe(self) -> dict[str, Any]:
        """The last observation, and the whole state of the simulation."""
        return {**self.seen, "state": self.env.get_sim_state(), "done": self.done}


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), Plain)
