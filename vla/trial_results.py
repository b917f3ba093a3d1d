"""What trials say: rates by checkpoint and axis, paired differences, where failures happen, the gap to simulators."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from vla import options
from vla.comparison import mmrv, paired, pearson, rates, spearman
from vla.errors import SimrealError
from vla.rig import Measured
from vla.trial_log import FILE, Played, parse, replayed
from vla.trial_protocol import Protocol, Slot, baseline, read_key, schedule

PHASES = ("reach", "grasp", "carry", "place")


class Trials:
    """A folder of trials, finished or not. played: every trial, also the faulted ones; scored: one for each slot."""

    def __init__(self, folder: Path):
        file = folder / FILE
        if not file.is_file():
            raise SimrealError(
                f"there are no trials in {folder}", code="TRIALS_MISSING", remedy="Name a folder of `vla trials`."
            )
        header, events = parse(file.read_text(encoding="utf-8"), file)
        self.folder, self.header, self.events = folder, header, events
        self.protocol = options.read(Protocol, header["protocol"])
        self.slots = schedule(self.protocol, header["checkpoints"])
        self.names = dict(sorted(read_key(folder).checkpoints.items()))
        self.first = baseline(folder)
        self.played: list[Played] = replayed(events)
        self.scored = {p.slot: p for p in self.played if p.scored}
        made = folder / "machine.json"
        self.account: dict[str, Any] = json.loads(made.read_text()) if made.exists() else {}

    def of(self, letter: str, variants: Sequence[str] | None = None) -> list[Played]:
        """The scored trials of a checkpoint, of these variants."""
        return [self.scored[s.number] for s in self._slots(letter, variants) if s.number in self.scored]

    def pairs(self, other: str, variants: Sequence[str] | None = None) -> tuple[list[bool], list[bool]]:
        """Successes on the scenes that both the first checkpoint and `other` have played."""
        found: dict[int, dict[str, bool]] = {}
        for letter in (self.first, other):
            for slot in self._slots(letter, variants):
                if slot.number in self.scored:
                    found.setdefault(slot.scene, {})[letter] = self.scored[slot.number].success
        both = [pair for pair in found.values() if len(pair) == 2]
        return [pair[self.first] for pair in both], [pair[other] for pair in both]

    def _slots(self, letter: str, variants: Sequence[str] | None) -> list[Slot]:
        return [s for s in self.slots if s.letter == letter and (variants is None or s.variant in variants)]


def results(trials: Trials, sim: Mapping[str, Any] | None = None, calibration: str = "") -> dict[str, Any]:
    """The report as JSON data. sim: letter -> the JSON of `vla eval` of its checkpoint, for the gap."""
    axes = trials.protocol.axes
    found: dict[str, Any] = {
        "checkpoints": {letter: _policy(trials, letter) for letter in trials.names},
        "first": trials.first,
        "comparisons": {
            letter: paired(*trials.pairs(letter)) | {
                "axes": {axis: paired(*trials.pairs(letter, members)) for axis, members in axes.items()}
            }
            for letter in trials.names if letter != trials.first
        },
        "trials": len(trials.slots), "scored": len(trials.scored),
        "faulted": [{"slot": p.slot, "fault": p.fault} for p in trials.played if p.fault],
        "interrupted": sum(not p.ended for p in trials.played),
        "interventions": sum(bool(p.label and p.label["intervention"]) for p in trials.scored.values()),
        "protocol": trials.header["protocol"], "use_sim": trials.header["use_sim"], "twin": trials.header["twin"],
        "detector": _detected(trials), "calibration": calibration or calibrated(trials.events), **trials.account,
    }  # fmt: skip
    if sim:
        found["gap"] = gap(trials, sim)
    return found


def _detected(trials: Trials) -> dict[str, int] | None:
    """How often a camera's detector said what was judged, without help; None if there was none."""
    seen = [(p.found["camera"]["success"], (p.label or {}).get("outcome") == "success")
            for p in trials.scored.values() if p.found.get("camera")]  # fmt: skip
    if not seen:
        return None
    sure = [(said, judged) for said, judged in seen if said is not None]
    return {"trials": len(seen), "unsure": len(seen) - len(sure), "agreed": sum(a == b for a, b in sure)}


