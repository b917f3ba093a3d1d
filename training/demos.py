"""Demonstrations of the scripted expert: `vla demos`.

Shards of episodes are made in parallel and renamed into place, so a killed run goes on where it stopped. Each kept
episode succeeded. The executed actions carry noise, the recorded ones don't (DART, Laskey et al. 2017): the policy
learns how to come back.
"""

import json
import multiprocessing as mp
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.envs.base import EpisodeRequest
from training.envs.tabletop import Tabletop, TabletopConfig
from vla.cli import Command
from vla.errors import SimrealError
from vla.tasks.expert import Expert
from vla.tasks.put_on_plate import MAX_STEPS

SHARD = 25  # episodes
RETREAT = np.array([0, 0, 0.02, 0, 0, 0, 1.0])  # what the expert does once the object rests on the goal


@dataclass(frozen=True)
class DemosConfig:
    """Options of `vla demos`.

    out: folder for the shards.
    episodes: successful episodes to keep.
    seed: first episode's seed; evaluation uses other seeds.
    stride: control steps between recorded images.
    noise: standard deviation in m of the noise on the executed translation.
    workers: processes, 0 for one per core.
    env: the simulator's options.
    """

    out: Path
    episodes: int = 1000
    seed: int = 1_000_000
    stride: int = 3
    noise: float = 0.004
    workers: int = 0
    env: TabletopConfig = field(default_factory=TabletopConfig)


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


def _shard_name(index: int) -> str:
    return f"shard_{index:05d}.npz"


def record_episode(env: Tabletop, seed: int, stride: int, noise: float) -> dict[str, np.ndarray] | None:
    """Play one episode in environment 0; None if the expert failed."""
    env.reset(0, EpisodeRequest(seed))
    rng = np.random.default_rng([seed, 11])
    expert = Expert(env.config.max_translation, env.config.max_rotation)
    burst_start = int(rng.integers(0, 30)) if rng.random() < 0.5 else -1
    burst = rng.uniform(-1, 1, 3) * env.config.max_translation * np.array([1.0, 1.0, 0.5])
    scale = noise * rng.uniform(0, 1)
    images, states, privileged, steps, actions = [], [], [], [], []
    done = False
    instruction = ""
    for t in range(MAX_STEPS):
        if t % stride == 0:
            seen = env.observe([0])[0]
            instruction = seen.instruction
            images.append(np.stack([seen.images[c.name] for c in env.contract.cameras]))
            states.append(np.concatenate([seen.state[f.name] for f in env.contract.state]))
            privileged.append(env.privileged([0])[0])
            steps.append(t)
        action = expert.act(env.expert_view(0))
        actions.append(action)
        executed = action.copy()
        if expert.phase in ("approach", "descend", "carry"):
            executed[:3] += rng.normal(0, scale, 3)
            if burst_start <= t < burst_start + 3:
                executed[:3] += burst
        result = env.step([0], executed[None, None])
        if result.terminated[0]:
            done = True
            break
    if not done:
        return None
    chunk = env.config.chunk
    padded = np.array(actions + [RETREAT] * chunk)
    return {
        "images": np.stack(images),
        "state": np.stack(states),
        "privileged": np.stack(privileged),
        "actions": np.stack([padded[t : t + chunk] for t in steps]),
        "instruction": np.array([instruction] * len(steps)),
    }


def _make_shard(config: DemosConfig, index: int) -> tuple[int, int]:
    """Write one shard; returns episodes kept and episodes played."""
    env = Tabletop(1, config.env)
    wanted = min(SHARD, config.episodes - index * SHARD)
    episodes: list[dict[str, np.ndarray]] = []
    played = 0
    while len(episodes) < wanted:
        if played >= 20 * SHARD:
            raise SimrealError(f"the expert succeeded only {len(episodes)} times in {played}: lower noise")
        # Every shard draws from a range of seeds of its own, so that shards don't depend on each other.
        episode = record_episode(env, config.seed + index * 1000 + played, config.stride, config.noise)
        played += 1
        if episode is not None:
            episodes.append(episode)
    env.close()
    target = config.out / _shard_name(index)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    number = np.concatenate([np.full(len(e["state"]), i) for i, e in enumerate(episodes)])
    with temporary.open("wb") as file:
        np.savez(file, episode=number, **{k: np.concatenate([e[k] for e in episodes]) for k in episodes[0]})
    temporary.rename(target)
    return len(episodes), played


def demos(config: DemosConfig) -> None:
    """Make the missing shards."""
    console = Console()
    config.out.mkdir(parents=True, exist_ok=True)
    record = json.loads(json.dumps(asdict(config), default=str))
    record.pop("workers"), record.pop("episodes"), record.pop("out")
    info = config.out / "demos.json"
    if info.exists() and json.loads(info.read_text()) != record:
        raise SimrealError(
            f"{config.out} holds demonstrations made with other options: {info.read_text()}", code="OUTPUT_EXISTS",
            remedy="Choose another out=, or delete the folder.",
        )  # fmt: skip
    info.write_text(json.dumps(record, indent=1))
    for stale in config.out.glob("*.tmp"):
        stale.unlink()
    count = -(-config.episodes // SHARD)
    missing = [i for i in range(count) if not (config.out / _shard_name(i)).exists()]
    workers = config.workers or os.cpu_count() or 1
    columns = TextColumn("demonstrations"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    kept = played = 0
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn")) as pool,
    ):
        bar = progress.add_task("", total=config.episodes, completed=(count - len(missing)) * SHARD)
        for future in as_completed([pool.submit(_make_shard, config, i) for i in missing]):
            new, tried = future.result()
            kept, played = kept + new, played + tried
            progress.advance(bar, new)
    if played:
        console.print(f"kept {kept} of {played} episodes in {config.out}")


def read(folder: Path, episodes: int | None = None) -> Demonstrations:
    """All samples of a folder of demonstrations, in the order of the shards."""
    shards = list(_shards(folder))
    if not shards:
        raise SimrealError(
            f"no demonstrations in {folder}", code="DEMOS_MISSING", remedy=f"Make them: `vla demos out={folder}`"
        )
    numbers, offset = [], 0
    for shard in shards:
        numbers.append(shard["episode"] + offset)
        offset = int(numbers[-1].max()) + 1
    number = np.concatenate(numbers)
    keep = slice(None) if episodes is None else number < episodes
    parts = {k: np.concatenate([s[k] for s in shards])[keep] for k in shards[0] if k != "episode"}
    return Demonstrations(
        images=parts["images"],
        state=parts["state"],
        instructions=[str(text) for text in parts["instruction"]],
        actions=parts["actions"],
        privileged=parts["privileged"],
        episode=number[keep],
    )


def _shards(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    for path in sorted(folder.glob("shard_*.npz")):
        with np.load(path, allow_pickle=False) as data:
            yield {k: data[k] for k in data.files}


command = Command(
    name="demos", help="Record demonstrations of the scripted expert.", schema=DemosConfig, config_name="demos", run=demos
)
