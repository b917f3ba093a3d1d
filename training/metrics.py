"""The metrics of a run, as RUN/metrics.jsonl has them."""

import json
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read(run: Path) -> list[dict[str, Any]]:
    """One dictionary for each iteration so far, None for what is unknown; a line cut by a kill is left out."""
    file = run / FILE
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