def calibrated(events: Sequence[Mapping[str, Any]]) -> str:
    """How old each camera's calibration was when a trial began, in words."""
    ages: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    present: Mapping[str, Any] | None = None
    without = told = 0
    for event in events:
        if event["event"] == "session":
            present = event["calibration"]
        elif event["event"] == "begin" and present is not None:
            told += 1
            without += not present
            for camera, found in present.items():
                made = Measured(found["made"], "", 0, 0.0)
                ages.setdefault(camera, []).append(made.age_days(datetime.fromtimestamp(event["at"], timezone.utc)))
                exact = [f"{found['error_px']:.2g} px"]
                exact += [f"{found['error_mm']:.2g} mm"] if found["error_mm"] is not None else []
                errors[camera] = ", ".join(exact)
    if not told:
        return "not known"
    parts = [
        f"{camera} {min(days):.1f}" + f" to {max(days):.1f}" * (max(days) - min(days) > 0.05)
        + f" days old ({errors[camera]})" for camera, days in ages.items()
    ]  # fmt: skip
    if without:
        parts.append("none" if without == told else f"none in {without} of {told} trials")
    return "; ".join(parts)


def _policy(trials: Trials, letter: str) -> dict[str, Any]:
    played = trials.of(letter)
    failures = [p for p in played if not p.success]
    where = Counter((p.label or {}).get("where") or ("helped" if (p.label or {})["intervention"] else "not said")
                    for p in failures)  # fmt: skip
    times = [p.seconds for p in played if p.success]
    return {
        "checkpoint": trials.names[letter], **rates([p.success for p in played]),
        "axes": {a: rates([p.success for p in trials.of(letter, v)]) for a, v in trials.protocol.axes.items()},
        "variants": {
            v: rates([p.success for p in trials.of(letter, [v])]) for m in trials.protocol.axes.values() for v in m
        },
        "failures": {name: where[name] for name in (*PHASES, "helped", "not said") if name in where},
        "seconds_of_success": {"median": float(np.median(times)), "longest": max(times)} if times else None,
    }  # fmt: skip


def gap(trials: Trials, sim: Mapping[str, Any]) -> dict[str, Any]:
    """The simulator's rates beside the trials', over all variants and checkpoints that both have."""
    points = []
    for letter, evaluation in sim.items():
        for variant, entry in evaluation["variants"].items():
            made = trials.of(letter, [variant])
            if made:
                real = rates([p.success for p in made])
                points.append({"letter": letter, "variant": variant, "simulated": entry["rate"], "real": real["rate"],
                               "episodes": entry["episodes"], "trials": real["episodes"]})  # fmt: skip
    return {"points": points, **correlations([p["simulated"] for p in points], [p["real"] for p in points])}


def correlations(simulated: Sequence[float], real: Sequence[float]) -> dict[str, Any]:
    """How well one tells the other; difference: real minus simulated, mean over the points."""
    difference = float(np.mean(np.subtract(real, simulated))) if len(real) else None
    return {
        "difference": difference, "pearson": pearson(simulated, real), "spearman": spearman(simulated, real),
        "mmrv": mmrv(simulated, real),
    }  # fmt: skip


def match_evaluations(trials: Trials, files: Sequence[Path]) -> dict[str, Any]:
    """letter -> evaluation, by the checkpoint that each file names."""
    found: dict[str, Any] = {}
    for file in files:
        data = json.loads(file.read_text())
        name = str(Path(data.get("checkpoint", "")).expanduser().absolute())
        letter = next((k for k, v in trials.names.items() if v == name), None)
        if letter is None or "variants" not in data:
            raise SimrealError(
                f"{file} is no evaluation of a checkpoint of these trials", code="EVALUATION",
                remedy=f"Name JSON files of `vla eval` of {', '.join(trials.names.values())}.",
            )  # fmt: skip
        found[letter] = data
    return found


def sentence(found: Mapping[str, Any]) -> str:
    """What a comparison says, and how many more trials it would need, in words."""
    if not found["pairs"]:
        return "no scene was played by both"
    gain, (low, high) = 100 * found["gain"], (100 * v for v in found["bootstrap95"])
    text = f"{gain:+.1f} points ({low:+.1f} to {high:+.1f}) on {found['pairs']} scenes, " \
           f"{found['only_second']} solved by it alone and {found['only_first']} by the other alone, " \
           f"p = {found['p']:.2g} (McNemar, exact)"  # fmt: skip
    if found["p"] <= 0.05:
        return f"{text}: a difference"
    if found["pairs_needed"] is None:
        return f"{text}: no difference is shown, and none can be expected of more trials at these rates"
    if not found["more_pairs"]:
        return f"{text}: no difference is shown, though one of this size is found by so many in 4 of 5 cases"
    return f"{text}: no difference is shown; one of this size needs about {found['more_pairs']} more scenes (power 80%)"
