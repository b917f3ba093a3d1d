"""How far the schedules scale, simulated: `python benchmarks/scaling.py --out scaling.json --figure scaling.png`.

All figures come from the event model of training/pipeline/model.py: none is a measurement of the system.
1. bounds: the two scenarios of training/pipeline/scenarios.py with no overhead.
2. published: RLinf's figures beside the model's (benchmarks/published.py).
3. measured: rollouts of docs/results/rollout.json beside what the model makes of the stage times of one worker.
4. scaling: 8 to 256 GPUs for each schedule.

--trace writes timelines of the two scenarios as Chrome traces. Exit code 1 if a measured rollout is missed by more than
a tenth. Takes some minutes.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from published import FITS, compare, maniskill, solve
from scipy.integrate import quad
from scipy.stats import lognorm

from training.pipeline.model import Result, predict_rollout, simulate, write_trace
from training.pipeline.scenarios import (
    ABLATION,
    ASYNCHRONOUS,
    ASYNCHRONOUS_PLACEMENTS,
    ASYNCHRONOUS_SCHEDULE,
    HYBRID,
    HYBRID_PLACEMENTS,
    Placement,
    Scenario,
    Schedule,
    SeparateEnvironments,
    colocated,
    disaggregated,
    hybrid,
    pipelined,
)
from vla.results import commit, machine, write_json

ROLLOUT = Path(__file__).parents[1] / "docs" / "results" / "rollout.json"
GPUS = (8, 16, 32, 64, 128, 256)
TOLERANCE = 0.10  # of measured rollouts
SYNC_S = 1.0  # assumed: weights to the policies, in the scaling of separate environments
STYLES = {
    "colocated sequential": "C0o-", "colocated pipelined": "C4v-", "disaggregated sequential": "C1s-",
    "hybrid pipelined": "C2^-", "asynchronous": "C3D-",
}  # fmt: skip


def figures(result: Result) -> dict[str, Any]:
    return {
        "seconds_per_iteration": result.seconds_per_iteration, "env_steps_per_s": result.env_steps_per_s,
        "utilisation": result.utilisation, "waiting": result.waiting, "staleness": result.staleness,
    }  # fmt: skip


def expected_slowest(environments: SeparateEnvironments, count: int) -> float:
    """Expected time of the slowest of `count` steps in s, resets apart: integral of 1 - F(x)^count."""
    sigma = np.sqrt(np.log1p(environments.variation**2))
    step = lognorm(sigma, scale=environments.mean_s * np.exp(-(sigma**2) / 2))
    return float(quad(lambda x: 1 - step.cdf(x) ** count, 0, 200 * environments.mean_s, limit=500)[0])


def bounds() -> dict[str, Any]:
    """Part 1."""
    slow = {n: simulate(HYBRID, HYBRID_PLACEMENTS[n], Schedule()) for n in ("disaggregated", "colocated")}
    without = simulate(replace(HYBRID, hands_s=0.0), HYBRID_PLACEMENTS["colocated"], Schedule()).seconds_per_iteration
    stages = {}
    for k in (1, 2, 3, 4):
        result = simulate(HYBRID, HYBRID_PLACEMENTS["hybrid"], pipelined(k))
        ratios = {f"over_{n}": s.seconds_per_iteration / result.seconds_per_iteration for n, s in slow.items()}
        ratios["over_colocated_without_change_of_hands"] = without / result.seconds_per_iteration
        stages[str(k)] = figures(result) | ratios
    base = simulate(ASYNCHRONOUS, ASYNCHRONOUS_PLACEMENTS["synchronous"], Schedule(), iterations=60)
    ablation = {}
    for name, schedule in ABLATION.items():
        result = simulate(ASYNCHRONOUS, ASYNCHRONOUS_PLACEMENTS["asynchronous"], schedule, iterations=20)
        ablation[name] = figures(result) | {
            "over_synchronous": base.seconds_per_iteration / result.seconds_per_iteration
        }
    environments, n = ASYNCHRONOUS.environment, ASYNCHRONOUS.environments
    assert isinstance(environments, SeparateEnvironments)
    decision_s = ASYNCHRONOUS.inference.seconds(n, 2) + ASYNCHRONOUS.learner.seconds(n, 2, False)
    slowest_s = expected_slowest(environments, n)
    exact = ASYNCHRONOUS.decisions * (slowest_s + decision_s) + environments.reset_s
    return {
        "hybrid": {"stages": stages} | {n: figures(s) for n, s in slow.items()},
        "asynchronous": {
            "synchronous": figures(base), "ablation": ablation, "expected_slowest_s": slowest_s,
            "expected_synchronous_s": exact,
            "bound": exact / ASYNCHRONOUS.learner.seconds(ASYNCHRONOUS.steps, 1, False),
        },
    }  # fmt: skip


def measured() -> list[dict[str, Any]]:
    """Part 3. half_known: whether the policy's time for half the slots is an input (from pipelined_1), too."""
    rows = []
    for model, entry in json.loads(ROLLOUT.read_text())["models"].items():
        busy = entry["placements"]["sequential_1"]["mean_s"]
        environment_s, policy_s = (busy[f"{name}_busy"] / entry["decisions"] for name in ("environment", "policy"))
        half_s = entry["placements"]["pipelined_1"]["mean_s"]["policy_busy"] / entry["decisions"] / 2
        pairs = {"one_worker": ((1, 1), (1, 2)), "two_workers": ((2, 1), (2, 2)), "both_cores": ((1, 1), (2, 2))}
        for pair, runs in pairs.items():
            known = entry["median"] if pair == "one_worker" else entry[pair]["median"]
            for half_known, fixed_s in ((False, 0.0), (True, 2 * half_s - policy_s)):
                slow, fast = (
                    predict_rollout(environment_s, policy_s, w, k, 2, entry["decisions"], entry["slots"], fixed_s)
                    for w, k in runs
                )
                rows.append({
                    "model": model, "pair": pair, "half_known": half_known, "measured": known, "predicted": slow / fast,
                    "error_percent": 100 * (slow / fast / known - 1),
                })  # fmt: skip
    return rows


