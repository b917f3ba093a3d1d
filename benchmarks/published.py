"""Published throughput of RLinf (arXiv 2510.06710) beside the event model of training/pipeline/model.py.

The steps/s are read off bar charts (+-0.5), the seconds per iteration on 16 GPUs are printed numbers. Stage times are
fitted to some of the cells, by least squares of the logarithms, and the other cells are predicted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from training.pipeline.model import simulate
from training.pipeline.scenarios import (
    BatchedEnvironments,
    Inference,
    Learner,
    Placement,
    Scenario,
    Schedule,
    colocated,
    disaggregated,
    hybrid,
    pipelined,
)

GPUS = (8, 16, 32)
PER_NODE = 8

# Environment steps/s on 8, 16 and 32 GPUs; seconds of rollout and training of an iteration on 16.
STEPS_PER_S = {
    "maniskill": {"colocated": (18.5, 29, 29), "disaggregated": (16.5, 26, 30.7), "hybrid": (31, 44, 49.4)},
    "libero": {"colocated": (38, 74, 137), "hybrid": (29, 54.5, 102), "simplevla": (27, 52, 56)},
}
SECONDS_16 = {
    "maniskill": {"colocated": (238, 474), "disaggregated": (335, 440), "hybrid": (269, 190)},
    "libero": {"colocated": (238, 204), "hybrid": (393, 207), "simplevla": (370, 380)},
}
Cell = tuple[str, int, str]  # placement, GPUs, "rollout" or "training" in s or "steps/s"
Values = Sequence[float]


@dataclass(frozen=True)
class Fit:
    """What was fitted to which cells.

    scenario: stage times on a number of GPUs, from the parameters. start: parameters to begin with, by name and
        unit; all are positive.
    """

    system: str
    scenario: Callable[[Values, int], Scenario]
    start: dict[str, float]
    cells: tuple[Cell, ...]


def maniskill(values: Values, gpus: int) -> Scenario:
    """128 environments on the GPU, 160 steps; simulator and policy take the same time, for want of figures of each.

    values: fixed_s, share_s (of a call of either), learner_fixed_s, learner_gpu_s (of an update), shared_speed and,
        if it is there, the growth of the fixed times with each further node.
    """
    fixed_s, share_s, learner_fixed_s, learner_gpu_s, speed = values[:5]
    growth = 1 + (values[5] if len(values) > 5 else 0.0) * (gpus / PER_NODE - 1)
    environments, decisions = 128, 160
    steps = environments * decisions
    return Scenario(
        environments, decisions, BatchedEnvironments(fixed_s * growth, share_s),
        Inference(fixed_s * growth, share_s / environments),
        Learner(learner_gpu_s / steps, learner_fixed_s * growth / steps, speed),
    )  # fmt: skip


def libero(values: Values, gpus: int) -> Scenario:
    """64 environments, 64 chunks of 8 steps; the simulator's processes and renderers are on the nodes of its GPUs.

    values: environment_gpu_s, policy_gpu_s (of a call for all environments), learner_gpu_s (of an update).
    """
    environment_s, policy_s, learner_s = values
    environments, decisions, chunk = 64, 64, 8
    return Scenario(
        environments, decisions, BatchedEnvironments(0.0, environment_s), Inference(0.0, policy_s / environments),
        Learner(learner_s / (environments * decisions * chunk)), chunk,
    )  # fmt: skip


def placed(name: str, gpus: int) -> tuple[Placement, Schedule]:
    """Where things are. The disaggregated split is an assumption: thirds, and the rest for the learner."""
    third, half = gpus // 3, gpus // 2
    return {
        "colocated": (colocated(gpus), Schedule()),
        "disaggregated": (disaggregated(third, third, gpus - 2 * third), Schedule()),
        "hybrid": (hybrid(half, half), pipelined(2)),
    }[name]


def stage_cells(system: str) -> tuple[Cell, ...]:
    """The stage times on 16 GPUs."""
    placements = [name for name in SECONDS_16[system] if name != "simplevla"]
    return tuple((name, 16, part) for name in placements for part in ("rollout", "training"))


_START = {"fixed_s": 0.5, "share_s": 2.0, "learner_fixed_s": 60.0, "learner_gpu_s": 2000.0, "shared_speed": 0.4}
_NODES = _START | {"growth_per_node": 0.1}
FITS = {
    "maniskill, stage times": Fit("maniskill", maniskill, _START, stage_cells("maniskill")),
    "maniskill, nodes": Fit("maniskill", maniskill, _NODES, (*stage_cells("maniskill"), ("hybrid", 32, "steps/s"))),
    "maniskill, all cells": Fit(
        "maniskill", maniskill, _NODES,
        (*stage_cells("maniskill"), *((n, g, "steps/s") for n in STEPS_PER_S["maniskill"] for g in (8, 32))),
    ),
    "libero, stage times": Fit(
        "libero", libero, {"environment_gpu_s": 40.0, "policy_gpu_s": 20.0, "learner_gpu_s": 3000.0},
        stage_cells("libero"),
    ),
}  # fmt: skip


def published(system: str) -> dict[Cell, float]:
    """Every cell that the model has a word on."""
    cells: dict[Cell, float] = {}
    for name, (rollout, training) in SECONDS_16[system].items():
        cells[name, 16, "rollout"], cells[name, 16, "training"] = rollout, training
    for name, rates in STEPS_PER_S[system].items():
        cells.update({(name, gpus, "steps/s"): rate for gpus, rate in zip(GPUS, rates, strict=True)})
    return cells


def predicted(fit: Fit, values: Values) -> dict[Cell, float]:
    """The same cells from stage times; SimpleVLA, another system, has none of its own."""
    cells: dict[Cell, float] = {}
    for name in STEPS_PER_S[fit.system]:
        for gpus in GPUS if name != "simplevla" else ():
            scenario = fit.scenario(values, gpus)
            placement, schedule = placed(name, gpus)
            result = simulate(scenario, placement, schedule, iterations=2)
            training = scenario.learner.seconds(scenario.steps, len(placement.learner), placement.memory_shared)
            cells[name, gpus, "steps/s"] = result.env_steps_per_s
            cells[name, gpus, "rollout"] = result.seconds_per_iteration - training
            cells[name, gpus, "training"] = training
    return cells


def solve(fit: Fit) -> np.ndarray:
    """The parameters, in the order of `fit.start`."""
    known = published(fit.system)

    def errors(logarithms: np.ndarray) -> list[float]:
        found = predicted(fit, np.exp(logarithms).tolist())
        return [float(np.log(found[cell] / known[cell])) for cell in fit.cells]

    return np.exp(least_squares(errors, np.log(list(fit.start.values())), diff_step=1e-4).x)


def simplevla() -> dict[Cell, float]:
    """SimpleVLA from its own stage times on 16 GPUs, split evenly: the steps of an iteration as in the other rows."""
    steps = libero([1.0, 1.0, 1.0], 16).steps
    return {("simplevla", g, "steps/s"): steps / (sum(SECONDS_16["libero"]["simplevla"]) * 16 / g) for g in GPUS}


def compare(fit: Fit) -> dict[str, object]:
    """Parameters and every cell: published, from the model, error in %, and whether it was fitted.

    A cell whose rollout and training were fitted is no prediction either.
    """
    values = solve(fit)
    found, known = predicted(fit, values.tolist()), published(fit.system)
    if fit.system == "libero":
        found |= simplevla()
    halves = {(name, gpus) for name, gpus, part in fit.cells if part == "training"}
    rows = [
        {
            "placement": name, "gpus": gpus, "quantity": quantity, "published": known[name, gpus, quantity],
            "model": found[name, gpus, quantity],
            "fitted": (name, gpus, quantity) in fit.cells or (name, gpus) in halves,
            "error_percent": 100 * (found[name, gpus, quantity] / known[name, gpus, quantity] - 1),
        }
        for name, gpus, quantity in known
        if (name, gpus, quantity) in found
    ]  # fmt: skip
    return {"parameters": dict(zip(fit.start, values.tolist(), strict=True)), "cells": rows}
