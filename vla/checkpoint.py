"""The deployable bundle: a folder that a simulator, a robot and a replay load alike. It never holds a pickle.

model.safetensors   weights                    contract.json    what the policy needs
model.json          configuration              transforms.json  the codec's chains
tokenizer.json, tokenizer_config.json          statistics.json  normalisation
provenance.json     commit, resolved configuration, seed, training curve
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from vla import schema
from vla.codec import Codec, InputTransforms, OutputTransforms
from vla.contract import PolicyContract
from vla.errors import CodedError, Fault, SimrealError
from vla.policy import Policy, Provenance, build, model_settings
from vla.statistics import Statistics
from vla.tokenizer import InstructionTokenizer
from vla.transforms import InstructionFormat, UniformBins, from_data, to_data
from vla.weights import empty, fill

FILES = (
    "model.safetensors",
    "model.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "statistics.json",
    "contract.json",
    "transforms.json",
    "provenance.json",
)
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
TRANSFORMS_VERSION = 1
COPY_AGAIN = "Copy the checkpoint again from where it was written, or choose another one."


class CheckpointError(CodedError):
    """A checkpoint can't be written or read."""


def save(policy: Policy, folder: str | Path, provenance: Provenance | None = None, overwrite: bool = False) -> None:
    """Write the checkpoint beside `folder` and rename it: a kill never leaves half of one under that name.

    An existing folder is an error, unless `overwrite`: then it is moved away just before and deleted after.
    """
    target = Path(folder).absolute()
    if target.exists() and not overwrite:
        remedy = "Choose another name, or pass overwrite=True."
        raise CheckpointError(Fault("CHECKPOINT_EXISTS", str(target), "a new folder", "an existing one", remedy))
    if target.exists() and not (target / "contract.json").is_file():
        remedy = "Choose another name; only a checkpoint is ever replaced."
        raise CheckpointError(Fault("NOT_A_CHECKPOINT", str(target), "a checkpoint", "something else", remedy))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    temporary.chmod(0o755)
    try:
        _write(policy, temporary, provenance or policy.provenance)
        if target.exists():
            old = temporary.with_suffix(".old")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(
    folder: str | Path, offered: PolicyContract | None, consumer: str = "", device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Policy:  # fmt: skip
    """Read a checkpoint, check that it is whole and fits what `consumer` offers.

    Raises CheckpointError for the files and ContractError for a contract that does not fit.
    offered: None leaves out the check, for tools that don't run the policy.
    device, dtype: of the weights; None keeps the type that they are stored in.
    """
    root = Path(folder)
    codec = read_codec(root, offered, consumer)
    provenance = schema.load(Provenance, _text(root, "provenance.json"), "provenance", CheckpointError)
    return Policy(codec, _read_model(root, device, dtype), provenance)


def outline(folder: str | Path) -> Policy:
    """The policy of a checkpoint without the values of its weights, which take no memory: names, shapes and types."""
    root = Path(folder)
    codec, config = read_codec(root, None), read_model_config(root)
    model = _empty_model(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_stored(config))
    return Policy(codec, model)


def read_codec(folder: str | Path, offered: PolicyContract | None, consumer: str = "") -> Codec:
    """Everything of a checkpoint but its model; arguments and errors as of `load`."""
    root = Path(folder)
    _check_files(root)
    contract = PolicyContract.from_json(_text(root, "contract.json"))
    if offered is not None:
        contract.check(offered, consumer)
    statistics = Statistics.from_json(_text(root, "statistics.json"))
    if statistics.hash != contract.statistics_hash:
        raise CheckpointError(
            Fault(
                "STATISTICS_HASH",
                "statistics.json",
                str(contract.statistics_hash),
                statistics.hash,
                COPY_AGAIN,
            )
        )
    inputs, outputs = _read_transforms(_text(root, "transforms.json"))
    return Codec(contract, statistics, inputs, outputs, _read_tokenizer(root))


def fingerprint(folder: str | Path) -> str:
    """SHA-256 of what a policy is: of all files but the provenance, which says where it comes from."""
    root, found = Path(folder), hashlib.sha256()
    _check_files(root)
    for name in sorted({*FILES} - {"provenance.json"}):
        content = hashlib.sha256()
        with (root / name).open("rb") as file:
            while part := file.read(2**24):
                content.update(part)
        found.update(f"{name} {content.hexdigest()}\n".encode())
    return found.hexdigest()


def read_model_config(folder: str | Path) -> dict[str, Any]:
    """The configuration that `vla.policy.build` makes the checkpoint's model from."""
    config: dict[str, Any] = schema.parse(_text(Path(folder), "model.json"), "model", CheckpointError)
    return config


def _write(policy: Policy, folder: Path, provenance: Provenance) -> None:
    codec = policy.codec
    transforms = {
        "version": TRANSFORMS_VERSION,
        "images": [to_data(step) for step in codec.inputs.images],
        "state": [to_data(step) for step in codec.inputs.state],
        "instruction": to_data(codec.inputs.instruction),
        "action": [to_data(step) for step in codec.outputs.action],
        "bins": to_data(codec.outputs.bins),
    }
    texts = {
        "model.json": _json(model_settings(policy.model)),
        "statistics.json": codec.statistics.to_json(),
        "contract.json": codec.contract.to_json(),
        "transforms.json": _json(transforms),
        "provenance.json": _json(asdict(provenance)),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    codec.tokenizer.save(folder)
    weights = folder / "model.safetensors"
    save_model(policy.model, str(weights))
    shutil.copymode(folder / "model.json", weights)  # safetensors keeps the file from everybody else
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_files(root: Path) -> None:
    if not root.is_dir():
        remedy = "Check the path; a checkpoint is a folder."
        raise CheckpointError(Fault("CHECKPOINT_MISSING", str(root), "a folder", "nothing or a file", remedy))
    faults = [
        Fault(
            "PICKLE",
            str(path.relative_to(root)),
            "no pickled file",
            path.name,
            "Remove it; weights come as safetensors.",
        )
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in PICKLES
    ]
    faults += [
        Fault("FILE_MISSING", name, "a file", "nothing", COPY_AGAIN) for name in FILES if not (root / name).is_file()
    ]
    if faults:
        raise CheckpointError(*faults)


def _text(root: Path, name: str) -> str:
    try:
        return (root / name).read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise CheckpointError(Fault("NOT_JSON", name, "text in UTF-8", "other bytes", COPY_AGAIN)) from problem


def _read_transforms(text: str) -> tuple[InputTransforms, OutputTransforms]:
    data = schema.parse(text, "transforms", CheckpointError)
    keys = {"version", "images", "state", "instruction", "action", "bins"}
    if not isinstance(data, dict) or set(data) != keys or data["version"] != TRANSFORMS_VERSION:
        found = repr(sorted(data))[:80] if isinstance(data, dict) else type(data).__name__
        expected = f"the keys {sorted(keys)}, version {TRANSFORMS_VERSION}"
        raise CheckpointError(Fault("TRANSFORMS", "transforms.json", expected, found, COPY_AGAIN))

    def chain(key: str) -> tuple[Any, ...]:
        if not isinstance(data[key], list):
            raise CheckpointError(Fault("TRANSFORMS", f"transforms.{key}", "a list", repr(data[key])[:60], COPY_AGAIN))
        return tuple(from_data(step, f"transforms.{key}[{i}]") for i, step in enumerate(data[key]))

    instruction = from_data(data["instruction"], "transforms.instruction")
    bins = from_data(data["bins"], "transforms.bins")
    if not isinstance(instruction, InstructionFormat) or not isinstance(bins, UniformBins):
        found = f"{type(instruction).__name__}, {type(bins).__name__}"
        expected = "InstructionFormat, UniformBins"
        raise CheckpointError(Fault("TRANSFORMS", "transforms.instruction, bins", expected, found, COPY_AGAIN))
    return InputTransforms(chain("images"), chain("state"), instruction), OutputTransforms(chain("action"), bins)


def _read_tokenizer(root: Path) -> InstructionTokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        schema.parse(_text(root, name), name, CheckpointError)
    try:
        return InstructionTokenizer.load(root)
    except Exception as problem:  # the tokenizers library raises bare Exception for a foreign file
        if isinstance(problem, CodedError):
            raise
        found = f"{type(problem).__name__}: {str(problem)[:120]}"
        raise CheckpointError(Fault("TOKENIZER", "tokenizer.json", "a tokenizer", found, COPY_AGAIN)) from problem


def _read_model(root: Path, device: str | torch.device, dtype: torch.dtype | None) -> nn.Module:
    config = read_model_config(root)
    model = _empty_model(config)
    fill(model, [root / "model.safetensors"], CheckpointError, COPY_AGAIN, device, dtype, _stored(config))
    return model


def _stored(config: dict[str, Any]) -> torch.dtype:
    """The type of the weights in the file."""
    kind: torch.dtype = getattr(torch, str(config.get("dtype", "float32")))
    return kind


def _empty_model(config: dict[str, Any]) -> nn.Module:
    try:
        return empty(lambda: build(config))
    except (SimrealError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as problem:
        if isinstance(problem, CodedError):
            raise
        found = f"{type(problem).__name__}: {problem.args[0] if problem.args else problem}"
        remedy = getattr(problem, "remedy", "") or "Load it with the version that wrote it. " + COPY_AGAIN
        raise CheckpointError(Fault("MODEL_CONFIG", "model.json", "a known model", found, remedy)) from problem
