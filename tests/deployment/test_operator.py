"""A session of trials: what the operator may do when, what is scored, and that it goes on where it was broken off.

The robot is a stand-in that does what it is told: what is tested here is the session, the log and the page.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from deployment.operator import Detect, OperatorError, Run, Session, verdict
from deployment.operator_terminal import operate
from vla.detector import Detection, by_colour, load
from vla.episodes import Label
from vla.errors import SimrealError
from vla.scene_picture import Viewpoint
from vla.tasks.put_on_plate import Episode
from vla.trial_log import FILE, TrialLog
from vla.trial_protocol import Protocol, Slot, View, schedule

PROTOCOL = Protocol({"in_distribution": ["in_distribution"], "objects": ["unseen_object"]}, scenes=1, limit_s=1.0)
SLOTS = schedule(PROTOCOL, 2)
HEADER = {"version": 1}
ME = "me"
Until = Callable[..., bool]


class Arm:
    """Does what it is told; `runs` are what its trials come to, the last one again and again."""

    def __init__(self, *runs: Run):
        self.runs = list(runs) or [Run(0.5, success=True)]
        self.acted: list[str] = []
        self.labels: list[Label] = []
        self.letter = ""
        self.hangs = False

    def use(self, letter: str) -> None:
        self.letter = letter

    def home(self) -> None:
        pass

    def lay_out(self, slot: Slot, instruction: str) -> None:
        assert instruction

    def image(self) -> np.ndarray:
        return np.full((64, 64, 3), 90, np.uint8)

    def run(self, limit_s: float, stopped: Callable[[], bool]) -> Run:
        self.acted.append(self.letter)
        while self.hangs and not stopped():
            threading.Event().wait(0.01)
        return self.runs.pop(0) if len(self.runs) > 1 else self.runs[0]

    def label(self, label: Label) -> None:
        self.labels.append(label)

    def recording(self) -> str:
        return f"episode_{len(self.acted):06d}.mcap"


@contextmanager
def session(folder: Path, arm: Arm, automatic: bool = False, detect: Detect | None = None) -> Iterator[Session]:
    """A session that is driven, until the block is left."""
    with TrialLog(folder, HEADER) as log:
        made = Session(log, SLOTS, arm, 1.0, automatic, detect)
        driver = threading.Thread(target=made.drive, daemon=True)
        driver.start()
        try:
            yield made
        finally:
            made.close()
            driver.join(5)
            assert not driver.is_alive()


def do(made: Session, action: str, until: Until, label: Label | None = None) -> None:
    """Act as soon as it is possible."""
    stages = {"begin": "waiting", "ready": "laying", "label": "judging", "undo": "laying", "stop": "running"}
    assert until(lambda: made.stage == stages[action]), (made.stage, action)
    made.act(action, ME, made.revision, label)


SUCCESS = verdict("anna", "success", "", False, "")
GRASP = verdict("anna", "failure", "grasp", False, "slipped")


def test_trial_after_trial_until_all_are_scored(tmp_path: Path, until: Until) -> None:
    arm = Arm()
    with session(tmp_path, arm) as made:
        made.claim("anna", ME)
        do(made, "begin", until)
        for label in (SUCCESS, GRASP, SUCCESS, SUCCESS):
            do(made, "ready", until)
            do(made, "label", until, label)
        assert until(lambda: made.stage == "done") and made.done == 4
    assert arm.acted == [slot.letter for slot in SLOTS] and [x.where for x in arm.labels] == ["", "grasp", "", ""]
    played = TrialLog(tmp_path, HEADER)
    assert [p.success for p in played.played] == [True, False, True, True] and played.played[1].label is not None
    assert played.played[1].label["by"] == "anna" and played.played[0].recording == "episode_000001.mcap"
    played.close()


def test_what_a_camera_says_is_a_suggestion_and_the_operator_overrules_it(tmp_path: Path, until: Until) -> None:
    arm, widths = Arm(Run(0.5, width_m=0.08)), []

    def detect(before: np.ndarray, after: np.ndarray, scene: Episode, width_m: float | None) -> Detection:
        assert before.shape == after.shape == (64, 64, 3) and scene.objects
        widths.append(width_m)
        return Detection(True, 0.012, "12 mm from the goal's centre")

    with session(tmp_path, arm, detect=detect) as made:
        made.claim("anna", ME)
        do(made, "begin", until)
        for label in (SUCCESS, GRASP):
            do(made, "ready", until)
            assert until(lambda: made.stage == "judging")
            assert made.state()["seen"] == "the camera: success (12 mm from the goal's centre)"
            do(made, "label", until, label)
        assert until(lambda: made.stage == "laying") and not made.state()["seen"]
    assert widths == [0.08, 0.08]
    with TrialLog(tmp_path, HEADER) as log:
        assert [p.success for p in log.played] == [True, False]  # the second one is overruled
        assert [p.found["camera"]["success"] for p in log.played] == [True, True]


def test_a_detector_is_named_by_module_and_function() -> None:
    assert load("vla.detector:by_colour") is by_colour
    for name in ("vla.detector:nothing", "no.such.module:f", "by_colour"):
        with pytest.raises(SimrealError, match="DETECTOR"):
            load(name)


def test_a_verdict_is_taken_back(tmp_path: Path, until: Until) -> None:
    arm = Arm()
    with session(tmp_path, arm) as made:
        made.claim("anna", ME)
        do(made, "begin", until)
        do(made, "ready", until)
        do(made, "label", until, SUCCESS)
        do(made, "undo", until)
        assert until(lambda: made.stage == "judging") and made.done == 0
        do(made, "label", until, GRASP)
        assert until(lambda: made.stage == "laying") and made.done == 1
        assert not made.log.played[0].success and len(arm.acted) == 1
    kinds = [json.loads(line)["event"] for line in (tmp_path / FILE).read_text().splitlines()[1:]]
    assert kinds == ["begin", "end", "label", "undo", "label"]  # nothing is removed


def test_a_fault_is_repeated_and_never_scored(tmp_path: Path) -> None:
    arm = Arm(Run(0.2, "REFLEX"), Run(0.2, "REFLEX"), Run(0.5, success=False, where="carry"))
    with TrialLog(tmp_path, HEADER) as log:
        made = Session(log, SLOTS, arm, 1.0, automatic=True)
        made.drive()
        assert made.stage == "done" and made.done == 4
        found = [(p.slot, p.fault, p.attempt) for p in log.played[:3]]
        assert found == [(0, "REFLEX", 1), (0, "REFLEX", 2), (0, "", 3)]
        assert len(arm.labels) == 4 and arm.labels[0].where == "carry"
    stubborn = Arm(Run(0.1, "REFLEX"))
    with TrialLog(tmp_path / "other", HEADER) as log, pytest.raises(SimrealError, match="3 faults in trial 1"):
        Session(log, SLOTS, stubborn, 1.0, automatic=True).drive()
    assert len(stubborn.acted) == 3


def test_help_is_no_success(tmp_path: Path, until: Until) -> None:
    with session(tmp_path, Arm()) as made:
        made.claim("anna", ME)
        do(made, "begin", until)
        do(made, "ready", until)
        do(made, "label", until, verdict("anna", "success", "", True, ""))
        assert until(lambda: made.stage == "laying")
        assert made.log.played[0].scored and not made.log.played[0].success


def test_what_was_broken_off_goes_on(tmp_path: Path, until: Until) -> None:
    arm = Arm()
    arm.hangs = True
    with session(tmp_path, arm) as made:  # left while the trial runs
        made.claim("anna", ME)
        do(made, "begin", until)
        do(made, "ready", until)
        assert until(lambda: made.stage == "running")
    arm.hangs = False
    with session(tmp_path, arm) as made:  # left while it is judged
        made.claim("anna", ME)
        assert made.done == 0
        do(made, "begin", until)
        do(made, "ready", until)
        assert until(lambda: made.stage == "judging")
    acted = len(arm.acted)
    with session(tmp_path, arm) as made:
        made.claim("bert", ME)
        do(made, "label", until, SUCCESS)  # what has ended is judged, not repeated
        assert until(lambda: made.stage == "laying") and made.done == 1 and len(arm.acted) == acted


def test_the_log_survives_a_kill_at_any_byte(tmp_path: Path) -> None:
    with TrialLog(tmp_path, HEADER) as log:
        Session(log, SLOTS, Arm(), 1.0, automatic=True).drive()
    data = (tmp_path / FILE).read_bytes()
    for cut in range(0, len(data), 7):
        folder = tmp_path / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / FILE).write_bytes(data[:cut])
        with TrialLog(folder, HEADER) as log:
            complete = data[:cut].count(b"\n") - 1
            assert len(log.events) == max(complete, 0)
            Session(log, SLOTS, Arm(), 1.0, automatic=True).drive()
            assert len({p.slot for p in log.played if p.scored}) == 4
            assert sum(p.scored for p in log.played) == 4  # none twice


def test_other_trials_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    TrialLog(tmp_path, HEADER | {"limit_s": 1.0}).close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(SimrealError, match="limit_s differ"):
        TrialLog(tmp_path, HEADER | {"limit_s": 2.0})
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / FILE).write_text("no json\n")
    with pytest.raises(SimrealError, match="no log of trials"):
        TrialLog(tmp_path, HEADER)


def test_two_operators_at_once_are_refused(tmp_path: Path, until: Until) -> None:
    code = "import sys, pathlib, vla.trial_log as t; t.TrialLog(pathlib.Path(sys.argv[1]), {})"
    with session(tmp_path, Arm()) as made:
        second = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env={**os.environ}
        )
        assert second.returncode and "OPERATOR_BUSY" in second.stderr and f"process {os.getpid()}" in second.stderr
        made.claim("anna", ME)
        with pytest.raises(OperatorError, match="anna operates"):
            made.claim("bert", "another page")
        assert until(lambda: made.stage == "waiting")
        with pytest.raises(OperatorError, match="somebody else"):
            made.act("begin", "another page", made.revision)
        with pytest.raises(OperatorError, match="not possible now"):
            made.act("ready", ME, made.revision)
        with pytest.raises(OperatorError, match="not possible now"):
            made.act("begin", ME, made.revision - 1)  # of a page that is out of date
        made.act("begin", ME, made.revision)


@pytest.mark.parametrize(("outcome", "where"), [("failure", ""), ("failure", "nowhere"), ("fault", ""), ("", "grasp")])
def test_a_verdict_that_says_too_little_is_refused(outcome: str, where: str) -> None:
    with pytest.raises(OperatorError):
        verdict("anna", outcome, where, False, "")


def test_the_terminal_does_the_same(tmp_path: Path) -> None:
    answers = {"begin": [""], "Enter when": ["p", "", "u", "", "", ""], "what": ["x", "s", "g!", "r", "c", "p"]}
    asked: list[str] = []

    def ask(text: str) -> str:
        key = next(k for k in answers if k in text)
        asked.append(key)
        return answers[key].pop(0)

    arm = Arm()
    with session(tmp_path, arm) as made:
        view = View()
        viewpoint = Viewpoint(view.position, view.rotation_xyzw, view.fov_y_deg)
        operate(made, viewpoint, "anna", tmp_path, ask, lambda seconds: False)
        assert made.done == 4
        assert [(p.success, p.label and p.label["where"]) for p in made.log.played] == [
            (False, "grasp"), (False, "reach"), (False, "carry"), (False, "place"),
        ]  # fmt: skip
        assert made.log.played[0].label is not None and made.log.played[0].label["intervention"]
    assert (tmp_path / "scene.png").stat().st_size > 1000 and asked[0] == "begin"
