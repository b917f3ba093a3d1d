"""Whether two groups of runs differ, and how much may be said with as many seeds and episodes as there are."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from training.comparison.runs import WINDOW, Episode, Group, Run
from vla.comparison import mean_spread, over_runs, paired, rates, unpaired
from vla.results import interval
from vla.trial_results import sentence

SEEDS = 3  # of each group, from which on seeds are compared, and not episodes
ALPHA = 0.05
POINTS = 60  # of a mean curve


def common(groups: Sequence[Group]) -> list[Episode]:
    """Greedy episodes that every run has played; none if a run has no evaluation."""
    played = [set(run.greedy) for group in groups for run in group.runs]
    return sorted(set.intersection(*played)) if played else []


def greedy(run: Run, episodes: Sequence[Episode]) -> dict[str, Any]:
    return rates([run.greedy[episode] for episode in episodes])


def trained(run: Run) -> dict[str, Any]:
    """Of sampled actions, in the last WINDOW episodes of training or all that there were."""
    success, played = run.curve.success[-1], run.curve.episodes[-1]
    done = round((success or 0.0) * played)
    spread = list(interval(done, played)) if played else None
    return {"successes": done, "episodes": played, "rate": success, "wilson95": spread}


def over(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rate of a group: mean over its runs, with an interval over seeds, or over episodes if seeds are too few."""
    known = [entry for entry in entries if entry["episodes"]]
    if not known:
        return {"rate": None, "interval95": None, "over": None, "episodes": 0, "runs": [None for _ in entries]}
    done, played = (sum(entry[k] for entry in known) for k in ("successes", "episodes"))
    each = [entry["rate"] for entry in known]
    seeds = len(known) >= SEEDS
    spread = mean_spread(each) if seeds else interval(done, played)
    return {
        "rate": float(np.mean(each)), "interval95": list(spread), "over": "seeds" if seeds else "episodes",
        "episodes": played, "runs": [entry["rate"] for entry in entries],
    }  # fmt: skip


def to_goal(run: Run, goal: float) -> tuple[int, float] | None:
    """Environment steps and minutes until WINDOW episodes in a row had this success; None if that never was."""
    c = run.curve
    for steps, minutes, success, episodes in zip(c.env_steps, c.minutes, c.success, c.episodes, strict=True):
        if success is not None and episodes >= WINDOW and success >= goal:
            return steps, minutes
    return None


def efficiency(group: Group, goal: float) -> dict[str, Any]:
    """Median over the runs of what the goal took; a run that did not reach it took longer than all others."""
    reached = [to_goal(run, goal) for run in group.runs]
    found: dict[str, Any] = {"reached": sum(r is not None for r in reached), "of": len(reached)}
    for index, name in enumerate(("env_steps", "minutes")):
        median = float(np.median([r[index] if r else np.inf for r in reached]))
        found[name] = median if np.isfinite(median) else None
        found[f"{name}_of_runs"] = [r[index] if r else None for r in reached]
    return found


def mean_curve(group: Group, axis: str) -> dict[str, list[float]]:
    """Success over env_steps or minutes: mean of the runs where all have one, and low and high beside it.

    low and high: 95% over seeds if there are enough; of two runs these themselves; of one, Wilson's over episodes.
    """
    lines = []
    for run in group.runs:
        rows = zip(getattr(run.curve, axis), run.curve.success, run.curve.episodes, strict=True)
        lines.append(np.array([row for row in rows if row[1] is not None], float).reshape(-1, 3))
    if any(len(line) == 0 for line in lines):
        return {"x": [], "mean": [], "low": [], "high": []}
    if len(lines) == 1:
        x, mean, episodes = lines[0].T
        low, high = np.array([interval(round(m * n), int(n)) for m, n in zip(mean, episodes, strict=True)]).T
    else:
        x = np.linspace(max(line[0, 0] for line in lines), min(line[-1, 0] for line in lines), POINTS)
        each = np.stack([np.interp(x, line[:, 0], line[:, 1]) for line in lines])
        mean, low, high = each.mean(0), each.min(0), each.max(0)
        if len(lines) >= SEEDS:
            low, high = np.array([mean_spread(column) for column in each.T]).T
    return {k: v.tolist() for k, v in (("x", x), ("mean", mean), ("low", low), ("high", high))}


