"""Batches of a split, in this process or in workers: unreadable images, and workers that fail.

One policy for images that fail when they are read, in training and in judging: they are counted and named,
and too many of them end the run. In training the next readable sample takes the place of one that fails, so
that every process has its whole batch; in judging the sample is left out.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from dgm4.data.annotations import Problem
from dgm4.data.dataset import Batch, Item, PairDataset, collate
from engine.errors import BackendError, InputError

log = logging.getLogger(__name__)

_NAMED = 20  # unreadable images that the log names
_FEWEST_ALLOWED, _SHARE_ALLOWED = 4, 0.01  # of a split: some of a small one, a hundredth of a large one
_SHARED = Path("/dev/shm")
_SHARED_MEMORY = ("No space left", "shared memory", "Bus error", "/dev/shm", "unable to write to file")


class Loaded(NamedTuple):
    """A batch, None where nothing of it could be read, and what was wrong with the others."""

    batch: Batch | None
    problems: tuple[Problem, ...]


class Unreadable:
    """Counts the images of a split of `count` samples that cannot be read."""

    def __init__(self, split: str, count: int) -> None:
        self.split, self.count = split, count
        self.allowed = max(_FEWEST_ALLOWED, int(_SHARE_ALLOWED * count))
        self.pictures: set[Path] = set()

    def add(self, problems: Iterable[Problem]) -> None:
        """Count and name what was not known yet; raises InputError for too many."""
        for problem in problems:
            if problem.file in self.pictures:
                continue
            self.pictures.add(problem.file)
            level = logging.WARNING if len(self.pictures) <= _NAMED else logging.DEBUG
            log.log(
                level, "split %s, unreadable image %d: %s", self.split, len(self.pictures), problem.message
            )
            if len(self.pictures) > self.allowed:
                raise InputError(
                    f"split {self.split}: more than {self.allowed} of {self.count} images cannot be read, "
                    f"the last one: {problem.message}; mend them, or leave them out of the annotations"
                )


class _Replacing(Dataset[tuple[Item | None, tuple[Problem, ...]]]):
    """Samples; `replace` puts the next readable one in the place of one that cannot be read."""

    def __init__(self, pairs: PairDataset, replace: bool) -> None:
        self.pairs, self.tries = pairs, 1 + replace * Unreadable("", len(pairs)).allowed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Item | None, tuple[Problem, ...]]:
        problems: list[Problem] = []
        for other in range(index, index + self.tries):
            found = self.pairs.read(other % len(self.pairs))
            if isinstance(found, Item):
                return found, tuple(problems)
            problems.append(found)
        return None, tuple(problems)


def make_loader(
    pairs: PairDataset,
    workers: int,
    batch: int = 1,
    order: Sampler[list[int]] | None = None,
    pin: bool = False,
) -> DataLoader[Any]:
    """Batches of `pairs`, in `order` for training, else `batch` by `batch` for judging; yields `Loaded`.

    Workers for training outlive an epoch, with the images they keep.
    """
    if workers:
        _end_workers_at_exit()
    settings: dict[str, Any] = {"batch_size": batch} if order is None else {"batch_sampler": order}
    return DataLoader(
        _Replacing(pairs, replace=order is not None),
        **settings,
        collate_fn=_collate,
        num_workers=workers,
        persistent_workers=workers > 0 and order is not None,
        worker_init_fn=_start_worker,
        pin_memory=pin,
        # An iterator draws a number: torch's own stream, which dropout takes, stays where it was.
        generator=torch.Generator(),
    )


def load(loader: DataLoader[Any]) -> Iterator[Loaded]:
    """Iterate over a loader of `make_loader`; raises BackendError where a worker of it fails."""
    try:
        yield from loader
    except (RuntimeError, OSError) as error:
        if not loader.num_workers:
            raise
        raise BackendError(_explain(str(error))) from error


def _explain(error: str) -> str:
    """Why a worker failed, in one line, and what helps."""
    if any(sign in error for sign in _SHARED_MEMORY):
        status = os.statvfs(_SHARED)
        size = status.f_blocks * status.f_frsize / 2**20
        return (
            f"a process that reads images has no shared memory left ({_SHARED} holds {size:.0f} MiB): start "
            "the container with more (docker run --shm-size=1g), or read in this process with --workers 0"
        )
    said = [line for line in error.splitlines() if line.strip()][-1:]
    return f"a process that reads images ended: {' '.join(said)}; if memory ran out, give fewer --workers"


@functools.cache
def _end_workers_at_exit() -> None:
    atexit.register(_end_workers)


def _end_workers() -> None:
    """End the workers that are left: they ignore the signal by which multiprocessing would."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises where a worker is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _start_worker(number: int) -> None:
    """The training process decides when to end, also where the whole group is sent a signal."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)


def _collate(read: Sequence[tuple[Item | None, tuple[Problem, ...]]]) -> Loaded:
    items = [item for item, _ in read if item is not None]
    batch = collate(items) if items else None
    if batch is not None and get_worker_info() is not None:
        # Here an error reaches the training process. In the thread that sends batches, where torch would do
        # it, it is printed, the batch is lost, and the training process waits for ever.
        for value in batch:
            if isinstance(value, Tensor):
                value.share_memory_()
    return Loaded(batch, tuple(problem for _, problems in read for problem in problems))
