"""pi0's checkpoints for `vla import`: the layout of transformers' PI0 classes, which is also that of lerobot's weights.

The tensors come in by transformers' own loading, which knows both ways of naming them. Mean and standard deviation of
state and actions are in the file of the processor; the base model has none, it needs another bundle's.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PI0Config, PI0ForConditionalGeneration

from vla import schema, weights
from vla.codec import Codec, InputTransforms, OutputTransforms
from vla.contract import PolicyContract
from vla.errors import Fault
from vla.importing import AGAIN, ImportConfig, adopt, derive, read_statistics, read_tokenizer, weight_files
from vla.models.pi0 import Pi0, Pi0Config
from vla.models.published import PublishedError
from vla.policy import Policy, Provenance
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import InstructionTokenizer
from vla.transforms import ImageCheck, ImageResize, InstructionFormat, Standardize, UniformBins

TEMPLATE = "{task}\n"
N_BINS = 256  # without meaning: pi0 has no action tokens
FOREIGN = ("unnorm_key", "adapter", "decoding", "chunk", "stop", "values")  # options that pi0 has no use for
# In processor_config.json, and in lerobot's normaliser.
MOMENTS = {"state_mean": "observation.state.mean", "state_std": "observation.state.std",
           "actions_mean": "action.mean", "actions_std": "action.std"}  # fmt: skip


def read_pi0(root: Path, source: dict[str, Any], config: ImportConfig) -> Policy:
    """The policy of a checkpoint. source: config.json, of transformers or of lerobot."""
    defaults = {field.name: field.default for field in fields(ImportConfig)}
    told = [name for name in FOREIGN if getattr(config, name) != defaults[name]]
    if told:
        remedy = "Leave them out; the chunk is the checkpoint's."
        raise PublishedError(Fault("OPTIONS", "options", f"none of {[*FOREIGN]} for pi0", str(told), remedy))
    settings, name = network_config(source), Path(config.path).name
    tokenizer = read_tokenizer(root, config.prompt_length)
    if config.like is not None:
        statistics = read_statistics(config.like)
        contract = adopt(PolicyContract.read(config.like), settings.chunk_size, TEMPLATE, True)
    else:
        statistics = _moments(root, source)
        if config.contract is not None:
            contract = PolicyContract.read(config.contract)
        else:
            contract = derive(config, name, statistics, settings.chunk_size, TEMPLATE)
    codec = _codec(contract, statistics, tokenizer, settings)
    model = _model(root, settings, codec, config)
    return Policy(codec, model, Provenance(config={"imported_from": config.path, "unnorm_key": name}))


def network_config(source: dict[str, Any]) -> Any:
    """transformers' configuration; lerobot's has the same names for what it shares, and no other sizes than these."""
    known = {f.name for f in fields(PI0Config)} | {"vlm_config", "dit_config"}
    variants = (source.get("paligemma_variant", "gemma_2b"), source.get("action_expert_variant", "gemma_300m"))
    if variants != ("gemma_2b", "gemma_300m"):
        remedy = "Only pi0's published sizes are known by their names; save it with transformers' classes."
        raise PublishedError(Fault("VARIANT", "config.json", "gemma_2b, gemma_300m", str(variants), remedy))
    return PI0Config(**{k: v for k, v in source.items() if k in known})


def _model(root: Path, settings: Any, codec: Codec, config: ImportConfig) -> Pi0:
    """The weights, all of one type, in the model that a bundle is loaded into: there is one copy of them."""
    weight_files(root)
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        read: Any = PI0ForConditionalGeneration.from_pretrained(
            root, config=settings, dtype=dtype, local_files_only=True, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except SafetensorError as problem:
        fault = Fault("WEIGHTS_DAMAGED", str(root), "whole files", str(problem)[:160], AGAIN)
        raise PublishedError(fault) from problem
    loaded, found = read
    faults = [
        Fault("WEIGHTS_MISMATCH", str(name), "the tensor of pi0", kind, AGAIN)
        for kind, names in (
            ("none", found["missing_keys"]), ("no such tensor", found["unexpected_keys"]),
            ("another shape", [name for name, *_ in found["mismatched_keys"]]),
        )
        for name in sorted(names)
    ]  # fmt: skip
    if faults:
        raise PublishedError(*faults[:5])
    contract = codec.contract
    sizes = Pi0Config(
        cameras=len(contract.cameras), state_dim=contract.state_size, prompt_length=codec.tokenizer.length,
        chunk=settings.chunk_size, action_dim=contract.action.dim, n_bins=N_BINS, steps=settings.num_inference_steps,
        pad=codec.tokenizer.pad_id, bos=codec.tokenizer.tokenizer.bos_token_id, pi0=settings.to_dict(),
        dtype=str(loaded.dtype).removeprefix("torch."),
    )  # fmt: skip
    model: Any = weights.empty(sizes.build)
    for name, tensor in loaded.state_dict().items():
        weights.put(model.network, name, tensor)
    return model


def _codec(contract: PolicyContract, statistics: Statistics, tokenizer: InstructionTokenizer, settings: Any) -> Codec:
    """pi0's chains: square images, mean and standard deviation, the sentence and a line break."""
    side = settings.vlm_config.vision_config.image_size
    sizes = {(camera.height, camera.width) for camera in contract.cameras}
    wide = [size for size in sizes if size[0] != size[1]]
    if wide:
        remedy = "Crop the images to squares before, and set image_size to that."
        raise PublishedError(Fault("IMAGE_SIZE", "cameras", "square images", f"{wide[0]}", remedy))
    limits = {"actions": (contract.action.dim, settings.max_action_dim),
              "state": (contract.state_size, settings.max_state_dim)}  # fmt: skip
    faults = [
        Fault("SIZE", name, f"at most {most} numbers", str(size), "Choose statistics of another data set.")
        for name, (size, most) in limits.items()
        if size > most
    ]
    if tokenizer.tokenizer.bos_token_id is None:
        remedy = "Copy tokenizer.json and tokenizer_config.json of PaliGemma to the checkpoint."
        faults.append(Fault("TOKENIZER", "tokenizer_config.json: bos_token", "a token", "none", remedy))
    if faults:
        raise PublishedError(*faults)
    height, width = next(iter(sizes))
    images: tuple[ImageCheck | ImageResize, ...] = (ImageCheck(height, width),)
    if (height, width) != (side, side):
        images = (*images, ImageResize(side, side))
    state = (Standardize.of(statistics.state),) if statistics.state.size else ()
    return Codec(
        contract.with_statistics(statistics.hash), statistics,
        InputTransforms(images, state, InstructionFormat(TEMPLATE, lowercase=False)),
        OutputTransforms((Standardize.of(statistics.action),), UniformBins(N_BINS)), tokenizer,
    )  # fmt: skip