def compared(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every two groups."""
    return [judge(first, second) for first, second in combinations(groups, 2)]


def judge(first: Group, second: Group) -> dict[str, Any]:
    """Whether two groups differ. differ: None where there is too little to tell. text: the same in words."""
    episodes = common([first, second])
    seeds = min(len(first.runs), len(second.runs))
    by = f"{len(episodes)} greedy episodes of each run" if episodes else f"the last {WINDOW} episodes of training"
    if seeds >= SEEDS:
        found = _by_seeds(*([_final(run, episodes)["rate"] or 0.0 for run in g.runs] for g in (first, second)))
    elif episodes:
        found = _by_pairs(first, second, episodes)
    else:
        found = _by_training(*([trained(run) for run in g.runs] for g in (first, second)))
    text = f"{second.name} beside {first.name}, by {by}: {found['text']}"
    if seeds < SEEDS:
        text += f". That holds for these policies; for the methods {SEEDS} seeds of each are needed, there are " \
                f"{len(first.runs)} and {len(second.runs)}"  # fmt: skip
    return {"first": first.name, "second": second.name, "greedy": bool(episodes), **found, "text": f"{text}."}


def _final(run: Run, episodes: Sequence[Episode]) -> dict[str, Any]:
    return greedy(run, episodes) if episodes else trained(run)


def _by_seeds(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    found = over_runs(first, second)
    low, high = found["bootstrap95"]
    apart, sure = not low <= 0 <= high, found["p"] <= ALPHA
    text = f"{_points(found['gain'], low, high)}, bootstrap over {len(first)} and {len(second)} seeds, " \
           f"p = {found['p']:.2g} (Welch)"  # fmt: skip
    if apart and sure:
        return {"by": "seeds", **found, "differ": True, "text": f"{text}: they differ"}
    if apart:
        return {"by": "seeds", **found, "differ": None, "text": f"{text}: too few seeds to tell"}
    return {"by": "seeds", **found, "differ": False, "text": f"{text}: no difference is shown"}


def _by_pairs(first: Group, second: Group, episodes: Sequence[Episode]) -> dict[str, Any]:
    """Runs of one seed make pairs, else those of one place."""
    with_seed = {run.seed: run for run in second.runs}
    pairs = [(run, with_seed[run.seed]) for run in first.runs if run.seed in with_seed]
    pairs = pairs or list(zip(first.runs, second.runs, strict=False))
    outcomes = [(a.greedy[e], b.greedy[e]) for a, b in pairs for e in episodes]
    found = paired([a for a, _ in outcomes], [b for _, b in outcomes])
    return {"by": "episodes", **found, "differ": found["p"] <= ALPHA, "text": sentence(found)}


def _by_training(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Episodes of training have no partners: each policy has met others."""
    sums = [tuple(sum(e[k] for e in entries) for k in ("successes", "episodes")) for entries in (first, second)]
    if min(entry["episodes"] for entry in (*first, *second)) < WINDOW:
        fewest = min(entry["episodes"] for entry in (*first, *second))
        return {"by": "training", "differ": None, "text": f"a run has {fewest} of them: too few to tell"}
    found = unpaired((sums[0][0], sums[0][1]), (sums[1][0], sums[1][1]))
    differ = found["p"] <= ALPHA
    text = f"{_points(found['gain'], *found['interval95'])}, p = {found['p']:.2g} (Fisher, exact): " \
           f"{'they differ' if differ else 'no difference is shown'}"  # fmt: skip
    return {"by": "training", **found, "differ": differ, "text": text}


def _points(gain: float, low: float, high: float) -> str:
    return f"{100 * gain:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
