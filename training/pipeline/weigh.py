"""What a model takes of a device's memory, worked out without the device and without the weights.

The model is built on torch's meta device, whose tensors have a size and no values; one forward pass there tells what
the backward pass would keep. Attention counts as the fused kernels of a GPU have it: inputs, output, mask and row sums.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from vla import lora
from vla.lora import FULL, Lora
from vla.policy import build

GIB = 2**30
LONGEST = 2**31


@dataclass(frozen=True)
class Sizes:
    """Of a model's inputs. image: K, H, W, 3. state: numbers. prompt: tokens. chunk: C, D of the actions."""

    image: tuple[int, int, int, int]
    state: int
    prompt: int
    chunk: tuple[int, int]


@dataclass(frozen=True)
class Load:
    """Bytes. kept, block and cache are those of one sample.

    weights: of the whole model as stored. trained: numbers that are trained, float32 in a learner. masters: how much
    more they take there than as stored. gradients, moments: of those, two moments (AdamW).
    kept: what the forward pass leaves for the backward pass. kept_checkpointed: the same, if blocks are computed again;
    None if the model can't. block: the largest block's share of `kept`. cache: keys and values of a decision that
    is made token by token.
    """

    parameters: int
    trained: int
    weights: int
    masters: int
    gradients: int
    moments: int
    kept: int
    kept_checkpointed: int | None
    block: int
    cache: int

    def learner(self, micro_batch: int, checkpointing: bool, parts: int = 1) -> int:
        """Bytes of a learner that takes so many samples at a time; parts: learners over which the weights are split.

        What is trained beside frozen weights is not split.
        """
        inside = self.kept
        if checkpointing and self.kept_checkpointed is not None:
            inside = self.kept_checkpointed + self.block
        own = self.masters + self.gradients + self.moments
        held = self.weights + own if self.trained == self.parameters else self.weights
        return held // parts + (self.weights + own - held) + micro_batch * inside

    def policy(self, batch: int) -> int:
        """Bytes of a policy that decides so many observations at a time."""
        return self.weights + batch * (self.block + self.cache)


class _Attention(torch.autograd.Function):
    """Keeps what the fused kernels keep."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty_like(q)
        bias = [] if mask is None else [torch.empty_like(mask, dtype=q.dtype)]
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), *bias)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError("only the forward pass is weighed")


class _Weightless(TorchFunctionMode):
    """Lets a model run without values: where it asks for one, no place is padding and every length is the longest."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else (kwargs or {}).get("attn_mask")
            return _Attention.apply(*args[:3], mask)
        if func in (torch.Tensor.__bool__, torch.Tensor.item):
            return True
        if func is torch.Tensor.__int__:
            return LONGEST
        return func(*args, **(kwargs or {}))


class _Scale:
    """Counts the memory that saved tensors hold, each piece once, and the largest share of a block of a ModuleList."""

    def __init__(self, model: nn.Module):
        self.total = self.block = 0
        self._known = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        self._held: list[torch.Tensor] = []  # or a piece's place would be taken by the next one
        self._begun: list[int] = []
        blocks = [block for part in model.modules() if isinstance(part, nn.ModuleList) for block in part]
        self._hooks = [b.register_forward_pre_hook(self._enter) for b in blocks]
        self._hooks += [b.register_forward_hook(self._leave) for b in blocks]

    @contextmanager
    def weighing(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._add, lambda tensor: tensor):
            yield
        for hook in self._hooks:
            hook.remove()

    def _add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._held.append(tensor)
            self.total += storage.nbytes()
        return tensor

    def _enter(self, *_: Any) -> None:
        self._begun.append(self.total)

    def _leave(self, *_: Any) -> None:
        self.block = max(self.block, self.total - self._begun.pop())


def weigh(config: dict[str, Any], sizes: Sizes, adapters: Lora = FULL, samples: int = 2) -> Load:
    """The load of the model that `config` builds, in the type of weights that it names (float32 if none).

    adapters: train these in place of all weights. samples: of the forward pass that is counted.
    """
    kind = getattr(torch, str(config.get("dtype", "float32")))
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        with torch.device("meta"):
            model: Any = build(config)
    finally:
        torch.set_default_dtype(before)
    if adapters.rank:
        lora.attach(model, adapters)
    kept, block = _forward(model, sizes, samples)
    checkpointed = None
    if hasattr(model, "checkpoint_gradients"):
        model.checkpoint_gradients()
        checkpointed = _forward(model, sizes, samples)[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(4 * p.numel() for p in trained)
    return Load(
        sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained),
        sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        size - sum(p.nbytes for p in trained), size, 2 * size, kept, checkpointed, block,
        _cache(model, sizes),
    )  # fmt: skip


def _forward(model: Any, sizes: Sizes, samples: int) -> tuple[int, int]:
    """Bytes a sample that a forward pass keeps, and of its largest block."""
    with torch.device("meta"):
        images = torch.empty(samples, *sizes.image, dtype=torch.uint8)
        state, tokens = torch.empty(samples, sizes.state), torch.empty(samples, sizes.prompt, dtype=torch.int64)
        said = torch.empty(samples, *sizes.chunk, dtype=torch.int64)
        given = {"actions": said} if getattr(model, "autoregressive", False) else {}
        scale = _Scale(model)
        with _Weightless(), scale.weighing():
            model(images, state, tokens, **given)
    return scale.total // samples, scale.block // samples


def _cache(model: Any, sizes: Sizes) -> int:
    """Keys and values of all layers for a prompt and its actions."""
    if not getattr(model, "autoregressive", False):
        return 0
    c = model.trunk.config
    places = _places(model, sizes) + sizes.chunk[0] * sizes.chunk[1]
    width = c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)
    return int(2 * c.num_hidden_layers * places * width * model.trunk.embed_tokens.weight.element_size())


def _places(model: Any, sizes: Sizes) -> int:
    """Tokens of a prompt with its images."""
    with torch.device("meta"), torch.no_grad(), _Weightless():
        images = torch.empty(1, *sizes.image, dtype=torch.uint8)
        seen = model.see(images, torch.empty(1, sizes.state), torch.empty(1, sizes.prompt, dtype=torch.int64))
    return 1 + seen.tokens.shape[1] + sizes.prompt + bool(sizes.state)
