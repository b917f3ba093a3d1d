"""The gap from simulator to robot as an instrument: `vla gap checkpoint=[A,B]`.

The same variants are played in the training simulator (`vla eval`) and on the twin, nominal and shifted
(`vla deploy`), each by its own command in a process of its own; what they have in common is their JSON files. Pearson's
correlation and MMRV over variants and checkpoints say how far one may trust the simulator to tell which policy is
better. What has been played stays: the same command goes on.
"""

import base64
import io
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from vla.cli import Command
from vla.errors import SimrealError
from vla.results import commit, machine, write_json
from vla.tasks.put_on_plate import ALL_VARIANTS, VARIANTS, axis_of
from vla.trial_results import correlations

World = Literal["nominal", "shifted"]
DEFAULT = ["in_distribution", "unseen_object", "unseen_table", "unseen_instruction", "unseen_position"]


@dataclass(frozen=True)
class GapConfig:
    """Options of `vla gap`.

    checkpoint: bundles to measure.
    variants: of the task; dynamic textures and noise exist in the simulator only.
    worlds: twins to compare the simulator with.
    episodes: of each variant in the simulator.
    trials: of each variant on each twin.
    seed: of the first episode, in all worlds.
    out: folder of the results.
    """

    checkpoint: list[Path]
    variants: list[str] = field(default_factory=lambda: list(DEFAULT))
    worlds: list[World] = field(default_factory=lambda: ["nominal", "shifted"])
    episodes: int = 50
    trials: int = 20
    seed: int = 90_001
    out: Path = Path("runs/gap")


def run(config: GapConfig) -> None:
    """Play what is missing, then compare."""
    check(config)
    console = Console()
    points = []
    for index, checkpoint in enumerate(config.checkpoint):
        for variant in config.variants:
            folder = config.out / f"{index}_{checkpoint.parent.name}_{checkpoint.name}"
            console.print(f"{checkpoint}: {variant}")
            points.append(_point(config, checkpoint, variant, folder))
    found = compare(points, config.worlds) | {"seed": config.seed, "commit": commit(), "machine": machine("torch")}
    write_json(config.out / "gap.json", found)
    part = config.out / "gap.html.part"
    part.write_text(page(found), encoding="utf-8")
    part.replace(config.out / "gap.html")
    _show(console, found)
    console.print(f"{config.out / 'gap.html'}, {config.out / 'gap.json'}")


def check(config: GapConfig) -> None:
    """Variants that both the simulator and the twin know."""
    for variant in config.variants:
        if variant not in ALL_VARIANTS or axis_of(variant) == "control":
            known = ", ".join(v for members in VARIANTS.values() for v in members)
            raise SimrealError(f"there is no variant {variant!r}", code="VARIANT", remedy=f"Choose some of {known}.")
    if missing := [str(path) for path in config.checkpoint if not (path / "contract.json").is_file()]:
        raise SimrealError(f"{missing[0]} is no checkpoint", code="CHECKPOINT", remedy="Name the folder of a bundle.")


def _point(config: GapConfig, checkpoint: Path, variant: str, folder: Path) -> dict[str, Any]:
    """One checkpoint and one variant in all worlds: successes and trials of each."""
    axis = axis_of(variant)
    simulated = _made(
        folder / f"{variant}_simulator.json", "eval", f"checkpoint={checkpoint}", f"suite={axis}",
        f"tasks=[{VARIANTS[axis].index(variant)}]", f"episodes={config.episodes}", f"seed={config.seed}",
    )["variants"][variant]  # fmt: skip
    point: dict[str, Any] = {"checkpoint": str(checkpoint), "variant": variant, "simulator": _entry(simulated)}
    for world in config.worlds:
        point[world] = _entry(_made(
            folder / f"{variant}_{world}.json", "deploy", f"checkpoint={checkpoint}", "use_sim=true", f"twin={world}",
            f"variant={variant}", f"trials={config.trials}", f"seed={config.seed}",
            f"logs={folder / f'{variant}_{world}_logs'}",
        ))  # fmt: skip
    return point


