"""Demonstrations of the scripted expert: `vla demos`.

Shards of episodes are made in parallel and renamed into place, so a killed run goes on where it stopped. Each kept
episode succeeded. In some the arm is pushed, or the first grasp goes beside the object: the policy learns how to come
back. What is recorded is undisturbed: a chunk into which a push falls is left out, because nobody could foresee it.
"""

import json
import multiprocessing as mp
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training import recorded
from training.envs import EnvConfig
from training.envs.base import Demonstrable, EpisodeRequest, Scattered, VectorEnv
from training.run import check_options
from vla.cli import Command
from vla.contract import PolicyContract
from vla.errors import SimrealError
from vla.results import write_json
from vla.tasks.expert import Expert
from vla.types import Observation

SHARD = 25  # episodes
PUSHES = 2  # in a pushed episode: control steps in a random direction, which the expert has to make good
PUSH_STEPS = 3
SCENE_SHARD = 1000
SCENE_SEEDS = 500_000_000
SCENES = 20_000
SOURCE = "source.json"  # what was demonstrated: contract and instructions
RETREAT = np.array([0, 0, 0.02, 0, 0, 0, 1.0])  # what the expert does once the object rests on the goal


@dataclass(frozen=True)
class DemosConfig:
    """Options of `vla demos`.

    out: folder for the shards.
    episodes: successful episodes to keep.
    scenes: random layouts seen from random tool positions, for the pretraining of the vision; null for as many as a
        simulator needs that has them.
    seed: first episode's seed; evaluation uses other seeds.
    stride: control steps between recorded images, at least.
    pushed: share of the episodes in which the arm is pushed aside, now and then.
    misses: share of the episodes that begin with a grasp beside the object, which is not recorded; the recovery is.
    workers: processes, 0 for one per core.
    env: the simulator.
    """

    out: Path
    episodes: int = 1000
    scenes: int | None = None
    seed: int = 1_000_000
    stride: int = 3
    pushed: float = 0.6
    misses: float = 0.2
    workers: int = 0
    env: EnvConfig = field(default_factory=EnvConfig)


@dataclass(frozen=True)
class Demonstrations:
    """Samples of all episodes: what the policy saw and what the expert then did.

    images: uint8 `[N, K, H, W, 3]`; state: float64 `[N, S]` in the contract's order; instructions: N sentences;
    actions: float64 `[N, C, 7]`; privileged: float32 `[N, A]`; episode: int64 `[N]`.
    """

    images: np.ndarray
    state: np.ndarray
    instructions: list[str]
    actions: np.ndarray
    privileged: np.ndarray
    episode: np.ndarray


@dataclass(frozen=True)
class Source:
    """Where demonstrations come from: the simulator's contract and the sentences of its task."""

    contract: PolicyContract
    instructions: tuple[str, ...]


def _shard_name(index: int) -> str:
    return f"shard_{index:05d}.npz"


def expert_of(env: VectorEnv) -> Expert:
    """The expert within the bounds of the simulator's actions."""
    bounds = env.contract.action
    return Expert(bounds.max_translation, bounds.max_rotation)


def record_episode(
    env: Any, request: EpisodeRequest, stride: int, pushed: float, misses: float
) -> dict[str, np.ndarray] | None:
    """Play one episode in environment 0; None if the expert failed."""
    env.reset(0, request)
    rng = np.random.default_rng([request.seed, 11])
    chunk, limit = env.contract.action.chunk, env.max_steps
    expert = expert_of(env)
    pushes = np.zeros((limit + chunk, 3))
    if rng.random() < pushed:
        for start in rng.integers(0, 36, PUSHES):
            pushes[start : start + PUSH_STEPS] += rng.uniform(-1, 1, 3) * env.contract.action.max_translation
    # Whether a push falls into the chunk that begins at a step.
    disturbed = np.convolve(pushes.any(1), np.ones(chunk))[chunk - 1 :] > 0
    angle = rng.uniform(0, 2 * np.pi)
    miss = rng.uniform(0.02, 0.05) * np.array([np.cos(angle), np.sin(angle), 0.0]) * (rng.random() < misses)
    missing = bool(miss.any())
    samples: list[tuple[np.ndarray, ...]] = []
    steps: list[int] = []
    actions: list[np.ndarray] = []
    done, since = False, stride
    instruction = ""
    for t in range(limit):
        view = env.expert_view(0)
        if missing and expert.phase == "carry":
            missing = False
        if missing:
            view = replace(view, target=view.target + miss)
        elif since >= stride and not disturbed[t]:
            since = 0
            seen = env.observe([0])[0]
            instruction = seen.instruction
            samples.append(_sample(env, seen))
            steps.append(t)
        since += 1
        action = expert.act(view)
        actions.append(action)
        executed = action.copy()
        if expert.phase in ("reach", "carry"):
            executed[:3] += pushes[t]
        result = env.step([0], executed[None, None])
        done = bool(result.success[0])
        if result.terminated[0] or result.truncated[0]:
            break
    if not done or not steps:
        return None
    padded = np.array(actions + [RETREAT] * chunk)
    images, states, privileged = (np.stack(part) for part in zip(*samples, strict=True))
    return {
        "images": images,
        "state": states,
        "privileged": privileged,
        "actions": np.stack([padded[t : t + chunk] for t in steps]),
        "instruction": np.array([instruction] * len(steps)),
    }


