"""The distribution of action tokens: sampling, log-probability and entropy, always in float32."""

import torch


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0 for a distribution, found {temperature}; 0 is for sampling only")
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def sample(
    logits: torch.Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
    uniforms: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens int64 `[...]` from logits `[..., n_bins]`; temperature 0 takes the most likely ones.

    uniforms: numbers in [0, 1) `[...]` to draw with, in place of `generator`: a token then depends on nothing
        but its own logits and number, whatever else is in the batch.
    """
    if temperature == 0:
        return logits.float().argmax(dim=-1)
    if uniforms is None:
        device = logits.device if generator is None else generator.device
        uniforms = torch.rand(logits.shape[:-1], generator=generator, device=device)
    elif uniforms.shape != logits.shape[:-1]:
        raise ValueError(f"uniforms must have the shape {tuple(logits.shape[:-1])}, found {tuple(uniforms.shape)}")
    # Inverse of the cumulative distribution. Float64 and the strict comparison exclude probability 0.
    cumulative = _log_softmax(logits, temperature).double().exp().cumsum(dim=-1)
    threshold = uniforms.to(logits.device, torch.float64)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0]


def log_prob(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probability float32 `[...]` of tokens `[...]` under logits `[..., n_bins]`."""
    return _log_softmax(logits, temperature).gather(-1, tokens.long()[..., None])[..., 0]


def entropy(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Entropy float32 `[...]` in nats of logits `[..., n_bins]`; a logit of minus infinity counts as 0."""
    log_probs = _log_softmax(logits, temperature)
    return -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(dim=-1)
