"""`vla act`: what a checkpoint says to given images, in numbers that another implementation can be held against."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from vla.cli import Command
from vla.errors import SimrealError
from vla.policy import Policy, Speedup
from vla.results import write_json
from vla.types import Observation


@dataclass(frozen=True)
class ActConfig:
    """Options of `vla act`.

    checkpoint: folder of a bundle.
    images: one file for each camera of the contract, in its order.
    instruction: what the robot is told.
    state: numbers of the proprioceptive state in the contract's order and units.
    out: JSON file of the result.
    dtype: of the computation; auto takes that of the weights.
    device: cpu or cuda.
    speedup: graph (fixed shapes, CUDA graphs on a GPU), compile (torch.compile as well), or none.
    temperature: 0 takes the most likely tokens.
    seed: of the draw at a higher temperature.
    """

    checkpoint: Path
    images: tuple[Path, ...]
    instruction: str
    out: Path
    state: tuple[float, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    speedup: Speedup = "none"
    temperature: float = 0.0
    seed: int = 0


def act(config: ActConfig) -> None:
    """Run `vla act`."""
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    policy = Policy.load(config.checkpoint, None, "vla act", device=config.device, dtype=dtype)
    policy.speed_up(config.speedup)
    inputs = policy.codec.encode([observation(policy, config)])
    prompt = policy.codec.inputs.instruction.forward(config.instruction)
    result: dict[str, Any] = {"instruction": config.instruction, "prompt": prompt, "dtype": config.dtype}
    if policy.regresses:
        normalised = policy.outputs(inputs)[0].cpu().numpy()
        result.update(normalised=normalised.tolist(), actions=policy.codec.denormalize(normalised).tolist())
    else:
        generator = torch.Generator().manual_seed(config.seed)
        decision = policy.sample(inputs, config.temperature, generator)
        logits = policy.logits(inputs, decision.tokens)
        actions = policy.codec.decode(decision.tokens[0].cpu().numpy())
        result.update(
            tokens=decision.tokens[0].tolist(), logits=logits[0].tolist(), log_probs=decision.log_probs[0].tolist(),
            actions=actions.tolist(),
        )  # fmt: skip
        top = getattr(policy.model, "top_id", 0)
        if top:  # the model speaks through its language model's vocabulary
            result["token_ids"] = (top - decision.tokens[0]).tolist()
    write_json(config.out, result)
    for row in result["actions"]:
        print(" ".join(f"{number: .4f}" for number in row))


def observation(policy: Policy, config: ActConfig) -> Observation:
    """The images and numbers as the codec takes them; an image of another size is resized, and that is said."""
    contract = policy.contract
    if len(config.images) != len(contract.cameras):
        names = [camera.name for camera in contract.cameras]
        raise SimrealError(
            f"{len(config.images)} images for {len(names)} cameras: {names}", code="IMAGES",
            remedy="Write images=[FIRST.png,SECOND.png] in that order.",
        )  # fmt: skip
    if len(config.state) != contract.state_size:
        names = [f"{field.name} {field.shape} {field.unit}" for field in contract.state]
        raise SimrealError(
            f"{len(config.state)} numbers of state, the contract has {contract.state_size}: {names}", code="STATE",
            remedy="Write state=[...] with all of them.",
        )  # fmt: skip
    images = {}
    for camera, file in zip(contract.cameras, config.images, strict=True):
        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
        except (OSError, UnidentifiedImageError) as problem:
            raise SimrealError(f"{file}: {problem}", code="IMAGE", remedy="Name an image file.") from problem
        if picture.size != (camera.width, camera.height):
            print(f"{file}: {picture.width} x {picture.height} is resized to {camera.width} x {camera.height}")
            picture = picture.resize((camera.width, camera.height), Image.Resampling.BICUBIC)
        images[camera.name] = np.asarray(picture)
    state, start = {}, 0
    for field in contract.state:
        state[field.name] = np.array(config.state[start : start + field.size]).reshape(field.shape)
        start += field.size
    return Observation(images, state, config.instruction, dict.fromkeys([*images, *state], 0.0))


command = Command(
    name="act", help="Tokens, logits and actions of a checkpoint for given images, as JSON.", schema=ActConfig, run=act
)
