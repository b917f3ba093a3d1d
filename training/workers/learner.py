"""The learner: data-parallel PPO updates straight from the rollout block."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from training import augmentation, state
from training.algorithms import ppo
from training.algorithms.gae import advantages, normalize
from training.algorithms.ppo import PPOConfig
from training.pipeline.block import RolloutBlock, RolloutShape
from vla import lora
from vla.errors import SimrealError
from vla.lora import FULL, Lora
from vla.policy import Policy
from vla.results import commit
from vla.types import ModelInputs

STATE, CRITIC, PERCEPTION = "learner.safetensors", "critic.safetensors", "perception.safetensors"
STATISTICS = (
    "loss",
    "policy_loss",
    "value_loss",
    "entropy",
    "privileged_loss",
    "approx_kl",
    "clip_fraction",
    "grad_norm",
)
GAP = ("rollout_logprob_gap_max", "rollout_logprob_gap_mean")  # not a number where no policy was trained
LOOK = 256  # frames at a time, where no gradients are wanted
FRAME = ("images", "state", "tokens", "privileged")  # what the memory keeps of a row


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


class Memory:
    """The last frames of all rollouts, in a ring: what the auxiliary loss needs never grows stale."""

    def __init__(self, capacity: int):
        self.capacity, self.count, self.next = capacity, 0, 0
        self.arrays: dict[str, torch.Tensor] = {}

    def add(self, rows: dict[str, torch.Tensor]) -> None:
        """Keep a copy of rows `[n, ...]`."""
        size = len(rows["state"])
        for key in FRAME:
            if key not in self.arrays:
                self.arrays[key] = rows[key].new_zeros((self.capacity, *rows[key].shape[1:]))
            self.arrays[key][(self.next + torch.arange(size)) % self.capacity] = rows[key]
        self.next = (self.next + size) % self.capacity
        self.count = min(self.capacity, self.count + size)

    def sample(self, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        chosen = torch.randint(self.count, (size,), generator=generator)
        return {key: array[chosen] for key, array in self.arrays.items()}


class Learner:
    """Runs in a Ray actor of its own, one for each rank."""

    def __init__(
        self, rank: int, world: int, checkpoint: str, shape: RolloutShape, block: str, config: PPOConfig,
        seed: int, iterations: int, threads: int, rendezvous: str, adapters: Lora = FULL,
    ):  # fmt: skip
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # improbable bins make them, and processors handle them slowly
        self.rank, self.world, self.config, self.seed, self.iterations = rank, world, config, seed, iterations
        self.policy = Policy.load(checkpoint, None, "learner")
        self.block = RolloutBlock(shape, block)
        model: Any = self.policy.model
        self.adapters = adapters
        if adapters.rank:
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # the same on every rank
                lora.attach(model, adapters)
        if config.gradient_checkpointing:
            model.checkpoint_gradients()
        head = list(model.value_head.parameters())
        owned = {id(p) for p in head}
        reached = model.parameters() if config.train_vision else model.behind_seen()
        owned |= {id(p) for n, p in model.named_parameters() if n.startswith(tuple(getattr(model, "idle", ())))}
        trunk = [p for p in reached if id(p) not in owned and p.requires_grad]
        groups = [{"params": trunk, "lr": config.learning_rate}]
        if config.critic == "head":
            groups.append({"params": head, "lr": config.value_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, betas=(0.9, 0.95))
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the same on every rank, like its batches: no gradients have to be exchanged
            self.critic = _critic(shape) if config.critic == "privileged" else None
        self.critic_optimizer = (
            torch.optim.AdamW(self.critic.parameters(), config.value_learning_rate) if self.critic else None
        )
        self.seeing: list[nn.Parameter] = _seeing(model) if config.perception_steps and shape.privileged else []
        self.seeing_optimizer = (
            torch.optim.AdamW(self.seeing, config.perception_learning_rate, betas=(0.9, 0.95)) if self.seeing else None
        )
        self.memory = Memory(config.perception_memory // world)
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)

    def ready(self) -> int:
        """The process id, once everything is set up."""
        return os.getpid()

    def weights(self) -> dict[str, np.ndarray]:
        """Those that are trained: all of them, or the adapters and heads."""
        model = self.policy.model
        trained = lora.trained(model) if self.adapters.rank else model.state_dict()
        # numpy has no bfloat16; float32 holds the same numbers
        return {k: v.detach().float().numpy().copy() for k, v in trained.items()}

    def update(self, iteration: int) -> Update:
        """All epochs on the rollout in the block."""
        began = time.perf_counter()
        config = self.config
        block = {k: torch.from_numpy(v) for k, v in self.block.arrays.items()}
        valid = ~block["boundary"][:-1]
        executed = block["executed"] & valid[..., None]
        values = self._values(block) if self.critic else block["values"]
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
            values=values[:-1].flatten(0, 1),
            executed=executed.flatten(0, 1),
            advantage=advantage.flatten(0, 1),
            returns=returns.flatten(0, 1),
            weight=self._weights(executed).flatten(0, 1),
        )
        factor = ppo.learning_rate_factor(config, iteration, self.iterations)
        seed = int(np.random.SeedSequence([self.seed, iteration]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        totals: dict[str, list[float]] = {}
        if self.critic is not None:
            totals["value_loss"] = self._fit_critic(flat, rows, iteration, generator)
        critic_only = iteration < config.critic_iterations
        for group, rate in zip(
            self.optimizer.param_groups, (config.learning_rate, config.value_learning_rate), strict=False
        ):
            group["lr"] = rate * factor
        if not critic_only or self.critic is None:
            self._improve(flat, rows, iteration, generator, critic_only, totals)
        if self.seeing:
            steady = 1.0 if iteration < config.warmup_iterations else factor
            self._see(flat, rows, seed, steady, totals, iteration)
        metrics = dict.fromkeys(STATISTICS, 0.0) | dict.fromkeys(GAP, np.nan)
        metrics.update({k: float(np.mean(v)) for k, v in totals.items()})
        metrics.update(
            explained_variance=explained, learning_rate=config.learning_rate * factor * (not critic_only),
            updates=float(len(totals.get("loss", ()))), last_kl=totals.get("approx_kl", [0.0])[-1],
            update_s=time.perf_counter() - began,
        )  # fmt: skip
        return Update(metrics, self.weights() if self.rank == 0 else None)

    def _weights(self, executed: torch.Tensor) -> torch.Tensor:
        """Weight `[T, N, C]` of every control step in the loss."""
        weights = executed.float()
        if self.config.length_normalization:  # a slot's steps weigh as much as if all T x C had been valid
            share = weights.mean(dim=(0, 2), keepdim=True).clamp(min=1e-3)
            weights = weights / share
        return weights

    def _values(self, block: dict[str, torch.Tensor]) -> torch.Tensor:
        """The privileged critic's `[T + 1, N, C]`, one for every action."""
        assert self.critic is not None
        with torch.no_grad():
            values: torch.Tensor = self.critic(block["critic_states"]).squeeze(-1)
        return values

    def _fit_critic(
        self, flat: dict[str, torch.Tensor], rows: torch.Tensor, iteration: int, generator: torch.Generator
    ) -> list[float]:
        """The privileged critic's passes over the rollout; its losses."""
        assert self.critic is not None and self.critic_optimizer is not None
        config, losses = self.config, []
        inputs = flat["critic_states"]
        for epoch in range(config.critic_epochs):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for minibatch, chosen in enumerate(order.tensor_split(config.minibatches)):
                values = self.critic(inputs[chosen]).squeeze(-1)
                weight = _value_weight(flat["weight"][chosen], values)
                loss = ppo.value_loss(values, flat["values"][chosen], flat["returns"][chosen], weight, config)
                losses.append(float(loss.detach()))
                if not np.isfinite(losses[-1]):
                    raise LossError(iteration, epoch, minibatch, {"value_loss": losses[-1]})
                self.critic_optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.critic.parameters(), config.grad_clip)
                self.critic_optimizer.step()
        return losses

    def _improve(
        self,
        flat: dict[str, torch.Tensor],
        rows: torch.Tensor,
        iteration: int,
        generator: torch.Generator,
        critic_only: bool,
        totals: dict[str, list[float]],
    ) -> None:
        """PPO's passes; their statistics are added to `totals`."""
        shares = [rows[rank :: self.world] for rank in range(self.world)]
        seen = None if self.config.train_vision else self._look(flat, shares[self.rank])
        for epoch in range(self.config.epochs):
            orders = [share[torch.randperm(len(share), generator=generator)] for share in shares]
            parts = [order.tensor_split(self.config.minibatches) for order in orders]
            for minibatch, chosen in enumerate(zip(*parts, strict=True)):  # rows of every rank
                statistics = self._step(flat, seen, chosen, iteration, epoch, minibatch, critic_only)
                for key, value in statistics.items():
                    totals.setdefault(key, []).append(value)
                if self.config.target_kl is not None and statistics["approx_kl"] > self.config.target_kl:
                    return

    def _look(self, flat: dict[str, torch.Tensor], rows: torch.Tensor) -> Any:
        """What the model's `see` returns for these rows, in arrays of all rows; the others are 0."""
        model: Any = self.policy.model
        whole: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for part in rows.split(LOOK):
                seen = model.see(*(flat[k][part] for k in ("images", "state", "tokens")))
                for key, value in seen._asdict().items():
                    if value is not None:
                        whole.setdefault(key, value.new_zeros((len(flat["state"]), *value.shape[1:])))[part] = value
        return seen._replace(**whole)

    def _step(
        self,
        flat: dict[str, torch.Tensor],
        seen: Any,
        chosen: tuple[torch.Tensor, ...],
        iteration: int,
        epoch: int,
        minibatch: int,
        critic_only: bool,
    ) -> dict[str, float]:
        config = self.config
        mine = chosen[self.rank]
        batch = {k: v[mine] for k, v in flat.items()}
        inputs: Any = (batch[k] for k in ("images", "state", "tokens"))
        tokens = batch["action_tokens"].to(torch.int64)
        if seen is not None:
            seen = type(seen)(*(None if value is None else value[mine] for value in seen))
        found = self.policy.evaluate_actions(
            ModelInputs(*inputs), tokens, config.temperature, seen, entropy_gradient=config.entropy_coef != 0
        )
        executed, weight = batch["executed"], batch["weight"]
        new = ppo.group(found.log_probs, executed, config.ratio)
        old = ppo.group(batch["log_probs"], executed, config.ratio)
        advantage, unit_weight = self._per_unit(batch["advantage"], weight, new)
        actor, statistics = ppo.policy_loss(new, old, advantage, unit_weight, config)
        entropy = ppo.weighted_mean(found.entropy, weight[..., None].expand_as(found.entropy))
        loss = torch.zeros(()) if critic_only else actor - config.entropy_coef * entropy
        terms = {"policy_loss": actor, "entropy": entropy}
        if self.critic is None:
            value_weight = _value_weight(weight, found.values)
            terms["value_loss"] = ppo.value_loss(found.values, batch["values"], batch["returns"], value_weight, config)
            loss = loss + config.value_coef * terms["value_loss"]
        # Means over this rank's samples become its share of the mean over all.
        share = self.world * weight.sum() / sum(flat["weight"][rows].sum() for rows in chosen)
        loss = loss * share
        terms["loss"] = loss / share
        gap = self._gap(found.log_probs.detach(), batch["log_probs"], executed) if epoch == minibatch == 0 else {}
        kl = ppo.divergence(found.log_probs.detach(), batch["log_probs"], executed)
        numbers = {k: share * v.detach() for k, v in {**terms, **statistics, "approx_kl": kl}.items()}
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        norm = self._average(self.parameters, numbers)
        summary = {k: float(v) for k, v in numbers.items()}
        if not all(np.isfinite(v) for v in summary.values()) or not np.isfinite(norm):
            raise LossError(iteration, epoch, minibatch, {**summary, "grad_norm": norm})
        if critic_only:  # the trunk stays as it is, and so do its moments
            for parameter in self.optimizer.param_groups[0]["params"]:
                parameter.grad = None
        self.optimizer.step()
        return {**summary, **gap, "grad_norm": norm}

    def _gap(self, log_probs: torch.Tensor, old: torch.Tensor, executed: torch.Tensor) -> dict[str, float]:
        """How far the log-probabilities of executed tokens are from the rollout's before the first step; all ranks.

        `[B, C, D]` each, executed `[B, C]`. What is left is rounding: another order of sums, a cache, bfloat16.
        """
        apart = (log_probs - old).abs() * executed[..., None]
        largest, sums = apart.amax(), torch.stack([apart.sum(), executed.sum() * float(old.shape[-1])])
        if self.world > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            dist.all_reduce(sums)
        return dict(zip(GAP, (float(largest), float(sums[0] / sums[1].clamp(min=1))), strict=True))

    def _see(
        self,
        flat: dict[str, torch.Tensor],
        rows: torch.Tensor,
        seed: int,
        factor: float,
        totals: dict[str, list[float]],
        iteration: int,
    ) -> None:
        """The auxiliary phase: steps on remembered frames that train the perception alone."""
        assert self.seeing_optimizer is not None
        model: Any = self.policy.model
        self.memory.add({k: flat[k][rows[self.rank :: self.world]] for k in FRAME})
        generator = torch.Generator().manual_seed(seed + 1 + self.rank)
        for group in self.seeing_optimizer.param_groups:
            group["lr"] = self.config.perception_learning_rate * factor
        for step in range(self.config.perception_steps):
            batch = self.memory.sample(self.config.perception_batch // self.world, generator)
            inputs: Any = (batch[k] for k in ("images", "state", "tokens"))
            seen = augmentation.augment(ModelInputs(*inputs), generator)
            loss = ppo.privileged_loss(model.perceive(seen.images, seen.state, seen.tokens), batch["privileged"])
            numbers = {"privileged_loss": loss.detach()}
            self.seeing_optimizer.zero_grad(set_to_none=False)
            loss.backward()
            norm = self._average(self.seeing, numbers)
            shown = float(numbers["privileged_loss"])
            if not np.isfinite(shown) or not np.isfinite(norm):
                raise LossError(iteration, 0, step, {"privileged_loss": shown, "grad_norm": norm})
            totals.setdefault("privileged_loss", []).append(shown)
            self.seeing_optimizer.step()

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

    def _average(self, parameters: list[nn.Parameter], numbers: dict[str, torch.Tensor]) -> float:
        """Average gradients and statistics over the ranks in one message, clip; the norm before clipping."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([*(g.flatten() for g in gradients), torch.stack([*numbers.values()])])
            dist.all_reduce(flat)
            flat /= self.world
            offset = 0
            for gradient in gradients:
                size = gradient.numel()
                gradient.copy_(flat[offset : offset + size].view_as(gradient))
                offset += size
            numbers.update(zip(numbers, flat[offset:], strict=True))
        return float(nn.utils.clip_grad_norm_(parameters, self.config.grad_clip))

    def save(self, folder: str) -> None:
        """Weights that are trained, and optimizers."""
        state.save(Path(folder) / STATE, self._trained(), self.optimizer, 0)
        if self.critic is not None and self.critic_optimizer is not None:
            state.save(Path(folder) / CRITIC, self.critic, self.critic_optimizer, 0)
        if self.seeing_optimizer is not None:
            state.save(Path(folder) / PERCEPTION, nn.ParameterList(self.seeing), self.seeing_optimizer, 0)

    def restore(self, folder: str) -> None:
        """What `save` wrote."""
        if self.seeing_optimizer is not None:
            state.restore(Path(folder) / PERCEPTION, nn.ParameterList(self.seeing), self.seeing_optimizer)
        if self.critic is not None and self.critic_optimizer is not None:
            state.restore(Path(folder) / CRITIC, self.critic, self.critic_optimizer)
        state.restore(Path(folder) / STATE, self._trained(), self.optimizer)

    def _trained(self) -> nn.Module:
        return (
            nn.ParameterList([*lora.trained(self.policy.model).values()]) if self.adapters.rank else self.policy.model
        )

    def export(self, folder: str, curve: dict[str, Any], config: dict[str, Any]) -> None:
        """The deployable bundle."""
        from vla import checkpoint
        from vla.policy import Provenance

        self.policy.model.eval()
        if self.adapters.rank:
            deviation = lora.merge(self.policy.model, self.policy.probe)
            print(
                f"the adapters are merged; the outputs of a test image deviate by {deviation:.2g} at most", flush=True
            )
        checkpoint.save(self.policy, folder, Provenance(commit(), config, self.seed, curve), overwrite=True)


def _critic(shape: RolloutShape) -> nn.Sequential:
    """The simulator's state `[..., K]` -> value `[..., 1]`."""
    return nn.Sequential(nn.Linear(shape.critic, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 1))


def _seeing(model: Any) -> list[nn.Parameter]:
    """What the auxiliary phase trains; nothing if the model has no auxiliary output."""
    return [p for p in model.seeing() if p.requires_grad] if hasattr(model, "seeing") else []


def _value_weight(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weights `[B, C]` of control steps as weights `[B, V]` of values."""
    return weight if values.shape[-1] > 1 else weight.amax(-1, keepdim=True)