def _made(file: Path, command: str, *words: str) -> dict[str, Any]:
    """The JSON of a command, run if it is not there or not complete."""
    wanted = next(int(w.split("=")[1]) for w in words if w.startswith(("trials=", "episodes=")))
    stamp = file.with_suffix(".options")
    asked = json.dumps([command, *words])
    if not (file.is_file() and stamp.is_file() and stamp.read_text() == asked):
        file.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        arguments = [sys.executable, "-m", "vla", command, *words, f"out={file}"]
        done = subprocess.run(arguments, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise SimrealError(
                f"`vla {command} {' '.join(words)}` ended with code {done.returncode}", code="GAP",
                remedy="It said why, above. Then give the same command: what was finished stays.",
            )  # fmt: skip
        stamp.write_text(asked)
    found: dict[str, Any] = json.loads(file.read_text())
    if command == "deploy" and found["episodes"] < wanted:
        Console().print(f"{file}: {wanted - found['episodes']} of {wanted} trials had a fault and are not scored")
    return found


def _entry(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("rate", "successes", "episodes", "wilson95")}


def compare(points: list[dict[str, Any]], worlds: list[World]) -> dict[str, Any]:
    """Correlations of the simulator with each twin; points without a scored trial are left out, and told."""
    found: dict[str, Any] = {"points": points, "worlds": {}}
    for world in worlds:
        known = [p for p in points if p[world]["rate"] is not None]
        pairs = [(p["simulator"]["rate"], p[world]["rate"]) for p in known]
        rates = correlations([s for s, _ in pairs], [r for _, r in pairs])
        found["worlds"][world] = rates | {"points": len(pairs), "left_out": len(points) - len(pairs)}
    return found


def _show(console: Console, found: Mapping[str, Any]) -> None:
    table = Table()
    for name in ("checkpoint", "variant", "simulator", *found["worlds"]):
        table.add_column(name, overflow="fold")  # a narrow terminal breaks names, it hides none
    for point in found["points"]:
        cells = [_cell(point[world]) for world in ("simulator", *found["worlds"])]
        table.add_row("/".join(Path(point["checkpoint"]).parts[-2:]), point["variant"], *cells)
    console.print(table)
    for world, entry in found["worlds"].items():
        console.print(f"simulator and {world} twin: {said(entry)}")


def said(entry: Mapping[str, Any]) -> str:
    """Correlations in words."""
    values = {
        "mean difference": entry["difference"], "Pearson": entry["pearson"], "Spearman": entry["spearman"],
        "MMRV": entry["mmrv"],
    }  # fmt: skip
    texts = (f"{k} {'not defined' if v is None else f'{v:+.3f}'}" for k, v in values.items())
    return f"{entry['points']} points, {', '.join(texts)}"


def _cell(entry: Mapping[str, Any]) -> str:
    if entry["rate"] is None:
        return "no scored trial"
    low, high = (100 * v for v in entry["wilson95"])
    return f"{100 * entry['rate']:.1f}% ({low:.0f} to {high:.0f}) of {entry['episodes']}"


def page(found: Mapping[str, Any]) -> str:
    """The result as HTML."""
    worlds = ("simulator", *found["worlds"])
    rows = "".join(
        f"<tr><td>{'/'.join(Path(p['checkpoint']).parts[-2:])}</td><td>{p['variant']}</td>"
        + "".join(f"<td>{_cell(p[w])}</td>" for w in worlds) + "</tr>"
        for p in found["points"]
    )  # fmt: skip
    lines = "".join(f"<li>simulator and {w} twin: {said(e)}</li>" for w, e in found["worlds"].items())
    head = "".join(f"<th>{name}</th>" for name in ("checkpoint", "variant", *worlds))
    style = "body{font:16px system-ui;max-width:60rem;margin:2rem auto}td,th{padding:.3rem .8rem;text-align:left}"
    picture = base64.b64encode(_picture(found)).decode()
    return (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Gap</title><style>{style}</style>'
        f'<h1>From simulator to twin</h1><ul>{lines}</ul><img src="data:image/png;base64,{picture}" '
        f'alt="success on the twin against success in the simulator"><table><tr>{head}</tr>{rows}</table></html>'
    )


def _picture(found: Mapping[str, Any]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    axes.plot([0, 1], [0, 1], color="#bbb", linewidth=1)
    for world, marker in zip(found["worlds"], "os", strict=False):
        known = [p for p in found["points"] if p[world]["rate"] is not None]
        x, y = ([p[name]["rate"] for p in known] for name in ("simulator", world))
        axes.plot(x, y, marker, label=world, alpha=0.7)
    axes.set(xlabel="success in the simulator", ylabel="success on the twin", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    plt.close(figure)
    return out.getvalue()


command = Command(
    name="gap", help="Compare simulator, twin and shifted twin: what does one tell about the other?", schema=GapConfig,
    run=run, subject="checkpoint",
)  # fmt: skip
