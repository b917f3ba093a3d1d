"""The status board, the timeline that is written from it, and `vla top`, which shows it."""

import io
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from training.lock import hold
from training.pipeline.block import unlink
from training.pipeline.status import RING, Clock, Doing, Status, awaited, kind, shares
from training.pipeline.timeline import FIRST, LAST, Timeline, kept, read
from training.top import view
from training.trace import publish
from vla import cli
from vla.results import write_json

ROWS = ("lane 0", "lane 1", "policy worker 0", "learner 0", "learner 1", "driver")

Make = Callable[..., Status]


@pytest.fixture
def make() -> Iterator[Make]:
    made = []

    def create(rows: tuple[str, ...] = ROWS) -> Status:
        made.append(Status(rows, f"simreal_status_{time.time_ns()}", create=True))
        return made[-1]

    yield create
    for status in made:
        status.close()
        unlink(status.name)


def test_a_row_accounts_for_its_time(make: Make) -> None:
    status = make()
    row, clock = status.row("lane 1"), Clock(status)
    row.turn_to(Doing.STEPPING, 3)
    time.sleep(0.05)
    assert status.stuck("lane 1", 0.04) and not status.stuck("lane 1", 10)
    with row.during(Doing.ASKING):
        time.sleep(0.05)
        assert not status.stuck("lane 1", 0.04), "it waits for somebody"
    seconds, passed = clock.lap()
    assert seconds[1].sum() == pytest.approx(passed, abs=0.01)
    assert seconds[1, Doing.STEPPING] > 0.05 and seconds[1, Doing.ASKING] > 0.05
    assert seconds[0, Doing.STARTING] == pytest.approx(passed, abs=0.01), "what goes on counts, too"
    time.sleep(0.02)
    seconds, _ = clock.lap()
    assert seconds[1].nonzero()[0].tolist() == [Doing.STEPPING] and seconds[1].sum() < 0.05
    events, count = status.events(1)
    assert events["doing"].tolist() == [Doing.STEPPING, Doing.ASKING, Doing.STEPPING] and count == 3
    assert events["number"].tolist() == [3, -1, -1] and (np.diff(events["start"]) > 0.04).all()


def test_a_row_remembers_its_latest_turns(make: Make) -> None:
    status = make()
    row = status.row("driver")
    for number in range(RING + 100):
        row.turn_to(Doing.SAVING, number)
    events, count = status.events(5, 7)
    assert count == RING + 100
    assert events["number"].tolist() == list(range(100, RING + 100))
    events, _ = status.events(5, count - 2)
    assert events["number"].tolist() == [RING + 98, RING + 99]


def test_who_takes_a_dead_ones_place_goes_on_with_its_row(make: Make) -> None:
    status = make()
    dead = status.row("learner 0")
    dead.turn_to(Doing.UPDATING)
    dead._turns[0] = dead.turns + 1  # it died while it wrote
    assert status.look()["doing"][3] == Doing.UPDATING
    status.turn("learner 0", Doing.STARTING)
    other = status.row("learner 0")
    other.turn_to(Doing.IDLE)
    events, count = status.events(3)
    assert events["doing"].tolist() == [Doing.UPDATING, Doing.STARTING, Doing.IDLE] and count == 3


