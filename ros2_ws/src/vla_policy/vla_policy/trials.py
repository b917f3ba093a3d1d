"""`vla trials`: a protocol of blinded, paired trials, on the arm with an operator, or on the twin without one."""

import getpass
import signal
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from deployment.operator import Detect, Session
from deployment.operator_terminal import operate
from vla import options
from vla.cli import Command
from vla.contract import PolicyContract
from vla.detector import load
from vla.errors import SimrealError
from vla.results import commit, machine, write_json
from vla.rig import provenance
from vla.scene_picture import Viewpoint, seen_from
from vla.trial_log import TrialLog
from vla.trial_protocol import Protocol, digest, draw_key, read_protocol, schedule
from vla_policy.conductor import Conductor
from vla_policy.deploy import DeployConfig, running
from vla_policy.trial_robot import TrialRobot

LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class TrialsConfig:
    """Options of `vla trials`.

    protocol: YAML file, or a name of configs/trials.
    checkpoints: bundles to be compared, the others with the first one; empty for the protocol's.
    out: folder of the trials; the same command goes on where it was broken off.
    use_sim: the twin in place of the arm and its cameras; it lays the scenes.
    twin: nominal or shifted.
    operator: page, terminal, or twin, which needs nobody; null for twin with use_sim, else page.
    who: the operator's name, in the terminal.
    host: where the page is served; other than loopback needs a token.
    port: of the page, 0 for a free one.
    token: that the page's address has to have.
    robot_ip: address of the arm, if not use_sim.
    arm_id: fr3 or panda.
    namespace: of all nodes and topics.
    cameras: names of the cameras.
    record: whether every trial is recorded, in out/episodes.
    detector: MODULE:FUNCTION that says from the operator's camera whether a trial succeeded, such as
        vla.detector:by_colour; the operator sees it and judges. Empty: none.
    calibration: store of the cameras' calibrations: the operator's picture is drawn for the camera as it stands, the
        report tells the age, and the policy's contract is checked against it.
    """

    protocol: Path
    checkpoints: list[Path] = field(default_factory=list)
    out: Path = Path("runs/trials")
    use_sim: bool = False
    twin: Literal["nominal", "shifted"] = "nominal"
    operator: Literal["page", "terminal", "twin"] | None = None
    who: str = ""
    host: str = "127.0.0.1"
    port: int = 8770
    token: str = ""
    robot_ip: str = ""
    arm_id: Literal["fr3", "panda"] = "fr3"
    namespace: str = ""
    cameras: list[str] = field(default_factory=lambda: ["third_person", "wrist"])
    record: bool = True
    detector: str = ""
    calibration: Path | None = None


def run(config: TrialsConfig) -> int:
    """Make the trials that are missing."""
    operator = config.operator or ("twin" if config.use_sim else "page")
    _check(config, operator)
    protocol = read_protocol(config.protocol)
    checkpoints = [path.expanduser().absolute() for path in config.checkpoints or protocol.checkpoints]
    check_checkpoints(checkpoints)
    signal.signal(signal.SIGTERM, _interrupt)
    out = config.out.expanduser().absolute()
    with TrialLog(out, header(config, protocol, checkpoints)) as log:
        store = config.calibration.expanduser().absolute() if config.calibration else None
        log.add("session", calibration=provenance(store, config.cameras) if store else {})
        view = _viewpoint(protocol, store)
        detect = detection(config.detector, view)
        key = draw_key(out, checkpoints)
        slots = schedule(protocol, len(checkpoints))
        record = out / "episodes" if config.record else None
        first = next((s.letter for s in slots if s.number not in {p.slot for p in log.played if p.scored}), "A")
        deployed = DeployConfig(
            checkpoint=Path(key.checkpoints[first]), use_sim=config.use_sim, robot_ip=config.robot_ip,
            namespace=config.namespace, arm_id=config.arm_id, cameras=config.cameras, start=False, twin=config.twin,
            record=record, calibration=store, logs=out / "logs", trials=int(config.use_sim),  # no stop on success
        )  # fmt: skip
        with running(deployed) as made, Conductor(config.namespace, made.ended, twin=config.use_sim) as conductor:
            robot = TrialRobot(conductor, key.checkpoints, first, protocol.view.camera, record, config.use_sim)
            conductor.wait_until_up()
            session = Session(log, slots, robot, protocol.limit_s, operator == "twin", detect)
            _conduct(config, operator, session, view, out)
        Console().print(f"{session.done} of {len(slots)} trials are scored; `vla report trials={config.out}`")
        _account(out, conductor)
        return 0 if session.done == len(slots) else 1


def _check(config: TrialsConfig, operator: str) -> None:
    if not config.use_sim and operator == "twin":
        raise SimrealError(
            "operator=twin without use_sim: an arm's scenes are laid by somebody", code="TRIALS",
            remedy="Pass use_sim=true, or operator=page.",
        )  # fmt: skip
    if not config.use_sim and not config.robot_ip:
        raise SimrealError("robot_ip is missing", code="TRIALS", remedy="Pass robot_ip=ADDRESS, or use_sim=true.")
    if operator == "page" and config.host not in LOOPBACK and not config.token:
        raise SimrealError(
            f"whoever reaches {config.host} could move the arm", code="TOKEN_NEEDED",
            remedy="Pass token=..., or leave host out.",
        )  # fmt: skip


