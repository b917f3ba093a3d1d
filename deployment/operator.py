"""A session of trials: what is to be done next, and by whom. The page, the terminal and the twin all act on it.

Stages: waiting (nobody has begun) -> preparing (the arm goes home, the policy is changed) -> laying (the operator lays
the scene) -> running -> judging -> preparing ... -> done. A trial with a fault is repeated, never scored. Whatever is
asked for in another stage, or by somebody who has not seen the newest one, is refused.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Condition
from typing import Any, Literal, Protocol

import numpy as np

from vla.detector import Detection
from vla.episodes import Label, Outcome, Phase
from vla.errors import SimrealError
from vla.tasks.put_on_plate import Episode, sample_episode
from vla.trial_log import Played, TrialLog
from vla.trial_protocol import Slot

Stage = Literal["waiting", "preparing", "laying", "running", "judging", "done", "failed"]
AGAIN = 3  # faults of a slot, one after the other, after which the session ends: something is broken
FRESH_S = 0.3  # after the arm has come home, until an image shows it
PRESENT_S = 15.0  # for which an operator who is not heard of keeps the session


class OperatorError(SimrealError):
    """Something that can't be done now."""


@dataclass(frozen=True)
class Run:
    """What came out of one trial. fault: why it is not to be scored. success, where: of the twin, which knows.

    width_m: of the gripper at the end, if it is known.
    """

    seconds: float
    fault: str = ""
    success: bool | None = None
    where: Phase = ""
    distance_m: float | None = None
    width_m: float | None = None


Detect = Callable[[np.ndarray, np.ndarray, Episode, float | None], Detection]  # before, after, scene, width in m


class Robot(Protocol):
    """What a session needs of a robot, or of its twin."""

    def use(self, letter: str) -> None:
        """From now on this policy acts."""

    def home(self) -> None:
        """Away from the table, at rest."""

    def lay_out(self, slot: Slot, instruction: str) -> None:
        """Tell the policy its sentence; the twin lays the scene, too."""

    def image(self) -> np.ndarray | None:
        """What the operator's camera sees, uint8 `[H, W, 3]`."""

    def run(self, limit_s: float, stopped: Callable[[], bool]) -> Run:
        """Let the policy act until the limit, a success, a fault, or until `stopped`."""

    def label(self, label: Label) -> None:
        """Tell the recorder."""

    def recording(self) -> str:
        """Name of the last episode's file; "" if none is recorded."""


