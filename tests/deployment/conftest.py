"""A robot and its twin; streams for an inference."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from deployment.franka import ArmConfig
from deployment.inference import Inference
from deployment.reference import Pose
from deployment.twin import TwinConfig, TwinProcess

SENTENCE = "put the red cube on the plate"
DOWN = np.array([0.5**0.5, 0.5**0.5, 0.0, 0.0])
START = Pose(np.array([0.46, 0.0, 0.22]), DOWN)


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


@pytest.fixture(scope="module")
def twin(robot: ArmConfig) -> Iterator[TwinProcess]:
    made = TwinProcess(TwinConfig(initial_joints=robot.home))
    yield made
    made.stop()
