"""The learner: data-parallel PPO updates straight from the rollout block."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from training import state
from training.algorithms import ppo
from training.algorithms.gae import advantages, normalize
from training.algorithms.ppo import PPOConfig
from training.pipeline.block import RolloutBlock, RolloutShape
from vla.errors import SimrealError
from vla.policy import Policy
from vla.types import ModelInputs

# Parameters with a learning rate of their own, by the first part of their name.
VALUE_HEAD = ("value_head",)
PERCEPTION = ("vision_backbone", "locator")
STATE = "learner.safetensors"


class LossError(SimrealError):
    """A loss that is not finite; nothing was updated with it."""

    def __init__(self, iteration: int, epoch: int, minibatch: int, terms: dict[str, float]):
        shown = ", ".join(f"{k} {v:g}" for k, v in terms.items())
        super().__init__(
            f"the loss is not finite in iteration {iteration}, epoch {epoch}, minibatch {minibatch}: {shown}",
            code="NAN_LOSS",
            remedy="The iteration before is kept. Lower learning_rate or grad_clip and start anew.",
        )
        self.arguments = (iteration, epoch, minibatch, terms)

    def __reduce__(self) -> tuple[type, tuple[int, int, int, dict[str, float]]]:
        return LossError, self.arguments


@dataclass
class Update:
    """What an update did: means of its minibatches' statistics, and the weights for the policy workers."""

    metrics: dict[str, float]
    weights: dict[str, np.ndarray] | None


