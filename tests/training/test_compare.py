"""`vla compare`: groups of runs, what is said of them, and that it is right: against runs that are known to differ."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.compare import CompareConfig, compare, comparison
from training.comparison.page import figure, markdown, rows
from training.comparison.runs import WINDOW, episodes_of, gather, windowed
from training.comparison.verdict import mean_curve, to_goal
from training.evaluate import EvalConfig, Suite, summarize
from training.play import EpisodeResult
from vla import cli
from vla.comparison import mean_spread, over_runs, unpaired, welch
from vla.errors import SimrealError
from vla.results import write_json


def make(
    folder: Path, success: Sequence[float], seed: int = 0, rate: float = 1e-4, finished: bool = True, each: int = 100,
    placement: str = "synchronous", bundle: str = "a", **config: Any,
) -> Path:  # fmt: skip
    """A folder as `vla train` leaves it, with `each` episodes in an iteration."""
    data = {"checkpoint": f"{bundle}/checkpoint", "seed": seed, "iterations": len(success), "slots": 8,
            "algorithm": {"learning_rate": rate, "band": None}, "from": None, "force": False, **config}  # fmt: skip
    write_json(folder / "config.json", data)
    start = {"iteration": 0, "placement": {"schedule": placement}, "cluster": "local", "commit": "abc",
             "machine": {"cores": 2}, "packages": {"torch": "2.0"}}  # fmt: skip
    known = {"path": f"/{bundle}", "sha256": bundle * 64}
    write_json(folder / "origin.json", {"repeats": None, "checkpoint": known, "starts": [start]})
    lines = [
        {"iteration": i, "rollout/success": s, "rollout/episodes": float(each),
         "time/total_env_steps": 1000 * (i + 1), "time/elapsed_s": 60.0 * (i + 1)} for i, s in enumerate(success)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "checkpoint").mkdir()
    return folder


def evaluate(run: Path, wins: Sequence[bool], seed: int = 90_001, name: str = "checkpoint") -> None:
    """The file that `vla eval` writes beside the bundle."""
    results = {"in_distribution": [EpisodeResult(seed + i, bool(win), 20) for i, win in enumerate(wins)]}
    config = EvalConfig(run / name, suite="in_distribution", episodes=len(wins), seed=seed)
    suite = Suite({"in_distribution": ("in_distribution",)})
    write_json(run / f"eval_tabletop_{name}.json", summarize(results, config, suite))


RISING = (0.2, 0.5, 0.7, 0.85, 0.9, 0.9)
FLAT = (0.2, 0.3, 0.3, 0.4, 0.4, 0.4)


def test_success_is_over_the_last_episodes() -> None:
    told = [{"rollout/success": s, "rollout/episodes": n} for s, n in ((0.5, 80), (None, 0), (1.0, 150), (0.0, 300))]
    assert windowed(told) == [(40, 80), (40, 80), (190, 230), (0, 300)]


def test_equal_options_but_the_seed_make_a_group_and_folders_do(tmp_path: Path) -> None:
    runs = [make(tmp_path / f"ppo_{seed}", RISING, seed) for seed in (0, 1)]
    moved = make(tmp_path / "ppo_2", RISING, 2, checkpoint="elsewhere/checkpoint")  # the same weights
    again = make(tmp_path / "repeated", RISING, 1)
    other = make(tmp_path / "fast", RISING, 0, rate=1e-3)
    late = make(tmp_path / "late", RISING, 0, placement="asynchronous")
    young = make(tmp_path / "young", RISING, 0, bundle="b")
    named = tmp_path / "seeds"
    for seed in (3, 4):
        make(named / f"seed_{seed}", RISING, seed)
    groups = gather([*runs, moved, again, other, late, young, named])
    found = {group.name: [run.seed for run in group.runs] for group in groups}
    assert found == {"seeds": [3, 4], "ppo": [0, 1, 2], "repeated": [1], "fast": [0], "late": [0], "young": [0]}
    options = comparison(groups, 0.8)["options"]
    assert set(options) == {"algorithm.learning_rate", "placement.schedule", "checkpoint"}
    assert options["algorithm.learning_rate"] == [1e-4, 1e-4, 1e-4, 1e-3, 1e-4, 1e-4]
    make(named / "seed_5", RISING, 5, rate=1.0)
    mixed = comparison(gather([named, runs[0]]), 0.8)
    assert mixed["options"]["algorithm.learning_rate"] == ["several", 1e-4]
    with pytest.raises(SimrealError, match="holds no run") as caught:
        gather([tmp_path / "nothing"])
    assert caught.value.code == "RUN_MISSING"


def test_runs_of_versions_with_fewer_options_are_of_the_same_method(tmp_path: Path) -> None:
    make(tmp_path / "a" / "seed_0", RISING, 0)
    make(tmp_path / "a" / "seed_1", RISING, 1, values=None)
    make(tmp_path / "a" / "seed_2", RISING, 2, values="chunk")
    groups = gather([tmp_path / "a" / f"seed_{seed}" for seed in (0, 1, 2)])
    assert [(group.name, len(group.runs)) for group in groups] == [("a", 2), ("seed_2", 1)]
    assert set(comparison(groups, 0.8)["options"]) == {"values"}


def test_a_component_that_is_gone_is_noted(tmp_path: Path) -> None:
    run = make(tmp_path / "own", RISING, algorithm={"_target_": "gone.away.Config", "learning_rate": 1e-4})
    (group,) = gather([run])
    assert group.runs[0].config["algorithm._target_"] == "gone.away.Config"
    assert "gone.away.Config can't be imported" in group.runs[0].notes[0]


def test_names_that_are_there_twice_are_told_apart(tmp_path: Path) -> None:
    runs = [make(tmp_path / side / "run", RISING, rate=rate) for side, rate in (("a", 1.0), ("b", 2.0))]
    assert [group.name for group in gather(runs)] == ["a/run", "b/run"]


def test_what_the_goal_took(tmp_path: Path) -> None:
    fast, slow = (make(tmp_path / n, s, i) for i, (n, s) in enumerate((("g_0", RISING), ("g_1", FLAT))))
    (group,) = gather([fast, slow])
    # two iterations are 200 episodes: 0.875 in the fifth, 0.775 in the fourth
    assert to_goal(group.runs[0], 0.8) == (5000, 5.0) and to_goal(group.runs[1], 0.8) is None
    assert to_goal(gather([make(tmp_path / "few", (0.9,), each=150)])[0].runs[0], 0.8) is None, "too few episodes"
    found = comparison([group], 0.8)["groups"]["g"]["to_goal"]
    assert (found["reached"], found["of"], found["env_steps"]) == (1, 2, None)
    assert "not reached (1 of 2)" in rows(comparison([group], 0.8))[0]
    third = make(tmp_path / "g_2", RISING, 2)
    found = comparison(gather([fast, slow, third]), 0.8)["groups"]["g"]["to_goal"]
    assert (found["reached"], found["env_steps"], found["minutes"]) == (2, 5000, 5.0)


def test_the_mean_of_curves_and_its_interval(tmp_path: Path) -> None:
    high, low = (make(tmp_path / f"g_{i}", (s,) * n, i, iterations=6) for i, s, n in ((0, 0.8, 4), (1, 0.4, 6)))
    curve = mean_curve(gather([high, low])[0], "env_steps")
    assert (curve["x"][0], curve["x"][-1]) == (1000, 4000), "where both have one"
    assert curve["mean"] == pytest.approx([0.6] * len(curve["x"]))
    assert (curve["low"][0], curve["high"][0]) == pytest.approx((0.4, 0.8))
    alone = mean_curve(gather([high])[0], "minutes")
    assert alone["x"] == [1, 2, 3, 4] and alone["low"][-1] == pytest.approx(0.7392, abs=1e-3)  # Wilson, 160 of 200


def test_one_run_of_each_is_compared_by_pairs_of_episodes(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", RISING), make(tmp_path / "two", RISING, rate=1e-3)
    wins = np.arange(100) % 2 == 0
    better = wins.copy()
    better[1:25:2] = True  # 12 more
    evaluate(one, wins)
    evaluate(two, better)
    evaluate(two, [False] * 100, name="start")  # where it began is not what it became
    verdict = comparison(gather([one, two]), 0.8)["verdicts"][0]
    assert (verdict["by"], verdict["pairs"], verdict["only_second"], verdict["only_first"]) == ("episodes", 100, 12, 0)
    assert verdict["differ"] is True and verdict["p"] == pytest.approx(2 / 2**12)
    assert "3 seeds of each are needed, there are 1 and 1" in verdict["text"]
    shuffled = np.random.default_rng(0).permutation(wins)
    evaluate(two, shuffled)
    assert comparison(gather([one, two]), 0.8)["verdicts"][0]["differ"] is False
    evaluate(two, better, seed=90_051)  # the half of the episodes is the same
    found = comparison(gather([one, two]), 0.8)
    assert found["verdicts"][0]["pairs"] == 50 and found["evaluated"]["seeds"][0] == 90_051


def test_without_evaluation_the_last_episodes_of_training_count(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", RISING), make(tmp_path / "two", FLAT, rate=1e-3)
    verdict = comparison(gather([one, two]), 0.8)["verdicts"][0]
    assert (verdict["by"], verdict["differ"], verdict["episodes"]) == ("training", True, [200, 200])
    assert verdict["gain"] == pytest.approx(-0.5)
    few = make(tmp_path / "few", (0.9,), each=WINDOW - 1, rate=1e-2)
    verdict = comparison(gather([one, few]), 0.8)["verdicts"][0]
    assert verdict["differ"] is None and "199 of them: too few to tell" in verdict["text"]


def groups_of(tmp_path: Path, first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    runs = []
    for name, rate, finals in (("a", 1e-4, first), ("b", 1e-3, second)):
        runs += [make(tmp_path / f"{name}_{i}", (0.2, f, f), i, rate) for i, f in enumerate(finals)]
    return comparison(gather(runs), 0.8)


@pytest.mark.parametrize(
    ("first", "second", "differ", "words"),
    [
        ((0.60, 0.62, 0.61), (0.80, 0.82, 0.84), True, "they differ"),
        ((0.60, 0.70, 0.80), (0.65, 0.72, 0.78), False, "no difference is shown"),
        ((0.60, 0.61, 0.62), (0.61, 0.75, 0.76), None, "too few seeds to tell"),
    ],
)
def test_from_three_seeds_on_seeds_are_compared(
    tmp_path: Path, first: Sequence[float], second: Sequence[float], differ: bool | None, words: str
) -> None:
    found = groups_of(tmp_path, first, second)
    verdict = found["verdicts"][0]
    assert verdict["by"] == "seeds" and verdict["runs"] == [3, 3] and verdict["differ"] is differ, verdict
    assert words in verdict["text"] and "are needed" not in verdict["text"]
    assert found["groups"]["a"]["training"]["over"] == "seeds"


def test_methods_that_are_equal_are_seldom_told_to_differ() -> None:
    """With three seeds the bootstrap alone errs far more often than once in 20."""
    random = np.random.default_rng(1)
    alone = both = 0
    for _ in range(300):
        found = over_runs(random.normal(0.7, 0.05, 3).tolist(), random.normal(0.7, 0.05, 3).tolist())
        apart = not found["bootstrap95"][0] <= 0 <= found["bootstrap95"][1]
        alone, both = alone + apart, both + (apart and found["p"] <= 0.05)
    assert alone / 300 > 0.1 and both / 300 < 0.08, (alone, both)


def test_statistics_by_hand() -> None:
    assert welch([1.0, 1.0], [1.0, 1.0]) == 1.0 and welch([1.0, 1.0], [0.5, 0.5]) == 0.0
    # t = 2 / sqrt(1/3 + 1/3) with 4 degrees of freedom
    assert welch([1.0, 2.0, 3.0], [3.0, 4.0, 5.0]) == pytest.approx(0.0705, abs=1e-4)
    found = unpaired((56, 70), (48, 80))  # Newcombe 1998, method 10, example (a): 0.0524 to 0.3339 the other way round
    assert found["interval95"] == pytest.approx([-0.3339, -0.0524], abs=1e-4) and found["p"] < 0.02
    assert mean_spread([0.4, 0.4, 0.4]) == pytest.approx((0.4, 0.4))


def test_page_picture_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make(tmp_path / "one", RISING), make(tmp_path / "two|", FLAT, rate=1e-3, finished=False)
    evaluate(one, [True, False] * 10)
    out = tmp_path / "out" / "compare.html"
    assert cli.main(["compare", str(one), str(two), f"out={out}"]) == 0
    page = out.read_text()
    assert "data:image/png;base64," in page and "algorithm.learning_rate" in page and "they differ" in page
    assert 'src="http' not in page and "two|: 6 of 6 iterations" in page
    compare(CompareConfig([one, two], tmp_path / "c.json"))
    found = json.loads((tmp_path / "c.json").read_text())
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert found["groups"]["one"]["greedy"]["runs"] == [0.5] and found["groups"]["two|"]["greedy"]["rate"] is None
    assert "two\\|" in markdown(found) and "they differ" in capsys.readouterr().out
    with pytest.raises(SimrealError, match="no page") as caught:
        compare(CompareConfig([one], tmp_path / "c.txt"))
    assert caught.value.code == "OUTPUT"


def test_what_runs_began_with_stands_beside_them(tmp_path: Path) -> None:
    """On the episodes that all have played, and not at all where it has not played them."""
    one = make(tmp_path / "one", RISING)
    evaluate(one, [True, False, True, True], seed=90_002)
    evaluate(tmp_path, [True, False, False, False, True, True], name="start")
    found = comparison(gather([one]), 0.8, {"beginning": episodes_of(tmp_path / "eval_tabletop_start.json")})
    before = found["beginnings"]["beginning"]
    assert before["rate"] == 0.25 and before["episodes"] == 4 and before["over"] == "episodes"
    assert rows(found)[0][:3] == ["beginning", "", "25.0% (5 to 70 over episodes)"]
    assert "before training" in markdown(found) and "beginning" in markdown(found)
    lines = [line for line in figure(found).axes[0].get_lines() if line.get_label() == "beginning, greedy"]
    assert [set(line.get_ydata()) for line in lines] == [{0.25}]
    evaluate(tmp_path, [True], name="start")
    fewer = comparison(gather([one]), 0.8, {"beginning": episodes_of(tmp_path / "eval_tabletop_start.json")})
    assert not fewer["beginnings"] and "before training" not in markdown(fewer)


def test_an_evaluation_without_single_episodes_is_named(tmp_path: Path) -> None:
    one = make(tmp_path / "one", RISING)
    evaluate(one, [True] * 5)
    file = one / "eval_tabletop_checkpoint.json"
    told = json.loads(file.read_text())
    del told["outcomes"]
    write_json(file, told)
    found = comparison(gather([one]), 0.8)
    assert found["groups"]["one"]["greedy"]["rate"] is None and "write it anew with `vla eval`" in found["notes"][0]
