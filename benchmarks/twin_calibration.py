"""Calibration of the twin through ROS, driver and camera, against its exact truth.

    python benchmarks/twin_calibration.py --out twin_calibration.json --store rig

For each camera and each seed the commands of the guide: intrinsics, handeye (with the lens as found, and with the true
one), latency with an injected delay, check, check of a camera that the store has turned by 3 degrees, align. What was
found is compared with the scene; every command's exit code and time is kept.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vla.adapters.tabletop import CAMERAS, THIRD_PERSON_FOV_Y_DEG, WRIST_FOV_Y_DEG, camera_pose
from vla.results import commit, machine, write_json
from vla.rig import Intrinsics, Mount, Store, Transform

SIZE, DELAY_S, TURN_DEG = 400, 0.15, 3.0
TRIES = 4
FOV = {"third_person": THIRD_PERSON_FOV_Y_DEG, "wrist": WRIST_FOV_Y_DEG}


class Bench:
    """A store, and the commands on it."""

    def __init__(self, store: Store, camera: str, seed: int):
        self.store, self.camera, self.seed = store, camera, seed
        self.steps: list[dict[str, Any]] = []

    def vla(self, what: str, *words: str) -> str:
        """Run a step on the twin; what it printed."""
        for _ in range(TRIES):  # a run that was broken off goes on with the same command
            text = self._once(what, *words)
            if self.steps[-1]["code"] in (0, 1):
                return text
        raise SystemExit(f"vla calibrate {what} {' '.join(words)} failed {TRIES} times, see above")

    def _once(self, what: str, *words: str) -> str:
        given = (f"camera={self.camera}", f"store={self.store.folder}", "use_sim=true", f"seed={self.seed}", *words)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "vla", "calibrate", what, *given], capture_output=True, text=True, check=False
        )
        seconds = time.monotonic() - began
        self.steps.append({"step": " ".join([what, *words]), "code": done.returncode, "seconds": seconds})
        step = f"{self.camera} {self.seed} {what} {' '.join(words)}"
        print(f"{step}: {done.returncode} after {seconds:.0f} s", flush=True)
        print(done.stdout[-1500:], done.stderr[-1500:], sep="\n", flush=True)
        return done.stdout

    def number(self, text: str, pattern: str) -> float:
        found = re.search(pattern, text)
        return float(found.group(1)) if found else float("nan")


def measure(store: Store, camera: str, seed: int, views: Sequence[int]) -> dict[str, Any]:
    """Everything of one camera."""
    bench, true = Bench(store, camera, seed), Intrinsics.from_fov(SIZE, SIZE, FOV[camera])
    result: dict[str, Any] = {"camera": camera, "seed": seed, "steps": bench.steps}
    bench.vla("intrinsics", f"views={views[0]}")
    lens = store.read(camera).intrinsics
    result["lens"] = {
        "focal_percent": 100 * (lens.fx / true.fx - 1),
        "centre_px": float(np.hypot(lens.cx - true.cx, lens.cy - true.cy)),
        "held_out_px": store.read(camera).measured.error_px, "sigma": store.read(camera).measured.sigma,
    }  # fmt: skip
    bench.vla("handeye", f"views={views[1]}")
    result["pose"] = pose_error(store, camera)
    found = store.read(camera)
    store.write(replace(found, intrinsics=true, mount=None))  # the views are there: the pose alone is found anew
    bench.vla("handeye", f"views={views[1]}")
    result["pose_with_the_true_lens"] = pose_error(store, camera)
    bench.vla("latency", f"delay_s={DELAY_S}")
    delay = store.read(camera).delay
    if delay is not None:
        result["delay"] = {
            "injected_s": DELAY_S, "found_s": delay.arrival_s - delay.capture_s, "capture_s": delay.capture_s,
            "capture_95": delay.capture_95, "arrival_95": delay.arrival_95, "motion_s": delay.motion_s,
            "motion_95": delay.motion_95,
        }  # fmt: skip
    result["check"] = bench.number(bench.vla("check"), r"are ([\d.]+) px")
    told = bench.vla("align")
    result["align"] = {"iou": bench.number(told, r"IoU ([\d.]+)"), "points_px": bench.number(told, r"points ([\d.]+)")}
    stored = store.read(camera)
    store.write(replace(stored, mount=turned(stored.mount)))
    told = bench.vla("check")
    result["turned"] = {"failed": bench.steps[-1]["code"] == 1, "deg": bench.number(told, r"and ([\d.]+) deg")}
    store.write(stored)
    return result


def pose_error(store: Store, camera: str) -> dict[str, float] | None:
    mount = store.read(camera).mount
    if mount is None:
        return None
    metres, degrees = mount.pose.distance(camera_pose(camera)[1])
    sigma = mount.measured.sigma
    return {"mm": 1e3 * metres, "deg": degrees, "told_mm": sigma["translation_mm"], "told_deg": sigma["rotation_deg"],
            "held_out_px": mount.measured.error_px}  # fmt: skip


def turned(mount: Mount | None) -> Mount | None:
    """The camera turned about its own y axis."""
    if mount is None:
        return None
    c, s = np.cos(np.deg2rad(TURN_DEG)), np.sin(np.deg2rad(TURN_DEG))
    turn = np.eye(4)
    turn[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    return replace(mount, pose=Transform.from_matrix(mount.pose.matrix @ turn))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True, help="new folder for the stores, one for each seed")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--views", type=int, nargs=2, default=(30, 15), help="of intrinsics and of hand-eye")
    parser.add_argument("--cameras", nargs="+", default=CAMERAS, choices=CAMERAS)
    options = parser.parse_args()
    os.environ.setdefault("ROS_DOMAIN_ID", str(100 + os.getpid() % 100))
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for camera in options.cameras:
            runs.append(measure(Store(options.store / str(seed)), camera, seed, options.views))
            words = ["python", "benchmarks/twin_calibration.py", *sys.argv[1:]]
            write_json(options.out, {
                "command": " ".join(words), "commit": commit(), "machine": machine("numpy", "scipy", "franky-sim"),
                "runs": runs,
            })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
