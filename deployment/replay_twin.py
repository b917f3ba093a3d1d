"""`vla replay on=twin`: what an arm was sent in an episode, sent to the twin once more; nobody looks, so it drifts.

The twin goes on by as much as time has passed in the recording, whatever this machine takes for it. Of an episode of
a twin that was too slow, as on a busy machine, its own time counts, which it has told. The scene of an episode that
knows its seed is laid out again, so that it also shows whether the object arrives.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from deployment.franka import ArmConfig, ArmError, FrankaArm
from deployment.replay_sources import Follow, Source, TwinClock, source
from deployment.twin import SHIFTED, TwinConfig, TwinProcess
from vla import configuration
from vla.episode_reader import Episode
from vla.episodes import files
from vla.errors import CodedError, SimrealError
from vla.recording import Recording, Track
from vla.results import commit, machine, write_json
from vla.tasks.put_on_plate import sample_episode

PRESETS = {"nominal": TwinConfig(), "shifted": SHIFTED}
HOME_S = 120.0  # a busy machine simulates slowly
REST_S = 1.0  # after the motion, before the scene is judged
Sample = tuple[float, np.ndarray, float]  # s of the recording, tool `[3]` m, width of the gripper m


@dataclass(frozen=True)
class Drift:
    """Between the recorded motion of the tool and the present one, at the same times since the start.

    mean_mm, max_mm, end_mm: distance of the tool. end: 0.1 s before the policy was stopped. width_mm: mean difference
    of the gripper's width. lag_then_mm, lag_mm: mean distance of the tool from what the arm was sent, then and now;
    None without target_pose. pace: simulated over passed time while it was recorded; 1 for an arm. recorded, success:
    whether the object arrived, then and now; None where nobody judged. distance_mm: from the object to the goal's
    centre now. fault: what ended the motion early; seconds: that were compared.
    """

    file: str
    mean_mm: float
    max_mm: float
    end_mm: float
    width_mm: float
    lag_then_mm: float | None
    lag_mm: float | None
    pace: float
    seconds: float
    recorded: bool | None = None
    success: bool | None = None
    distance_mm: float | None = None
    fault: str = ""


class Rerun:
    """A twin and its arm, for any number of episodes of one kind of arm: fr3 or panda."""

    def __init__(self, arm_id: str, preset: TwinConfig, follow: Follow = "references"):
        self.arm_id, self.follow = arm_id, follow
        self.robot = configuration.load(ArmConfig, arm_id, folder=configuration.config_folder() / "robot")
        self.twin = TwinProcess(replace(preset, initial_joints=self.robot.home))
        self.arm = FrankaArm(self.twin.address, self.robot)

    def close(self) -> None:
        self.twin.release()
        self.arm.close()
        self.twin.stop()

    def play(self, recording: Recording) -> Drift:
        """Execute an episode again, from where its arm began."""
        info, (begin, end) = recording.info, recording.acting
        self._go(joints_at(recording, begin))
        if info.seed is not None:
            self.twin.lay_out(sample_episode(info.seed, info.variant))
        start = self.arm.begin()
        wanted = source(self.follow, recording, self.robot.limits, start)
        apart = float(np.linalg.norm(wanted.at(begin, 1.0 / self.robot.rate_hz, start).pose.position - start.position))
        if apart > self.robot.limits.start_distance:
            raise SimrealError(
                f"{recording.episode.path} begins {1e3 * apart:.0f} mm from where the arm is", code="START_POSE",
                remedy="Only episodes that tell the joints they began with, or began at home, can be executed again.",
            )  # fmt: skip
        self.twin.hold()
        samples, fault = self._run(recording, wanted, begin, end)
        self.arm.end()
        time.sleep(REST_S)
        verdict = self.twin.judge() if info.seed is not None else None
        judged = {"success": True, "failure": False}.get(info.outcome)
        return replace(
            compare(recording, samples), recorded=judged, success=verdict.success if verdict else None,
            distance_mm=1e3 * verdict.distance_m if verdict else None, fault=fault,
        )  # fmt: skip

    def _run(self, recording: Recording, wanted: Source, begin: float, end: float) -> tuple[list[Sample], str]:
        """Where the tool went, and what broke it off."""
        clock, step, samples = TwinClock(recording), 1.0 / self.robot.rate_hz, []
        state = self.arm.state()
        try:
            for time_s in np.arange(begin, end, step).tolist():
                self.arm.follow(wanted.at(time_s, step, state.pose), step)
                self.twin.advance(clock.between(time_s, time_s + step))
                state = self.arm.state()
                samples.append((time_s + step, state.pose.position, state.gripper_width))
        except ArmError as error:
            return samples, str(error)
        finally:
            self.twin.release()
        return samples, self.arm.gripper.error if self.arm.gripper else ""

    def _go(self, joints: Sequence[float] | None) -> None:
        """Bring the arm to these joint positions, or home, with the gripper open."""
        try:
            self.arm.start_home(joints)
        except ArmError as error:
            if error.code != "ROBOT_SILENT":  # which a machine that stood still for a second brings about
                raise
            self.arm.close()
            self.arm = FrankaArm(self.twin.address, self.robot)
            self.arm.start_home(joints)
        limit, gripper = time.monotonic() + HOME_S, self.arm.gripper
        while self.arm.homing() or (gripper is not None and gripper.busy):
            if time.monotonic() > limit:
                raise SimrealError(f"the arm is not at its start after {HOME_S:g} s", code="NOT_READY")
            time.sleep(0.05)


def arm_of(recording: Recording) -> str:
    """fr3 or panda, as the chunks name it."""
    if not recording.chunks:
        raise SimrealError(
            f"{recording.episode.path} has no chunks", code="NO_CHUNKS",
            remedy="Only episodes in which a policy acted can be executed again.",
        )  # fmt: skip
    return str(recording.chunks[0][1].header.frame_id).removesuffix("_link0")


def joints_at(recording: Recording, begin: float) -> tuple[float, ...] | None:
    """The arm's joints `[7]` rad when the policy began; None if the recording does not tell them."""
    for log, said in recording.of("joint_states"):
        found = [p for name, p in zip(said.name, said.position, strict=True) if "finger" not in name]
        if log >= begin and len(found) == 7:
            return tuple(found)
    return None


