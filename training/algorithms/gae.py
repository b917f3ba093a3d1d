"""Generalised advantage estimation (Schulman et al. 2016) over chunks or over the actions inside them."""

import torch


def advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    executed: torch.Tensor,
    terminated: torch.Tensor,
    valid: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, both `[T, N, V]`; zero where nothing was executed.

    rewards: `[T, N, C]`. values: `[T + 1, N, V]` with V = 1 (one value a chunk: its rewards are summed) or
    V = C (one value an action). executed: bool `[T, N, C]`. terminated: bool `[T, N]`.
    valid: bool `[T, N]`, False in a row that holds only the final observation of a truncated episode: its
    value is the bootstrap of the row before, its action was ignored.
    gamma, lam: per chunk if V = 1, per action if V = C.
    """
    steps, _, width = values.shape[0] - 1, values.shape[1], values.shape[2]
    if width == 1:
        rewards, executed = (rewards * executed).sum(-1, keepdim=True), executed.any(-1, keepdim=True)
    executed = executed & valid[..., None]
    result = torch.zeros_like(values[:-1])
    running = torch.zeros_like(values[0, :, 0])
    for t in reversed(range(steps)):
        following = values[t + 1, :, 0]
        alive = (~terminated[t]).to(values.dtype)
        for c in reversed(range(width)):
            done = executed[t, :, c]
            delta = rewards[t, :, c] + gamma * alive * following - values[t, :, c]
            running = torch.where(done, delta + gamma * lam * alive * running, running)
            following = torch.where(done, values[t, :, c], following)
            alive = torch.where(done, torch.ones_like(alive), alive)  # only the last action ends an episode
            result[t, :, c] = torch.where(done, running, torch.zeros_like(running))
        # A boundary row separates two episodes: nothing flows from the later to the earlier one.
        running = torch.where(valid[t], running, torch.zeros_like(running))
    return result, (result + values[:-1]) * executed
