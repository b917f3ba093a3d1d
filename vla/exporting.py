"""`vla export`: a bundle of an OpenVLA or OpenVLA-OFT back in the published layout, see `vla.importing`."""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vla import checkpoint
from vla.cli import Command
from vla.errors import Fault
from vla.importing import TOWERS
from vla.models import read_config
from vla.models.published import LlamaSizes, PublishedConfig, PublishedError
from vla.policy import Policy, model_settings
from vla.weights import shown

SHARD_BYTES = 5 * 2**30


@dataclass(frozen=True)
class ExportConfig:
    """Options of `vla export`.

    checkpoint: folder of a bundle made by `vla import` or trained from one.
    out: folder of the published layout; it must not exist.
    """

    checkpoint: Path
    out: Path


def export(config: ExportConfig) -> None:
    """Run `vla export`: write beside `out`, then rename."""
    if config.out.exists():
        raise PublishedError(
            Fault("OUT_EXISTS", str(config.out), "a new folder", "an existing one", "Choose another name.")
        )
    policy = checkpoint.load(config.checkpoint, None, "vla export")
    model: Any = policy.model
    sizes = read_config(model_settings(model))
    if not isinstance(sizes, PublishedConfig):
        found = repr(model_settings(model).get("class"))
        remedy = "Only models of the published architecture have a published layout."
        raise PublishedError(Fault("MODEL_CLASS", "model.json: class", "'openvla'", found, remedy))
    part = config.out.with_name(f".{config.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write(policy, sizes, part)
        part.rename(config.out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{config.out}: the published layout")


def _write(policy: Policy, c: PublishedConfig, folder: Path) -> None:
    key = str(policy.provenance.config.get("unnorm_key", "simreal"))
    state = policy.model.state_dict()
    film = {k: v for k, v in state.items() if k.startswith("vision_backbone.")} if c.film else {}
    apart = {
        "action_head": {k.removeprefix("action_head."): v for k, v in state.items() if k.startswith("action_head.")},
        "proprio_projector": {
            k.removeprefix("proprio_projector."): v for k, v in state.items() if k.startswith("proprio_projector.")
        },
        "vision_backbone": film,
    }
    for name, tensors in apart.items():
        if tensors:
            torch.save(tensors, folder / f"{name}--1_checkpoint.pt")
    kept = {k: v for k, v in state.items() if k.startswith(("vision_backbone.", "projector.", "language_model."))}
    if film:  # the layout keeps the towers without FiLM beside it
        plain = {k: v for k, v in kept.items() if not re.search(r"blocks\.\d+\.(scale|shift)\.", k)}
        kept = {k.replace(".block.", "."): v for k, v in plain.items()}
    _write_shards({k: kept[k] for k in sorted(kept)}, folder)
    statistics = {key: _entry(policy)}
    files = {
        "config.json": _source_config(c, statistics),
        "dataset_statistics.json": statistics,
        "preprocessor_config.json": _preprocessor(c),
        "generation_config.json": {
            "_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": c.pad,
        },
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, indent=2) + "\n")
    policy.codec.tokenizer.save(folder)


def _write_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for number, shard in shown([*enumerate(shards, 1)], "writing", sum(t.nbytes for t in tensors.values())):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _entry(policy: Policy) -> dict[str, Any]:
    """The statistics as the published layout has them."""
    numbers = policy.codec.statistics
    entry = {"action": {k: list(v) for k, v in asdict(numbers.action).items()}}
    if numbers.state.size:
        entry["proprio"] = {k: list(v) for k, v in asdict(numbers.state).items() if k != "mask"}
    return entry


def _source_config(c: PublishedConfig, statistics: dict[str, Any]) -> dict[str, Any]:
    overrides = {
        name: {"embed_dim": own.width, "depth": own.depth, "num_heads": own.heads}
        for (name, full), own in zip(TOWERS.items(), (c.dino, c.siglip), strict=True)
        if (own.width, own.depth, own.heads) != (full.width, full.depth, full.heads)
    }
    default = LlamaSizes()
    text = {k: v for k, v in asdict(c.language).items() if v != getattr(default, k) or k == "vocab_size"}
    return {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp", "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "llm_backbone_id": "llama2-7b-pure", "llm_max_length": c.language.max_position_embeddings,
        "vision_backbone_id": "dinosiglip-vit-so-224px", "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive", "image_sizes": [c.dino.image_size, c.siglip.image_size],
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_override_act_layers": [None, None], "n_action_bins": c.n_bins,
        "pad_to_multiple_of": c.vocabulary_padding, "pad_token_id": c.pad, "output_projector_states": False,
        "text_config": {"model_type": "llama", "pad_token_id": c.pad, "torch_dtype": c.dtype, **text},
        "torch_dtype": c.dtype, "norm_stats": statistics, **({"vision_overrides": overrides} if overrides else {}),
    }  # fmt: skip


def _preprocessor(c: PublishedConfig) -> dict[str, Any]:
    sizes = [[3, t.image_size, t.image_size] for t in (c.dino, c.siglip)]
    normalise = [{"mean": list(m), "std": list(s), "inplace": False} for m, s in zip(c.mean, c.std, strict=True)]
    return {
        "image_processor_type": "PrismaticImageProcessor", "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive", "input_sizes": sizes, "interpolations": ["bicubic", "bicubic"],
        "means": [list(m) for m in c.mean], "stds": [list(s) for s in c.std], "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None, "tvf_normalize_params": normalise,
        "tvf_crop_params": [{"output_size": s[1:]} for s in sizes],
        "tvf_resize_params": [
            {"antialias": True, "interpolation": 3, "max_size": None, "size": s[1:]} for s in sizes
        ],
    }  # fmt: skip


command = Command(
    name="export", help="Write a bundle of a published architecture back in its published layout.", schema=ExportConfig,
    run=export,
)  # fmt: skip
