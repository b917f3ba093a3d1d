"""A small but real policy, and streams for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from deployment.inference import Inference
from deployment.reference import Pose
from vla.adapters.tabletop import tabletop_contract
from vla.policy import Policy
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer

SENTENCE = "put the red cube on the plate"
DOWN = np.array([0.5**0.5, 0.5**0.5, 0.0, 0.0])
START = Pose(np.array([0.46, 0.0, 0.22]), DOWN)


def untrained(seed: int = 3) -> Policy:
    """64 px, chunks of 8, as the quickstart's policy."""
    contract = tabletop_contract(
        image_size=64, chunk=8, max_translation=0.02, max_rotation=0.06, task_set="put_on_plate"
    )
    action = ArrayStatistics.from_bounds([-0.01] * 3 + [-0.02] * 3 + [0.0], [0.01] * 3 + [0.02] * 3 + [1.0])
    state = ArrayStatistics.from_bounds([-1.0] * contract.state_size, [1.0] * contract.state_size)
    model = {
        "class": "openvla_oft", "vision": {"image_size": 64, "widths": [8, 16], "keypoints": 4}, "hidden": 16,
        "layers": 1, "heads": 2, "intermediate": 32, "chunk": 8, "n_bins": 32, "prompt_length": 12,
    }  # fmt: skip
    return Policy.untrained(model, contract, Statistics(action, state), train_tokenizer([SENTENCE], 512, 12), seed)


@pytest.fixture
def policy() -> Policy:
    return untrained()


@dataclass
class Streams:
    """Feeds an inference as cameras and a driver would; images differ from frame to frame."""

    inference: Inference
    number: int = 0
    sentence: str = SENTENCE
    start: Pose = START

    def frame(self, **skewed: float) -> float:
        """One image of each camera and the state of now; the stamps of `skewed` cameras are off by so many s."""
        now = time.time()
        self.inference.state(now, self.start, 0.08)
        self.inference.commanded(now, self.start)
        for camera in self.inference.contract.cameras:
            self.number += 1
            image = np.full((64, 64, 3), self.number % 256, np.uint8)
            self.inference.image(camera.name, now + skewed.get(camera.name, 0.0), image, "rgb8")
        return now


@pytest.fixture
def streams() -> Callable[[Inference], Streams]:
    return Streams
