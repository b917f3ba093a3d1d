"""Observations from streams: images and states that arrive at different times become one observation of one moment.

policy_node and the replay of its recordings share this file, so that both see the same, bit for bit.
Parts are matched by their capture times. A camera that is missing, silent, of the wrong size, or that publishes one and
the same image while the arm moves is told as a fault, before the policy sees it. No threads, no clock.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from vla.adapters import tabletop as adapter
from vla.contract import PolicyContract
from vla.errors import CodedError, Fault
from vla.types import Observation, Pose

KEPT_S = 2.0  # of images and states


class StreamError(CodedError):
    """An image or a state that can't be used."""


@dataclass(frozen=True)
class AssemblerConfig:
    """How parts are matched.

    tolerance_s: greatest difference of the capture times of an observation's parts.
    silent_s: a camera or the state that has sent nothing for so long is at fault.
    frozen_s: a camera whose image has not changed for so long is at fault, if the tool has moved in the meantime.
    moved_m: how far the tool has to have moved for that.
    """

    tolerance_s: float = 0.04
    silent_s: float = 0.5
    frozen_s: float = 0.4
    moved_m: float = 0.01


@dataclass(frozen=True)
class _State:
    stamp: float
    tool: Pose
    gripper_width: float


class History:
    """Where the tool was to be, as the driver told it during the last seconds."""

    def __init__(self) -> None:
        self._stamps: deque[float] = deque()
        self._poses: deque[Pose] = deque()

    def add(self, stamp: float, pose: Pose) -> None:
        if self._stamps and stamp <= self._stamps[-1]:
            return
        self._stamps.append(stamp)
        self._poses.append(pose)
        while self._stamps[0] < stamp - KEPT_S:
            self._stamps.popleft()
            self._poses.popleft()

    def __len__(self) -> int:
        return len(self._stamps)

    def at(self, stamp: float) -> Pose:
        """The position is interpolated, the rotation is the nearest one."""
        after = bisect_left(self._stamps, stamp)
        if after in (0, len(self._stamps)):
            return self._poses[min(after, len(self._poses) - 1)]
        earlier, later = self._stamps[after - 1], self._stamps[after]
        share = (stamp - earlier) / (later - earlier)
        a, b = self._poses[after - 1], self._poses[after]
        return Pose((1 - share) * a.position + share * b.position, (b if share > 0.5 else a).rotation)