class Session:
    """See the module's docstring. Any thread may ask and act; `drive` belongs to one.

    detect: says what a camera has seen of a trial, for the operator and for the log; the operator's verdict counts.
    """

    def __init__(self, log: TrialLog, slots: list[Slot], robot: Robot, limit_s: float, automatic: bool,
                 detect: Detect | None = None):  # fmt: skip
        self._detect = detect
        self.log, self.slots, self.limit_s, self.automatic = log, slots, limit_s, automatic
        self._robot = robot
        self.stage: Stage = "waiting"
        self.revision = 0  # counts changes of the stage
        self.message = ""
        self._changed = Condition()
        self._asked: tuple[str, Label | None] | None = None
        self._stop = self._helped = self._over = False
        self._operator, self._token, self._heard = "", "", 0.0
        self._began = 0.0

    # What anybody may ask

    @property
    def done(self) -> int:
        """Slots that are scored."""
        return len({p.slot for p in self.log.played if p.scored})

    def next(self) -> Slot | None:
        """The first slot without a verdict."""
        scored = {p.slot for p in self.log.played if p.scored}
        return next((slot for slot in self.slots if slot.number not in scored), None)

    def open(self) -> Played | None:
        """A trial that has ended and waits for its verdict."""
        played = self.log.played
        last = played[-1] if played else None
        return last if last is not None and last.ended and not last.fault and last.label is None else None

    def scene(self) -> Episode | None:
        slot = self.next()
        return None if slot is None else sample_episode(slot.seed, slot.variant)

    def state(self) -> dict[str, Any]:
        """What the page shows: letters, never names."""
        slot, scene = self.next(), self.scene()
        faults = sum(bool(p.fault) for p in self.log.played)
        return {
            "stage": self.stage, "revision": self.revision, "message": self.message, "operator": self._operator,
            "done": self.done, "all": len(self.slots), "faults": faults, "limit_s": self.limit_s,
            "letter": slot.letter if slot else "", "slot": slot.number if slot else None,
            "instruction": scene.instruction if scene else "", "seconds": time.time() - self._began,
            "helped": self._helped, "undo": self._undoable() is not None, "seen": self._seen(),
        }  # fmt: skip

    def _seen(self) -> str:
        """What the camera says of the trial that is to be judged, in words."""
        played = self.open()
        camera = played.found.get("camera") if played is not None else None
        if not camera:
            return ""
        verdict = {True: "success", False: "failure", None: "can't tell"}[camera["success"]]
        return f"the camera: {verdict} ({camera['said']})"

    # What the operator does

    def claim(self, who: str, token: str) -> None:
        """One operator at a time: whoever is not heard of for PRESENT_S loses the session."""
        with self._changed:
            now = time.monotonic()
            if self._token not in ("", token) and now - self._heard < PRESENT_S:
                raise OperatorError(
                    f"{self._operator} operates these trials", code="OPERATOR_BUSY",
                    remedy="One operator at a time: wait until that page is closed.",
                )  # fmt: skip
            self._operator, self._token, self._heard = who.strip() or "operator", token, now

    def heard(self, token: str) -> bool:
        """Whether it is the operator who looks; it counts as a sign of life."""
        if token and token == self._token:
            self._heard = time.monotonic()
            return True
        return False

    def act(self, action: str, token: str, revision: int, label: Label | None = None) -> None:
        """begin, ready, stop, help, label, undo. Refused in a wrong stage, or with a revision that is over."""
        with self._changed:
            if token != self._token or not token:
                raise OperatorError(
                    "somebody else operates these trials", code="OPERATOR_BUSY", remedy="Say who you are."
                )
            stages: dict[str, tuple[Stage, ...]] = {
                "begin": ("waiting",), "ready": ("laying",), "stop": ("running",), "help": ("running", "judging"),
                "label": ("judging",), "undo": ("laying", "done"),
            }  # fmt: skip
            if action not in stages or self.stage not in stages[action] or revision != self.revision or self._asked:
                raise OperatorError(
                    f"{action!r} is not possible now ({self.stage})", code="STALE", remedy="Look again, then act."
                )
            self._heard = time.monotonic()
            if action == "stop":
                self._stop = True
            elif action == "help":
                self._helped = not self._helped
            else:
                self._asked = action, label
            self._changed.notify_all()

    # What the session does

    def drive(self) -> None:
        """Trial after trial, until all are scored or `close` is called."""
        try:
            if self.open() is not None:
                self._robot_waits()
                self._judge(None)
            elif not self.automatic:
                self._enter("waiting")
                self._wait("begin")
            while not self._over:
                slot = self.next()
                if slot is None:
                    self._enter("done")
                    if self.automatic or self._wait("undo") != "undo":
                        return
                    self._undo()
                    continue
                self._trial(slot)
        except SimrealError as error:
            self.message = str(error)
            self._enter("failed")
            raise

    def close(self) -> None:
        """Ends `drive` at the next opportunity; a running trial is stopped and counts as interrupted."""
        with self._changed:
            self._over = self._stop = True
            self._changed.notify_all()

    def _robot_waits(self) -> None:
        self.message = "this trial had ended when the session was broken off"

    def _trial(self, slot: Slot) -> None:
        self._enter("preparing")
        scene = sample_episode(slot.seed, slot.variant)
        self._robot.use(slot.letter)
        self._robot.home()
        self._robot.lay_out(slot, scene.instruction)
        if not self.automatic:
            self._enter("laying")
            asked = self._wait("ready", "undo")
            if asked == "undo":
                self._undo()
                return
            if not asked:
                return
        self.message = ""
        self.log.add("begin", slot=slot.number, letter=slot.letter, by=self._who)
        self._stop = self._helped = False
        self._began = time.time()
        before = self._robot.image() if self._detect is not None else None
        self._enter("running")
        run = self._robot.run(self.limit_s, lambda: self._stop)
        if self._over:
            return  # a begin without an end: the trial is repeated
        found: dict[str, Any] = {"success": run.success, "where": run.where, "distance_m": run.distance_m}
        if self._detect is not None and not run.fault:
            self._robot.home()  # it would hide the object
            time.sleep(FRESH_S)
            after = self._robot.image()
            if before is not None and after is not None:
                found["camera"] = asdict(self._detect(before, after, scene, run.width_m))
        self.log.add(
            "end", slot=slot.number, letter=slot.letter, seconds=run.seconds, fault=run.fault,
            recording=self._robot.recording(), found=found,
        )  # fmt: skip
        if run.fault:
            self.message = f"the last trial had a fault and is repeated: {run.fault}"
            self._too_many_faults(slot)
        else:
            self._judge(run)

    def _too_many_faults(self, slot: Slot) -> None:
        last = [p for p in self.log.played if p.slot == slot.number][-AGAIN:]
        if len(last) == AGAIN and all(p.fault for p in last):
            raise SimrealError(
                f"{AGAIN} faults in trial {slot.number + 1}, the last one: {last[-1].fault}", code="FAULTS",
                remedy="Find its cause, then give the same command: the trials go on with this one.",
            )  # fmt: skip

    def _judge(self, run: Run | None) -> None:
        played = self.open()
        assert played is not None
        if self.automatic:
            success = run.success if run is not None else played.found["success"]
            where: Phase = "" if success else run.where if run is not None else played.found["where"]
            self._record(played, Label(time.time(), self._who, "success" if success else "failure", where))
            return
        self._enter("judging")
        if self._wait("label"):
            assert self._label is not None
            self._record(played, self._label)

    def _record(self, played: Played, label: Label) -> None:
        self.log.add(
            "label", slot=played.slot,
            label={"outcome": label.outcome, "where": label.where, "intervention": label.intervention,
                   "note": label.note, "by": label.by},
        )  # fmt: skip
        self._robot.label(label)

    def _undoable(self) -> Played | None:
        """The last trial that was judged, if none has begun since."""
        played = self.log.played
        return played[-1] if played and played[-1].scored else None

    def _undo(self) -> None:
        played = self._undoable()
        if played is not None:
            self.log.add("undo", slot=played.slot, by=self._who)
            self._judge(None)

    @property
    def _who(self) -> str:
        return "twin" if self.automatic else self._operator

    def _enter(self, stage: Stage) -> None:
        with self._changed:
            self.stage, self._asked = stage, None
            self.revision += 1
            self._changed.notify_all()

    def _wait(self, *actions: str) -> str:
        """Until the operator asks for one of them: which; "" at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or (self._asked is not None and self._asked[0] in actions))
            if self._over or self._asked is None:
                return ""
            action, self._label = self._asked
            return action

    def wait(self, seconds: float, revision: int) -> None:
        """For a front end: until something has changed since `revision`."""
        with self._changed:
            self._changed.wait_for(lambda: self.revision != revision, seconds)

    def image(self) -> np.ndarray | None:
        return self._robot.image()


def verdict(who: str, outcome: Outcome, where: Phase, intervention: bool, note: str) -> Label:
    """The operator's verdict; a failure has a place, a success has none."""
    if outcome not in ("success", "failure"):
        raise OperatorError("the verdict is success or failure", code="LABEL", remedy="Choose one of them.")
    if outcome == "failure" and where not in ("reach", "grasp", "carry", "place"):
        raise OperatorError("say where it failed", code="LABEL", remedy="Choose reach, grasp, carry or place.")
    return Label(time.time(), who, outcome, where if outcome == "failure" else "", intervention, note)


def picture_file(folder: Path) -> Path:
    """Where the terminal's picture of the scene lies."""
    return folder / "scene.png"
