"""What the schedules gain: `python benchmarks/pipeline.py --out pipeline.json --figure pipeline.png`.

- hybrid: a simulator on the GPU, three devices; hybrid placement with 1 to 4 stages over disaggregated (one device
  each) and colocated ones, both sequential.
- asynchronous: 64 environments on processor cores, two devices; asynchronous over synchronous colocated, and what each
  part of it adds.
- tabletop: the shipped policy, all on this machine's processors; the figures depend on its cores.
- maniskill_mlp: an MLP in ManiSkill, see benchmarks/maniskill_mlp.py; left out where ManiSkill is not installed.

The first two run the real actors, transport, losses and schedules on a few cores: environments, policy and learner are
stand-ins that wait for the times of training/pipeline/scenarios.py. `share_of_bound` is the ratio over that of the
event model, which has no overhead; `error_percent` says how far the model's seconds are from those of each run.

--only runs some parts; those of an existing --out that do not run are kept, each with its own command and machine.
Exit code 1 if a figure misses its target. Other work on the machine spoils them: its load is in the result.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline_figure import draw
from rich.console import Console
from stand_in_runs import measure_asynchronous, measure_hybrid
from tabletop_schedules import measure_tabletop

from vla.results import commit, machine, write_json


def measure_maniskill_mlp(console: Console, repeats: int) -> dict[str, Any]:
    from maniskill_mlp import measure  # needs the extra `maniskill`

    found: dict[str, Any] = measure()
    console.print(f"maniskill_mlp: {found['seconds_per_iteration']:.3f} s an iteration", highlight=False)
    return found


PARTS: dict[str, Callable[[Console, int], dict[str, Any]]] = {
    "hybrid": measure_hybrid,
    "asynchronous": measure_asynchronous,
    "tabletop": measure_tabletop,
    "maniskill_mlp": measure_maniskill_mlp,
}
NEEDS = {"maniskill_mlp": "mani_skill"}  # packages that are no dependencies
FOLDER = Path(__file__).resolve().parent
REPEATS = 3
TARGETS = {
    "hybrid": {"over_disaggregated": 1.88, "share_of_bound": 0.94},
    "asynchronous": {"over_synchronous": 2.27, "share_of_bound": 0.90},
}
TOLERANCE_PERCENT = 10.0  # of the event model's seconds


def checked(result: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """What each figure came to, and whether that is enough."""
    for part, targets in TARGETS.items():
        for name, target in targets.items() if part in result else ():
            found = result[part][name]
            yield f"{part}: {name} {found:.3f}, target {target:g}", found >= target
    rows = result.get("hybrid", {}).get("sides", {}) | result.get("asynchronous", {}).get("ablation", {})
    for name, row in rows.items():
        error = row["error_percent"]
        yield f"{name}: event model {error:+.1f}%", abs(error) <= TOLERANCE_PERCENT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--figure", type=Path, help="PNG file of the result")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run, by default all")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="updates of each side that count")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats: 2 or more, so that there is a spread")
    # Ray's workers import the stand-ins from here.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER), os.getenv("PYTHONPATH")]))
    console = Console()
    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    missing = {part: package for part, package in NEEDS.items() if find_spec(package) is None}
    parts = arguments.only or [part for part in PARTS if part not in missing]
    if arguments.only is None:
        for part, package in missing.items():
            console.print(f"{part} is left out: {package} is not installed", style="yellow")
    for part in parts:
        about = {
            "commit": commit() or "unknown", "machine": machine("torch", "ray"),
            "command": shlex.join(["python", *sys.argv]),
        }  # fmt: skip
        if about["machine"]["load_average_1_min"] > 0.5 and part == parts[0]:
            console.print("other work is running: the figures will be too low", style="yellow")
        result[part] = PARTS[part](console, arguments.repeats)
        about["machine"]["load_average_1_min_after"] = os.getloadavg()[0]
        result[part] |= about
        write_json(arguments.out, result)
    if arguments.figure:
        draw(result, arguments.figure)
    missed = 0
    for text, met in checked(result):
        missed += not met
        console.print(f"{text}: {'met' if met else 'MISSED'}", highlight=False)
    console.print(f"written to {arguments.out}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
