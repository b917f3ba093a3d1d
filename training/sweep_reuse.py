"""Runs that another sweep has finished already: the same variant often stands in several."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from training import origin
from training.evaluate import EvalConfig
from training.sweep_run import is_scored
from training.train import TrainConfig
from vla import options
from vla.checkpoint import fingerprint
from vla.errors import SimrealError


def check(sweeps: Sequence[Path]) -> None:
    """Refuse folders that are no sweeps."""
    for folder in sweeps:
        if not next(folder.glob("*/seed_*/config.json"), None):
            raise SimrealError(
                f"reuse: {folder} holds no run of a sweep", code="SWEEP", remedy="Give the out= of another `vla sweep`."
            )


def take_over(sweeps: Sequence[Path], run: TrainConfig, score: EvalConfig | None) -> Path | None:
    """Copy a finished run with the same options, seed and beginning to `run.out`, which must not be there yet.

    An evaluation that it has comes along if it is that of `score`. Returns the run, None where there is none.
    """
    for folder in sweeps:
        for found in sorted(folder.glob(f"*/seed_{run.seed}")):
            if (found / "checkpoint").exists() and _is_same(found, run):
                temporary = run.out.with_name(f".{run.out.name}.part")
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(found, temporary)
                if score is not None and not is_scored(score, temporary / score.file.name):
                    (temporary / score.file.name).unlink(missing_ok=True)
                temporary.rename(run.out)
                return found
    return None


def _is_same(folder: Path, run: TrainConfig) -> bool:
    """Whether the run in `folder` has these options and began with this bundle."""
    if run.checkpoint is None or not run.checkpoint.exists() or not (folder / origin.FILE).exists():
        return False
    free = ("out", "checkpoint", "cluster", "force", "from")
    known = options.fill(TrainConfig, origin.options_of(folder))
    there, wanted = ({k: v for k, v in told.items() if k not in free} for told in (known, options.write(run)))
    return there == wanted and origin.read(folder)["checkpoint"]["sha256"] == fingerprint(run.checkpoint)
