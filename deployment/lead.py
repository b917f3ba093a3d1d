"""How long before a chunk wants the tool somewhere the arm has to be told so, docs/decisions/0013."""

from dataclasses import dataclass

from vla.contract import ActionSemantics
from vla.errors import SimrealError
from vla.rig import Delay

LONGEST_S = 0.2  # beyond, something else is wrong with the arm than its delay


@dataclass(frozen=True)
class Lead:
    """text: where it comes from, for the log."""

    seconds: float
    text: str


def lead(action: ActionSemantics, measured: Delay | None) -> Lead:
    """By how much the arm moves later than the one that the policy has learnt with; not less than nothing.

    An arm that is earlier than in training waits at its goal for the gripper; it is not slowed down.
    """
    if measured is None:
        return Lead(0.0, "no lead: the arm's delay has not been measured (`vla calibrate latency`)")
    if action.motion_s is None:
        return Lead(0.0, "no lead: the checkpoint does not say how late the arm moved in training")
    late = f"the arm moves {1e3 * measured.motion_s:.0f} ms after a command, in training {1e3 * action.motion_s:.0f} ms"
    seconds = max(0.0, measured.motion_s - action.motion_s)
    if seconds > LONGEST_S:
        raise SimrealError(
            f"{late}: more than {1e3 * LONGEST_S:.0f} ms apart", code="MOTION_DELAY",
            remedy="Measure again (`vla calibrate latency`), or train with it: env.settings.calibration=STORE.",
        )  # fmt: skip
    return Lead(seconds, f"{late}: told {1e3 * seconds:.0f} ms earlier")
