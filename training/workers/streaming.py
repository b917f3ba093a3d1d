"""The learner of the asynchronous schedule: takes finished fragments as they come, while others are rolled out.

The first pass over a fragment needs no earlier log-probabilities: its proximal policy is the present one, the ratio is
1 and what remains is the policy gradient with truncated importance weights. Further passes are clipped against the
log-probabilities that the first one found.
"""

import time
from pathlib import Path
from typing import Any

import torch

from training.algorithms import surrogate
from training.algorithms.base import explained_variance
from training.pipeline.bell import Bell, PipelineTimeout
from training.pipeline.block import RolloutShape
from training.pipeline.status import Doing
from training.workers.gap import LogProbGap
from training.workers.learner import Learner, LearnerOptions, Update
from training.workers.seen import look
from training.workers.targets import Targets


class StreamingLearner(Learner):
    """Runs in a Ray actor of its own, one for each rank; all take the same fragments in the same order.

    per_update: fragments. deadline_s: longest wait for one.
    """

    def __init__(
        self, rank: int, options: LearnerOptions, device: str, shape: RolloutShape, block: str, bells: str,
        per_update: int, deadline_s: float,
    ):  # fmt: skip
        super().__init__(rank, options, device, shape, block)
        self.per_update, self.deadline_s = per_update, deadline_s
        self.bell = Bell(Path(bells) / f"learner{rank}")
        self.scale = torch.zeros(per_update, 3, dtype=torch.float64)  # count, sum and sum of squares, in turn
        self.scaled = 0  # fragments so far
        whole = {k: torch.from_numpy(v) for k, v in self.block.arrays.items()}
        self.told = {k: v for k, v in whole.items() if k != "images"}
        width = shape.chunk if self.critic else shape.values if self.valued else 1
        own = {"values": width, "advantage": width, "unscaled": width, "returns": width, "weight": shape.chunk,
               "executed": shape.chunk}  # fmt: skip
        rows = (shape.fragments, shape.decisions + 1, shape.slots)
        self.found = {k: torch.zeros(*rows, size, dtype=torch.bool if k == "executed" else None)
                      for k, size in own.items()}  # fmt: skip
        self.found["proximal"] = torch.zeros(*rows, shape.chunk, shape.action_dim)
        after = {k: v for k, v in whole.items() if v.shape[1] == rows[1]}
        self.flat = {k: v.flatten(0, 2) for k, v in {**after, **self.found}.items()}
        self.first_pass = False

    def update(self, iteration: int) -> Update:
        """The fragments of an update as they come, then the passes that need all of them."""
        began = time.perf_counter()
        self.row.turn_to(Doing.UPDATING, iteration)
        config, factor = self.config, self._set_rates(iteration)
        totals: dict[str, list[float]] = {}
        shares: list[list[torch.Tensor]] = [[] for _ in range(self.world)]
        seen: Any = None
        ages: list[torch.Tensor] = []
        each = self.per_update // config.minibatches
        for minibatch in range(config.minibatches):
            self.optimizer.zero_grad(set_to_none=False)
            self.gap = LogProbGap() if minibatch == 0 and self._improves(iteration) else None
            numbers: dict[str, torch.Tensor] = {}
            total = torch.zeros(())
            number, last = minibatch * each, (minibatch + 1) * each
            while number < last:
                most = 1 if self.is_sharded else last - number  # whose passes have to be everybody's
                with self.row.during(Doing.AWAITING, iteration):
                    fragments = self._arrived(iteration, number, most)
                number += len(fragments)
                taken = self._take(fragments)
                rows = torch.cat(taken)
                ages.append(iteration - self.flat["versions"][rows].float())
                for rank, share in enumerate(shares):
                    share += [part[rank :: self.world] for part in taken]
                if not self._improves(iteration):
                    continue
                mine = torch.cat(shares[self.rank][-len(taken) :])
                if self.looks:
                    seen = look(self.policy, self.precision, self.flat, mine, seen)
                self.first_pass = True
                self._accumulate(self.flat, seen, mine, -(-len(rows) // self.world), torch.ones(()), iteration, numbers)
                self.first_pass = False
                total += self.flat["weight"][rows].sum()
            if self._improves(iteration):
                self._rescale(numbers, total)
                statistics = self._step(numbers, iteration, 0, minibatch)
                if self.gap is not None:
                    statistics.update(self.gap.over(self.world))
                for key, value in statistics.items():
                    totals.setdefault(key, []).append(value)
        self.gap = None
        rows = torch.cat([part for parts in zip(*shares, strict=True) for part in parts])
        generator = torch.Generator().manual_seed(self._seed(iteration))
        if self.critic is not None:
            totals["value_loss"] = self.critic.fit(self.flat, rows, iteration, generator)
        if self._improves(iteration):
            if config.normalize_advantages:  # now that all are known
                self.flat["advantage"][rows] = surrogate.normalize(self.flat["unscaled"][rows], self._counted(rows))
            passes = range(1, config.epochs)
            self._improve(self.flat, seen, [torch.cat(s) for s in shares], iteration, passes, generator, totals)
        if self.seeing:
            self._see(self.flat, rows, iteration, totals)
        age = torch.cat(ages)
        numbers_of_update = {
            "explained_variance": self._explained(rows) if self.valued else 0.0, "samples": float(len(rows)),
            "staleness_mean": float(age.mean()), "staleness_max": float(age.max()),
        }  # fmt: skip
        return self._finish(iteration, factor, totals, numbers_of_update, began)

    def _arrived(self, iteration: int, number: int, most: int) -> list[int]:
        """The next fragment of this update, and up to `most` in all that are there already."""
        message = self.bell.wait(self.deadline_s)
        if message is None:
            what = f"fragment {number + 1} of {self.per_update} for update {iteration}"
            raise PipelineTimeout(f"learner {self.rank}", (), self.deadline_s, what)
        fragments = []
        while message is not None:
            fragment, update, _ = message
            if update != iteration:
                raise RuntimeError(f"learner {self.rank}: a fragment for update {update} in update {iteration}")
            fragments.append(fragment)
            if self.rank == 0:
                self.row.count("taken")
            message = self.bell.wait(0) if len(fragments) < most else None
        return fragments

    def _take(self, fragments: list[int]) -> list[torch.Tensor]:
        """Work out what fragments say; the samples of each as rows of `flat`."""
        found = self._targets({k: v[fragments].transpose(0, 1).flatten(1, 2) for k, v in self.told.items()})
        decisions, slots = len(found.keep), self.block.shape.slots
        advantage = self._normalized(found, slots) if self.config.normalize_advantages else found.advantage
        values = {"values": found.values[:-1], "advantage": advantage, "unscaled": found.advantage,
                  "returns": found.returns, "weight": found.weight, "executed": found.executed}  # fmt: skip
        for key, value in values.items():
            self.found[key][fragments, :decisions] = value.unflatten(1, (-1, slots)).transpose(0, 1)
        return [
            fragment * (decisions + 1) * slots + torch.nonzero(keep.flatten()).flatten()
            for fragment, keep in zip(fragments, found.keep.split(slots, 1), strict=True)
        ]

    def _normalized(self, found: Targets, slots: int) -> torch.Tensor:
        """Zero mean and unit variance over the last fragments, as many as an update has: those to come aren't known.

        A fragment, `slots` columns, counts for itself and for those after it, so that it does not matter which of
        them arrive together. Of more updates the mean would lag behind that of a critic that learns, and all actions
        of an update would seem better or worse than they are.
        """
        parts = []
        for advantage, mask in zip(found.advantage.split(slots, 1), found.mask.split(slots, 1), strict=True):
            chosen = advantage[mask].double()
            entry = torch.stack([chosen.new_tensor(chosen.numel()), chosen.sum(), (chosen**2).sum()])
            self.scale[self.scaled % len(self.scale)] = entry
            self.scaled += 1
            count, total, squares = self.scale.sum(0)
            mean = total / count.clamp(min=1)
            deviation = (squares / count.clamp(min=1) - mean**2).clamp(min=0).sqrt()
            scaled = (advantage - mean.float()) / (deviation.float() + 1e-8)
            parts.append(torch.where(mask, scaled, torch.zeros_like(scaled)))
        return torch.cat(parts, 1)

    def _rescale(self, numbers: dict[str, torch.Tensor], total: torch.Tensor) -> None:
        """Turn sums over control steps into means, now that their weight is known."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= total
        for key in numbers:
            numbers[key] = numbers[key] / total

    def _actor_loss(
        self, flat: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], mine: torch.Tensor, log_probs: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Clipped against the proximal policy, weighted by its probability over that of the policy that acted."""
        config, executed = self.config, batch["executed"]
        if self.first_pass:
            flat["proximal"][mine] = log_probs.detach().to(flat["proximal"].device)
        tokens = log_probs, flat["proximal"][mine].to(log_probs.device), batch["log_probs"]
        new, proximal, acted = (surrogate.group(x, executed, config.ratio) for x in tokens)
        importance, cut = surrogate.importance_weights(proximal, acted, config.importance_cap)
        advantage, weight = surrogate.per_unit(batch["advantage"], batch["weight"], new)
        loss, statistics = config.loss(new, proximal, advantage, weight, importance)
        statistics["truncated_share"] = surrogate.weighted_mean(cut, weight)
        statistics["importance"] = surrogate.weighted_mean(importance, weight)
        return loss, statistics

    def _explained(self, rows: torch.Tensor) -> float:
        mask = self._counted(rows)
        return explained_variance(self.flat["values"][rows][mask], self.flat["returns"][rows][mask])

    def _counted(self, rows: torch.Tensor) -> torch.Tensor:
        """Bool `[n, V]`: where values and advantages mean something."""
        executed = self.flat["executed"][rows]
        return executed if self.flat["values"].shape[-1] > 1 else executed.any(-1, keepdim=True)
