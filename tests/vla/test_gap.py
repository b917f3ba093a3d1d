"""The gap between simulator and twins: what is compared, of commands that a stand-in plays."""

import json
import stat
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vla import gap
from vla.errors import SimrealError
from vla.gap import GapConfig, run

# What `vla eval` and `vla deploy` write, as far as it is read; every call is noted.
STAND_IN = """#!PYTHON
import json, sys
from pathlib import Path
words = dict(w.split("=", 1) for w in sys.argv[4:])
out, eval_ = Path(words["out"]), sys.argv[3] == "eval"
with (Path(__file__).parent / "calls").open("a") as file:
    file.write(" ".join(sys.argv[3:]) + "\\n")
if (Path(__file__).parent / "broken").exists():
    sys.exit(2)
rate = {"in_distribution": 0.9, "unseen_object": 0.5}[out.stem.rsplit("_", 1)[0]]
if not eval_:
    rate -= 0.2
entry = {"rate": rate, "successes": round(20 * rate), "episodes": 20, "wilson95": [0.0, 1.0]}
out.write_text(json.dumps({"variants": {out.stem.rsplit("_", 1)[0]: entry}} if eval_ else entry))
"""


def test_what_is_played_is_compared_and_stays(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "vla"
    program.write_text(STAND_IN.replace("PYTHON", sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(gap.sys, "executable", str(program))
    variants = ["in_distribution", "unseen_object"]
    config = GapConfig([bundle], variants, ["nominal"], episodes=20, trials=20, out=tmp_path / "gap")
    run(config)
    found = json.loads((config.out / "gap.json").read_text())
    assert [p["nominal"]["rate"] for p in found["points"]] == pytest.approx([0.7, 0.3])
    nominal = found["worlds"]["nominal"]
    assert nominal["mmrv"] == 0.0 and nominal["difference"] == pytest.approx(-0.2) and nominal["pearson"] is None
    assert "data:image/png" in (config.out / "gap.html").read_text()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4 and "suite=semantic tasks=[0]" in calls[2] and "twin=nominal" in calls[3]
    run(config)
    assert len((tmp_path / "calls").read_text().splitlines()) == 4  # nothing is played twice
    (tmp_path / "broken").touch()
    with pytest.raises(SimrealError, match="ended with code 2"):
        run(GapConfig([bundle], variants, ["nominal"], episodes=30, trials=20, out=config.out))


def test_what_can_not_be_compared_is_told(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(SimrealError, match="no variant 'nonsense'"):
        run(GapConfig([bundle], ["nonsense"], out=tmp_path))
    with pytest.raises(SimrealError, match="no checkpoint"):
        run(GapConfig([tmp_path], out=tmp_path))


def test_a_narrow_terminal_hides_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"rate": 0.5, "successes": 3, "episodes": 6, "wilson95": [0.2, 0.8]}
    point = {"checkpoint": "runs/rl/checkpoint", "variant": "unseen_instruction", "simulator": entry}
    gap._show(Console(width=40), {"points": [point], "worlds": {}})
    shown = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if "│" in line]
    joined = ["".join(cell.strip() for cell in column) for column in zip(*shown, strict=True)]
    assert joined[0] == "rl/checkpoint" and joined[1] == "unseen_instruction" and "6" in joined[2]