class Learner:
    """Runs in a Ray actor of its own, one for each rank."""

    def __init__(
        self, rank: int, world: int, checkpoint: str, shape: RolloutShape, block: str, config: PPOConfig,
        seed: int, iterations: int, threads: int, rendezvous: str,
    ):  # fmt: skip
        torch.set_num_threads(threads)
        self.rank, self.world, self.config, self.seed, self.iterations = rank, world, config, seed, iterations
        self.policy = Policy.load(checkpoint, None, "learner")
        self.block = RolloutBlock(shape, block)
        model = self.policy.model
        named = list(model.named_parameters())
        head = [p for n, p in named if n.startswith(VALUE_HEAD)]
        perception = [p for n, p in named if n.startswith(PERCEPTION)]
        trunk = [p for n, p in named if not n.startswith((*VALUE_HEAD, *PERCEPTION))]
        self.names = [n for n, _ in model.named_parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": trunk, "lr": config.learning_rate},
                {"params": perception, "lr": config.perception_learning_rate},
                {"params": head, "lr": config.value_learning_rate},
            ],
            weight_decay=config.weight_decay, betas=(0.9, 0.95),
        )  # fmt: skip
        self.parameters = [*trunk, *perception, *head]
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)

    def ready(self) -> int:
        """The process id, once everything is set up."""
        return os.getpid()

    def weights(self) -> dict[str, np.ndarray]:
        return {k: v.detach().numpy().copy() for k, v in self.policy.model.state_dict().items()}

    def update(self, iteration: int) -> Update:
        """All epochs on the rollout in the block."""
        began = time.perf_counter()
        config = self.config
        block = {k: torch.from_numpy(v) for k, v in self.block.arrays.items()}
        valid = ~block["boundary"][:-1]
        executed = block["executed"] & valid[..., None]
        values = block["values"]
        advantage, returns = advantages(
            block["rewards"], values, block["executed"], block["terminated"], valid, config.gamma, config.lam
        )
        width = values.shape[-1]
        value_mask = executed if width > 1 else executed.any(-1, keepdim=True)
        explained = ppo.explained_variance(values[:-1][value_mask], returns[value_mask])
        if config.normalize_advantages:
            advantage = normalize(advantage, value_mask)
        rows = torch.nonzero(valid.flatten()).flatten()
        flat = {k: v[:-1].flatten(0, 1) for k, v in block.items() if len(v) == len(values)}
        flat.update(
            executed=executed.flatten(0, 1),
            advantage=advantage.flatten(0, 1),
            returns=returns.flatten(0, 1),
            weight=self._weights(executed).flatten(0, 1),
        )
        factor = ppo.learning_rate_factor(config, iteration, self.iterations)
        critic_only = iteration < config.critic_iterations
        trunk, perception, head = self.optimizer.param_groups
        trunk["lr"] = 0.0 if critic_only else config.learning_rate * factor
        perception["lr"] = 0.0 if critic_only else config.perception_learning_rate * factor
        head["lr"] = config.value_learning_rate * (1.0 if critic_only else factor)
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, iteration]).generate_state(1)[0])
        )
        totals: dict[str, list[float]] = {}
        stopped = False
        for epoch in range(config.epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for minibatch, chosen in enumerate(order.tensor_split(config.minibatches)):
                statistics = self._step(flat, chosen, iteration, epoch, minibatch, critic_only)
                for key, value in statistics.items():
                    totals.setdefault(key, []).append(value)
                stopped = config.target_kl is not None and statistics["approx_kl"] > config.target_kl
                if stopped:
                    break
            if stopped:
                break
        metrics = {k: float(np.mean(v)) for k, v in totals.items()}
        metrics.update(
            explained_variance=explained, learning_rate=trunk["lr"], updates=float(len(totals["loss"])),
            last_kl=totals["approx_kl"][-1], update_s=time.perf_counter() - began,
        )  # fmt: skip
        return Update(metrics, self.weights() if self.rank == 0 else None)

    def _weights(self, executed: torch.Tensor) -> torch.Tensor:
        """Weight `[T, N, C]` of every control step in the loss."""
        weights = executed.float()
        if self.config.length_normalization:  # a slot's steps weigh as much as if all T x C had been valid
            share = weights.mean(dim=(0, 2), keepdim=True).clamp(min=1e-3)
            weights = weights / share
        return weights

    def _step(
        self,
        flat: dict[str, torch.Tensor],
        chosen: torch.Tensor,
        iteration: int,
        epoch: int,
        minibatch: int,
        critic_only: bool,
    ) -> dict[str, float]:
        config = self.config
        mine = chosen.tensor_split(self.world)[self.rank]
        batch = {k: v[mine] for k, v in flat.items()}
        inputs: Any = (batch[k] for k in ("images", "state", "tokens"))
        tokens = batch["action_tokens"].to(torch.int64)
        found = self.policy.evaluate_actions(ModelInputs(*inputs), tokens, config.temperature)
        executed, weight = batch["executed"], batch["weight"]
        new = ppo.group(found.log_probs, executed, config.ratio)
        old = ppo.group(batch["log_probs"], executed, config.ratio)
        advantage, unit_weight = self._per_unit(batch["advantage"], weight, new)
        actor, statistics = ppo.policy_loss(new, old, advantage, unit_weight, config)
        value_weight = weight if found.values.shape[-1] > 1 else weight.amax(-1, keepdim=True)
        critic = ppo.value_loss(found.values, batch["values"], batch["returns"], value_weight, config)
        entropy = ppo.weighted_mean(found.entropy, weight[..., None].expand_as(found.entropy))
        loss = config.value_coef * critic
        if not critic_only:
            loss = loss + actor - config.entropy_coef * entropy
        privileged = torch.zeros(())
        if found.auxiliary is not None and config.privileged_coef and not critic_only:
            privileged = ppo.privileged_loss(found.auxiliary, batch["privileged"])
            loss = loss + config.privileged_coef * privileged
        terms = {
            "loss": loss,
            "policy_loss": actor,
            "value_loss": critic,
            "entropy": entropy,
            "privileged_loss": privileged,
        }
        kl = ppo.divergence(found.log_probs.detach(), batch["log_probs"], executed)
        numbers = {k: v.detach() for k, v in {**terms, **statistics, "approx_kl": kl}.items()}
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        norm = self._average(numbers)
        summary = {k: float(v) for k, v in numbers.items()}
        if not all(np.isfinite(v) for v in summary.values()) or not np.isfinite(norm):
            raise LossError(iteration, epoch, minibatch, {**summary, "grad_norm": norm})
        self.optimizer.step()
        return {**summary, "grad_norm": norm}

    @staticmethod
    def _per_unit(
        advantage: torch.Tensor, weight: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantage `[B, V]` and weight `[B, C]` in the ratio's shape: `[B, C, D]`, `[B, C]` or `[B, 1]`."""
        if like.dim() == 3:
            return advantage[..., None].expand_as(like), weight[..., None].expand_as(like)
        if like.shape[1] == 1:
            per_chunk = weight.amax(-1, keepdim=True)
            total = (advantage * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1e-8)
            return (advantage if advantage.shape[1] == 1 else total), per_chunk
        return advantage.expand_as(like), weight

    def _average(self, numbers: dict[str, torch.Tensor]) -> float:
        """Average gradients and statistics over the ranks in one message, clip; the norm before clipping."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world > 1:
            flat = torch.cat([*(p.grad.flatten() for p in self.parameters), torch.stack([*numbers.values()])])
            dist.all_reduce(flat)
            flat /= self.world
            offset = 0
            for parameter in self.parameters:
                size = parameter.numel()
                parameter.grad.copy_(flat[offset : offset + size].view_as(parameter))
                offset += size
            numbers.update(zip(numbers, flat[offset:], strict=True))
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip))

    def save(self, folder: str) -> None:
        """Weights and optimizer."""
        state.save(Path(folder) / STATE, self.policy.model, self.optimizer, 0)

    def restore(self, folder: str) -> None:
        """What `save` wrote."""
        state.restore(Path(folder) / STATE, self.policy.model, self.optimizer)

    def export(self, folder: str, curve: dict[str, Any], config: dict[str, Any]) -> None:
        """The deployable bundle."""
        from vla import checkpoint
        from vla.policy import Provenance

        self.policy.model.eval()
        checkpoint.save(self.policy, folder, Provenance("", config, self.seed, curve), overwrite=True)