def _moments(root: Path, source: dict[str, Any]) -> Statistics:
    """Mean and standard deviation, of transformers' processor or of lerobot's normaliser."""
    mapping = source.get("normalization_mapping") or {}
    other = {k: v for k, v in mapping.items() if k in ("STATE", "ACTION") and v != "MEAN_STD"}
    if other:
        remedy = "Only pi0's own normalisation is known."
        raise PublishedError(Fault("NORMALISATION", "normalization_mapping", "MEAN_STD", str(other), remedy))
    file, data = root / "processor_config.json", {}
    if file.is_file():
        data = schema.parse(file.read_text(), file.name, PublishedError)
    for normaliser in root.glob("policy_preprocessor_step_*_normalizer_processor.safetensors"):
        stored = load_file(normaliser)
        data |= {own: stored[name].double().tolist() for own, name in MOMENTS.items() if name in stored}
    missing = [name for name in MOMENTS if not data.get(name)]
    if missing:
        remedy = "Set like to a bundle whose statistics are taken over, or write those of the training data there."
        raise PublishedError(Fault("STATISTICS", file.name, str([*MOMENTS]), f"no {missing}", remedy))
    state = ArrayStatistics.from_moments(data["state_mean"], data["state_std"])
    return Statistics(ArrayStatistics.from_moments(data["actions_mean"], data["actions_std"]), state)