def test_another_process_writes_a_row(make: Make) -> None:
    status = make()
    code = f"""
import pickle
from training.pipeline.status import Doing
row = pickle.loads({pickle.dumps(status)!r}).row("policy worker 0")
for _ in range(1000):
    row.turn_to(Doing.DECIDING)
    row.turn_to(Doing.GATHERING)
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    while child.poll() is None:  # numbers that belong together, whenever one looks
        seen = status.look()
        assert (seen["seconds"].sum(1) <= time.monotonic() - seen["since"].min() + 60).all()
    assert child.returncode == 0
    assert status["turns"][2] == 4000 and status["doing"][2] == Doing.GATHERING
    assert status["turns"][0] == 0


def test_who_waits_for_whom() -> None:
    doing = [Doing.STEPPING, Doing.ASKING, Doing.GATHERING, Doing.AWAITING, Doing.AVERAGING, Doing.LEARNING]
    assert [awaited(ROWS, doing, index) for index in range(len(ROWS))] == [
        [], ["policy worker 0"], ["lane 0"], ["lane 0", "lane 1"], ["learner 0"], ["learner 0", "learner 1"],
    ]  # fmt: skip
    assert [kind(name) for name in ROWS] == ["lane", "lane", "policy worker", "learner", "learner", "driver"]


def test_shares_are_means_over_the_rows_of_a_stage() -> None:
    seconds = np.zeros((len(ROWS), len(Doing)))
    seconds[0, Doing.STEPPING], seconds[1, Doing.STEPPING], seconds[1, Doing.ASKING] = 4, 2, 2
    seconds[2, Doing.DECIDING], seconds[2, Doing.LOADING] = 1, 1
    seconds[3, Doing.AWAITING] = 4
    assert shares(ROWS, seconds, 4.0) == {"environments": 0.75, "policy": 0.5, "learners": 0.0}


def test_the_timeline_keeps_the_first_and_the_last_iterations(make: Make, tmp_path: Path) -> None:
    status = make()
    lane, learner, timeline = status.row("lane 0"), status.row("learner 1"), Timeline(tmp_path / "timeline", status)
    for iteration in range(10):
        for decision in range(3):
            lane.turn_to(Doing.STEPPING, decision)
            lane.turn_to(Doing.ASKING, decision)
        learner.turn_to(Doing.UPDATING, iteration)
        timeline.keep(iteration)
    assert kept(tmp_path / "timeline") == [*range(FIRST), *range(10 - LAST, 10)]
    whole = read(tmp_path / "timeline", range(10 - LAST, 10))
    mine = [interval for interval in whole if interval.name == "lane 0"]
    assert len(mine) == 6 * LAST, "each is there once, and the last one goes on"
    assert all(a.end == b.start for a, b in pairwise(mine))
    assert [i.number for i in whole if i.name == "learner 1"] == [10 - LAST - 1, *range(10 - LAST, 9)]
    figure = publish(tmp_path)
    assert figure is not None and len(figure.axes[0].get_yticklabels()) == 2
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    assert {(names[e["tid"]], e["name"]) for e in spans} == {
        ("lane 0", "stepping"), ("lane 0", "asking"), ("learner 1", "updating"),
    }  # fmt: skip
    assert min(e["ts"] for e in spans) == 0 and all(e["dur"] >= 0 for e in spans)
    assert spans[0]["args"] == {"number": 0}
    assert publish(tmp_path / "nothing") is None


def shown(run: Path) -> str:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(view(run))
    return console.export_text()


def test_top_shows_a_run_that_is_at_work_and_one_that_is_not(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write_json(run / "config.json", {"iterations": 5})
    assert "0 of 5 iterations, not running" in shown(run)
    lock = hold(run)
    assert "its workers start" in shown(run)
    status = make()
    write_json(run / "status.json", {"block": status.name, "rows": status.rows})
    rows = {name: status.row(name) for name in ROWS}
    for name, doing in {"lane 0": Doing.STEPPING, "lane 1": Doing.ASKING, "policy worker 0": Doing.GATHERING,
                        "learner 0": Doing.AWAITING}.items():  # fmt: skip
        rows[name].turn_to(doing)
    status["finished"][0], status["taken"][0] = 7, 5
    time.sleep(0.1)
    said = shown(run)
    lines = {line.split("│")[1].strip(): line for line in said.splitlines() if line.count("│") > 4}
    assert "stepping" in lines["lane 0"] and "100%" in lines["lane 0"]
    assert "asking" in lines["lane 1"] and "policy worker 0" in lines["lane 1"] and " 0%" in lines["lane 1"]
    assert "gathering" in lines["policy worker 0"] and "lane 0 " in lines["policy worker 0"]
    assert "awaiting" in lines["learner 0"] and "lane 0, 1" in lines["learner 0"]
    assert "environments 50%, policy 0%, learners 0%" in said
    assert "1 of 2 wait for the policy, 0 for a free fragment; 2 finished fragments wait for the learners" in said
    lock.close()
    row = {"iteration": 0, "time/policy_s": 1.25, "use/policy": 0.5, "rollout/success": 0.1}
    (run / "metrics.jsonl").write_text(json.dumps(row) + '\n{"iteration": 1, "cut')
    entry = EntryPoint("top", "training.top:command", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: (entry,))
    assert cli.main(["top", str(run), "once=true"]) == 0
    said = " ".join(capsys.readouterr().out.split())  # lines are broken
    assert "1 of 5 iterations, not running" in said and "1.25" in said and "50%" in said
    assert cli.main(["top", str(tmp_path / "other")]) == 2
    assert "holds no run" in capsys.readouterr().err
