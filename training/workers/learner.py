"""The learner: data-parallel updates straight from the rollout block, whatever the algorithm."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from training import augmentation, state
from training.algorithms import surrogate
from training.algorithms.auxiliary import privileged_loss
from training.algorithms.base import ActorCritic, Algorithm, adapted, explained_variance, value_weight
from training.pipeline.block import RolloutBlock, RolloutShape
from training.pipeline.judging import Judged, judge
from training.pipeline.status import Doing
from training.pipeline.weights import WeightsBlock, WeightsLayout, sent
from training.workers import gap, sharding
from training.workers.averaging import average
from training.workers.critic import LossError, PrivilegedCritic
from training.workers.gap import LogProbGap
from training.workers.memory import FRAME, Memory
from training.workers.precision import Precision
from training.workers.rendezvous import meet
from training.workers.room import Room
from training.workers.rounds import Rounds
from training.workers.seen import look, recalled, template
from training.workers.targets import Targets, targets
from training.workers.watched import Watched
from vla import lora
from vla.lora import FULL, Lora
from vla.policy import Policy
from vla.results import commit, write_json
from vla.types import ModelInputs

STATE, PERCEPTION, RATES = "learner", "perception", "rates.json"
STATISTICS = (
    "loss",
    "policy_loss",
    "value_loss",
    "entropy",
    "privileged_loss",
    "approx_kl",
    "clip_fraction",
    "grad_norm",
    "explained_variance",
)


@dataclass(frozen=True)
class LearnerOptions:
    """world: learners. checkpoint: to begin with. layout, weights: of the block for the policy worker, and its name.

    config: how to learn. seed, iterations: of the run. threads: of torch. rendezvous: URL where learners meet.
    micro_batch: samples in a forward and backward pass at most. adapters: that are trained, if any.
    dtype: of frozen weights and activations, "" for that of the checkpoint; weights that are trained are float32.
    offload: between updates the weights leave the device. compile: the blocks of the model. shard: its weights.
    """

    world: int
    checkpoint: str
    layout: WeightsLayout
    weights: str
    config: Algorithm
    seed: int
    iterations: int
    threads: int
    rendezvous: str
    micro_batch: int | None = None
    adapters: Lora = FULL
    dtype: str = ""
    offload: bool = False
    compile: bool = False
    shard: bool = False


@dataclass
class Update:
    """What an update did: means of its minibatches' statistics."""

    metrics: dict[str, float]


