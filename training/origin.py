"""What a run began with, in RUN/origin.json: enough for `vla train from=RUN` to repeat it, or to say why it can't."""

import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vla.checkpoint import fingerprint
from vla.errors import SimrealError
from vla.results import commit, machine, write_json

FILE = "origin.json"
MACHINE = ("processor", "cores", "rendering", "python")  # what may change the last bit of a number


def record(
    run: Path, checkpoint: Path, iteration: int, placement: Mapping[str, Any], cluster: str, repeats: str | None
) -> None:
    """Note a start of the run. checkpoint: that it began with. iteration: that this start goes on with."""
    found = read(run) if (run / FILE).exists() else {
        "repeats": repeats, "checkpoint": {"path": str(checkpoint.absolute()), "sha256": fingerprint(checkpoint)},
        "starts": [],
    }  # fmt: skip
    present = machine()
    found["starts"].append({
        "iteration": iteration, "placement": placement, "cluster": cluster, "commit": commit(),
        "machine": {name: present[name] for name in MACHINE}, "packages": packages(),
    })  # fmt: skip
    write_json(run / FILE, found)


def packages() -> dict[str, str]:
    """The version of every package that the project depends on and that is installed."""
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in metadata.requires("simreal") or ()}
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in sorted({"simreal", *names})}
    return {name: package.version for name, package in found.items() if package is not None}


def read(run: Path) -> dict[str, Any]:
    """What `record` wrote."""
    if not (run / "config.json").exists():
        raise SimrealError(
            f"{run} holds no run", code="RUN_MISSING", remedy="Give the folder that `vla train out=` has made."
        )
    if not (run / FILE).exists():
        raise SimrealError(
            f"{run} has no {FILE}: an earlier version began it and did not keep what it began with", code="ORIGIN",
            remedy=f"Give the options of {run / 'config.json'} one by one, without from=.",
        )  # fmt: skip
    found: dict[str, Any] = json.loads((run / FILE).read_text())
    return found


def begun(origin: Mapping[str, Any]) -> dict[str, Any]:
    """The start that made the first iteration: those before it were killed in it."""
    starts: list[dict[str, Any]] = origin["starts"]
    return next((start for start in reversed(starts) if start["iteration"] == 0), starts[0])


def interruptions(origin: Mapping[str, Any]) -> list[str]:
    """Iterations before which the run was broken off and went on."""
    return [str(start["iteration"]) for start in origin["starts"] if start["iteration"]]


def options_of(run: Path) -> dict[str, Any]:
    """The options of a run as it began, in place of those of the YAML files."""
    origin = read(run)
    first, where = begun(origin), Path(origin["checkpoint"]["path"])
    data = json.loads((run / "config.json").read_text()) | {k: first[k] for k in ("placement", "cluster")}
    if data["checkpoint"] is not None and Path(data["checkpoint"]).absolute() != where:
        data["checkpoint"] = str(where)  # it was named relative to another folder
    return data


def check(run: Path, out: Path, checkpoint: Path | None) -> None:
    """Refuse to repeat a run whose beginning is gone or has changed. checkpoint: that the repetition begins with."""
    origin = read(run)
    where, wanted = Path(origin["checkpoint"]["path"]), origin["checkpoint"]["sha256"]
    if run.resolve() == out.resolve():
        raise SimrealError(
            f"from= and out= are both {run}", code="OUTPUT_EXISTS",
            remedy="Give the repetition a folder of its own; to go on with a run, give its options without from=.",
        )  # fmt: skip
    if checkpoint is None or checkpoint.absolute() != where:  # random weights are made anew; another one is wanted
        return
    again = "or name another beginning with checkpoint=BUNDLE: then the run is not repeated but made from that one."
    if not where.exists():
        raise SimrealError(
            f"{run} began with {where}, which is gone (its sha256 is {wanted[:16]})", code="START_MISSING",
            remedy=f"Put that bundle back, {again}",
        )  # fmt: skip
    if (found := fingerprint(where)) != wanted:
        raise SimrealError(
            f"{run} began with {where}, which has changed since: its sha256 was {wanted[:16]} and is {found[:16]}",
            code="START_CHANGED", remedy=f"Put the bundle of then back, {again}",
        )  # fmt: skip


def differences(run: Path) -> list[str]:
    """What is other now than when the run began, and may let a repetition come out otherwise."""
    origin = read(run)
    first, parts = begun(origin), interruptions(origin)
    present, now = machine(), packages()
    told = [
        f"{name} is {now.get(name, 'not installed')}, was {first['packages'].get(name, 'not installed')}"
        for name in sorted({*now, *first["packages"]}) if now.get(name) != first["packages"].get(name)
    ]  # fmt: skip
    told += [f"{k} is {present[k]}, was {first['machine'][k]}" for k in MACHINE if present[k] != first["machine"][k]]
    if (own := commit()) != first["commit"]:
        told.append(f"the code is at commit {own or 'unknown'}, was at {first['commit'] or 'unknown'}")
    elif own.endswith("-dirty"):
        told.append(f"the code is changed from commit {own.removesuffix('-dirty')}, now and then, perhaps not alike")
    if parts:
        told.append(f"it was interrupted before iteration {', '.join(parts)}: an unbroken run need not have its curve")
    return told
