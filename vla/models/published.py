"""OpenVLA and OpenVLA-OFT as published: their sizes as configuration, and their weights from and to their layout."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vla.errors import CodedError, Fault
from vla.models.base import ModelConfig
from vla.models.heads import L1Head, NumberedMLP, value_head
from vla.models.openvla import BOS, STOP, Layout, OpenVLA
from vla.models.vit import DINO, SIGLIP, FusedBackbone, ViTConfig

Triple = tuple[float, float, float]


class PublishedError(CodedError):
    """A published checkpoint is not what it should be."""


@dataclass(frozen=True)
class LlamaSizes:
    """Of Llama 2; the defaults are those of 7B. rope_theta: base of the rotary positions."""

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class PublishedConfig(ModelConfig):
    """A published model. The defaults are OpenVLA 7B.

    dino, siglip: the vision transformers.
    mean, std: of the channels of either, images in 0..1.
    vocabulary_padding: rows of the vocabulary that stand for nothing, at its end; the action tokens come before them.
    pad: id of the padding.
    state_dim: numbers of the proprioceptive state, 0 for none.
    decoding: autoregressive (OpenVLA) or parallel (OpenVLA-OFT).
    stop: whether the stop token follows the placeholders of parallel decoding.
    head: tokens, or l1 for OpenVLA-OFT's regression.
    film: whether the prompt modulates the vision transformers.
    detach_value: keep value gradients out of the trunk.
    dtype: of the weights.
    """

    dino: ViTConfig = DINO
    siglip: ViTConfig = SIGLIP
    mean: tuple[Triple, Triple] = ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5))
    std: tuple[Triple, Triple] = ((0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5))
    language: LlamaSizes = field(default_factory=LlamaSizes)
    vocabulary_padding: int = 64
    pad: int = 32000
    cameras: int = 1
    state_dim: int = 0
    prompt_length: int = 64
    decoding: Literal["autoregressive", "parallel"] = "autoregressive"
    chunk: int = 1
    stop: bool = True
    head: Literal["tokens", "l1"] = "tokens"
    film: bool = False
    values: int = 0
    detach_value: bool = False
    dtype: str = "bfloat16"

    def build(self) -> OpenVLA:
        model = assemble(self)
        for parameter in model.parameters():  # buffers stay: positions and means want float32
            parameter.data = parameter.data.to(getattr(torch, self.dtype))
        return model

    def facts(self) -> dict[str, Any]:
        return {"vocabulary": self.language.vocab_size, "image_size": self.dino.image_size}

    def words(self) -> int:
        return self.language.vocab_size - self.vocabulary_padding - self.n_bins  # the action tokens follow


def assemble(c: PublishedConfig) -> OpenVLA:
    """With random weights, in float32."""
    h, sizes = c.language.hidden_size, asdict(c.language)
    images = c.cameras * (c.dino.image_size // c.dino.patch) ** 2
    longest = 1 + images + bool(c.state_dim) + c.prompt_length + c.chunk * c.action_dim + 1  # BOS and STOP
    if longest > c.language.max_position_embeddings:
        expected, found = f"at most {c.language.max_position_embeddings} tokens", f"{longest}, {images} of images"
        remedy = "Lower prompt_length, chunk or the number of cameras."
        raise PublishedError(Fault("CONTEXT", "the longest sequence", expected, found, remedy))
    text = h if c.film else 0
    towers = [replace(tower, text=text) for tower in (c.dino, c.siglip)]
    vision = FusedBackbone(towers[0], towers[1], c.mean, c.std)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    language_model = LlamaForCausalLM(
        LlamaConfig(**sizes, rope_parameters=rope, pad_token_id=c.pad, bos_token_id=BOS, eos_token_id=STOP)
    )
    autoregressive = c.decoding == "autoregressive"
    return OpenVLA(
        c.data(),
        Layout(c.chunk, c.action_dim, c.n_bins, c.pad, autoregressive, c.stop and not autoregressive, c.film),
        vision, NumberedMLP(vision.width, 4 * vision.width, h, h), language_model,
        proprio=NumberedMLP(c.state_dim, h, h) if c.state_dim else None,
        head=L1Head(h, c.action_dim) if c.head == "l1" else None,
        value_head=value_head(h, c.values, bias=False) if c.values else None,
        top_id=c.language.vocab_size - c.vocabulary_padding - 1, detach_value=c.detach_value,
    )  # fmt: skip
