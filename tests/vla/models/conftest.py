"""What the original code of OpenVLA and OpenVLA-OFT gave on a tiny checkpoint; see reference/README.md."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla.importing import ImportConfig, read
from vla.policy import Policy
from vla.types import ModelInputs

REFERENCE = Path(__file__).parent / "reference"
PARTS = {"l1": ("action_head",), "proprio": ("proprio_projector",), "film": ("vision_backbone",)}


@pytest.fixture(scope="session")
def numbers() -> Callable[[str], dict[str, np.ndarray]]:
    """The arrays of a reference file."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(REFERENCE / f"{name}.npz") as file:
            return {key: file[key] for key in file.files}

    return load


@pytest.fixture(scope="session")
def tasks() -> list[str]:
    return list(json.loads((REFERENCE / "openvla.json").read_text())["tasks"])


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., Policy]:
    """published("l1", "proprio", option=...): the tiny checkpoint with those parts of OpenVLA-OFT, in float32."""

    def make(*parts: str, adapter: bool = False, **options: Any) -> Policy:
        folder = tmp_path / "published"
        shutil.copytree(REFERENCE / "checkpoint", folder)
        for part in parts:
            for name in PARTS[part]:
                shutil.copy(REFERENCE / "oft_components" / f"{name}--1_checkpoint.pt", folder)
        given = {"unnorm_key": "bridge_orig", "image_size": (240, 320), "dtype": "float32", **options}
        lora = {"adapter": REFERENCE / "lora"} if adapter else {}
        return read(ImportConfig(str(folder), tmp_path / "bundle", **given, **lora))

    return make


@pytest.fixture
def inputs(numbers: Any, tasks: list[str]) -> Callable[..., ModelInputs]:
    """inputs(policy, 0, 2): what the codec makes of those samples; a second view is the next sample's image."""

    def make(policy: Policy, *samples: int) -> ModelInputs:
        codec, images = policy.codec, numbers("openvla")["images"]
        views = [[images[(i + view) % 3] for view in range(len(codec.contract.cameras))] for i in samples]
        seen = np.empty((len(samples), *codec.image_shape), np.uint8)
        for row, pictures in enumerate(views):
            for view, image in enumerate(pictures):
                for transform in codec.inputs.images:
                    image = transform.forward(image)
                seen[row, view] = image
        state = np.tile(numbers("openvla_oft")["proprio"], (len(samples), 1))[:, : codec.contract.state_size]
        tokens = np.stack([codec.tokenizer.encode(codec.inputs.instruction.forward(tasks[i])) for i in samples])
        return ModelInputs(seen, state, tokens)

    return make


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """close(name, found, expected): a failure names the quantity."""

    def check(name: str, found: Any, expected: Any, limit: float = 1e-5) -> None:
        a, b = (np.asarray(v.detach() if isinstance(v, torch.Tensor) else v, np.float64) for v in (found, expected))
        assert a.shape == b.shape, f"{name}: shape {a.shape}, expected {b.shape}"
        error = float(np.abs(a - b).max() / max(1.0, float(np.abs(b).max())))
        assert error <= limit, f"{name} deviates by {error:.3g}, more than {limit:g}"

    return check


@pytest.fixture(scope="session")
def reference() -> Path:
    return REFERENCE
