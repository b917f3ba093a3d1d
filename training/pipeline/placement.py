"""Who runs where and what may overlap, and the check that all parts of a run fit each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from training.algorithms.base import ActorCritic, Algorithm
from training.pipeline import group_checks
from training.pipeline.block import RolloutShape
from training.pipeline.crew import Crew, Node, here, man
from training.pipeline.probe import probe
from training.pipeline.seats import CPU
from training.pipeline.weights import WeightsLayout
from training.workers.seen import kept
from vla import lora as adapters
from vla.checkpoint import outline
from vla.codec import Codec
from vla.errors import SimrealError
from vla.lora import FULL, Lora
from vla.policy import Policy

AUTO = "auto"  # what is sized by memory


class EngineError(SimrealError):
    """The engine can't start or go on."""


@dataclass(frozen=True)
class PlacementConfig:
    """Who runs where and what may overlap.

    environments: devices of the simulators: cpu, all, 0-3, 0,2,4-7, or a share of the cluster's GPUs, 25-50%.
    policy: devices of the policy, likewise, with a policy worker on each.
    learner: devices of the learner, likewise, with a learner on each.
    compile: fuse the steps within the blocks of a large model: the first iteration takes a minute longer.
    dtype: of frozen weights and activations, null for that of the checkpoint; what is trained stays float32.
    offload: whoever rests leaves its device's memory to the others that sit there.
    schedule: synchronous, rollout and update take turns; or asynchronous, they go on side by side.
    environment_workers: processes that step environments, in all.
    environment_nodes: those on processors sit on so many nodes of a cluster; null for all that can have some.
    environment_resource: and only on nodes that declare this resource to Ray; "" for any node.
    stages: synchronous: groups of environments of a worker that take turns; 1 is sequential, 2 and more pipelined.
    lanes: asynchronous: groups of environments of a worker that step on their own, each in a thread.
    batch_max: asynchronous: environments in a forward pass at most, null for all that a policy worker serves.
    batch_wait_ms: asynchronous: how long the policy waits for more of them after the first.
    staleness: asynchronous: updates that the policy may have had since a decision that is learnt from; 0 for none.
    fragments_per_update: asynchronous: an update takes so many fragments, `decisions` chunks of a lane each; null for
        as many as there are lanes, so that it has as many samples as a synchronous one.
    policy_workers: processes that decide, each for a part of the environment workers of its node; so many on every
        node that has some. GPUs set their number.
    policy_threads: torch threads of a policy worker.
    learners: data-parallel learner processes; GPUs set their number.
    learner_threads: torch threads of each learner.
    shard: split the weights and the optimizer's moments over the learners (FSDP2), for models that do not fit one GPU.
    micro_batch: samples in a forward and backward pass of a learner at most, null for a whole minibatch; auto for as
        many as its device's memory holds by the estimate of `vla plan`.
    deadline_s: a process that waits longer than this names whom it waits for.
    update_patience: a learner hangs if it has not used the processor for so many times as long as the longest update
        so far, and for deadline_s at least.
    worker_memory_gib: an environment worker that has grown larger is replaced between iterations, null for no bound.
    """

    environments: str = CPU
    policy: str = CPU
    learner: str = CPU
    dtype: Literal["float32", "bfloat16"] | None = None
    offload: bool = False
    compile: bool = False
    schedule: Literal["synchronous", "asynchronous"] = "synchronous"
    environment_workers: int = 2
    environment_nodes: int | None = None
    environment_resource: str = ""
    stages: int = 1
    lanes: int = 1
    batch_max: int | None = None
    batch_wait_ms: float = 2.0
    staleness: int = 1
    fragments_per_update: int | None = None
    policy_workers: int = 1
    policy_threads: int = 2
    learners: int = 2
    learner_threads: int = 1
    shard: bool = False
    micro_batch: int | Literal["auto"] | None = None
    deadline_s: float = 60.0
    update_patience: float = 10.0
    worker_memory_gib: float | None = None

    @property
    def samples_at_a_time(self) -> int | None:
        """`micro_batch` as a number; auto has to be settled before."""
        if self.micro_batch == AUTO:
            raise EngineError(
                "micro_batch=auto has not been settled", code="PLACEMENT",
                remedy="Set placement.micro_batch to a number.",
            )  # fmt: skip
        return self.micro_batch

    @property
    def all_lanes(self) -> int:
        return self.environment_workers * self.lanes

    @property
    def update_fragments(self) -> int:
        """Fragments that an update takes."""
        return self.all_lanes if self.fragments_per_update is None else self.fragments_per_update

    @property
    def fragments(self) -> int:
        """Fragments that may be begun and not learnt from: with no more of them the staleness stays in its bound."""
        return (self.staleness + 1) * self.update_fragments


@dataclass(frozen=True)
class Plan:
    """A checkpoint and an environment that fit each other and the placement."""

    codec: Codec
    shape: RolloutShape
    weights: WeightsLayout
    crew: Crew


