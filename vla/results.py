"""Measured results: rates with their interval, what they were measured on, and the file they are written to."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def interval(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95% interval of a rate."""
    from scipy.stats import binomtest  # takes a second, and workers ask for the commit alone

    bounds = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return float(bounds.low), float(bounds.high)


def score(successes: int, episodes: int) -> dict[str, Any]:
    """The entry of a variant or an axis in the JSON file."""
    return {
        "successes": successes,
        "episodes": episodes,
        "rate": successes / episodes,
        "wilson95": list(interval(successes, episodes)),
    }


def commit() -> str:
    """Commit of the code that runs, with -dirty if it was changed since; "" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:  # no git
        return ""
    return found.stdout.strip()


def machine(*packages: str) -> dict[str, Any]:
    """What a figure was measured on, with the versions of these packages."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_1_min": os.getloadavg()[0],
        "rendering": os.environ.get("MUJOCO_GL", ""),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write_json(file: Path, data: Any) -> None:
    """Write beside and rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1))
    temporary.rename(file)
