"""Which samples make a batch: a function of seed, epoch and process alone, so that a run can be taken up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class BatchOrder(Sampler[list[int]]):
    """Batches of indices for one epoch and one process, shuffled; what fills no batch is left out.

    `start` leaves out the batches that were trained before an interruption.
    """

    def __init__(
        self, count: int, batch: int, seed: int, epoch: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        self.count, self.batch, self.seed, self.epoch = count, batch, seed, epoch
        self.rank, self.world, self.start = rank, world, start

    @property
    def whole(self) -> int:
        """Batches of the whole epoch, those left out included."""
        return self.count // (self.batch * self.world)

    def __len__(self) -> int:
        return self.whole - self.start

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.count, generator=generator)
        used = order[: self.whole * self.batch * self.world].view(self.whole, self.world, self.batch)
        yield from used[self.start :, self.rank].tolist()