def plan(
    checkpoint: Path, environment: str, settings: dict[str, Any], slots: int, decisions: int,
    algorithm: Algorithm, placement: PlacementConfig, lora: Lora = FULL, nodes: Sequence[Node] = (),
) -> Plan:  # fmt: skip
    """Check that everything fits, before any process is started and any file written.

    nodes: of the cluster; none for this machine alone.
    """
    nodes = nodes or here()
    if placement.environment_workers < 1:
        raise EngineError("there is no environment worker", code="PLACEMENT", remedy="Set environment_workers=1.")
    placement = group_checks.settled(placement, algorithm, slots)
    crew = man(placement, nodes)
    if not crew.learners:
        raise EngineError("there is no learner", code="PLACEMENT", remedy="Set placement.learners to 1 or more.")
    if (micro_batch := placement.samples_at_a_time) is not None and micro_batch < 1:
        raise EngineError(
            f"micro_batch is {micro_batch}", code="PLACEMENT", remedy="Choose 1 or more, auto, or null."
        )  # fmt: skip
    if placement.update_patience < 1:
        raise EngineError(
            f"update_patience is {placement.update_patience:g}", code="PLACEMENT",
            remedy="Choose 1 or more: updates do not all take equally long.",
        )  # fmt: skip
    foreign = "stages" if placement.schedule == "asynchronous" else "lanes"
    if (value := getattr(placement, foreign)) != 1:
        raise EngineError(
            f"{foreign} is {value}, but the {placement.schedule} schedule has none", code="PLACEMENT",
            remedy=f"Set placement.{foreign}=1, or choose the other schedule.",
        )  # fmt: skip
    if placement.schedule == "asynchronous":
        group_checks.check_lanes(slots, algorithm, placement, len(crew.learners))
        _check_lanes(slots, decisions, algorithm, placement, len(crew.learners))
    else:
        _check_stages(slots, decisions, algorithm, placement, len(crew.learners))
        group_checks.check_batch(algorithm, placement, slots * decisions, len(crew.learners))
    _check_policies(placement, crew, nodes)
    if placement.shard and placement.offload:
        raise EngineError(
            "shard and offload can't be used together", code="PLACEMENT",
            remedy="Set placement.offload=false: a sharded learner takes little of each GPU.",
        )  # fmt: skip
    policy = outline(checkpoint)
    codec, contract = policy.codec, policy.contract
    facts = probe(environment, settings, nodes[crew.environments[0].node])
    contract.check(facts.contract, f"environment {environment}")
    privileged, critic = facts.privileged, facts.critic
    if algorithm.groups:
        longest = -(-facts.max_steps // codec.action_shape[0])
        group_checks.check_rows(slots, decisions, longest, algorithm, placement)
    values = _check_model(policy, environment, privileged, critic, algorithm, placement)
    lanes = placement.schedule == "asynchronous"
    shape = RolloutShape(
        decisions, slots // placement.all_lanes if lanes else slots, codec.image_shape, contract.state_size,
        codec.tokenizer.length, *codec.action_shape, values=values,
        privileged=privileged, critic=critic, fragments=placement.fragments if lanes else 0,
        seen=kept(policy, algorithm, privileged),
    )  # fmt: skip
    if lora.rank:
        with torch.random.fork_rng():
            adapters.attach(policy.model, lora)
    return Plan(codec, shape, WeightsLayout.of(policy.model, lora), crew)


def _check_policies(placement: PlacementConfig, crew: Crew, nodes: Sequence[Node]) -> None:
    """Inputs of a forward pass never cross nodes: where environments are, a policy worker is."""
    for node in sorted({place.node for place in (*crew.environments, *crew.policies)}):
        workers, policies = len(crew.at(node, "environment worker")), len(crew.at(node, "policy worker"))
        if not 1 <= policies <= workers:
            where = f" of node {nodes[node].name}" if len(nodes) > 1 else ""
            raise EngineError(
                f"{workers} environment workers{where} can't be split over {policies} policy workers", code="PLACEMENT",
                remedy="Raise environment_workers, or lower policy_workers or the GPUs of the policy.",
            )  # fmt: skip


def _check_stages(slots: int, decisions: int, algorithm: Algorithm, placement: PlacementConfig, learners: int) -> None:
    workers, stages = placement.environment_workers, placement.stages
    if slots < workers * stages:
        raise EngineError(
            f"{slots} environments can't be split over {workers} workers x {stages} stages", code="PLACEMENT",
            remedy="Raise slots, or lower environment_workers or stages.",
        )  # fmt: skip
    if algorithm.groups:
        group_checks.check_slots(slots, algorithm, placement, learners)
    else:
        check_samples(slots, decisions, algorithm, learners)


def check_samples(slots: int, decisions: int, algorithm: Algorithm, learners: int) -> None:
    """Refuse a synchronous rollout that is too small for its learners."""
    minibatches = algorithm.minibatches if algorithm.batch_size is None else 1
    # In the worst case every other row holds nothing but the final observation of an episode.
    if (least := slots * decisions // 2) < minibatches * learners:
        raise EngineError(
            f"{slots} slots x {decisions} decisions give {least} samples at worst, too few for "
            f"{minibatches} minibatches on {learners} learners",
            code="PLACEMENT", remedy="Raise slots or decisions, or lower minibatches or learners.",
        )  # fmt: skip


def _check_lanes(slots: int, decisions: int, algorithm: Algorithm, placement: PlacementConfig, learners: int) -> None:
    lanes, per_update = placement.all_lanes, placement.update_fragments
    where = f"{placement.environment_workers} workers x {placement.lanes} lanes"

    def refuse(what: str, remedy: str) -> None:
        raise EngineError(what, code="PLACEMENT", remedy=remedy)

    if placement.lanes < 1 or slots < lanes or slots % lanes:
        refuse(
            f"{slots} environments can't be split evenly over {where}",
            "Make slots a multiple of environment_workers x lanes.",
        )
    if placement.staleness < 0:
        refuse(f"staleness is {placement.staleness}", "Choose 0, for a policy that waits for every update, or more.")
    if placement.batch_wait_ms < 0:
        refuse(f"batch_wait_ms is {placement.batch_wait_ms:g}", "Choose 0 or more.")
    each = slots // lanes
    if placement.batch_max is not None and (placement.batch_max < each or placement.batch_max % each):
        refuse(
            f"a batch of {placement.batch_max} can't be made of lanes with {each} environments",
            f"Make batch_max a multiple of {each}, or null.",
        )
    if per_update < 1 or per_update % algorithm.minibatches:
        refuse(
            f"{per_update} fragments can't be split into {algorithm.minibatches} minibatches",
            "Make fragments_per_update a multiple of algorithm.minibatches.",
        )
    if placement.fragments < lanes:
        refuse(
            f"{where} can't all be at work: {placement.fragments} fragments may be begun at a time, "
            f"(staleness {placement.staleness} + 1) x {per_update} an update",
            "Raise staleness or fragments_per_update, or lower environment_workers or lanes.",
        )
    least = each * decisions // 2  # the other rows may hold nothing but the final observation of an episode
    if least < learners:
        refuse(
            f"fragments of {each} environments x {decisions} decisions give {least} samples at worst, too few for "
            f"{learners} learners",
            "Raise slots or decisions, or lower lanes or learners.",
        )


def _check_model(
    policy: Policy, environment: str, privileged: int, critic: int, algorithm: Algorithm, placement: PlacementConfig
) -> int:
    """How many values the model's head gives."""
    valued = algorithm if isinstance(algorithm, ActorCritic) else None
    if valued is not None and valued.critic == "privileged" and not critic:
        raise EngineError(
            f"environment {environment} has no state for a privileged critic", code="CRITIC",
            remedy="Choose algorithm=ppo, whose critic is the model's value head.",
        )  # fmt: skip
    if (placement.compile or placement.shard) and not hasattr(policy.model, "blocks"):
        raise EngineError(
            f"{type(policy.model).__name__} does not tell its `blocks`, which placement.compile and .shard need",
            code="PLACEMENT", remedy="Set placement.compile=false placement.shard=false.",
        )  # fmt: skip
    if not algorithm.train_vision and not hasattr(policy.model, "see"):
        raise EngineError(
            f"{type(policy.model).__name__} has no `see` of its own, which algorithm.train_vision=false needs",
            code="VISION", remedy="Set algorithm.train_vision=true.",
        )  # fmt: skip
    tells = getattr(policy.model, "auxiliary_size", 0)
    if algorithm.perception_steps and tells and privileged and tells != privileged:
        raise EngineError(
            f"the model's auxiliary output has {tells} numbers, environment {environment} tells {privileged}",
            code="PRIVILEGED", remedy="Set algorithm.perception_steps=0, or train a model for this environment.",
        )  # fmt: skip
    if algorithm.gradient_checkpointing and not hasattr(policy.model, "checkpoint_gradients"):
        raise EngineError(
            f"{type(policy.model).__name__} has no `checkpoint_gradients`", code="MEMORY",
            remedy="Set algorithm.gradient_checkpointing=false.",
        )  # fmt: skip
    if policy.regresses:
        raise EngineError(
            "the model regresses its actions: it gives no distribution to learn by", code="NO_DISTRIBUTION",
            remedy="Import it with action tokens, without the action head's file.",
        )  # fmt: skip
    settings: Any = policy.model.config
    if valued is not None and not settings.get("values"):
        raise EngineError(
            "the model has no value head or gives no distribution", code="VALUES",
            remedy="Import it with values=1 (or one for each action of a chunk), with action tokens; or choose an "
            "algorithm without values, algorithm=grpo.",
        )  # fmt: skip
    return int(settings.get("values", 0))
