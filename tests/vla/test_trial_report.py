"""The report of trials, of a log whose figures are known."""

import json
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from vla import options
from vla.errors import SimrealError
from vla.policy import Policy
from vla.trial_log import TrialLog
from vla.trial_protocol import Protocol, baseline, draw_key, schedule
from vla.trial_report import write
from vla.trial_results import Trials, match_evaluations, sentence

PROTOCOL = Protocol({"in_distribution": ["in_distribution"], "objects": ["unseen_object"]}, scenes=10)
HEADER = {
    "version": 1, "protocol": {k: v for k, v in options.write(PROTOCOL).items() if k != "checkpoints"},
    "checkpoints": 2, "use_sim": True, "twin": "nominal", "arm_id": "fr3",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, bundle: Path) -> Path:
    """The first checkpoint fails in carrying with every unseen object, the other one always succeeds."""
    other, out = tmp_path / "other", tmp_path / "trials"
    shutil.copytree(bundle, other)
    with (other / "model.safetensors").open("ab") as file:
        file.write(b" ")
    with TrialLog(out, HEADER) as log:
        draw_key(out, [bundle, other])
        first = baseline(out)
        for slot in schedule(PROTOCOL, 2):
            if slot.number == 3:
                log.add("begin", slot=3, letter=slot.letter, by="twin")
                log.add("end", slot=3, letter=slot.letter, seconds=1.0, fault="<REFLEX>", recording="", found={})
            success = slot.letter != first or slot.axis != "objects"
            log.add("begin", slot=slot.number, letter=slot.letter, by="twin")
            log.add("end", slot=slot.number, letter=slot.letter, seconds=4.0 if success else 10.0, fault="",
                    recording="", found={})  # fmt: skip
            label = {"outcome": "success" if success else "failure", "where": "" if success else "carry",
                     "intervention": slot.number in (0, 1), "note": "", "by": "twin"}  # fmt: skip
            log.add("label", slot=slot.number, label=label)
    return out


def test_rates_differences_and_failures(folder: Path) -> None:
    page, found = write(folder)
    first, other = baseline(folder), "AB".replace(baseline(folder), "")
    ours, theirs = found["checkpoints"][first], found["checkpoints"][other]
    helped = 1  # of each: trials 0 and 1 are a pair
    axis = schedule(PROTOCOL, 2)[0].axis
    assert ours["axes"]["objects"]["successes"] == 0 and ours["failures"]["carry"] == 10
    assert ours["successes"] == 10 - (helped if axis == "in_distribution" else 0)
    assert theirs["successes"] == 20 - helped and theirs["failures"] == {"helped": 1}
    assert theirs["wilson95"] == pytest.approx([0.7639, 0.9911], abs=1e-3)  # 19 of 20
    part = found["comparisons"][other]
    assert part["pairs"] == 20 and part["only_first"] == 0 and part["only_second"] == 10 - (axis == "objects")
    assert part["p"] < 0.01 and "a difference" in sentence(part)
    assert "no difference" in sentence(part["axes"]["in_distribution"])
    assert found["faulted"] == [{"slot": 3, "fault": "<REFLEX>"}] and found["scored"] == 40
    text = page.read_text()
    assert "&lt;REFLEX&gt;" in text and "<REFLEX>" not in text
    assert json.loads((folder / "report.json").read_text())["calibration"] == "not known"


def test_the_age_of_the_calibration_is_that_at_the_trials(folder: Path) -> None:
    file = folder / "trials.jsonl"
    header, *events = [json.loads(line) for line in file.read_text().splitlines()]
    made = datetime(2026, 11, 1, tzinfo=timezone.utc)
    for day, event in enumerate(events):
        event["at"] = made.timestamp() + 86400 * (2 + (day > 5))
    told = {"third_person": {"made": made.isoformat(), "error_px": 0.214, "error_mm": 0.83}}
    session = {"event": "session", "at": events[0]["at"], "calibration": told}
    file.write_text("".join(json.dumps(line) + "\n" for line in (header, session, *events)))
    page, found = write(folder)
    assert found["calibration"] == "third_person 2.0 to 3.0 days old (0.21 px, 0.83 mm)"
    assert "Calibration: third_person 2.0 to 3.0 days old" in page.read_text()
    bare = {"event": "session", "at": events[9]["at"], "calibration": {}}
    file.write_text("".join(json.dumps(line) + "\n" for line in (header, session, *events[:9], bare, *events[9:])))
    assert "none in " in write(folder)[1]["calibration"]
    assert write(folder, calibration="by hand")[1]["calibration"] == "by hand"


def test_how_often_the_camera_agrees_with_the_verdict(folder: Path) -> None:
    assert write(folder)[1]["detector"] is None
    file = folder / "trials.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    said = iter([None, *[True] * 100])
    for line in lines:
        if line.get("event") == "end" and not line["fault"]:
            line["found"] = {"camera": {"success": next(said), "distance_m": 0.0, "said": ""}}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, found = write(folder)
    judged = [line["label"]["outcome"] == "success" for line in lines if line.get("event") == "label"]
    assert found["detector"] == {"trials": 40, "unsure": 1, "agreed": sum(judged[1:])}
    assert "agrees with the verdict in" in page.read_text()


def test_the_gap_to_the_simulator(folder: Path, tmp_path: Path) -> None:
    names = Trials(folder).names
    files = []
    for letter, rates in (("A", (0.9, 0.2)), ("B", (1.0, 0.8))):
        data = {"checkpoint": names[letter], "variants": {
            v: {"rate": r, "episodes": 50} for v, r in zip(("in_distribution", "unseen_object"), rates, strict=True)
        }}  # fmt: skip
        files.append(tmp_path / f"{letter}.json")
        files[-1].write_text(json.dumps(data))
    page, found = write(folder, files, "3 days old")
    points = {(p["letter"], p["variant"]): p["real"] for p in found["gap"]["points"]}
    assert len(points) == 4 and points[baseline(folder), "unseen_object"] == 0.0
    assert found["gap"]["pearson"] is not None and found["gap"]["mmrv"] is not None
    assert "From the simulator to here" in page.read_text() and "3 days old" in page.read_text()
    files[0].write_text(json.dumps({"checkpoint": "elsewhere", "variants": {}}))
    with pytest.raises(SimrealError, match="no evaluation of a checkpoint"):
        match_evaluations(Trials(folder), files)


def test_recorded_trials_have_clips(folder: Path, acting: Policy, record: Callable[..., Path], tmp_path: Path) -> None:
    log = folder / "trials.jsonl"
    name = record(folder / "episodes", acting, 1.0).name
    log.write_text(log.read_text().replace('"recording": ""', f'"recording": "{name}"'))
    page, _ = write(folder)
    assert page.read_text().count("data:image/webp;base64,") == 4 - (len(_failures(folder)) < 2)


def _failures(folder: Path) -> list[str]:
    trials: Any = Trials(folder)
    return [letter for letter in trials.names if any(not p.success for p in trials.of(letter))]


def test_a_folder_without_trials_is_told(tmp_path: Path) -> None:
    with pytest.raises(SimrealError, match="no trials"):
        write(tmp_path)
