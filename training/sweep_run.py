"""One run of a sweep in a process of its own, which trains and scores: `python -m training.sweep_run FILE.json`."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from training.evaluate import EvalConfig, evaluate
from training.train import TrainConfig, train
from vla import options
from vla.errors import SimrealError

LOOK_S = 1.0
GRACE_S = 10.0  # to end in order


def is_scored(config: EvalConfig, file: Path | None = None) -> bool:
    """Whether the evaluation is there, with as many episodes from the same seed on; file: null for where it belongs."""
    file = file or config.file
    if not file.exists():
        return False
    told = json.loads(file.read_text())
    wanted = str(config.checkpoint), options.write(config.env)
    if config.out is not None and (told["checkpoint"], told["env"]) != wanted:
        return False  # beside a bundle it is that one's, elsewhere it may be another's
    return told["seed"] == config.seed and {len(o) for o in told.get("outcomes", {}).values()} == {config.episodes}


def play_out(file: Path) -> int:
    """Train to the end, then score; either may be left out, what is finished stays. Returns the exit code."""
    told = json.loads(file.read_text())
    try:
        if told["train"] is not None:
            train(options.read(TrainConfig, told["train"]))
        if told["evaluation"] is not None:
            score = options.read(EvalConfig, told["evaluation"])
            if not is_scored(score):
                evaluate(score)
    except SimrealError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def end_with(starter: int) -> None:
    """End this process when the one that started it is gone: its run would be in the way of the next."""
    while os.getppid() == starter:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(1)  # it waits for Ray, and then no signal is heard


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    sys.exit(play_out(Path(sys.argv[1])))
