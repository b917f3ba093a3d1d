"""OpenVLA with fixed shapes, for a policy that only acts: a static cache, CUDA graphs, torch.compile.

At batch 1 a decision of OpenVLA is eight short passes, which cost more in launching kernels than in running them.
Nothing here depends on how long the prompt is or how far the decoding has come, but through tensors: a pass is launched
as a whole, by replaying it as a CUDA graph, and can be compiled.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import StaticCache

from vla.models.base import VLAOutput
from vla.models.openvla import Draw, OpenVLA

EAGER_CALLS = 2  # before a graph is captured: libraries choose kernels and allocate in the first ones
Run = Callable[..., tuple[torch.Tensor | None, ...]]


class FixedShapes:
    """A model without gradients, at the shapes of the inputs that it is made with; only those may come.

    Without a GPU the shapes are fixed and no more. compiled: torch.compile as well, at the first call.
    The weights stay where they are: make another one after moving the model, or after attaching or merging adapters.
    """

    @torch.no_grad()
    def __init__(self, model: OpenVLA, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor, compiled: bool):
        self.model = model
        self.shapes = tuple(part.shape for part in (images, state, tokens))
        if not model.autoregressive:
            self._whole = _launched(self._answer, images.device, compiled)
            return
        prompt, _, _ = model.prompt(images, state, tokens)
        sizes = model.trunk.config
        self._start = prompt.shape[1]
        self._end = self._start + model.layout.tokens - 1  # the last token is never looked at
        self._indices = torch.arange(model.layout.tokens, device=prompt.device)
        self._cache: Any = StaticCache(config=sizes, max_cache_len=self._end)
        width = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
        self._cache.early_initialization(len(prompt), sizes.num_key_value_heads, width, prompt.dtype, prompt.device)
        self._first = _launched(self._prefill, images.device, compiled)
        self._next = _launched(self._step, images.device, compiled)

    def takes(self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor) -> bool:
        """Whether these have the shapes that it is made for."""
        return tuple(part.shape for part in (images, state, tokens)) == self.shapes

    @torch.no_grad()
    def forward(self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor) -> VLAOutput:
        """As `OpenVLA.forward` in parallel decoding."""
        return VLAOutput(*_kept(self._whole(images, state, tokens)))  # type: ignore[arg-type]

    @torch.no_grad()
    def decide(
        self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor, draw: Draw
    ) -> tuple[torch.Tensor, VLAOutput]:
        """As `OpenVLA.decide`."""
        first, values, auxiliary, present = _kept(self._first(images, state, tokens))
        assert first is not None and values is not None
        logits, said = [first], [draw(first[:, 0], 0)]
        for index in range(1, self.model.layout.tokens):
            (following,) = _kept(self._next(said[-1], self._indices[index - 1], present))
            assert following is not None
            logits.append(following)
            said.append(draw(following[:, 0], index))
        shape = (len(tokens), self.model.layout.chunk, self.model.layout.action_dim)
        output = VLAOutput(torch.cat(logits, 1).reshape(*shape, -1), values, auxiliary)
        return torch.stack(said, 1).reshape(shape), output

    def _answer(self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor) -> VLAOutput:
        return self.model.answer(*self.model.prompt(images, state, tokens))

    def _prefill(
        self, images: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Logits `[B, 1, bins]` of the first token, values, the auxiliary output, which of the prompt is there."""
        self._cache.reset()
        x, present, auxiliary = self.model.prompt(images, state, tokens)
        causal = torch.ones(self._start, self._start, dtype=torch.bool, device=x.device).tril()
        mask = F.pad(causal & present[:, None], (0, self._end - self._start))[:, None]
        where = (present.long().cumsum(1) - 1).clamp(min=0)
        hidden = self.model.hidden(x, mask, where, self._cache)[:, -1:]
        return self.model.logits(hidden), self.model.values(hidden[:, 0]), auxiliary, present

    def _step(self, said: torch.Tensor, index: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor]:
        """Logits `[B, 1, bins]` after the action tokens `said` `[B]` at `index` `[]`; present: as of the prompt."""
        x = self.model.embed(said[:, None])
        columns = torch.arange(self._end, device=x.device)
        mask = F.pad(present, (0, self._end - self._start), value=True) & (columns <= self._start + index)
        where = present.sum(1, keepdim=True) + index
        return (self.model.logits(self.model.hidden(x, mask[:, None, None], where, self._cache)),)


class Graph:
    """A function of tensors of fixed shapes as a CUDA graph; what it returns is overwritten by the next call."""

    def __init__(self, run: Run):
        self._run, self._calls = run, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._outputs: tuple[torch.Tensor | None, ...] = ()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        self._calls += 1
        if self._calls <= EAGER_CALLS:
            return self._aside(inputs)
        if self._graph is None:
            self._inputs = tuple(given.clone() for given in inputs)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, does not run
                self._outputs = self._run(*self._inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._outputs

    def _aside(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
        """Without a graph, on a stream of its own as a capture has it."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            outputs = self._run(*inputs)
        here.wait_stream(aside)
        return outputs


def _launched(run: Run, device: torch.device, compiled: bool) -> Run:
    """The function as it is to be called: compiled, and on a GPU as a graph."""
    if compiled:
        run = torch.compile(run, fullgraph=True, dynamic=False)
    return Graph(run) if device.type == "cuda" else run


def _kept(outputs: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """Copies that the next call leaves alone."""
    return tuple(None if part is None else part.clone() for part in outputs)
