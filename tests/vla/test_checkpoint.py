import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vla import checkpoint
from vla.checkpoint import FILES, CheckpointError
from vla.contract import ContractError, PolicyContract
from vla.errors import CodedError
from vla.policy import Policy, Provenance
from vla.types import Observation


@pytest.fixture
def folder(policy: Policy, tmp_path: Path) -> Path:
    policy.save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def codes_of_load(folder: Path, offered: PolicyContract | None = None) -> tuple[str, ...]:
    with pytest.raises(CodedError) as error:
        checkpoint.load(folder, offered, "test")
    assert all(fault.expected and fault.found and fault.remedy for fault in error.value.faults)
    return error.value.codes


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_a_loaded_policy_is_the_saved_one(
    policy: Policy, folder: Path, offered: PolicyContract, observations: list[Observation]
) -> None:
    copy = Policy.load(folder, offered, "simulator")
    assert copy.contract == policy.contract and copy.provenance == policy.provenance
    assert copy.codec.statistics == policy.codec.statistics
    assert copy.codec.inputs == policy.codec.inputs and copy.codec.outputs == policy.codec.outputs
    own, other = policy.model.state_dict(), copy.model.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    for one, two in zip(policy.act(observations), copy.act(observations), strict=True):
        assert one.actions.tobytes() == two.actions.tobytes() and one.stamp == two.stamp
    assert not copy.model.training
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "whoever may read one may read all"


def test_saving_leaves_nothing_beside_and_never_replaces_by_accident(
    policy: Policy, folder: Path, tmp_path: Path
) -> None:
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(CheckpointError) as error:
        policy.save(folder)
    assert error.value.codes == ("CHECKPOINT_EXISTS",)
    checkpoint.save(policy, folder, Provenance(seed=8), overwrite=True)
    assert checkpoint.load(folder, None).provenance.seed == 8
    assert list(tmp_path.iterdir()) == [folder]
    (tmp_path / "thesis").mkdir()
    with pytest.raises(CheckpointError) as error:
        checkpoint.save(policy, tmp_path / "thesis", overwrite=True)
    assert error.value.codes == ("NOT_A_CHECKPOINT",)


def test_a_failed_save_leaves_nothing(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        policy.save(tmp_path / "new", Provenance(curve={"loss": float("nan")}))
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_and_file_for_folder(folder: Path, tmp_path: Path) -> None:
    assert codes_of_load(tmp_path / "nothing") == ("CHECKPOINT_MISSING",)
    assert codes_of_load(folder / "model.json") == ("CHECKPOINT_MISSING",)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert codes_of_load(folder) == ("FILE_MISSING",)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_file(folder: Path, name: str, keep: float) -> None:
    path = folder / name
    os.truncate(path, int(keep * path.stat().st_size))
    expected = "WEIGHTS_DAMAGED" if name == "model.safetensors" else "NOT_JSON"
    assert codes_of_load(folder) == (expected,)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"{}", b'{"a": 1}', b"[]", b"\x80\x04\x95\xff\x00", b"null"])
def test_foreign_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    codes_of_load(folder)


def test_foreign_weights(folder: Path, policy: Policy) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    first = next(iter(weights))
    save_file({"other.weight": torch.zeros(3)}, path)
    assert codes_of_load(folder) == ("WEIGHTS_MISMATCH",)
    save_file({name: tensor for name, tensor in weights.items() if name != first}, path)
    assert codes_of_load(folder) == ("WEIGHTS_MISMATCH",)
    save_file(weights | {first: torch.zeros(3)}, path)
    assert codes_of_load(folder) == ("WEIGHTS_MISMATCH",)
    save_file(weights | {first: weights[first].half()}, path)
    assert codes_of_load(folder) == ("WEIGHTS_MISMATCH",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "head.pt", "sub/optimizer.PKL"])
def test_pickles_are_refused_unopened(folder: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "executed"),)

    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(Trap()))
    assert codes_of_load(folder) == ("PICKLE",)
    assert not (folder / "executed").exists()


CHANGES: dict[str, tuple[str, Callable[[PolicyContract], PolicyContract]]] = {
    "camera": ("CAMERA_MISSING", lambda c: replace(c, cameras=c.cameras[:1])),
    "action mode": ("ACTION_MODE", lambda c: replace(c, action=replace(c.action, control_mode="joint"))),
    "chunk": ("ACTION_CHUNK", lambda c: replace(c, action=replace(c.action, chunk=8))),
    "statistics": ("STATISTICS_HASH", lambda c: replace(c, statistics_hash="0" * 64)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_contract_that_does_not_fit(folder: Path, offered: PolicyContract, case: str) -> None:
    code, change = CHANGES[case]
    with pytest.raises(ContractError) as error:
        checkpoint.load(folder, change(offered), "the robot")
    assert error.value.codes == (code,) and "the robot" in str(error.value)


def test_edited_statistics_are_noticed(folder: Path) -> None:
    def widen(data: dict[str, Any]) -> dict[str, Any]:
        data["action"]["q99"][0] *= 1.5
        return data

    edit(folder / "statistics.json", widen)
    assert codes_of_load(folder) == ("STATISTICS_HASH",)


def test_edited_transforms_are_noticed(folder: Path) -> None:
    def widen(data: dict[str, Any]) -> dict[str, Any]:
        data["action"][0]["q99"][0] *= 0.5
        return data

    edit(folder / "transforms.json", widen)
    assert codes_of_load(folder) == ("STATISTICS_TRANSFORM",)


TAMPERED: dict[str, tuple[str, str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "bins": ("transforms.json", "MODEL_CONFIG", lambda d: d | {"bins": d["bins"] | {"n_bins": 256}}),
    "bins for prompt": ("transforms.json", "TRANSFORMS", lambda d: d | {"instruction": d["bins"]}),
    "version": ("transforms.json", "TRANSFORMS", lambda d: d | {"version": 2}),
    "no image check": ("transforms.json", "IMAGE_CHAIN", lambda d: d | {"images": []}),
    "bins for state": ("transforms.json", "CHAIN", lambda d: d | {"state": [d["bins"]]}),
    "prompt": (
        "transforms.json",
        "INSTRUCTION_TEMPLATE",
        lambda d: d | {"instruction": d["instruction"] | {"template": "Do {task}"}},
    ),
    "chunk": ("contract.json", "MODEL_CONFIG", lambda d: d | {"action": d["action"] | {"chunk": 8}}),
    "unknown model": ("model.json", "MODEL_CONFIG", lambda d: d | {"class": "gpt"}),
    "unknown setting": ("model.json", "MODEL_CONFIG", lambda d: d | {"colour": 1}),
    "wider model": ("model.json", "WEIGHTS_MISMATCH", lambda d: d | {"hidden": 32}),
    "length": ("tokenizer_config.json", "MODEL_CONFIG", lambda d: d | {"model_max_length": 13}),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_parts_that_do_not_belong_together(folder: Path, case: str) -> None:
    name, code, change = TAMPERED[case]
    edit(folder / name, change)
    assert code in codes_of_load(folder)
