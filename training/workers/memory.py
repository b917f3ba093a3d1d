"""Frames of earlier rollouts, for the auxiliary phase."""

import torch

FRAME = ("images", "state", "tokens", "privileged")  # what is kept of a row


class Memory:
    """The last frames of all rollouts, in a ring: what the auxiliary loss needs never grows stale."""

    def __init__(self, capacity: int):
        self.capacity, self.count, self.next = capacity, 0, 0
        self.arrays: dict[str, torch.Tensor] = {}

    def add(self, rows: dict[str, torch.Tensor]) -> None:
        """Keep a copy of rows `[n, ...]`."""
        size = len(rows["state"])
        for key in FRAME:
            if key not in self.arrays:
                self.arrays[key] = rows[key].new_zeros((self.capacity, *rows[key].shape[1:]))
            self.arrays[key][(self.next + torch.arange(size)) % self.capacity] = rows[key]
        self.next = (self.next + size) % self.capacity
        self.count = min(self.capacity, self.count + size)

    def sample(self, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        chosen = torch.randint(self.count, (size,), generator=generator)
        return {key: array[chosen] for key, array in self.arrays.items()}