class Assembler:
    """See the module's docstring. `commanded` gives the reference at a time, as the executor remembers it."""

    def __init__(self, contract: PolicyContract, commanded: Callable[[float], Pose],
                 config: AssemblerConfig | None = None):  # fmt: skip
        self.config = config or AssemblerConfig()
        self._sizes = {camera.name: (camera.height, camera.width) for camera in contract.cameras}
        self._commanded = commanded
        self._images: dict[str, deque[tuple[float, np.ndarray]]] = {name: deque() for name in self._sizes}
        self._unchanged: dict[str, float] = {}  # camera -> stamp since which its image is the same
        self._states: deque[_State] = deque()

    def image(self, camera: str, stamp: float, image: np.ndarray, encoding: str = "rgb8") -> None:
        """Take in an image `[H, W, 3]`; cameras that the policy doesn't use are ignored."""
        if camera not in self._sizes:
            return
        if encoding != "rgb8" or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            remedy = "Publish uint8 images with the encoding rgb8."
            found = f"{encoding}, {image.dtype}, {image.shape}"
            raise StreamError(Fault("IMAGE_ENCODING", f"camera {camera}", "rgb8, uint8, [H, W, 3]", found, remedy))
        if image.shape[:2] != self._sizes[camera]:
            remedy = "Set the camera to this size, or crop and scale its image before it is published."
            wanted, found = (f"{h} x {w}" for h, w in (self._sizes[camera], image.shape[:2]))
            raise StreamError(Fault("IMAGE_SIZE", f"camera {camera}", wanted, found, remedy))
        kept = self._images[camera]
        if kept and stamp <= kept[-1][0]:
            return  # sent twice, or overtaken
        same = bool(kept) and np.array_equal(image, kept[-1][1])
        self._unchanged[camera] = self._unchanged.get(camera, stamp) if same else stamp
        kept.append((stamp, image))
        while kept[0][0] < stamp - KEPT_S:
            kept.popleft()

    def state(self, stamp: float, tool: Pose, gripper_width: float) -> None:
        """Take in a measured state."""
        if self._states and stamp <= self._states[-1].stamp:
            return
        self._states.append(_State(stamp, tool, gripper_width))
        while self._states[0].stamp < stamp - KEPT_S:
            self._states.popleft()

    def faults(self, now: float) -> list[Fault]:
        """What keeps the policy from seeing, at this moment."""
        config, found = self.config, []
        for camera, kept in self._images.items():
            if not kept:
                remedy = "Start the camera and check its topic's name."
                found.append(Fault("CAMERA_MISSING", f"camera {camera}", "images", "none so far", remedy))
            elif now - kept[-1][0] > config.silent_s:
                late = f"none for {now - kept[-1][0]:.2f} s"
                remedy = "Check the camera's cable, driver and load."
                found.append(
                    Fault("CAMERA_SILENT", f"camera {camera}", f"one every {config.silent_s:g} s", late, remedy)
                )
            elif self._frozen(camera):
                same = f"the same for {kept[-1][0] - self._unchanged[camera]:.2f} s"
                remedy = "Restart the camera: it publishes without looking."
                found.append(Fault("CAMERA_FROZEN", f"camera {camera}", "images that change", same, remedy))
        if not self._states or now - self._states[-1].stamp > config.silent_s:
            remedy = "Check that the arm's driver runs and publishes its state."
            found.append(Fault("STATE_SILENT", "state", f"one every {config.silent_s:g} s", "none", remedy))
        return found

    def _frozen(self, camera: str) -> bool:
        """Whether a camera's image has stayed the same although the tool has moved."""
        newest, since = self._images[camera][-1][0], self._unchanged[camera]
        if newest - since <= self.config.frozen_s or not self._states:
            return False
        way = self._nearest(newest).tool.position - self._nearest(since).tool.position
        return float(np.linalg.norm(way)) > self.config.moved_m

    def _nearest(self, stamp: float) -> _State:
        return min(self._states, key=lambda state: abs(state.stamp - stamp))

    def observation(self, instruction: str) -> Observation | None:
        """The newest moment of which all parts are known within the tolerance; None if there is none."""
        if not self._states or not all(self._images.values()):
            return None
        return self._around(min(kept[-1][0] for kept in self._images.values()), instruction)

    def observation_near(self, time: float, within_s: float, instruction: str) -> Observation | None:
        """The moment of the first camera's image that is nearest to a time, if it is not further away than that."""
        if not self._states or not all(self._images.values()):
            return None
        first = next(iter(self._images.values()))
        moment = min((stamp for stamp, _ in first), key=lambda stamp: abs(stamp - time))
        return self._around(moment, instruction) if abs(moment - time) <= within_s else None

    def _around(self, moment: float, instruction: str) -> Observation | None:
        """The parts that are nearest to a moment, if they are of one within the tolerance."""
        images = {name: min(kept, key=lambda part: abs(part[0] - moment)) for name, kept in self._images.items()}
        state = self._nearest(moment)
        stamps = [stamp for stamp, _ in images.values()] + [state.stamp]
        if max(stamps) - min(stamps) > self.config.tolerance_s:
            return None
        return self._joined(images, state, instruction)

    def observation_of(self, stamps: Mapping[str, float], instruction: str) -> Observation | None:
        """The observation whose parts have these capture times, as one that was made says; None if one is not there."""
        images = {}
        for name, kept in self._images.items():
            image = next((part for part in reversed(kept) if part[0] == stamps.get(name)), None)
            if image is None:
                return None
            images[name] = image
        wanted = stamps.get(adapter.STATE[0].name)
        state = next((part for part in reversed(self._states) if part.stamp == wanted), None)
        return None if state is None else self._joined(images, state, instruction)

    def _joined(self, images: Mapping[str, tuple[float, np.ndarray]], state: _State, instruction: str) -> Observation:
        x, y, z, w = state.tool.rotation
        native = {
            **{name: image for name, (_, image) in images.items()},
            "eef_pos": state.tool.position, "eef_quat_wxyz": np.array([w, x, y, z]),
            "commanded_pos": self._commanded(state.stamp).position, "gripper_width": state.gripper_width,
            "time": state.stamp,
        }  # fmt: skip
        seen = adapter.observation(native, instruction, tuple(images))
        return replace(seen, stamps={**seen.stamps, **{name: stamp for name, (stamp, _) in images.items()}})
