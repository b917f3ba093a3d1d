"""`vla plan`: who would sit where, what each GPU would hold, and what can't be; `--auto` measures and proposes."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.algorithms.base import Algorithm
from training.algorithms.ppo import PPOConfig
from training.capacity import DEFAULT_GIB, Device, present, remedy, settle, sized, sizes_of, weigh_devices
from training.envs import EnvConfig
from training.pipeline import auto
from training.pipeline.actors import ray_session
from training.pipeline.cluster import LOCAL
from training.pipeline.crew import man
from training.pipeline.crew import picture as seating
from training.pipeline.placement import PlacementConfig
from training.pipeline.seats import COMPONENTS, CPU, Cluster, check, seat
from training.pipeline.weigh import GIB, Load, Sizes, weigh
from training.start import untrained
from vla.checkpoint import read_codec, read_model_config
from vla.cli import Command
from vla.errors import SimrealError
from vla.lora import Lora
from vla.models import ModelConfig
from vla.models.published import PublishedConfig
from vla.policy import model_settings
from vla.results import write_json

SHOWN = 8  # proposals
LETTERS = {"environments": "E", "policy": "P", "learner": "L"}
SHIPPED = Path("checkpoints/put_on_plate")
OFT = PublishedConfig(decoding="parallel", chunk=8, stop=False, values=1)  # what is weighed without a checkpoint
OFT_PROMPT = 34  # tokens of an ordinary instruction


@dataclass(frozen=True)
class PlanConfig:
    """Options of `vla plan`; those of `vla train`, and what they would run on.

    cluster: the machines.
    checkpoint: bundle that would be trained; null weighs `model`, and measures with the one that a clone comes with.
    model: what would get random weights; null weighs OpenVLA-OFT with 7 billion parameters.
    seed: has no influence.
    iterations: has no influence.
    slots: environments in all.
    decisions: of every slot in an iteration.
    environment_gib: what the simulator takes on each of its GPUs; null if that is not known.
    env: where it would learn.
    algorithm: how it would learn.
    placement: who runs where.
    lora: adapters in place of all weights.
    auto: measure stage times on this machine for a minute, and propose placement and stages.
    auto_seconds: how long to measure, the start of the workers included.
    auto_out: YAML file of the best placement, for placement=FILE; null prints it.
    force: tell of a GPU that is too small, and end as if it were not.
    out: JSON file of the plan, null for none.
    address: auto or HOST:PORT of a Ray cluster that is there: show who would sit on which of its nodes, and no more.
    """

    cluster: Cluster = field(default_factory=Cluster)
    checkpoint: Path | None = None
    model: ModelConfig | None = None
    seed: int = 0
    iterations: int = 100
    slots: int = 128
    decisions: int = 32
    environment_gib: float | None = None
    env: EnvConfig = field(default_factory=EnvConfig)
    algorithm: Algorithm = field(default_factory=PPOConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    lora: Lora = field(default_factory=Lora)
    auto: bool = False
    auto_seconds: float = 60.0
    auto_out: Path | None = None
    force: bool = False
    out: Path | None = None
    address: str = LOCAL


def plan(config: PlanConfig) -> int:
    """Run `vla plan`; the exit code is 1 if a GPU would be too small."""
    console = Console(soft_wrap=True)
    if config.address != LOCAL:
        with ray_session(config.address) as nodes:
            console.print(seating(man(config.placement, nodes), nodes))
        return 0
    cluster = present(config.cluster)
    if config.auto:
        return _propose(config, cluster, console)
    placement = config.placement
    words = {name: getattr(placement, name) for name in COMPONENTS}
    seats = seat(words, cluster)
    check(seats, placement.stages, placement.schedule == "asynchronous", placement.offload, cluster.devices)
    model, sizes = _model(config)
    load = weigh(model, sizes, config.lora)
    given = config.slots, config.decisions, config.algorithm
    placement = sized(*given, placement, cluster, seats, load, config.environment_gib)
    if placement.micro_batch != config.placement.micro_batch:
        console.print(f"micro_batch: {placement.micro_batch}", highlight=False)
    devices = weigh_devices(*given, placement, cluster, seats, load, config.environment_gib)
    console.print(_about(config, load), highlight=False)
    if not devices:
        console.print("everything runs on the processors")
    else:
        console.print(picture(devices, cluster))
    if config.out is not None:
        write_json(config.out, {"seats": asdict(seats), "load": asdict(load), "devices": [asdict(d) for d in devices]})
    capacity = cluster.gpu_gib or DEFAULT_GIB
    full = [d for d in devices if d.peak > capacity]
    if full:
        ways = remedy(config.algorithm, placement, config.lora, seats)
        console.print(f"{len(full)} GPUs of {capacity:g} GiB would be too small: {ways}", style="red")
    return int(bool(full) and not config.force)


def _propose(config: PlanConfig, cluster: Cluster, console: Console) -> int:
    """Measure, let the event model play every candidate, and print them."""
    checkpoint = config.checkpoint or (SHIPPED if config.env.name == "tabletop" and SHIPPED.is_dir() else None)
    if checkpoint is None:
        raise SimrealError(
            f"--auto measures with a model: it needs checkpoint=; only in a clone, with env=tabletop, it is {SHIPPED}",
            code="CHECKPOINT", remedy="Name the bundle that will be trained.",
        )  # fmt: skip
    console.print(f"measured with {checkpoint}", highlight=False)
    where = config.placement
    if cluster.devices:  # one of its GPUs stands for the others
        where = replace(where, environments=CPU, policy="0", learner="0")
    sizes = config.slots, config.decisions, config.algorithm
    measured = settle(checkpoint, *sizes, where, config.lora, cluster, config.force)
    with ray_session():
        times = auto.measure(
            checkpoint, config.env.name, config.env.settings, config.env.variant, *sizes, measured,
            config.lora, config.auto_seconds, console.print,
        )  # fmt: skip
    console.print(f"update: {times.learner_s:.2f} s with one learner")
    found = auto.propose(times, where, cluster)
    table = Table(title="predicted, the fastest first", title_justify="left")
    for name in ("", "chunks/s", "s/iteration"):
        table.add_column(name)
    for one in found[:SHOWN]:
        table.add_row(one.name, f"{one.chunks_per_s:.1f}", f"{one.seconds:.2f}")
    console.print(table)
    text = auto.as_yaml(found[0].placement)
    if config.auto_out is None:
        console.print(text, end="")
    else:
        config.auto_out.parent.mkdir(parents=True, exist_ok=True)
        temporary = config.auto_out.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.rename(config.auto_out)
        console.print(f"written to {config.auto_out}; use it with placement={config.auto_out}")
    if config.out is not None:
        rows = [{"name": f.name, "chunks_per_s": f.chunks_per_s, "seconds": f.seconds} for f in found]
        write_json(config.out, {"times": asdict(times), "proposals": rows})
    return 0


def picture(devices: list[Device], cluster: Cluster) -> Table:
    """Who works on which GPU while rolling out and while updating, and what it holds."""
    capacity = cluster.gpu_gib or DEFAULT_GIB
    table = Table(title="E environments, P policy, L learner", title_justify="left")
    for name in ("node", "GPU", "rollout", "update", "holds, GiB", "peak, GiB", f"of {capacity:g} GiB"):
        table.add_column(name)
    for device in devices:
        rollout = " ".join(LETTERS[n] for n in ("environments", "policy") if n in device.gib)
        update = "L" if "learner" in device.gib else ""
        holds = ", ".join(f"{LETTERS[n]} {'?' if v is None else f'{v:.1f}'}" for n, v in device.gib.items())
        bar = "#" * min(15, round(15 * device.peak / capacity))
        style = "red" if device.peak > capacity else ""
        table.add_row(
            str(device.node), str(device.number), rollout, update, holds,
            f"{device.peak:.1f}", f"{bar:15s}", style=style,
        )  # fmt: skip
    return table


def _model(config: PlanConfig) -> tuple[dict[str, Any], Sizes]:
    """Configuration and inputs of the model that would be trained."""
    if config.checkpoint is not None:
        return read_model_config(config.checkpoint), sizes_of(read_codec(config.checkpoint, None))
    if config.model is not None:
        policy = untrained(config.model, config.env, config.seed)
        return model_settings(policy.model), sizes_of(policy.codec)
    settings = {"class": "openvla", "vocabulary": OFT.language.vocab_size, **asdict(OFT)}
    side = OFT.dino.image_size
    return settings, Sizes((OFT.cameras, side, side, 3), OFT.state_dim, OFT_PROMPT, (OFT.chunk, OFT.action_dim))


def _about(config: PlanConfig, load: Load) -> str:
    trained = f"{load.trained / 1e6:.1f} million" if load.trained < 1e9 else f"{load.trained / 1e9:.2f} billion"
    kept, again = load.kept / GIB, load.kept_checkpointed
    what = config.checkpoint or ("OpenVLA-OFT, 7B" if config.model is None else str(config.model.data()["class"]))
    less = "" if again is None else f" ({again / GIB:.2f} with algorithm.gradient_checkpointing=true)"
    return (
        f"{what}: {load.parameters / 1e9:.2f} billion parameters "
        f"({load.weights / GIB:.1f} GiB), {trained} trained; a sample keeps {kept:.2f} GiB{less}"
    )


command = Command(
    name="plan", help="Who would sit where, and what each GPU would hold.", schema=PlanConfig, config_name="plan",
    run=plan,
)  # fmt: skip