def best(scenario: Scenario, options: Iterable[tuple[Placement, Schedule]]) -> dict[str, Any]:
    """The quickest of several placements and schedules, and which it is."""
    results = []
    for placement, schedule in options:
        updates = (2, 1) if schedule.staleness == 0 else (6, 3)  # whose updates overlap has to settle
        results.append((simulate(scenario, placement, schedule, *updates), placement, schedule))
    result, placement, schedule = max(results, key=lambda r: r[0].env_steps_per_s)
    sizes = {n: len(getattr(placement, n)) for n in ("environment", "policy", "learner")}
    return figures(result) | {"devices": sizes, "stages": schedule.stages}


def batched_scaling(values: list[float], weak: bool) -> dict[str, list[dict[str, Any]]]:
    """A simulator on the GPU, its calls as long as the policy's. weak: 16 environments a GPU; else 128 in all."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for gpus in GPUS:
        recipe = maniskill(values, gpus)
        times = gpus // 8 if weak else 1
        scenario = replace(
            recipe, environments=recipe.environments * times,
            environment=replace(recipe.environment, share_s=recipe.environment.share_s * times),
            learner=replace(recipe.learner, fixed_s=recipe.learner.fixed_s / times),
        )  # fmt: skip
        splits = [(n, n, gpus - 2 * n) for n in sorted({part * gpus // 16 for part in range(2, 8)})]
        streams = [
            Schedule("asynchronous", k, "dynamic", fragment=20, microbatch=scenario.steps // 8, staleness=1)
            for k in (2, 4)
        ]
        for name, options in {
            "colocated sequential": [(colocated(gpus), Schedule())],
            "disaggregated sequential": [(disaggregated(*split), Schedule()) for split in splits],
            "hybrid pipelined": [(hybrid(gpus // 2, gpus // 2), pipelined(k)) for k in (2, 4)],
            "asynchronous": [(disaggregated(*split), s) for split in splits for s in streams],
        }.items():
            curves.setdefault(name, []).append({"gpus": gpus} | best(scenario, options))
            print(f"{gpus} GPUs, {name}: {curves[name][-1]['env_steps_per_s']:.0f} env steps/s", flush=True)
    return curves


def separate_scaling() -> dict[str, list[dict[str, Any]]]:
    """Environments on processor cores, 32 a GPU; the split of the asynchronous schedule is the best one of 8 GPUs."""
    curves: dict[str, list[dict[str, Any]]] = {}
    policies = [2, 3, 4]  # of 8 GPUs
    for gpus in GPUS:
        scenario = replace(ASYNCHRONOUS, environments=32 * gpus, sync_s=SYNC_S)
        stream = replace(ASYNCHRONOUS_SCHEDULE, microbatch=scenario.steps // 40)
        splits = [disaggregated(0, p * gpus // 8, gpus - p * gpus // 8) for p in policies]
        together = colocated(gpus, simulator=False)
        for name, options in {
            "colocated sequential": [(together, Schedule())],
            "colocated pipelined": [(together, pipelined(k)) for k in (2, 4)],
            "asynchronous": [(split, stream) for split in splits],
        }.items():
            curves.setdefault(name, []).append({"gpus": gpus} | best(scenario, options))
            print(f"{gpus} GPUs, {name}: {curves[name][-1]['env_steps_per_s']:.0f} env steps/s", flush=True)
        policies = [curves["asynchronous"][0]["devices"]["policy"]]
    return curves


def draw(scaling: Mapping[str, Mapping[str, list[dict[str, Any]]]], file: Path) -> None:
    """Environment steps/s per GPU against GPUs."""
    figure, axes = plt.subplots(1, len(scaling), figsize=(12.5, 3.8))
    for axis, (title, curves) in zip(axes, scaling.items(), strict=True):
        for name, points in curves.items():
            gpus = [p["gpus"] for p in points]
            axis.plot(gpus, [p["env_steps_per_s"] / p["gpus"] for p in points], STYLES[name], label=name, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_xticks(GPUS, [str(g) for g in GPUS])
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("env steps/s per GPU, simulated")
    figure.suptitle("A simulation of the system, not a measurement", fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--figure", type=Path, help="PNG file of part 4")
    parser.add_argument("--trace", type=Path, help="folder for timelines")
    arguments = parser.parse_args()
    nodes, constant = (solve(FITS[f"maniskill, {name}"]).tolist() for name in ("nodes", "stage times"))
    scaling = {
        "GPU simulator, 16 environments a GPU,\nfixed times grow with the nodes": batched_scaling(nodes, weak=True),
        "GPU simulator, 128 environments in all,\nconstant fixed times": batched_scaling(constant, weak=False),
        "CPU environments, 32 a GPU": separate_scaling(),
    }
    result = {
        "title": "A simulation of the system, not a measurement",
        "commit": commit() or "unknown", "machine": machine("numpy", "scipy"),
        "command": shlex.join(["python", *sys.argv]),
        "bounds": bounds(), "published": {name: compare(fit) for name, fit in FITS.items()},
        "measured": measured(), "scaling": scaling,
    }  # fmt: skip
    write_json(arguments.out, result)
    if arguments.figure:
        draw(scaling, arguments.figure)
    if arguments.trace:
        arguments.trace.mkdir(parents=True, exist_ok=True)
        for name, run in {
            "hybrid": (HYBRID, HYBRID_PLACEMENTS["hybrid"], pipelined(2)),
            "asynchronous": (ASYNCHRONOUS, ASYNCHRONOUS_PLACEMENTS["asynchronous"], ASYNCHRONOUS_SCHEDULE),
        }.items():
            write_trace(arguments.trace / f"{name}.json", simulate(*run, iterations=2).timeline)
    missed = [r for r in result["measured"] if r["half_known"] and abs(r["error_percent"]) > 100 * TOLERANCE]
    print(f"written to {arguments.out}; measured rollouts missed by more than {TOLERANCE:.0%}: {len(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
