"""The tabletop in MuJoCo Warp: thousands of worlds and their images on one GPU; for tests on the processor.

Contract, episodes, rewards and what a critic is told are the tabletop's; `docs/simulators/tabletop_warp.md` lists what
differs. Worlds with equally many objects and receptacles share a batch, which is built when the first of them is asked
for. Warp works in float32.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from training.envs.base import EpisodeRequest, StepResult
from training.envs.tabletop import CRITIC, PRIVILEGED, TOOL_HIGH, TOOL_LOW, TabletopConfig
from training.envs.tabletop_delays import NOMINAL_S
from training.envs.tabletop_render import blend, mujoco, noise_image
from training.envs.tabletop_warp_physics import choose
from training.envs.tabletop_warp_render import Renderer
from training.envs.tabletop_warp_worlds import Worlds
from vla import options
from vla.adapters import tabletop as adapter
from vla.contract import PolicyContract
from vla.errors import SimrealError
from vla.tasks.expert import Privileged
from vla.tasks.put_on_plate import (
    ALL_VARIANTS,
    CONTROLS,
    MAX_STEPS,
    RATE_HZ,
    VARIANTS,
    Episode,
    sample_episode,
    training_sentences,
)
from vla.types import Observation


@dataclass(frozen=True)
class TabletopWarpConfig(TabletopConfig):
    """Options of the simulator, beside those of the tabletop.

    device: where physics and images are computed, cpu or cuda; null for a GPU if there is one.
    """

    device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration is not None:
            raise ValueError("calibration: here are the task's own cameras only; take env=tabletop for a store's")


class TabletopWarp:
    """`VectorEnv` of put-on-plate episodes; `privileged` is described at `tabletop.PRIVILEGED`."""

    privileged_size = PRIVILEGED
    critic_size = CRITIC
    axes = VARIANTS
    controls = CONTROLS
    instructions = tuple(training_sentences())
    max_steps = MAX_STEPS

    def __init__(self, num_envs: int, config: TabletopWarpConfig | None = None):
        self.config = config or TabletopWarpConfig()
        self.num_envs = num_envs
        self.device = choose(self.config.device)
        self.contract: PolicyContract = adapter.tabletop_contract(
            image_size=self.config.image_size,
            chunk=self.config.chunk,
            max_translation=self.config.max_translation,
            max_rotation=self.config.max_rotation,
            rate_hz=RATE_HZ,
        )
        self.contract = replace(self.contract, action=replace(self.contract.action, motion_s=NOMINAL_S))
        self._batches: dict[tuple[int, int], tuple[Worlds, Renderer]] = {}
        self._keys: list[tuple[int, int] | None] = [None] * num_envs  # the batch that each environment plays in

    def reset(self, index: int, request: EpisodeRequest) -> None:
        """As in `VectorEnv`; episodes that begin one after the other are laid out together, by whoever looks first."""
        if request.variant not in ALL_VARIANTS:
            raise SimrealError(
                f"unknown variant {request.variant!r}: {options.nearest(request.variant, ALL_VARIANTS)}",
                code="VARIANT", remedy=f"Choose one of {', '.join(ALL_VARIANTS)}.",
            )  # fmt: skip
        self.lay_out(index, sample_episode(request.seed, request.variant))

    def lay_out(self, index: int, episode: Episode) -> None:
        """Start an episode of one's own making."""
        key = (len(episode.objects), len(episode.receptacles))
        if key not in self._batches:
            worlds = Worlds(self.num_envs, *key, self.config, self.device)
            self._batches[key] = worlds, Renderer(worlds.physics)
        self._batches[key][0].begin(index, episode)
        self._keys[index] = key

    def scatter(self, index: int, request: EpisodeRequest) -> None:
        """As in `Scattered`."""
        position = np.random.default_rng([request.seed, 12]).uniform(TOOL_LOW, TOOL_HIGH)
        episode = sample_episode(request.seed, request.variant)
        self.lay_out(index, replace(episode, start_position=tuple(float(v) for v in position)))

    def _played(self, indices: Sequence[int]) -> list[tuple[list[int], torch.Tensor, Worlds, Renderer]]:
        """Of each batch that plays any of `indices`: their rows in `indices`, their worlds, and the batch."""
        rows = defaultdict(list)
        for row, index in enumerate(indices):
            key = self._keys[index]
            if key is None:
                raise ValueError(f"environment {index} plays no episode: reset it before its first step")
            rows[key].append(row)
        played = []
        for key, mine in rows.items():
            worlds, renderer = self._batches[key]
            worlds.lay_out()
            played.append((mine, torch.tensor([indices[row] for row in mine], device=self.device), worlds, renderer))
        return played

    def step(self, indices: Sequence[int], actions: np.ndarray) -> StepResult:
        """As in `VectorEnv`; an episode that was over before is left alone and says so again."""
        count, chunk = actions.shape[:2]
        if count != len(indices):
            raise ValueError(f"{count} rows of actions for {len(indices)} environments: pass one row for each")
        if len(set(indices)) != count:
            raise ValueError(f"environments {list(indices)}: name each once, a batch has one row for each")
        if actions.shape[2:] != (7,) or not np.isfinite(actions).all():
            for row in actions.reshape(-1, *actions.shape[2:]):  # the adapter says what is wrong with which row
                adapter.command(row)
        rewards = np.zeros((count, chunk), np.float32)
        executed = np.zeros((count, chunk), bool)
        success, over = np.zeros(count, bool), np.zeros(count, bool)
        critic_states = np.zeros((count, chunk, CRITIC), np.float32)
        for rows, at, worlds, _ in self._played(indices):
            commands = torch.zeros(self.num_envs, chunk, 7, dtype=torch.float64, device=self.device)
            commands[at] = torch.as_tensor(actions[rows], dtype=torch.float64, device=self.device)
            named = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
            named[at] = True
            played = worlds.play(commands, named)
            rewards[rows], executed[rows] = _numpy(played.rewards[at]), _numpy(played.executed[at])
            critic_states[rows] = _numpy(played.critic_states[at])
            success[rows], over[rows] = _numpy(worlds.success[at]), _numpy(worlds.over[at])
        return StepResult(rewards, executed, success, over & ~success, success.copy(), critic_states)

    def observe(self, indices: Sequence[int]) -> list[Observation]:
        """As in `VectorEnv`; one launch draws both cameras of all named environments of a batch."""
        seen: dict[int, Observation] = {}
        for rows, at, worlds, renderer in self._played(indices):
            images, geoms = renderer.render(at, adapter.CAMERAS, self.config.image_size, worlds.table, worlds.light)
            state = worlds.physics.state
            drawn, shown = _numpy(images), _numpy(geoms == renderer.table)
            tool, width = _numpy(worlds.tool[at]), _numpy(worlds.width[at])
            turned = _numpy(state["site_xmat"][at, worlds.physics.tool].double()).reshape(-1, 9)
            commanded, steps = _numpy(worlds.command_position[at]), _numpy(worlds.step_count[at])
            for place, row in enumerate(rows):
                index = indices[row]
                episode = worlds.episodes[index]
                assert episode is not None
                disturbed = _disturbed(drawn[place], shown[place], episode, worlds.frames[index])
                worlds.frames[index] += 1
                quaternion = np.zeros(4)
                mujoco.mju_mat2Quat(quaternion, turned[place])
                native = {
                    **dict(zip(adapter.CAMERAS, disturbed, strict=True)),
                    "eef_pos": tool[place],
                    "eef_quat_wxyz": quaternion,
                    "commanded_pos": commanded[place],
                    "gripper_width": width[place],
                    "time": steps[place] / RATE_HZ,
                }
                seen[row] = adapter.observation(native, episode.instruction)
        return [seen[row] for row in range(len(indices))]

    def images(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """What the cameras see, uint8 RGB `[k, cameras, H, W, 3]` on the device for each batch; nothing disturbs it."""
        return [
            renderer.render(at, adapter.CAMERAS, self.config.image_size, worlds.table, worlds.light)[0]
            for _, at, worlds, renderer in self._played(indices)
        ]

    def privileged(self, indices: Sequence[int]) -> np.ndarray:
        return self._told(indices, "privileged", PRIVILEGED)

    def critic_state(self, indices: Sequence[int]) -> np.ndarray:
        return self._told(indices, "critic_state", CRITIC)

    def _told(self, indices: Sequence[int], what: str, size: int) -> np.ndarray:
        result = np.zeros((len(indices), size), np.float32)
        for rows, at, worlds, _ in self._played(indices):
            result[rows] = _numpy(getattr(worlds, what)()[at])
        return result

    def picture(self, index: int, size: int = 192) -> np.ndarray:
        """As in `VectorEnv`."""
        ((_, at, worlds, renderer),) = self._played([index])
        image, _ = renderer.render(at, adapter.CAMERAS[:1], size, worlds.table, worlds.light)
        return _numpy(image[0, 0])

    def expert_view(self, index: int) -> Privileged:
        """As in `Demonstrable`."""
        ((_, _, worlds, _),) = self._played([index])
        return worlds.expert_view(index)

    def close(self) -> None:
        self._batches, self._keys = {}, [None] * self.num_envs


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy on the host, which later steps do not change."""
    return tensor.cpu().numpy().copy()


def _disturbed(images: np.ndarray, table: np.ndarray, episode: Episode, frame: int) -> list[np.ndarray]:
    """Images `[cameras, H, W, 3]` with the noise of the episode's variant; `table`: the pixels that show the table."""
    mix, result = episode.disturbance, []
    for camera, image, mask in zip(adapter.CAMERAS, images, table, strict=True):
        if mix.noise_mix or mix.texture_mix:
            noise = noise_image([episode.seed, frame, camera == "wrist"], len(image))
            if mix.noise_mix:
                image = blend(image, noise, mix.noise_mix)
            else:
                image = np.where(mask[..., None], blend(image, noise, mix.texture_mix), image)
        result.append(image)
    return result


def make(num_envs: int, **settings: Any) -> TabletopWarp:
    """The entry of the registry; settings are the fields of `TabletopWarpConfig`."""
    return TabletopWarp(num_envs, options.read(TabletopWarpConfig, settings))
