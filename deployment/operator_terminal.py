"""The same as the operator's page, in the terminal: text, single words as answers, the picture as a file."""

import select
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from deployment.operator import OperatorError, Session, picture_file, verdict
from vla.episodes import Phase
from vla.scene_picture import Viewpoint, draw, words

TOKEN = "terminal"
WAYS: dict[str, Phase] = {"r": "reach", "g": "grasp", "c": "carry", "p": "place"}
VERDICT = "s success, or where it failed: r reach, g grasp, c carry, p place; with ! if you had to help"


def pressed(seconds: float) -> bool:
    """Whether Enter is pressed within so many seconds."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready and sys.stdin.readline())


def operate(session: Session, view: Viewpoint, who: str, folder: Path, ask: Callable[[str], str] = input,
            pressed: Callable[[float], bool] = pressed) -> None:  # fmt: skip
    """Ask and tell until the session is done. ask: shows a text, returns the answer."""
    console = Console()
    session.claim(who, TOKEN)
    told = -1
    while session.stage not in ("failed",):
        state = session.state()
        stage, revision = state["stage"], state["revision"]
        session.heard(TOKEN)
        if revision == told:
            session.wait(0.5, revision)
            continue
        told = revision
        if state["message"]:
            console.print(state["message"], markup=False)
        try:
            if stage == "waiting":
                ask("the arm goes home first; Enter to begin ")
                session.act("begin", TOKEN, revision)
            elif stage == "laying":
                _lay(session, view, folder, console, ask)
            elif stage == "running":
                console.print("running; Enter stops it")
                while session.revision == revision:
                    session.heard(TOKEN)
                    if pressed(0.2):
                        session.act("stop", TOKEN, revision)
                        session.wait(5.0, revision)
            elif stage == "judging":
                if state["seen"]:
                    console.print(state["seen"], markup=False)
                _judge(session, who, revision, ask)
            elif stage == "done":
                console.print(f"all {state['all']} trials are done")
                return
        except OperatorError as error:
            console.print(str(error), markup=False)
            told = -1


def _lay(session: Session, view: Viewpoint, folder: Path, console: Console, ask: Callable[[str], str]) -> None:
    state, scene, image = session.state(), session.scene(), session.image()
    assert scene is not None
    console.print(f"trial {state['done'] + 1} of {state['all']}, policy {state['letter']}: {scene.instruction}")
    for line in words(scene):
        console.print(f"  {line}", markup=False)
    if image is not None:
        file = picture_file(folder)
        draw(image, scene, view).save(file)
        console.print(f"  drawn in {file}; p draws it anew", markup=False)
    while (answer := ask("Enter when the scene is ready, u to undo the last verdict ").strip()) == "p":
        image = session.image()
        if image is not None:
            draw(image, scene, view).save(picture_file(folder))
    session.act("undo" if answer == "u" else "ready", TOKEN, state["revision"])


def _judge(session: Session, who: str, revision: int, ask: Callable[[str], str]) -> None:
    answer = ask(f"what happened? {VERDICT}: ").strip().lower()
    helped, letter = answer.endswith("!"), answer.rstrip("!").strip()
    label = verdict(who, "success" if letter == "s" else "failure", WAYS.get(letter, ""), helped, "")
    session.act("label", TOKEN, revision, label)
