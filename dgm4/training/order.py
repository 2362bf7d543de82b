"""Which samples make a batch: a function of seed, epoch and process alone, so that a run can be taken up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class BatchOrder(Sampler[list[int]]):
    """Batches of indices for one epoch and one process, shuffled; what fills no weight update is left out.

    `seek` chooses the epoch, from 0 on, and how many of its batches to leave out, as trained before an
    interruption. An update takes `accumulate` batches of each of `world` processes.
    """

    def __init__(
        self, count: int, batch: int, seed: int, accumulate: int = 1, rank: int = 0, world: int = 1
    ) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.rank, self.world = rank, world
        self.whole = count // (batch * world * accumulate) * accumulate  # batches of an epoch
        self.seek(0)

    def seek(self, epoch: int, start: int = 0) -> None:
        """Go to batch `start` of an epoch, for the next iteration."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.whole - self.start

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.count, generator=generator)
        used = order[: self.whole * self.batch * self.world].view(self.whole, self.world, self.batch)
        yield from used[self.start :, self.rank].tolist()
