"""`vla record`: recorder_node alone, beside a graph that runs already."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vla.cli import Command
from vla.errors import SimrealError
from vla_policy import graph
from vla_policy.process import starter

END_S = 10.0


@dataclass(frozen=True)
class RecordConfig:
    """Options of `vla record`; it records every episode until Ctrl-C.

    folder: where the episodes are written; it is made if it is not there.
    checkpoint: bundle that acts, whose contract and provenance go into every file; or contract.
    contract: a contract.json, where the checkpoint lies on another machine.
    calibration: store of the cameras' calibrations, which go into every file.
    namespace: of the graph.
    cameras: names of the cameras.
    transport: which topic of a camera is read: raw, or compressed, as the camera's driver compresses.
    images: how raw images are compressed; auto keeps every pixel of images up to 256 x 256.
    """

    folder: Path
    checkpoint: Path | None = None
    contract: Path | None = None
    calibration: Path | None = None
    namespace: str = ""
    cameras: list[str] = field(default_factory=lambda: ["third_person", "wrist"])
    transport: Literal["raw", "compressed"] = "raw"
    images: Literal["auto", "png", "jpeg"] = "auto"


def command_line(config: RecordConfig) -> list[str]:
    """The node's command."""
    if config.checkpoint is None and config.contract is None:
        raise SimrealError(
            "nobody says what acts", code="NO_CHECKPOINT", remedy="Pass checkpoint=BUNDLE, or contract=FILE."
        )
    names = ("folder", "checkpoint", "contract", "calibration")
    paths = {name: value for name in names if (value := getattr(config, name))}
    given = {name: str(value.expanduser().absolute()) for name, value in paths.items()}
    choices = {"cameras": config.cameras, "transport": config.transport, "images": config.images}
    return graph.command_line(sys.executable, graph.NodeSpec("recorder_node", {**given, **choices}), config.namespace)


def run(config: RecordConfig) -> int:
    """Record until Ctrl-C; the node's exit code."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **starter()}
    process = subprocess.Popen(command_line(config), env=environment, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        return process.wait(END_S)


command = Command(
    name="record", help="Record every episode of a robot that runs already.", schema=RecordConfig, run=run,
    subject="folder",
)  # fmt: skip