class Learner(Watched):
    """Runs in a Ray actor of its own, one for each rank."""

    def __init__(self, rank: int, options: LearnerOptions, device: str, shape: RolloutShape, block: str):
        torch.set_num_threads(options.threads)
        torch.set_flush_denormal(True)  # improbable bins make them, and processors handle them slowly
        config, seed, adapters = options.config, options.seed, options.adapters
        self.rank, self.world, self.config, self.seed, self.iterations = (
            rank, options.world, config, seed, options.iterations
        )  # fmt: skip
        self.device, self.checkpoint = torch.device(device), options.checkpoint
        self.valued = config if isinstance(config, ActorCritic) else None
        self.adapted, self.rounds = 1.0, Rounds()  # factor of the learning rates by the KL divergence
        kind = getattr(torch, options.dtype) if options.dtype else None
        self.policy = Policy.load(options.checkpoint, None, "learner", device=device, dtype=kind)
        self.template = template(self.policy, shape)
        self.looks = not config.train_vision and self.template is None
        self.block = RolloutBlock(shape, block)
        self.weights = WeightsBlock(options.layout, options.weights)
        self.micro_batch = options.micro_batch
        model: Any = self.policy.model
        self.adapters = adapters
        if adapters.rank:
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # the same on every rank
                lora.attach(model, adapters)
        if config.gradient_checkpointing:
            model.checkpoint_gradients()
        self.precision = Precision(model)
        if self.world > 1:
            meet(options.rendezvous, self.rank, self.world, self.device)
        self.is_sharded = options.shard and self.world > 1
        if self.is_sharded:
            sharding.shard(model, self.device, self.world, self.precision.kind, keep_trained=bool(adapters.rank))
        if options.compile:
            for block in model.blocks():
                block.compile()
        head = [] if getattr(model, "value_head", None) is None else list(model.value_head.parameters())
        owned = {id(p) for p in head}
        reached = model.parameters() if config.train_vision else model.behind_seen()
        owned |= {id(p) for n, p in model.named_parameters() if n.startswith(tuple(getattr(model, "idle", ())))}
        trunk = [p for p in reached if id(p) not in owned and p.requires_grad]
        groups = [{"params": trunk, "lr": config.learning_rate}]
        if self.valued is not None and self.valued.critic == "head":
            groups.append({"params": head, "lr": self.valued.value_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, betas=(0.9, 0.95))
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        is_told = self.valued is not None and self.valued.critic == "privileged"
        self.critic = PrivilegedCritic(shape.critic, self.valued, seed) if self.valued and is_told else None
        self.seeing: list[nn.Parameter] = _seeing(model) if config.perception_steps and shape.privileged else []
        self.seeing_optimizer = (
            torch.optim.AdamW(self.seeing, config.perception_learning_rate, betas=(0.9, 0.95)) if self.seeing else None
        )
        self.room = Room(model, device, self.optimizer, self.seeing_optimizer) if options.offload else None
        self.memory = Memory(config.perception_memory // self.world)
        self.gap: LogProbGap | None = None  # while it is wanted

    def publish(self, version: int) -> None:
        """Offer the weights after `version` updates to the policy worker; those of rank 0 stand for all."""
        offered = sent(self.policy.model, self.adapters)
        if self.is_sharded:
            offered = sharding.whole(offered)
        if self.rank == 0:
            self.weights.write(offered, version)

    def judge(self, number: int) -> Judged:
        """How many groups of the round in the block teach something; number: of the round, from 0. Raises DataError."""
        if number == 0:
            self.rounds.forget()
        return judge(self._block(), self.config)

    def set_aside(self) -> None:
        """Keep what the round in the block teaches: another one is needed."""
        flat, rows = self._samples(self._block())
        self.rounds.set_aside(flat, rows)

    def update(self, iteration: int) -> Update:
        """All epochs on the rollout in the block, and on what was set aside."""
        self.row.turn_to(Doing.UPDATING, iteration)
        began = time.perf_counter()
        if self.room is not None:
            self.room.enter()
        config = self.config
        flat, rows = self.rounds.join(*self._samples(self._block()))
        told = flat["mask"]
        known = {"samples": float(len(rows))}
        if self.valued is not None:
            known["explained_variance"] = explained_variance(flat["values"][told], flat["returns"][told])
        if config.normalize_advantages:
            flat["advantage"] = surrogate.normalize(flat["advantage"], told)
        factor = self._set_rates(iteration)
        generator = torch.Generator().manual_seed(self._seed(iteration))
        totals: dict[str, list[float]] = {}
        if self.critic is not None:
            totals["value_loss"] = self.critic.fit(flat, rows, iteration, generator)
        if self._improves(iteration):
            shares = [rows[rank :: self.world] for rank in range(self.world)]
            seen = look(self.policy, self.precision, flat, shares[self.rank]) if self.looks else None
            self._improve(flat, seen, shares, iteration, range(config.epochs), generator, totals)
        if self.seeing:
            self._see(flat, rows, iteration, totals)
        return self._finish(iteration, factor, totals, known, began)

    def _block(self) -> dict[str, torch.Tensor]:
        return {k: torch.from_numpy(v) for k, v in self.block.arrays.items()}

    def _samples(self, block: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """All rows of a rollout, one after the other, and the numbers of those that are learned from."""
        found = self._targets(block)
        flat = {k: v[:-1].flatten(0, 1) for k, v in block.items() if len(v) == len(found.values)}
        flat.update(
            values=found.values[:-1].flatten(0, 1),
            executed=found.executed.flatten(0, 1),
            advantage=found.advantage.flatten(0, 1),
            returns=found.returns.flatten(0, 1),
            weight=found.weight.flatten(0, 1),
            mask=found.mask.flatten(0, 1),
        )
        return flat, torch.nonzero(found.keep.flatten()).flatten()

    def _targets(self, block: dict[str, torch.Tensor]) -> Targets:
        """Advantages, returns and weights of a rollout."""
        return targets(block, self.config, self.critic, self.valued is not None)

    def _seed(self, iteration: int) -> int:
        return int(np.random.SeedSequence([self.seed, iteration]).generate_state(1)[0])

    def _set_rates(self, iteration: int) -> float:
        """Learning rates of an iteration; their factor."""
        factor = self.config.rate_factor(iteration, self.iterations) * self.adapted
        rates = [self.config.learning_rate, *([self.valued.value_learning_rate] if self.valued else [])]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate * factor
        return factor

    @property
    def _critic_iterations(self) -> int:
        return self.valued.critic_iterations if self.valued else 0

    def _improves(self, iteration: int) -> bool:
        """Whether an iteration reaches the model at all: its value head is trained from the first on."""
        return iteration >= self._critic_iterations or self.critic is None

    def _finish(
        self, iteration: int, factor: float, totals: dict[str, list[float]], numbers: dict[str, float], began: float
    ) -> Update:
        """Offer the weights; what the update did."""
        self.publish(iteration + 1)
        if self.room is not None:
            self.room.leave()
        metrics = dict.fromkeys(STATISTICS, 0.0) | dict.fromkeys(gap.NAMES, np.nan)
        metrics |= {k: float(np.mean(v)) for k, v in totals.items()} | numbers
        metrics.update(
            learning_rate=self.config.learning_rate * factor * (iteration >= self._critic_iterations),
            updates=float(len(totals.get("loss", ()))), last_kl=totals.get("approx_kl", [0.0])[-1],
            update_s=time.perf_counter() - began,
        )  # fmt: skip
        if self.config.adaptive_kl is not None and metrics["updates"]:
            self.adapted = adapted(self.adapted, metrics["last_kl"], self.config.adaptive_kl)
        self.row.turn_to(Doing.IDLE)
        return Update(metrics)

    def _improve(
        self,
        flat: dict[str, torch.Tensor],
        seen: Any,
        shares: list[torch.Tensor],
        iteration: int,
        epochs: range,
        generator: torch.Generator,
        totals: dict[str, list[float]],
    ) -> None:
        """The passes over the rows of every rank; their statistics are added to `totals`."""
        count = self._minibatches(sum(len(share) for share in shares))
        for epoch in epochs:
            orders = [share[torch.randperm(len(share), generator=generator)] for share in shares]
            parts = [order.tensor_split(count) for order in orders]
            for minibatch, chosen in enumerate(zip(*parts, strict=True)):  # rows of every rank
                self.optimizer.zero_grad(set_to_none=False)
                numbers: dict[str, torch.Tensor] = {}
                total = torch.as_tensor(sum(flat["weight"][rows].sum() for rows in chosen))
                self.gap = LogProbGap() if epoch == minibatch == 0 else None
                most = max(len(rows) for rows in chosen)
                self._accumulate(flat, seen, chosen[self.rank], most, total, iteration, numbers)
                statistics = self._step(numbers, iteration, epoch, minibatch)
                if self.gap is not None:
                    statistics.update(self.gap.over(self.world))
                for key, value in statistics.items():
                    totals.setdefault(key, []).append(value)
                if self.config.target_kl is not None and statistics["approx_kl"] > self.config.target_kl:
                    return

    def _minibatches(self, samples: int) -> int:
        """Of a pass over so many samples: every rank has one in each."""
        config = self.config
        wanted = config.minibatches if config.batch_size is None else round(samples / config.batch_size)
        return max(1, min(wanted, samples // self.world))

    def _accumulate(
        self,
        flat: dict[str, torch.Tensor],
        seen: Any,
        rows: torch.Tensor,
        most: int,
        total: torch.Tensor,
        iteration: int,
        numbers: dict[str, torch.Tensor],
    ) -> None:
        """Add the gradients of these rows, in micro-batches, and their statistics to `numbers`.

        most: rows of the rank that has most of them; all have as many micro-batches, since sharded ones wait for each
            other in each.
        total: weight of all ranks' rows in the step, by which means over these rows become their share of a mean.
        """
        least = max(1, most - (self.world > 1))  # ranks differ by one row at most
        for mine in rows.tensor_split(min(least, -(-most // (self.micro_batch or most)))):
            batch = {k: v[mine].to(self.device) for k, v in flat.items()}
            loss, terms = self._loss(flat, batch, seen, mine, iteration)
            share = self.world * batch["weight"].sum() / total
            loss = loss * share
            for key, value in {**terms, "loss": loss.detach() / share}.items():
                term = share * value.detach()
                numbers[key] = numbers[key] + term if key in numbers else term
            loss.backward()

    def _loss(
        self, flat: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], seen: Any, mine: torch.Tensor,
        iteration: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """Mean loss of a batch, the rows `mine` of `flat`, and statistics."""
        config = self.config
        inputs: Any = (batch[k] for k in ("images", "state", "tokens"))
        tokens = batch["action_tokens"].to(torch.int64)
        if self.template is not None:
            seen = recalled(self.template, batch)
        elif seen is not None:
            seen = type(seen)(*(None if value is None else value[mine] for value in seen))
        with self.precision.context(self.device):
            found = self.policy.evaluate_actions(
                ModelInputs(*inputs), tokens, config.temperature, seen, entropy_gradient=config.entropy_coef != 0
            )
        executed, weight = batch["executed"], batch["weight"]
        if self.gap is not None:
            newest = batch["versions"] == iteration  # else the learner has moved on since
            self.gap.add(found.log_probs.detach(), batch["log_probs"], executed & newest[:, None])
        actor, statistics = self._actor_loss(flat, batch, mine, found.log_probs)
        entropy = surrogate.weighted_mean(found.entropy, weight[..., None].expand_as(found.entropy))
        critic_only = iteration < self._critic_iterations
        loss = actor.new_zeros(()) if critic_only else actor - config.entropy_coef * entropy
        terms = {"policy_loss": actor, "entropy": entropy}
        if self.valued is not None and self.critic is None:
            counts = value_weight(weight, found.values)
            terms["value_loss"] = self.valued.value_loss(found.values, batch["values"], batch["returns"], counts)
            loss = loss + self.valued.value_coef * terms["value_loss"]
        kl = surrogate.divergence(found.log_probs.detach(), batch["log_probs"], executed)
        return loss, {**terms, **statistics, "approx_kl": kl}

    def _actor_loss(
        self, flat: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], mine: torch.Tensor, log_probs: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Against the policy that acted."""
        unit = self.config.ratio
        new, old = (surrogate.group(x, batch["executed"], unit) for x in (log_probs, batch["log_probs"]))
        return self.config.loss(new, old, *surrogate.per_unit(batch["advantage"], batch["weight"], new))

    def _step(self, numbers: dict[str, torch.Tensor], iteration: int, epoch: int, minibatch: int) -> dict[str, float]:
        """A step of the optimizer with the gradients so far; statistics over all ranks."""
        norm = self._average(self.parameters, numbers)
        summary = {k: float(v) for k, v in numbers.items()}
        if not all(np.isfinite(v) for v in summary.values()) or not np.isfinite(norm):
            raise LossError(iteration, epoch, minibatch, {**summary, "grad_norm": norm})
        if iteration < self._critic_iterations:  # the trunk stays as it is, and so do its moments
            for parameter in self.optimizer.param_groups[0]["params"]:
                parameter.grad = None
        self.optimizer.step()
        return {**summary, "grad_norm": norm}

    def _see(
        self,
        flat: dict[str, torch.Tensor],
        rows: torch.Tensor,
        iteration: int,
        totals: dict[str, list[float]],
    ) -> None:
        """The auxiliary phase: steps on remembered frames that train the perception alone."""
        assert self.seeing_optimizer is not None
        model: Any = self.policy.model
        self.memory.add({k: flat[k][rows[self.rank :: self.world]] for k in FRAME})
        generator = torch.Generator().manual_seed(self._seed(iteration) + 1 + self.rank)
        factor = self.config.rate_factor(iteration, self.iterations)
        for group in self.seeing_optimizer.param_groups:
            group["lr"] = self.config.perception_learning_rate * factor
        for step in range(self.config.perception_steps):
            batch = self.memory.sample(self.config.perception_batch // self.world, generator)
            inputs: Any = (batch[k] for k in ("images", "state", "tokens"))
            seen = augmentation.augment(ModelInputs(*inputs), generator)
            given = (part.to(self.device) for part in (seen.images, seen.state, seen.tokens))
            with self.precision.context(self.device):
                told = model.perceive(*given)
            loss = privileged_loss(told, batch["privileged"].to(self.device))
            numbers = {"privileged_loss": loss.detach()}
            self.seeing_optimizer.zero_grad(set_to_none=False)
            loss.backward()
            norm = self._average(self.seeing, numbers)
            shown = float(numbers["privileged_loss"])
            if not np.isfinite(shown) or not np.isfinite(norm):
                raise LossError(iteration, 0, step, {"privileged_loss": shown, "grad_norm": norm})
            totals.setdefault("privileged_loss", []).append(shown)
            self.seeing_optimizer.step()

    def _average(self, parameters: list[nn.Parameter], numbers: dict[str, torch.Tensor]) -> float:
        """Gradients and statistics over all ranks; the norm of the gradients before they are clipped."""
        is_averaged = self.is_sharded and not self.adapters.rank
        return average(parameters, numbers, self.world, is_averaged, self.config.grad_clip, self.row)

    def save(self, folder: str) -> None:
        """Weights that are trained, and optimizers."""
        with self.row.during(Doing.SAVING):
            for name, module, optimizer in self._parts():
                if self.is_sharded and not self.adapters.rank:
                    sharding.save(Path(folder), name, self.rank, self.world, module, optimizer)
                elif self.rank == 0:
                    state.save(Path(folder) / f"{name}.safetensors", module, optimizer, 0)
            if self.critic is not None and self.rank == 0:
                self.critic.save(Path(folder))
            if self.config.adaptive_kl is not None and self.rank == 0:
                write_json(Path(folder) / RATES, {"adapted": self.adapted})

    def restore(self, folder: str, iteration: int) -> None:
        """What `save` wrote before this iteration; the policy worker gets the weights, too."""
        for name, module, optimizer in self._parts():
            if self.is_sharded and not self.adapters.rank:
                sharding.restore(Path(folder), name, module, optimizer)
            else:
                state.restore(Path(folder) / f"{name}.safetensors", module, optimizer)
        if self.critic is not None:
            self.critic.restore(Path(folder))
        if self.config.adaptive_kl is not None:
            self.adapted = json.loads((Path(folder) / RATES).read_text())["adapted"]
        self.publish(iteration)

    def _parts(self) -> list[tuple[str, nn.Module, torch.optim.Optimizer]]:
        """Names of the files of a state, and what is in them; the whole model comes last."""
        model = self.policy.model
        trained = nn.ParameterList([*lora.trained(model).values()]) if self.adapters.rank else model
        parts: list[tuple[str, nn.Module, torch.optim.Optimizer]] = []
        if self.seeing_optimizer is not None:
            parts.append((PERCEPTION, nn.ParameterList(self.seeing), self.seeing_optimizer))
        return [*parts, (STATE, trained, self.optimizer)]

    def export(self, folder: str, curve: dict[str, Any], config: dict[str, Any]) -> None:
        """The deployable bundle, from a fresh copy of the one that training began with."""
        from vla import checkpoint
        from vla.policy import Provenance

        trained = sent(self.policy.model, self.adapters)
        if self.is_sharded:
            trained = sharding.whole(trained)
        if self.rank != 0:
            return
        policy = Policy.load(self.checkpoint, None, "learner")
        if self.adapters.rank:
            lora.attach(policy.model, self.adapters)
        precision = Precision(policy.model)
        with torch.no_grad():
            for name, own in sent(policy.model, self.adapters).items():
                own.copy_(trained[name])
        if self.adapters.rank:
            with precision.context(torch.device("cpu")):
                deviation = lora.merge(policy.model, policy.probe)
            print(
                f"the adapters are merged; the outputs of a test image deviate by {deviation:.2g} at most", flush=True
            )
        precision.undo()
        checkpoint.save(policy, folder, Provenance(commit(), config, self.seed, curve), overwrite=True)


def _seeing(model: Any) -> list[nn.Parameter]:
    """What the auxiliary phase trains; nothing if the model has no auxiliary output."""
    return [p for p in model.seeing() if p.requires_grad] if hasattr(model, "seeing") else []
