"""What a task of this project for ManiSkill offers beyond ManiSkill's own: variants, sentences, an expert's view."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from mani_skill.envs.sapien_env import BaseEnv

from vla.rig import Intrinsics
from vla.tasks.expert import Privileged


class Suite(BaseEnv):
    """A task of ManiSkill with one environment whose episodes have variants.

    axes, controls, instructions: as in `VectorEnv`; instruction: of the episode that is played. privileged_size: it
    depends on the robot's cameras.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]]
    controls: ClassVar[tuple[str, ...]]
    instructions: ClassVar[tuple[str, ...]]
    privileged_size: int
    critic_size: ClassVar[int]
    instruction: str

    def episode_options(self, seed: int, variant: str) -> dict[str, Any]:
        """What `reset` is to be told, beside the seed."""
        raise NotImplementedError

    def see_from(self, eye: Any, lens: Intrinsics) -> None:
        """The third-person camera stands here, in the world, and has this lens."""
        raise NotImplementedError

    def level(self, info: dict[str, Any], progress: bool) -> float:
        """How far the episode has come: stages reached, and how near the next one is, if `progress` counts."""
        raise NotImplementedError

    def expert_view(self) -> Privileged:
        raise NotImplementedError

    def scatter(self, random: np.random.Generator) -> None:
        """Put the tool at a random place, before the first step."""
        raise NotImplementedError

    def privileged(self) -> np.ndarray:
        """float32 `[privileged_size]`."""
        raise NotImplementedError

    def critic_state(self, left: float) -> np.ndarray:
        """float32 `[critic_size]`; left: share of the time that is left."""
        raise NotImplementedError

    def picture(self, size: int) -> np.ndarray:
        """A third-person image for people, uint8 `[size, size, 3]`."""
        raise NotImplementedError
