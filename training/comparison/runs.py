"""Runs as a comparison reads them, and the groups that they form: runs that differ in their seed alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from training import metrics, origin
from training.train import TrainConfig
from vla import options
from vla.errors import ConfigError, SimrealError

WINDOW = 200  # episodes over which training's success is taken
BY_NAME = ("seed", "out", "from", "force", "cluster")  # options that do not make another method


class Episode(NamedTuple):
    """A greedy episode that any policy could have played. world: simulator and its settings, as text."""

    world: str
    variant: str
    seed: int


@dataclass(frozen=True)
class Curve:
    """Of training, after each iteration; success is None where no episode has ended, episodes are those it is over."""

    env_steps: list[int]
    minutes: list[float]
    success: list[float | None]
    episodes: list[int]


@dataclass(frozen=True)
class Run:
    """A folder of `vla train`.

    config: what makes the method, dotted name -> value. facts: what need not make a difference, likewise.
    greedy: episodes that the finished policy has played in `vla eval`, and whether it succeeded.
    notes: what a reader has to know.
    """

    folder: Path
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    seed: int
    curve: Curve
    greedy: Mapping[Episode, bool]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Runs of one method."""

    name: str
    runs: tuple[Run, ...]

    def shared(self, key: str, of: str = "config") -> Any:
        """The value that all runs have; "several" if they differ."""
        values = [getattr(run, of).get(key) for run in self.runs]
        return values[0] if all(value == values[0] for value in values) else "several"


def windowed(rows: Sequence[Mapping[str, Any]], window: int = WINDOW) -> list[tuple[int, int]]:
    """Successes and episodes after each iteration: of it and those before it, as many as give `window` episodes.

    Early iterations have fewer.
    """
    found = []
    for last in range(1, len(rows) + 1):
        wins = episodes = 0
        for row in reversed(rows[:last]):
            count = int(row["rollout/episodes"])
            episodes, wins = episodes + count, wins + round(count * (row["rollout/success"] or 0.0))
            if episodes >= window:
                break
        found.append((wins, episodes))
    return found


def is_run(folder: Path) -> bool:
    """Whether `vla train` has begun to learn there."""
    return (folder / "config.json").exists() and any("rollout/success" in row for row in metrics.read(folder)[:1])


def read(folder: Path) -> Run:
    """A run, finished or not."""
    data, rows = json.loads((folder / "config.json").read_text()), metrics.read(folder)
    notes = [] if (folder / "checkpoint").exists() else [f"{folder}: {len(rows)} of {data['iterations']} iterations"]
    facts: dict[str, Any] = {}
    if (folder / origin.FILE).exists():
        begun = origin.read(folder)
        first = origin.begun(begun)
        data["placement"] = first["placement"]
        if data["checkpoint"] is not None:  # the same weights may lie elsewhere
            data["checkpoint"] = f"sha256 {begun['checkpoint']['sha256'][:16]}"
        facts = flat({k: first[k] for k in ("commit", "machine", "packages")})
        if broken := origin.interruptions(begun):
            notes.append(f"{folder} was interrupted before iteration {', '.join(broken)}")
    try:
        data = options.fill(TrainConfig, data)  # a version before may know fewer
    except ConfigError as error:
        notes.append(f"{folder}: {error}")
    config = flat({k: v for k, v in data.items() if k not in BY_NAME})
    wins = windowed(rows)
    curve = Curve(
        [int(row["time/total_env_steps"]) for row in rows], [row["time/elapsed_s"] / 60 for row in rows],
        [won / played if played else None for won, played in wins], [played for _, played in wins],
    )  # fmt: skip
    return Run(folder, config, facts, data["seed"], curve, *_greedy(folder, notes))


def _greedy(folder: Path, notes: list[str]) -> tuple[dict[Episode, bool], tuple[str, ...]]:
    """All evaluations of the run's bundle that lie in its folder, and the notes with what is wrong with them."""
    found: dict[Episode, bool] = {}
    for file in sorted(folder.glob("eval_*.json")):
        told = json.loads(file.read_text())
        if Path(told["checkpoint"]).name != "checkpoint":  # the weights that it began with
            continue
        if "outcomes" not in told:
            notes.append(f"{file} does not tell its episodes one by one: write it anew with `vla eval`")
            continue
        found |= episodes_of(file)
    return found, tuple(notes)


def episodes_of(file: Path) -> dict[Episode, bool]:
    """Of a result of `vla eval` that tells its episodes one by one, without controls: whether each succeeded."""
    told = json.loads(file.read_text())
    world = json.dumps({k: told["env"][k] for k in ("name", "settings")}, sort_keys=True)
    return {
        Episode(world, variant, seed): letter == "1"
        for variant in told["variants"]
        for seed, letter in enumerate(told["outcomes"][variant], told["seed"])
    }


def gather(folders: Sequence[Path]) -> list[Group]:
    """A folder of runs is a group by its name; runs named themselves join those that differ in the seed alone."""
    groups: list[Group] = []
    alone: list[Run] = []
    for folder in folders:
        if is_run(folder):
            alone.append(read(folder))
            continue
        inside = tuple(read(part) for part in sorted(p for p in folder.glob("*") if is_run(p)))
        if not inside:
            raise SimrealError(
                f"{folder} holds no run of `vla train` that has ended an iteration", code="RUN_MISSING",
                remedy="Give folders of runs, or folders that hold those of several seeds.",
            )  # fmt: skip
        groups.append(Group(folder.name or str(folder.resolve().name), inside))
    for runs in _alike(alone):
        groups.append(Group(_name([run.folder for run in runs]), tuple(runs)))
    return _told_apart(groups)


def _alike(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of equal options and different seeds; a second one of a seed belongs elsewhere."""
    found: list[list[Run]] = []
    for run in runs:
        home = next((g for g in found if g[0].config == run.config and run.seed not in [r.seed for r in g]), None)
        if home is None:
            found.append([run])
        else:
            home.append(run)
    return found


def _name(folders: Sequence[Path]) -> str:
    """What the names of the folders have in common; of `ppo/seed_0` and `ppo/seed_1` it is `ppo`."""
    names, above = [folder.resolve().name for folder in folders], {folder.resolve().parent.name for folder in folders}
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in alike)
    own = common.rstrip("_-. ").removesuffix("seed").rstrip("_-. ")
    return own or (above.pop() if len(above) == 1 else names[0])


def _told_apart(groups: Sequence[Group]) -> list[Group]:
    """With the folder above in front of names that are there twice, or else a number behind them."""
    names = [group.name for group in groups]
    long = [f"{g.runs[0].folder.resolve().parent.name}/{g.name}" if names.count(g.name) > 1 else g.name for g in groups]
    numbered = [f"{n} ({long[: i + 1].count(n)})" if long.count(n) > 1 else n for i, n in enumerate(long)]
    return [Group(name, group.runs) for name, group in zip(numbered, groups, strict=True)]


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def differing(groups: Sequence[Group], of: str = "config") -> dict[str, list[Any]]:
    """Names that not all runs agree on -> the value of each group, "several" where its own runs differ."""
    names = sorted({key for group in groups for run in group.runs for key in getattr(run, of)})
    values = {name: [group.shared(name, of) for group in groups] for name in names}
    return {k: v for k, v in values.items() if "several" in v or any(value != v[0] for value in v)}
