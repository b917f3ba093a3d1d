"""LIBERO: 130 tasks of a Panda in five suites, with the protocol of the published evaluations.

Fixed initial states, ten steps in which things settle, images turned by 180 degrees, a time limit for each suite,
success by LIBERO's own check. Every environment is a process of its own: where one dies, the episode is played again up
to where it was, from the same request with the same actions, so that nobody sees a difference.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from training.envs import libero_files as files
from training.envs.base import EpisodeRequest, StepResult
from training.envs.libero_process import Died, Process
from training.envs.libero_teaching import CRITIC
from vla import options
from vla.adapters import libero as adapter
from vla.contract import PolicyContract
from vla.errors import SimrealError
from vla.tasks.expert import Privileged
from vla.types import Observation

IN_DISTRIBUTION = "in_distribution"
# Target and goal of the scripted expert and the tool, as seen from where it is, in units of 0.1 m; then target and goal
# in the image of each camera, -1..1, NaN out of sight. Only tasks that have an expert have it.
PRIVILEGED = 17
PLACES = r"(plate|akita_black_bowl|basket|wooden_tray)_\d"  # on or into which the expert puts things
HAVE_ONE = (
    "Tasks that put one thing on a plate or a bowl, or into a basket or a tray have an expert, all of libero_spatial "
    "and libero_object among them."
)
COARSEST = 0.02  # m
CHOICE = 31  # of the random stream that draws a task
PEOPLE = "frontview"  # camera of the pictures for people
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiberoConfig:
    """Options of the simulator.

    suite: libero_spatial, libero_object, libero_goal, libero_10 (long) or libero_90.
    tasks: numbers of those of the suite that training draws from, null for all.
    initial_states: fixed, the 50 that come with each task, state (seed - 1) % 50 of them; random, drawn by the seed.
    image_size: width and height of both cameras in px; 256 in the published evaluations.
    antialiasing: smooth edges, as in LIBERO; without, a software renderer draws in less than two thirds of the time.
    mesh_edge: length in m that edges of meshes have about, 0.005 for small images; null as in LIBERO, whose scenes have
        a quarter of a million triangles, of which a software renderer draws each.
    chunk: actions of a chunk.
    max_translation: bound of a control step in m, per axis.
    max_rotation: bound of a control step in rad, per axis.
    reward: sparse, 1 with success; dense, also for progress, as in the tabletop, for tasks with a scripted expert.
    max_steps: time limit in control steps, null for that of the published evaluations, which depends on the suite.
    assets: folder of LIBERO's assets; null for where LIBERO keeps them, to which they are downloaded if need be.
    scenes: compiled scenes that an environment keeps, for when it comes back to a task.
    """

    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"] = "libero_spatial"
    tasks: list[int] | None = None
    initial_states: Literal["fixed", "random"] = "fixed"
    image_size: int = 256
    antialiasing: bool = True
    mesh_edge: float | None = None
    chunk: int = 8
    max_translation: float = adapter.MAX_TRANSLATION
    max_rotation: float = adapter.MAX_ROTATION
    reward: Literal["sparse", "dense"] = "sparse"
    max_steps: int | None = None
    assets: str | None = None
    scenes: int = 1


class _Slot:
    """One environment: its process, and what it takes to bring that process to where the episode is."""

    def __init__(self, settings: dict[str, Any]):
        self.process = Process("training.envs.libero_scene", settings)
        self.began = False
        self.task: files.Task
        self.calls: list[tuple[str, tuple[Any, ...]]] = []  # not answered yet

    def reset(self, request: EpisodeRequest, task: files.Task, state: np.ndarray | None, taught: Any) -> None:
        """Begin an episode; the process is not waited for. taught: as of `libero_scene.Worker.reset`."""
        self.collect()
        self.began, self.request, self.task = True, request, task
        self.begin = (str(task.bddl), state, request.seed, taught)
        self.taught = taught is not None
        self.past: list[np.ndarray] = []  # actions since
        self.steps = self.deaths = 0
        self.success = self.lost = False
        self.send("reset", *self.begin)

    def send(self, name: str, *given: Any) -> None:
        self.calls.append((name, given))
        self.process.send(name, *given)

    def collect(self) -> Any:
        """The answer to the last call; None if the episode is lost."""
        answer = None
        while self.calls:
            name, _ = self.calls[0]
            try:
                answer = self.process.receive()
            except Died as death:
                self._revive(death, name)
                answer = None
                continue
            except Exception:
                self.calls.pop(0)
                raise
            self.calls.pop(0)
        return answer

    def _revive(self, death: Died, name: str) -> None:
        """A new process, brought to where the old one was; an episode that kills a second one is given up."""
        self.deaths += 1
        where = f"{self.task.variant}, seed {self.request.seed}, step {self.steps}"
        if self.deaths > 3:
            raise SimrealError(
                f"LIBERO's process died {self.deaths} times ({death}) at {where}", code="SIMULATOR_DIED",
                remedy="Its messages stand above. `vla doctor` tests rendering; MUJOCO_GL=osmesa does without a GPU.",
            ) from death  # fmt: skip
        self.lost = self.deaths > 1
        will = "it is given up and counts as truncated" if self.lost else "it is played again to where it was"
        log.warning("LIBERO's process died (%s) at %s, in %s; a new one begins, %s", death, where, name, will)
        self.process.end()
        waiting = [call for call in self.calls if call[0] not in ("reset", "replay")]
        if self.lost:
            waiting = [call for call in waiting if call[0] != "step"]
        self.calls = []
        self.send("reset", *self.begin)
        if self.past and not self.lost:
            self.send("replay", np.concatenate(self.past))
        for again, given in waiting:
            self.send(again, *given)


class Libero:
    """`VectorEnv` of LIBERO's tasks. Variants: in_distribution, drawn of the configured tasks; SUITE; SUITE/NUMBER."""

    controls: tuple[str, ...] = ()

    def __init__(self, num_envs: int, config: LiberoConfig | None = None):
        self.config = config = config or LiberoConfig()
        self.num_envs = num_envs
        self.contract: PolicyContract = adapter.libero_contract(
            config.image_size, config.chunk, config.max_translation, config.max_rotation
        )
        self.axes = {suite: tuple(task.variant for task in files.tasks(suite)) for suite in files.LIMITS}
        self.training = self._chosen()
        self.instructions = tuple(task.instruction for task in self.training)
        is_told = all(_expert_goal(task) for task in self.training)
        self.privileged_size, self.critic_size = (PRIVILEGED, CRITIC) if is_told else (0, 0)
        self.max_steps = config.max_steps or files.LIMITS[config.suite]
        assets = str(files.assets(config.assets))
        drawn = ("image_size", "scenes", "antialiasing", "mesh_edge")
        settings = {"assets": assets} | {k: getattr(config, k) for k in drawn}
        self.slots = [_Slot(settings) for _ in range(num_envs)]

    def _chosen(self) -> tuple[files.Task, ...]:
        """The tasks of training."""
        config = self.config
        known = files.tasks(config.suite)
        numbers = range(len(known)) if config.tasks is None else config.tasks
        if not numbers or not all(0 <= number < len(known) for number in numbers):
            raise SimrealError(
                f"env.settings.tasks={config.tasks}: {config.suite} has tasks 0 to {len(known) - 1}", code="TASKS",
                remedy="Name some of these, or null for all.",
            )  # fmt: skip
        if config.scenes < 1 or config.image_size < 1 or (config.max_steps is not None and config.max_steps < 1):
            raise SimrealError(
                "env.settings: scenes, image_size and max_steps must be 1 or more", code="ENVIRONMENT",
                remedy="Correct them.",
            )  # fmt: skip
        if config.mesh_edge is not None and not 0 < config.mesh_edge <= COARSEST:
            raise SimrealError(
                f"env.settings.mesh_edge={config.mesh_edge}: must be more than 0 and at most {COARSEST} m",
                code="ENVIRONMENT", remedy="0.005 suits images of 64 px; null draws all there is.",
            )  # fmt: skip
        chosen = tuple(known[number] for number in numbers)
        if config.reward == "dense" and (untold := [t.variant for t in chosen if not _expert_goal(t)]):
            raise SimrealError(
                f"env.settings.reward=dense: there is no expert that knows progress in {', '.join(untold)}",
                code="ENVIRONMENT", remedy=f"Set env.settings.reward=sparse, or choose other tasks. {HAVE_ONE}",
            )  # fmt: skip
        return chosen

    def task(self, request: EpisodeRequest) -> files.Task:
        """The task that a request means."""
        variant = request.variant
        suite, slash, number = variant.partition("/")
        if variant == IN_DISTRIBUTION:
            tasks = self.training
        elif suite in files.LIMITS and not slash:
            tasks = files.tasks(suite)
        elif variant in self.axes.get(suite, ()):
            return files.tasks(suite)[int(number)]
        else:
            hint = options.nearest(suite, [IN_DISTRIBUTION, *self.axes])
            if suite in self.axes:
                hint = f"{suite} has tasks 0 to {len(self.axes[suite]) - 1}"
            raise SimrealError(
                f"LIBERO has no variant {variant!r}: {hint}", code="VARIANT",
                remedy=f"Choose {IN_DISTRIBUTION}, a suite, or a task of it as SUITE/NUMBER.",
            )  # fmt: skip
        return tasks[int(np.random.default_rng([request.seed, CHOICE]).integers(len(tasks)))]

    def reset(self, index: int, request: EpisodeRequest) -> None:
        task = self.task(request)
        fixed = self.config.initial_states == "fixed"
        state = files.initial_states(task)[(request.seed - 1) % files.STATES] if fixed else None
        goal = _expert_goal(task) if self.critic_size else None
        taught = None if goal is None else (goal, self._limit(task), self.config.reward == "dense")
        self.slots[index].reset(request, task, state, taught)

    def step(self, indices: Sequence[int], actions: np.ndarray) -> StepResult:
        """As in `VectorEnv`; an episode that was over before is left alone and says so again."""
        count, chunk = actions.shape[:2]
        if count != len(indices):
            raise ValueError(f"{count} rows of actions for {len(indices)} environments: pass one row for each")
        slots = [self._playing(index) for index in indices]
        # All are checked before the first is executed: a refused batch changes nothing.
        commands = np.array([[adapter.command(action) for action in row] for row in actions])
        left = [0 if self._over(slot) else min(chunk, self._limit(slot.task) - slot.steps) for slot in slots]
        for slot, row, steps in zip(slots, commands, left, strict=True):
            if steps:
                slot.send("step", row[:steps])
        rewards, executed = np.zeros((count, chunk), np.float32), np.zeros((count, chunk), bool)
        critic_states = np.zeros((count, chunk, self.critic_size), np.float32)
        for number, (slot, row, steps) in enumerate(zip(slots, commands, left, strict=True)):
            if not steps or (answer := slot.collect()) is None:
                continue
            slot.success, earned, told = answer
            done = len(earned)
            executed[number, :done] = True
            rewards[number, :done] = earned
            if slot.taught:
                critic_states[number, :done] = told
            slot.steps += done
            slot.past.append(row[:done])
        success = np.array([slot.success for slot in slots])
        truncated = np.array([self._over(slot) for slot in slots]) & ~success
        return StepResult(rewards, executed, success, truncated, success.copy(), critic_states)

    def _playing(self, index: int) -> _Slot:
        slot = self.slots[index]
        if not slot.began:
            raise ValueError(f"environment {index} plays no episode: reset it before its first step")
        return slot

    def _limit(self, task: files.Task) -> int:
        return self.config.max_steps or files.LIMITS[task.suite]

    def _over(self, slot: _Slot) -> bool:
        return slot.success or slot.lost or slot.steps >= self._limit(slot.task)

    def observe(self, indices: Sequence[int]) -> list[Observation]:
        slots = [self._playing(index) for index in indices]
        for slot in slots:
            slot.send("observe", tuple(adapter.NATIVE_CAMERAS.values()))
        return [adapter.observation(slot.collect(), slot.task.instruction) for slot in slots]

    def privileged(self, indices: Sequence[int]) -> np.ndarray:
        slots = [self._playing(index) for index in indices]
        told = np.full((len(slots), self.privileged_size), np.nan, np.float32)
        goals = [_expert_goal(slot.task) if self.privileged_size else None for slot in slots]
        for slot, goal in zip(slots, goals, strict=True):
            if goal:
                slot.send("privileged", goal, tuple(adapter.NATIVE_CAMERAS.values()))
        for row, slot, goal in zip(told, slots, goals, strict=True):
            if goal:
                row[:] = slot.collect()
        return told

    def critic_state(self, indices: Sequence[int]) -> np.ndarray:
        told = np.zeros((len(indices), self.critic_size), np.float32)
        slots = [self._playing(index) for index in indices]
        for slot in slots:
            if slot.taught:
                slot.send("critic_state")
        for row, slot in zip(told, slots, strict=True):
            if slot.taught and (answer := slot.collect()) is not None:
                row[:] = answer
        return told

    def picture(self, index: int, size: int = 192) -> np.ndarray:
        """A third-person image for people `[size, size, 3]` uint8; no policy sees it."""
        slot = self._playing(index)
        slot.send("picture", PEOPLE, size)
        picture: np.ndarray = slot.collect()
        return picture

    def expert_view(self, index: int) -> Privileged:
        """What the scripted expert is told about environment `index`; it picks up one thing and puts it somewhere."""
        slot = self._playing(index)
        goal = _expert_goal(slot.task)
        if goal is None:
            raise SimrealError(
                f"{slot.task.variant} ({slot.task.instruction}) has no scripted expert", code="EXPERT",
                remedy=HAVE_ONE,
            )  # fmt: skip
        slot.send("expert_view", goal)
        return Privileged(**slot.collect())

    def close(self) -> None:
        for slot in self.slots:
            slot.process.end()


def _expert_goal(task: files.Task) -> tuple[str, str] | None:
    """What the scripted expert has to put where; None if it can't do the task."""
    match task.goals:
        case [["on" | "in", thing, place]] if re.match(PLACES, place):
            return thing, place
    return None


def make(num_envs: int, **settings: Any) -> Libero:
    """The entry of the registry; settings are the fields of `LiberoConfig`."""
    return Libero(num_envs, options.read(LiberoConfig, settings))