def check_checkpoints(checkpoints: list[Path]) -> None:
    """One or more, all different, with contracts that one driver can serve."""
    if not checkpoints:
        raise SimrealError("there is no checkpoint", code="CHECKPOINT", remedy="Pass checkpoints=[A,B].")
    if len({digest(path) for path in checkpoints}) < len(checkpoints):
        raise SimrealError(
            "two of the checkpoints are the same", code="CHECKPOINT", remedy="Name each one once, in checkpoints=[A,B]."
        )
    first, *others = map(_served, checkpoints)
    for path, contract in zip(checkpoints[1:], others, strict=True):
        if contract != first:
            fields = [k for k in options.write(first) if getattr(first, k) != getattr(contract, k)]
            raise SimrealError(
                f"the contracts of {checkpoints[0]} and {path} differ: {', '.join(fields)}", code="MIXED_CONTRACTS",
                remedy="Compare checkpoints that the same robot can serve without a restart, or make trials of each.",
            )  # fmt: skip


def _served(checkpoint: Path) -> PolicyContract:
    """What the driver has to serve. Trials have no store, so how late the arm was in training changes nothing."""
    contract = PolicyContract.read(checkpoint)
    return replace(contract, statistics_hash="", action=replace(contract.action, motion_s=None))


def header(config: TrialsConfig, protocol: Protocol, checkpoints: list[Path]) -> dict[str, Any]:
    """What must stay the same for trials to go on. The checkpoints are in key.json: the log has letters only."""
    written = {k: v for k, v in options.write(protocol).items() if k != "checkpoints"}
    return {
        "version": 1, "protocol": written, "checkpoints": len(checkpoints), "use_sim": config.use_sim,
        "twin": config.twin if config.use_sim else "", "arm_id": config.arm_id,
    }  # fmt: skip


def detection(name: str, view: Viewpoint) -> Detect | None:
    """The detector of this name for a camera; None without one."""
    if not name:
        return None
    detector = load(name)
    return lambda before, after, scene, width_m: detector(before, after, scene, view, width_m)


def _viewpoint(protocol: Protocol, store: Path | None) -> Viewpoint:
    view = protocol.view
    return seen_from(Viewpoint(view.position, view.rotation_xyzw, view.fov_y_deg), store, view.camera)


def _conduct(config: TrialsConfig, operator: str, session: Session, view: Viewpoint, out: Path) -> None:
    """Drive the session, with its front end beside it."""
    console = Console()
    if operator == "twin":
        threading.Thread(target=_tell, args=(session, console), daemon=True).start()
        session.drive()
        return
    failed: list[BaseException] = []

    def drive() -> None:
        try:
            session.drive()
        except BaseException as error:  # raised again where the command ends
            failed.append(error)

    driver = threading.Thread(target=drive, name="session", daemon=True)
    driver.start()
    try:
        if operator == "terminal":
            operate(session, view, config.who or getpass.getuser(), out)
        else:
            from deployment.operator_page import Page  # its framework is an extra

            with Page(session, view, config.host, config.port, config.token) as page:
                console.print(f"the operator's page: {page.address} (Ctrl-C ends; the same command goes on)")
                while driver.is_alive():
                    driver.join(0.5)
    except KeyboardInterrupt:
        console.print("broken off; the same command goes on")
    finally:
        session.close()
        driver.join(30.0)
    if failed:
        raise failed[0]


def _tell(session: Session, console: Console) -> None:
    """A line for every trial, in letters."""
    told = len(session.log.events)
    while session.stage not in ("done", "failed"):
        session.wait(0.5, session.revision)
        for event in session.log.events[told:]:
            told += 1
            if event["event"] == "end" and event["fault"]:
                console.print(f"trial {event['slot'] + 1}: fault, repeated: {event['fault']}", markup=False)
            elif event["event"] == "label":
                where = event["label"]["where"]
                letter = session.slots[event["slot"]].letter
                text = event["label"]["outcome"] + f" at {where}" * bool(where)
                console.print(f"trial {event['slot'] + 1} of {len(session.slots)}, {letter}: {text}", markup=False)


def _account(out: Path, conductor: Conductor) -> None:
    """What the trials were made on, for the report."""
    found = machine("mujoco", "torch", "franky-control", "franky-sim")
    p99 = {
        name: float(np.quantile(values, 0.99)) if values else None
        for name, values in (("latency_ms", conductor.latency_ms), ("period_error_ms", conductor.period_error_ms))
    }
    write_json(out / "machine.json", {"commit": commit(), "machine": found, "p99": p99})


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


command = Command(
    name="trials", help="Blinded, paired trials of checkpoints on the arm or on its twin.", schema=TrialsConfig,
    run=run, subject="protocol",
)  # fmt: skip