def record_scenes(env: Any, seeds: range, variant: str) -> dict[str, np.ndarray]:
    """Layouts nobody has touched, seen once each from a random tool position."""
    rows = []
    for seed in seeds:
        env.scatter(0, EpisodeRequest(seed, variant))
        seen = env.observe([0])[0]
        rows.append((*_sample(env, seen), seen.instruction))
    return {
        k: np.stack(v)
        for k, v in zip(("images", "state", "privileged", "instruction"), zip(*rows, strict=True), strict=True)
    }


def _sample(env: VectorEnv, seen: Observation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images `[K, H, W, 3]`, state `[S]` and privileged `[A]` of environment 0."""
    images = np.stack([seen.images[c.name] for c in env.contract.cameras])
    state = np.concatenate([seen.state[f.name] for f in env.contract.state])
    return images, state, env.privileged([0])[0]


def _make_scenes(config: DemosConfig, index: int, count: int) -> int:
    env = config.env.make(1)
    start = SCENE_SEEDS + config.seed + index * SCENE_SHARD
    _write(config.out / f"scenes_{index:05d}.npz", record_scenes(env, range(start, start + count), config.env.variant))
    env.close()
    return count


def _held(file: Path, key: str | None) -> int:
    """Episodes or scenes in a shard; 0 if it is not there. One that holds too few is made anew."""
    if not file.exists():
        return 0
    with np.load(file, allow_pickle=False) as data:
        return len(data["state"]) if key is None else int(data[key].max()) + 1


def _write(target: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    temporary.rename(target)


def _make_shard(config: DemosConfig, index: int) -> tuple[int, int]:
    """Write one shard; returns episodes kept and episodes played."""
    env = config.env.make(1)
    wanted = min(SHARD, config.episodes - index * SHARD)
    episodes: list[dict[str, np.ndarray]] = []
    played = 0
    while len(episodes) < wanted:
        if played >= 20 * SHARD:
            raise SimrealError(
                f"the expert succeeded only {len(episodes)} times in {played}", code="EXPERT",
                remedy="Lower pushed and misses, or choose another task.",
            )  # fmt: skip
        # Every shard draws from a range of seeds of its own, so that shards don't depend on each other.
        request = EpisodeRequest(config.seed + index * 1000 + played, config.env.variant)
        episode = record_episode(env, request, config.stride, config.pushed, config.misses)
        played += 1
        if episode is not None:
            episodes.append(episode)
    env.close()
    number = np.concatenate([np.full(len(e["state"]), i) for i, e in enumerate(episodes)])
    arrays = {k: np.concatenate([e[k] for e in episodes]) for k in episodes[0]}
    _write(config.out / _shard_name(index), {"episode": number, **arrays})
    return len(episodes), played


def demos(config: DemosConfig) -> None:
    """Make the missing shards."""
    console = Console()
    file = config.out / "demos.json"
    record = check_options(file, config, ("workers", "episodes", "scenes", "out"))  # more may be added
    wanted_scenes = _check(config)
    write_json(file, record)
    for stale in config.out.glob("*.tmp"):
        stale.unlink()
    count = -(-config.episodes // SHARD)
    missing = [
        i
        for i in range(count)
        if _held(config.out / _shard_name(i), "episode") < min(SHARD, config.episodes - i * SHARD)
    ]

    def share(index: int) -> int:
        return min(SCENE_SHARD, wanted_scenes - index * SCENE_SHARD)

    missing_scenes = [
        i for i in range(-(-wanted_scenes // SCENE_SHARD)) if _held(config.out / f"scenes_{i:05d}.npz", None) < share(i)
    ]
    workers = config.workers or os.cpu_count() or 1
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    kept = played = 0
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn")) as pool,
    ):
        wanted = sum(min(SHARD, config.episodes - i * SHARD) for i in missing)
        bar = progress.add_task("demonstrations", total=config.episodes, completed=config.episodes - wanted)
        scenes = progress.add_task("random scenes", total=wanted_scenes, visible=wanted_scenes > 0)
        scene_jobs = [pool.submit(_make_scenes, config, i, share(i)) for i in missing_scenes]
        progress.advance(scenes, wanted_scenes - sum(share(i) for i in missing_scenes))
        for future in as_completed([pool.submit(_make_shard, config, i) for i in missing]):
            new, tried = future.result()
            kept, played = kept + new, played + tried
            progress.advance(bar, new)
        for job in as_completed(scene_jobs):
            progress.advance(scenes, job.result())
    if played:
        console.print(f"kept {kept} of {played} episodes in {config.out}")


def _check(config: DemosConfig) -> int:
    """Refuse a simulator that the expert can't act in; write what it demonstrates. How many scenes are wanted."""
    env = config.env.make(1)
    try:
        action = env.contract.action
        if not isinstance(env, Demonstrable) or (action.control_mode, action.dim) != ("delta_ee", 7):
            raise SimrealError(
                f"{config.env.name} has no scripted expert for {action.control_mode} actions", code="EXPERT",
                remedy="`vla envs` says which simulators have one; choose delta_ee where there are several modes.",
            )  # fmt: skip
        if config.scenes and not isinstance(env, Scattered):
            raise SimrealError(f"{config.env.name} has no random scenes", code="SCENES", remedy="Set scenes=0.")
        config.out.mkdir(parents=True, exist_ok=True)
        contract = json.loads(env.contract.to_json())
        write_json(config.out / SOURCE, {"contract": contract, "instructions": list(env.instructions)})
        return config.scenes if config.scenes is not None else SCENES * isinstance(env, Scattered)
    finally:
        env.close()


def source(folder: Path) -> Source:
    """Contract and instructions of the demonstrations in a folder."""
    check(folder)
    if recorded.is_store(folder):
        return Source(*recorded.source(folder))
    if not (folder / SOURCE).exists():
        raise SimrealError(
            f"{folder} has no {SOURCE}: its demonstrations are of an older release", code="DEMOS_OLD",
            remedy="Make them again with `vla demos` in another folder.",
        )  # fmt: skip
    data = json.loads((folder / SOURCE).read_text())
    return Source(PolicyContract.from_json(json.dumps(data["contract"])), tuple(data["instructions"]))


def check(folder: Path) -> None:
    """Refuse a folder without demonstrations."""
    if not any(folder.glob("shard_*.npz")) and not recorded.is_store(folder):
        raise SimrealError(
            f"no demonstrations in {folder}", code="DEMOS_MISSING",
            remedy=f"Make them: `vla demos out={folder}`, or name a folder of recorded episodes.",
        )  # fmt: skip


def read(folder: Path, episodes: int | None = None) -> Demonstrations:
    """The demonstrated samples of a folder, in the order of the shards or of the recorded episodes."""
    if recorded.is_store(folder):
        return _demonstrations(recorded.samples(folder, episodes))
    shards = list(_load(folder, "shard"))
    numbers, offset = [], 0
    for shard in shards:
        numbers.append(shard["episode"] + offset)
        offset = int(numbers[-1].max()) + 1
    number = np.concatenate(numbers)
    keep = slice(None) if episodes is None else number < episodes
    parts = {k: np.concatenate([s[k] for s in shards])[keep] for k in shards[0] if k != "episode"}
    return _demonstrations({**parts, "episode": number[keep]})


def _demonstrations(parts: dict[str, np.ndarray]) -> Demonstrations:
    return Demonstrations(
        images=parts["images"],
        state=parts["state"],
        instructions=[str(text) for text in parts["instruction"]],
        actions=parts["actions"],
        privileged=parts["privileged"],
        episode=parts["episode"],
    )


def has_scenes(folder: Path) -> bool:
    """Whether a folder holds random scenes."""
    return any(folder.glob("scenes_*.npz"))


def read_scenes(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """The random scenes of a folder: images `[N, K, H, W, 3]`, state `[N, S]`, instructions, privileged `[N, A]`."""
    shards = list(_load(folder, "scenes"))
    images, state, instructions, privileged = (
        np.concatenate([s[k] for s in shards]) for k in ("images", "state", "instruction", "privileged")
    )
    return images, state, [str(text) for text in instructions], privileged


def _load(folder: Path, kind: str) -> Iterator[dict[str, np.ndarray]]:
    check(folder)
    for path in sorted(folder.glob(f"{kind}_*.npz")):
        with np.load(path, allow_pickle=False) as data:
            yield {k: data[k] for k in data.files}


command = Command(
    name="demos",
    help="Record demonstrations of the scripted expert.",
    schema=DemosConfig,
    config_name="demos",
    run=demos,
)
