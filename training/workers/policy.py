"""The policy worker: decides for a stage as soon as all environment workers have shown it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.pipeline.bell import Bell, PipelineTimeout
from training.pipeline.block import RolloutBlock, RolloutShape
from vla import lora
from vla.lora import FULL, Lora
from vla.policy import Policy
from vla.types import ModelInputs


@dataclass
class PolicyLog:
    """Time in s that an iteration's forward passes took, and that the policy waited."""

    forward_s: float = 0.0
    wait_s: float = 0.0
    forwards: int = 0


class PolicyWorker:
    """Runs in a Ray actor of its own. slots: of each environment worker and stage, rows of the block."""

    def __init__(
        self,
        checkpoint: str,
        shape: RolloutShape,
        block: str,
        bells: str,
        slots: list[list[list[int]]],
        temperature: float,
        seed: int,
        threads: int,
        deadline_s: float,
        adapters: Lora = FULL,
    ):
        torch.set_num_threads(threads)
        self.policy = Policy.load(checkpoint, None, "policy worker")
        if adapters.rank:
            lora.attach(self.policy.model, adapters)
        self.block = RolloutBlock(shape, block)
        self.slots = slots
        self.stages = len(slots[0])
        self.rows = [np.concatenate([worker[stage] for worker in slots]) for stage in range(self.stages)]
        self.temperature, self.seed, self.deadline_s = temperature, seed, deadline_s
        self.bell = Bell(Path(bells) / "policy")
        self.environments = [Bell(Path(bells) / f"environment{i}") for i in range(len(slots))]

    def ready(self) -> int:
        """The process id, once everything is set up."""
        return os.getpid()

    def load(self, weights: dict[str, np.ndarray]) -> None:
        """Take over the learner's weights: those that it trains."""
        own = self.policy.model.state_dict()
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(torch.from_numpy(value.copy()))

    def rollout(self, iteration: int, fresh: bool) -> PolicyLog:
        """Decide rows 0 (if the episodes are fresh) or 1 up to T."""
        log = PolicyLog()
        total = self.block.shape.decisions + 1 - (0 if fresh else 1)
        arrived: dict[tuple[int, int], set[int]] = {}
        for _ in range(total * self.stages):
            stage, decision = self._next(arrived, log)
            began = time.perf_counter()
            self._decide(iteration, stage, decision)
            log.forward_s += time.perf_counter() - began
            log.forwards += 1
            for index, bell in enumerate(self.environments):
                bell.ring(index, stage, decision)
        return log

    def _next(self, arrived: dict[tuple[int, int], set[int]], log: PolicyLog) -> tuple[int, int]:
        """The next stage and decision that every environment worker has shown."""
        began = time.perf_counter()
        everyone = len(self.environments)
        while True:
            complete = next((key for key, workers in arrived.items() if len(workers) == everyone), None)
            if complete is not None:
                del arrived[complete]
                log.wait_s += time.perf_counter() - began
                return complete
            message = self.bell.wait(self.deadline_s)
            if message is None:
                heard = set.intersection(*arrived.values()) if arrived else set()
                missing = tuple(i for i in range(everyone) if i not in heard)
                where = ", ".join(f"stage {s}, decision {d}" for s, d in arrived) or "the first observations"
                raise PipelineTimeout("the policy worker", missing, self.deadline_s, where)
            worker, stage, decision = message
            arrived.setdefault((stage, decision), set()).add(worker)

    def _decide(self, iteration: int, stage: int, decision: int) -> None:
        rows, block = self.rows[stage], self.block
        inputs: Any = (torch.from_numpy(block[name][decision, rows]) for name in ("images", "state", "tokens"))
        answer = self.policy.sample(
            ModelInputs(*inputs), self.temperature, uniforms=self._uniforms(iteration, decision, rows)
        )
        block["action_tokens"][decision, rows] = answer.tokens.numpy()
        block["log_probs"][decision, rows] = answer.log_probs.numpy()
        block["values"][decision, rows] = answer.values.numpy()

    def _uniforms(self, iteration: int, decision: int, rows: np.ndarray) -> torch.Tensor:
        """Random numbers `[B, C, D]` that depend on slot and decision, not on the schedule."""
        size = (self.block.shape.chunk, self.block.shape.action_dim)
        draws = [
            np.random.Generator(
                np.random.Philox(key=[self.seed, int(row)], counter=[0, 0, iteration, decision])
            ).random(size)
            for row in rows
        ]
        return torch.from_numpy(np.stack(draws))
