"""A run's folder belongs to one process at a time. The system gives the lock of a killed one back."""

import fcntl
import time
from pathlib import Path
from typing import IO

from vla.errors import SimrealError

LOCK = "lock"
TRIES = 5


def hold(out: Path) -> IO[str]:
    """Keep other processes out until the file is closed or this process ends."""
    file = (out / LOCK).open("w")
    for _ in range(TRIES):  # whoever looks whether it is held has it for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(0.05)
    file.close()
    raise SimrealError(
        f"another process is at work in {out}", code="RUN_BUSY",
        remedy="Wait for it or stop it; `vla train` on a free folder goes on where it stopped.",
    )  # fmt: skip


def is_held(out: Path) -> bool:
    """Whether a process is at work in a folder."""
    try:
        with (out / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