def compare(recording: Recording, samples: Sequence[Sample]) -> Drift:
    """The drift while the policy acted."""
    track, (times, widths), target = recording.tool, recording.widths, recording.target
    first, last = max(recording.acting[0], track.times[0]), min(recording.acting[1], track.times[-1])
    inside = [sample for sample in samples if first <= sample[0] <= last]
    if len(inside) < 2:
        raise SimrealError(f"{recording.episode.path} is too short", code="TOO_SHORT", remedy="Leave it out.")
    stamps = np.array([stamp for stamp, _, _ in inside])
    then, now = track.at(stamps)[0], np.array([position for _, position, _ in inside])
    distance = 1e3 * np.linalg.norm(now - then, axis=1)
    width = np.abs(np.array([width for _, _, width in inside]) - np.interp(stamps, times, widths))
    end = float(stamps[-1])
    return Drift(
        recording.episode.path.name, float(distance.mean()), float(distance.max()),
        float(distance[int(np.searchsorted(stamps, end - 0.1))]), float(1e3 * width.mean()),
        _lag(target, stamps, then), _lag(target, stamps, now),
        TwinClock(recording).between(float(stamps[0]), end) / (end - float(stamps[0])), end - first,
    )  # fmt: skip


def _lag(target: Track, stamps: np.ndarray, tool: np.ndarray) -> float | None:
    if not len(target.times):
        return None
    wanted, _ = target.at(np.clip(stamps, target.times[0], target.times[-1]))
    return float(1e3 * np.linalg.norm(wanted - tool, axis=1).mean())


def rerun(
    episodes: Path, out: Path | None, limit: int | None, preset: Literal["nominal", "shifted"], follow: Follow
) -> int:
    """All episodes of a folder; 1 if one could not be executed to its end."""
    console, refused = Console(), {}
    drifts: list[Drift] = []
    made: Rerun | None = None
    try:
        for file in files(episodes.expanduser())[:limit]:
            try:
                recording = Recording(Episode(file))
                arm_id = arm_of(recording)
                if made is None or made.arm_id != arm_id:
                    if made is not None:
                        made.close()
                    made = Rerun(arm_id, PRESETS[preset], follow)
                drifts.append(made.play(recording))
                console.print(_line(drifts[-1]), markup=False)
            except (CodedError, SimrealError) as error:
                refused[file.name] = str(error)
                console.print(f"left out: {file.name}: {error}", markup=False)
    finally:
        if made is not None:
            made.close()
    if not drifts:
        raise SimrealError(
            f"no episode in {episodes} can be executed again", code="NO_EPISODES", remedy="See what is said above."
        )
    result = summary(drifts, preset, follow, refused)
    _print(result, console)
    if out is not None:
        write_json(out, result)
    return int(bool(refused) or any(drift.fault for drift in drifts))


def summary(drifts: Sequence[Drift], preset: str, follow: Follow, refused: dict[str, str]) -> dict[str, Any]:
    """The result as JSON data."""
    judged = [d for d in drifts if d.recorded is not None and d.success is not None]
    return {
        "twin": preset, "follow": follow, "refused": refused, "commit": commit(),
        "machine": machine("mujoco", "franky-sim"),
        **{key: float(np.mean([getattr(d, key) for d in drifts])) for key in ("mean_mm", "end_mm", "width_mm", "pace")},
        "max_mm": max(d.max_mm for d in drifts), "judged": len(judged),
        "same_outcome": sum(d.recorded == d.success for d in judged),
        "faulted": sum(bool(d.fault) for d in drifts), "episodes": [asdict(d) for d in drifts],
    }  # fmt: skip


def _line(drift: Drift) -> str:
    end = drift.fault or f"{drift.end_mm:.1f} mm at the end"
    slow = f"; recorded at {drift.pace:.2f} of the time" if drift.pace < 0.95 else ""
    lags = ""
    if drift.lag_then_mm is not None and drift.lag_mm is not None:
        lags = f"; behind what was sent by {drift.lag_then_mm:.1f} mm then, {drift.lag_mm:.1f} mm now"
    return f"{drift.file}: drift {drift.mean_mm:.1f} mm, at most {drift.max_mm:.1f} mm, {end}{lags}{slow}"


def _print(result: dict[str, Any], console: Console) -> None:
    table = Table("open loop on the twin", f"{result['twin']}, {result['follow']}")
    table.add_row("episodes, of these faulted", f"{len(result['episodes'])}, {result['faulted']}")
    for key, name in (("mean_mm", "mean drift"), ("max_mm", "greatest"), ("end_mm", "at the end"),
                      ("width_mm", "gripper's width")):  # fmt: skip
        table.add_row(f"{name}, mm", f"{result[key]:.1f}")
    table.add_row("same outcome, of those judged", f"{result['same_outcome']} of {result['judged']}")
    console.print(table)
