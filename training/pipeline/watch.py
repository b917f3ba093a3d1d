"""Lanes and policy workers of one host, as its boards show them: who is stuck, what one that is gone leaves behind."""

import time
from collections.abc import Mapping, Sequence

from training.pipeline.board import Board
from training.pipeline.status import Doing, Status

LOOK_S = 0.01  # between looks at a policy worker that decides


class LaneWatch:
    """Runs where the boards are.

    environments: lanes of each environment worker of the host. policies: lanes that each of its policy workers serves.
    patience: s that a step or a decision may take.
    """

    def __init__(
        self, board: Board, status: Status, environments: Mapping[int, Sequence[int]],
        policies: Mapping[int, Sequence[int]], patience: float,
    ):  # fmt: skip
        self.board, self.status, self.patience = board, status, patience
        self.environments, self.policies = environments, policies

    def stuck(self) -> dict[str, str]:
        """Workers that hang, and why."""
        found = {}
        for index, lanes in self.environments.items():
            if still := [lane for lane in lanes if self.status.stuck(f"lane {lane}", self.patience)]:
                what = f"lane {', '.join(map(str, still))} has not finished a step for {self.patience:g} s"
                found[f"environment worker {index}"] = what
        for index, lanes in self.policies.items():
            name = f"policy worker {index}"
            if self.status.still(name, self.patience) and self.board.unheard(lanes, self.patience):
                found[name] = f"it has not decided for {self.patience:g} s"
        return found

    def starting(self, rows: Sequence[str]) -> None:
        """Whoever had these rows is gone, and another will have them."""
        for row in rows:
            self.status.turn(row, Doing.STARTING)

    def forget(self, worker: int) -> int:
        """Drop what the lanes of an environment worker that is gone asked for; for `leave`."""
        self.board.forget(self.environments[worker])
        return int(self.board["forwards"][self._policy_of(worker)])

    def leave(self, worker: int, forwards: int) -> None:
        """Wait while its policy worker may still be deciding for it: the fragments are not free before.

        At most until a policy worker that decides for so long would be replaced.
        """
        policy, end = self._policy_of(worker), time.monotonic() + self.patience
        row = self.status.rows.index(f"policy worker {policy}")
        while time.monotonic() < end:
            if self.board["forwards"][policy] > forwards or self.status["doing"][row] == Doing.GATHERING:
                return
            time.sleep(LOOK_S)

    def _policy_of(self, worker: int) -> int:
        lane = self.environments[worker][0]
        return next(policy for policy, lanes in self.policies.items() if lane in lanes)
