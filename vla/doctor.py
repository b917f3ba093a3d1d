"""`vla doctor`: is this machine ready? Every missing part is named with the command that installs it.

Each part is tried in a process of its own: a crash in a driver is a finding, and `vla` imports no simulator.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console

from vla.cli import Command
from vla.doctor_simulators import (
    OPTIONAL_PARTS,
    check_optional,
    check_robotwin,
    check_vulkan,
    check_vulkan_device,
)
from vla.probing import Check, install_command, probe

GIB = 1024**3
OLDEST_PYTHON = (3, 10)
MIN_DISK_GIB = 5.0
MIN_MEMORY_GIB = 8.0
MIN_SHARED_MEMORY_GIB = 0.5
GL_PACKAGES = "libegl1 libosmesa6 libgl1"

TORCH_PROBE = """
import torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(f"torch {torch.__version__}, " + (", ".join(names) or f"CPU, {torch.get_num_threads()} threads"))
"""

# A lit sphere before a black background: a frame of one colour means that nothing was drawn.
RENDER_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 -1 2'/><geom size='.3' pos='0 0 0'/>"
    "<camera name='c' pos='0 -1.5 0' xyaxes='1 0 0 0 0 1'/></worldbody></mujoco>"
)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 64, 64)
renderer.update_scene(data, camera="c")
frame = renderer.render()
renderer.close()
assert frame.max() > frame.min(), "the frame is empty"
print(f"mujoco {mujoco.__version__}")
"""

RAY_PROBE = """
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error", address="local")
assert ray.get(ray.remote(lambda: 7).remote()) == 7
ray.shutdown()
print(f"ray {ray.__version__}: started, ran a task, stopped")
"""


@dataclass(frozen=True)
class DoctorConfig:
    """Options of `vla doctor`.

    quick: do not start Ray.
    json: print JSON in place of text.
    """

    quick: bool = False
    json: bool = False


def run(config: DoctorConfig) -> int:
    """Print every finding; 1 if a required part is missing, else 0."""
    checks = diagnose(config.quick)
    healthy = not any(check.required and check.status == "missing" for check in checks)
    if config.json:
        print(json.dumps({"ok": healthy, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print_report(checks, healthy)
    return 0 if healthy else 1


def diagnose(quick: bool = False) -> list[Check]:
    """Try every part, two at a time."""
    probes: list[Callable[[], Check]] = [
        check_python,
        check_packages,
        check_torch,
        check_rendering,
        check_ray_installed if quick else check_ray,
        check_disk,
        check_memory,
        check_shared_memory,
        *(partial(check_optional, *part) for part in OPTIONAL_PARTS),
        check_vulkan,
        check_vulkan_device,
        check_robotwin,
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return [future.result() for future in [pool.submit(probe) for probe in probes]]


def print_report(checks: list[Check], healthy: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    colours = {"ok": "green", "warning": "yellow", "missing": "red"}
    for check in checks:
        colour = colours[check.status] if check.required or check.status != "missing" else "dim"
        status = check.status if check.required or check.status != "missing" else "absent"
        console.print(f"[{colour}]{status:<8}[/] {check.name}: ", end="")
        console.print(check.detail, markup=False)
        if check.remedy:
            console.print(f"         -> {check.remedy}", markup=False)
    verdict = "Everything required is here." if healthy else "A required part is missing: see above."
    console.print(f"\n{verdict} Absent parts are optional.")


def check_python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return Check("Python", "ok", True, version)
    return Check("Python", "missing", True, version, "install Python 3.10 or newer, then `make setup`")


def check_packages() -> Check:
    """Every base dependency of the distribution is installed."""
    try:
        requirements = [text for text in metadata.requires("simreal") or [] if "extra ==" not in text]
    except metadata.PackageNotFoundError:
        return Check("packages", "missing", True, "simreal is not installed", install_command())
    installed = {str(found.metadata["Name"]).lower().replace("_", "-") for found in metadata.distributions()}
    names = [re.split(r"[^\w.-]", text)[0].lower() for text in requirements]
    if absent := [name for name in names if name not in installed]:
        return Check("packages", "missing", True, "not installed: " + ", ".join(absent), install_command())
    return Check("packages", "ok", True, f"all {len(names)} base dependencies")


def check_torch() -> Check:
    succeeded, detail = probe(TORCH_PROBE)
    if not succeeded:
        return Check("torch", "missing", True, detail, install_command())
    if "CPU" in detail and shutil.which("nvidia-smi"):
        remedy = f"{sys.executable} -m pip install --force-reinstall torch  # a build with CUDA"
        return Check("torch", "warning", True, f"{detail}; there is an NVIDIA driver", remedy)
    return Check("torch", "ok", True, detail)


def check_rendering() -> Check:
    """Render a frame with the back end that `MUJOCO_GL` names, or with EGL and OSMesa."""
    chosen = os.environ.get("MUJOCO_GL", "")
    failures: list[str] = []
    for backend in [chosen] if chosen else ["egl", "osmesa"]:
        succeeded, detail = probe(RENDER_PROBE, MUJOCO_GL=backend)
        if succeeded and failures:
            return Check("GL rendering", "warning", True, f"{detail}, {backend} only (slow)", "export MUJOCO_GL=osmesa")
        if succeeded:
            return Check("GL rendering", "ok", True, f"{detail}, {backend}")
        failures.append(f"{backend}: {detail}")
    remedy = f"sudo apt-get install {GL_PACKAGES}"
    if chosen:
        remedy = f"unset MUJOCO_GL (it is '{chosen}'; egl and osmesa need no screen), or {remedy}"
    return Check("GL rendering", "missing", True, "; ".join(failures), remedy)


def check_ray() -> Check:
    succeeded, detail = probe(RAY_PROBE)
    if succeeded:
        return Check("Ray", "ok", True, detail)
    remedy = f"{install_command()}; if it is installed, look into /tmp/ray/session_latest/logs"
    return Check("Ray", "missing", True, detail, remedy)


def check_ray_installed() -> Check:
    try:
        return Check("Ray", "ok", True, f"ray {metadata.version('ray')}, not started (quick)")
    except metadata.PackageNotFoundError:
        return Check("Ray", "missing", True, "not installed", install_command())


def check_disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    remedy = "free some space: a run with its checkpoints takes a few GiB"
    return _at_least("disk", free, MIN_DISK_GIB, "free in this folder", remedy)


def check_memory() -> Check:
    available = psutil.virtual_memory().available / GIB
    remedy = "close other programs, or use fewer environment workers"
    return _at_least("memory", available, MIN_MEMORY_GIB, "available", remedy)


def check_shared_memory() -> Check:
    """Observations cross between workers through /dev/shm, of which a container gets 64 MiB by default."""
    free = shutil.disk_usage("/dev/shm").free / GIB if Path("/dev/shm").is_dir() else 0.0
    remedy = "mount -o remount,size=4G /dev/shm, or start the container with --shm-size=4g"
    return _at_least("shared memory", free, MIN_SHARED_MEMORY_GIB, "free in /dev/shm", remedy)


def _at_least(name: str, found: float, needed: float, where: str, remedy: str) -> Check:
    detail = f"{found:.1f} GiB {where}"
    if found >= needed:
        return Check(name, "ok", True, detail)
    return Check(name, "warning", True, f"{detail}, {needed:g} are advised", remedy)


command = Command(
    name="doctor",
    help="Check this machine and name the command that installs each missing part.",
    schema=DoctorConfig,
    run=run,
)
