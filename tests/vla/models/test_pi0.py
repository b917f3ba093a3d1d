"""pi0 at a tiny size: behind a contract, in a bundle, learning one chunk by heart, imported from its checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PI0Config, PI0ForConditionalGeneration

from vla.act import ActConfig, act
from vla.contract import ActionSemantics, Camera, Instruction, PolicyContract, StateField
from vla.errors import CodedError
from vla.importing import ImportConfig, import_, read
from vla.importing_pi0 import network_config
from vla.policy import Policy, PolicyError
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import train_tokenizer
from vla.types import ModelInputs, Observation

SENTENCE, SIDE, CHUNK = "put the mug on the plate", 28, 6
GEMMA = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
CONFIG: dict[str, Any] = {
    "class": "pi0", "chunk": CHUNK, "action_dim": 7, "state_dim": 3, "cameras": 2, "prompt_length": 12, "n_bins": 256,
    "values": 0, "steps": 10, "pad": 0, "bos": 1,
    "pi0": {
        "chunk_size": CHUNK, "max_action_dim": 8, "max_state_dim": 8,
        "vlm_config": {
            "model_type": "paligemma", "projection_dim": 32, "image_token_id": 600,
            "text_config": {"model_type": "gemma", "vocab_size": 601, **GEMMA},
            "vision_config": {
                "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "patch_size": 14,
                "image_size": SIDE, "num_hidden_layers": 2, "num_attention_heads": 2, "vision_use_head": False,
            },
        },
        "dit_config": {"model_type": "gemma", **GEMMA},
    },
}  # fmt: skip


@pytest.fixture
def policy() -> Policy:
    contract = PolicyContract(
        version=1, embodiment="tiny", state=(StateField("position", (3,), "m", "base"),),
        cameras=tuple(Camera(n, "third_person", SIDE, SIDE, 45.0, 0.01, 1.0) for n in ("left", "right")),
        action=ActionSemantics("delta_ee", "rotvec", "base", 0.1, 0.1, 10.0, CHUNK),
        instruction=Instruction("{task}", None), statistics_hash=None,
    )  # fmt: skip
    numbers = Statistics(
        ArrayStatistics.from_bounds([-0.1] * 6 + [0.0], [0.1] * 6 + [1.0]),
        ArrayStatistics.from_bounds([-1.0] * 3, [1.0] * 3),
    )
    return Policy.untrained(CONFIG, contract, numbers, train_tokenizer([SENTENCE], 512, 12), seed=0)


@pytest.fixture
def seen() -> Observation:
    random = np.random.default_rng(0)
    images = {name: random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for name in ("left", "right")}
    return Observation(
        images, {"position": np.array([0.1, 0.2, 0.3])}, SENTENCE, dict.fromkeys([*images, "position"], 5.0)
    )


def test_a_bundle_gives_the_same_chunk_and_other_noise_another(
    policy: Policy, seen: Observation, tmp_path: Path
) -> None:
    policy.save(tmp_path / "bundle")
    again = Policy.load(tmp_path / "bundle", None)
    (first,), (second,) = policy.act([seen]), again.act([seen])
    assert first.actions.shape == (CHUNK, 7) and first.stamp == 5.0
    assert np.array_equal(first.actions, second.actions)
    (other,) = again.act([seen], generator=torch.Generator().manual_seed(1))
    assert np.abs(other.actions - first.actions).max() > 1e-3


def test_padding_and_the_rest_of_the_batch_change_nothing(policy: Policy, seen: Observation) -> None:
    inputs = policy.codec.encode([seen, seen])
    tokens = inputs.tokens.copy()
    tokens[1] = policy.codec.tokenizer.encode("the mug")
    noise = torch.randn(2, *policy.model.noise_shape, generator=torch.Generator().manual_seed(0))

    def run(rows: slice, width: int) -> torch.Tensor:
        parts = (inputs.images[rows], inputs.state[rows], tokens[rows, -width:])
        return policy.model(*(torch.from_numpy(p) for p in parts), noise=noise[rows]).actions

    with torch.no_grad():
        together = run(slice(0, 2), 12)
        assert torch.allclose(run(slice(1, 2), 3), together[1:], atol=1e-5)
        assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_it_learns_a_chunk_by_heart(policy: Policy, seen: Observation) -> None:
    torch.manual_seed(0)
    inputs = policy.codec.encode([seen] * 16)
    wanted = torch.linspace(-0.8, 0.8, CHUNK * 7).reshape(1, CHUNK, 7)
    parts = tuple(torch.as_tensor(p) for p in (inputs.images, inputs.state, inputs.tokens))
    optimizer = torch.optim.AdamW(policy.model.parameters(), 3e-3)
    losses = []
    for _ in range(250):
        loss = policy.model.loss(*parts, wanted.expand(16, -1, -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:20])
    reached = policy.outputs(ModelInputs(inputs.images[:2], inputs.state[:2], inputs.tokens[:2]))
    assert (reached - wanted).abs().mean() < 0.15


def test_the_loss_is_that_of_flow_matching(policy: Policy, seen: Observation) -> None:
    """Of the velocity from the actions to the noise, at the point between them that the time names."""
    parts = tuple(torch.as_tensor(p) for p in vars(policy.codec.encode([seen, seen])).values())
    generator, model = torch.Generator().manual_seed(0), policy.model
    noise = torch.randn(2, *model.noise_shape, generator=generator)
    actions, time = torch.rand(2, CHUNK, 7, generator=generator), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        loss = model.loss(*parts, actions, noise, time)
        padded = torch.nn.functional.pad(actions, (0, 1))
        between = time[:, None, None] * noise + (1 - time[:, None, None]) * padded
        velocity = model.network(**model._inputs(*parts), noise=between, timestep=time).logits
    assert torch.allclose(loss, (velocity - (noise - padded)).square().mean(), atol=1e-6)


def test_it_is_refused_for_rl_and_for_fixed_shapes(policy: Policy, seen: Observation) -> None:
    with pytest.raises(PolicyError, match="regression"):
        policy.sample(policy.codec.encode([seen]), 1.0)
    with pytest.raises(PolicyError, match="speedup=none"):
        policy.speed_up("graph")


MOMENTS = {
    "state_mean": [0.4, 0.0, 0.2], "state_std": [0.1, 0.2, 0.05],
    "actions_mean": [0.0] * 6 + [0.5], "actions_std": [0.01] * 6 + [0.5],
}  # fmt: skip


@pytest.fixture
def network() -> Any:
    torch.manual_seed(1)
    return PI0ForConditionalGeneration(PI0Config(**CONFIG["pi0"])).eval()


@pytest.fixture
def folder(network: Any, tmp_path: Path) -> Path:
    """A checkpoint as transformers writes it."""
    root = tmp_path / "published"
    network.save_pretrained(root)
    train_tokenizer([SENTENCE], 512, 12).save(root)
    (root / "processor_config.json").write_text(json.dumps({"processor_class": "PI0Processor", **MOMENTS}))
    return root


def options(folder: Path, **changed: Any) -> ImportConfig:
    usual = {"cameras": ("left", "right"), "image_size": (SIDE, SIDE), "prompt_length": 12, "rate_hz": 10.0}
    return ImportConfig(str(folder), folder.parent / "bundle", **{**usual, **changed})


def as_lerobot(folder: Path) -> None:
    """The names of lerobot's files: everything in `model`, tied embeddings as heads; a normaliser's statistics."""
    renamed = {}
    for name, value in load_file(folder / "model.safetensors").items():
        name = name.replace("language_model.model.", "language_model.")
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        name = name.replace("paligemma.model.language_model.embed_tokens", "paligemma.lm_head")
        renamed[f"model.{name}"] = value
    assert any("paligemma.lm_head" in name for name in renamed)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "processor_config.json").unlink()
    names = ("observation.state.mean", "observation.state.std", "action.mean", "action.std")
    numbers = {name: torch.tensor(value) for name, value in zip(names, MOMENTS.values(), strict=True)}
    save_file(numbers, folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")


@pytest.mark.parametrize("layout", ["transformers", "lerobot"])
def test_an_imported_checkpoint_has_its_tensors_and_a_bundle_keeps_them(
    folder: Path, network: Any, layout: str
) -> None:
    if layout == "lerobot":
        as_lerobot(folder)
    import_(options(folder))
    policy = Policy.load(folder.parent / "bundle", None)
    action = policy.codec.statistics.action
    assert np.allclose([action.mean, action.std], [MOMENTS["actions_mean"], MOMENTS["actions_std"]])
    own, expected = policy.model.network.state_dict(), network.state_dict()
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in expected)
    policy.save(folder.parent / "again")
    first, second = (load_file(folder.parent / name / "model.safetensors") for name in ("bundle", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    names = ("model.json", "contract.json", "statistics.json", "transforms.json")
    assert all((folder.parent / "bundle" / n).read_text() == (folder.parent / "again" / n).read_text() for n in names)


def test_edited_deviations_are_noticed(folder: Path) -> None:
    import_(options(folder))
    file = folder.parent / "bundle" / "transforms.json"
    data = json.loads(file.read_text())
    data["action"][0]["std"][0] *= 2
    file.write_text(json.dumps(data))
    with pytest.raises(CodedError, match="STATISTICS_TRANSFORM"):
        Policy.load(folder.parent / "bundle", None)


def test_it_acts_as_the_network_with_its_processor(folder: Path, network: Any, seen: Observation) -> None:
    import_(options(folder))
    policy = Policy.load(folder.parent / "bundle", None)
    tokens = policy.codec.tokenizer.encode(SENTENCE)
    ids = [CONFIG["pi0"]["vlm_config"]["image_token_id"]] * 8 + [1] + tokens[tokens != 0].tolist()
    pixels = np.stack([seen.images[name] for name in ("left", "right")])
    state = (np.array([0.1, 0.2, 0.3]) - MOMENTS["state_mean"]) / MOMENTS["state_std"]
    found = network.sample_actions(
        state=torch.tensor([[*state, *[0.0] * 5]], dtype=torch.float32), input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2)[None].float() / 127.5 - 1.0,
        pixel_attention_mask=torch.ones(1, 2, dtype=torch.bool),
        noise=torch.randn(1, *policy.model.noise_shape, generator=torch.Generator().manual_seed(0)),
    )  # fmt: skip
    expected = found[0, :, :7].numpy() * MOMENTS["actions_std"] + MOMENTS["actions_mean"]
    stamps = dict.fromkeys(["left", "right", "proprio"], 5.0)
    (chunk,) = policy.act([Observation(seen.images, {"proprio": np.array([0.1, 0.2, 0.3])}, SENTENCE, stamps)])
    assert np.abs(chunk.actions - expected).max() < 1e-5
    for name, image in seen.images.items():
        Image.fromarray(image).save(folder / f"{name}.png")
    files = (folder / "left.png", folder / "right.png")
    act(ActConfig(folder.parent / "bundle", files, SENTENCE, folder / "act.json", state=(0.1, 0.2, 0.3)))
    assert np.abs(np.array(json.loads((folder / "act.json").read_text())["actions"]) - expected).max() < 1e-5


def test_in_bfloat16_it_acts_too(folder: Path, seen: Observation) -> None:
    half, full = read(options(folder, dtype="bfloat16")), read(options(folder))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    deviation = (half.probe() - full.probe()).abs().max()
    assert 0 < deviation < 0.1
    import_(options(folder, dtype="bfloat16"))
    assert torch.equal(Policy.load(folder.parent / "bundle", None).probe(), half.probe())


def test_the_base_model_takes_the_statistics_of_a_bundle(folder: Path, policy: Policy, tmp_path: Path) -> None:
    (folder / "processor_config.json").unlink()
    with pytest.raises(CodedError, match="like"):
        read(options(folder))
    policy.save(tmp_path / "task")
    imported = read(options(folder, like=tmp_path / "task"))
    assert imported.codec.statistics == policy.codec.statistics
    assert imported.contract.state == policy.contract.state and imported.contract.action == policy.contract.action


def test_the_configuration_of_lerobot() -> None:
    lerobot = {"type": "pi0", "chunk_size": 20, "n_action_steps": 20, "max_state_dim": 16, "device": "cpu"}
    settings = network_config({**lerobot, "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"})
    assert (settings.chunk_size, settings.max_state_dim, settings.vlm_config.text_config.hidden_size) == (20, 16, 2048)
    with pytest.raises(CodedError, match="gemma_2b"):
        network_config({**lerobot, "paligemma_variant": "gemma_300m"})


def damage(folder: Path, kind: str) -> dict[str, Any]:
    """What is done to the folder, or told to the import."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    name = "action_out_proj.bias"
    changed = {
        "missing": {k: v for k, v in stored.items() if k != name}, "unknown": {**stored, "surplus": torch.zeros(1)},
        "shape": {**stored, name: torch.zeros(3)},
    }  # fmt: skip
    if kind in changed:
        save_file(changed[kind], file, metadata={"format": "pt"})
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "pickle":
        file.rename(folder / "pytorch_model.bin")
    elif kind == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "quantiles":
        data = json.loads((folder / "config.json").read_text()) | {"normalization_mapping": {"ACTION": "QUANTILES"}}
        (folder / "config.json").write_text(json.dumps(data))
    return {"options": {"values": 1}, "wide": {"image_size": (28, 56)}}.get(kind, {})


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("missing", "WEIGHTS_MISMATCH"), ("unknown", "WEIGHTS_MISMATCH"), ("shape", "WEIGHTS_MISMATCH"),
        ("cut", "WEIGHTS_DAMAGED"), ("pickle", "WEIGHTS_MISSING"), ("tokenizer", "FILE_MISSING"),
        ("options", "OPTIONS"), ("wide", "IMAGE_SIZE"), ("quantiles", "NORMALISATION"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_damaged_or_used_wrongly_is_refused(folder: Path, kind: str, code: str) -> None:
    config = options(folder, **damage(folder, kind))
    with pytest.raises(CodedError) as caught:
        import_(config)
    assert {fault.code for fault in caught.value.faults} == {code} and not config.out.exists()
