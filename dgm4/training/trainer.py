"""The training loop: one process, or as many as torchrun started."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from dgm4.config import model_config
from dgm4.data.annotations import read_split
from dgm4.data.dataset import Batch, PairDataset, collate, read_sidecar
from dgm4.losses import WEIGHTS
from dgm4.losses.contrastive import ALPHA
from dgm4.metrics import summarise
from dgm4.training.answers import collect, to_device
from dgm4.training.initialise import Initialisation, start_from
from dgm4.training.optimizer import make_optimizer, make_schedule
from dgm4.training.options import TrainOptions
from dgm4.training.order import BatchOrder
from dgm4.training.snapshot import load_released, read_snapshot, released_state, write_snapshot
from dgm4.training.trainee import Terms, Trainee
from engine.errors import BackendError, InputError, NumericalError
from engine.text import CaptionTokenizer

log = logging.getLogger(__name__)

LAST, BEST, LOG = "checkpoint_last.pth", "checkpoint_best.pth", "log.jsonl"
_SIDECARS = ("captions", "explanations")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where a run reads, writes and computes.

    `data` is a folder in the published layout, `out` takes checkpoints and log. `save_every` adds a
    checkpoint every so many updates, 0 only at the end of each epoch; `stop_after` ends the run after so
    many updates in all, to be taken up later. `cache` keeps decoded pictures in memory.
    """

    data: Path
    out: Path
    device: str = "auto"
    workers: int = 0
    cache: bool = True
    resume: bool = False
    save_every: int = 0
    stop_after: int = 0
    progress: bool = True


@dataclass
class Progress:
    """How far a run is: epochs done, batches of the epoch under way, updates in all, the best score."""

    epoch: int = 0
    batch: int = 0
    update: int = 0
    best: float = float("-inf")
    seconds: float = 0.0


class Trainer:
    """One run. Create it with a recipe and a place, then `run`."""

    def __init__(
        self,
        options: TrainOptions,
        place: Place,
        tokenizer: CaptionTokenizer,
        vocabulary: int,
        initialisation: Initialisation | None = None,
    ) -> None:
        """Read the data and build the network, or take the run in `place.out` up where it ended.

        Raises InputError for data that cannot be used, CheckpointError for a checkpoint that does not fit,
        BackendError for a device that is not there.
        """
        self.options, self.place = options, place
        self.rank, self.world = _join()
        self.device = _device(place.device, self.rank)
        if options.precision == "fp16" and self.device.type != "cuda":
            raise BackendError("training in fp16 needs a GPU; bf16 and fp32 run on a CPU too")
        self.train, self.val = self._datasets(tokenizer)
        torch.manual_seed(options.seed)
        self.trainee = make_trainee(options, vocabulary).to(self.device)
        if initialisation is not None:
            start_from(self.trainee, initialisation)
        self.optimizer = make_optimizer(self.trainee, options)
        self.updates = options.epochs * (self._order(0).whole // options.accumulate)
        if self.updates == 0:
            raise InputError(
                f"{place.data}: {len(self.train)} training pairs do not fill one update of {options.batch} x "
                f"{options.accumulate} x {self.world} processes"
            )
        self.schedule = make_schedule(self.optimizer, options, self.updates)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")
        self.progress = Progress()
        place.out.mkdir(parents=True, exist_ok=True)
        if place.resume:
            self._resume(place.out / LAST)
        # Another random stream for each process: dropout differs.
        elif self.rank:
            torch.manual_seed(options.seed + self.rank)

    def run(self) -> Progress:
        """Train to the end, or to `stop_after`; return how far it came.

        Writes `checkpoint_last.pth` and, by the sum of AUC, mAP, IoU and token F1 on the split "val",
        `checkpoint_best.pth`, both in the released layout, and one line of JSON an epoch in `log.jsonl`.
        Raises NumericalError where a loss is no longer finite.
        """
        model = self._parallel()
        while self.progress.epoch < self.options.epochs and not self._stopped():
            start = time.perf_counter()
            means = self._epoch(model)
            self.progress.seconds += time.perf_counter() - start
            if self.progress.batch:  # stopped within the epoch
                break
            if self.rank == 0:
                self._close_epoch(means, time.perf_counter() - start)
            if self.world > 1:
                dist.barrier()
        return self.progress

    def _stopped(self) -> bool:
        return 0 < self.place.stop_after <= self.progress.update

    def _parallel(self) -> nn.Module:
        if self.world == 1:
            return self.trainee
        devices = [self.device] if self.device.type == "cuda" else None
        # Ablations, and batches without side-cars, leave parameters without a gradient.
        return DistributedDataParallel(self.trainee, devices, find_unused_parameters=True)

    def _order(self, epoch: int, start: int = 0) -> BatchOrder:
        options = self.options
        return BatchOrder(len(self.train), options.batch, options.seed, epoch, self.rank, self.world, start)

    def _epoch(self, model: nn.Module) -> dict[str, float]:
        """Train one epoch, or what is left of it; return the mean of each loss."""
        model.train()
        progress, order = self.progress, self._order(self.progress.epoch, self.progress.batch)
        self.train.set_epoch(progress.epoch)
        usable = order.whole - order.whole % self.options.accumulate
        loader = DataLoader(
            self.train, batch_sampler=order, collate_fn=collate, num_workers=self.place.workers
        )
        sums: dict[str, float] = defaultdict(float)
        with self._bar(usable, progress) as bar:
            for batch in loader:
                if progress.batch >= usable:
                    break
                terms = self._step(model, to_device(batch, self.device), order.whole)
                for name, value in terms.items():
                    sums[name] += value
                bar.update()
                bar.set_postfix({name: f"{value:.3f}" for name, value in terms.items()}, refresh=False)
                if self._stopped():
                    self._save(LAST)
                    return {}
        count = usable - order.start
        progress.epoch, progress.batch = progress.epoch + 1, 0
        return {name: value / max(count, 1) for name, value in sums.items()}

    def _step(self, model: nn.Module, batch: Batch, whole: int) -> dict[str, float]:
        """One forward and backward pass, and an update where enough have gathered."""
        options, progress = self.options, self.progress
        due = (progress.batch + 1) % options.accumulate == 0
        alpha = ALPHA if progress.epoch else ALPHA * min(1.0, progress.batch / whole)
        waiting: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(model, DistributedDataParallel) and not due:
            waiting = model.no_sync()
        with waiting:
            with self._autocast():
                terms = cast(Terms, model(batch, alpha))
            weights = WEIGHTS[options.model]
            loss = torch.stack([weights[name] * value.float() for name, value in terms.items()]).sum()
            self.scaler.scale(loss / options.accumulate).backward()
        scalars = torch.stack([value.detach().float() for value in terms.values()]).tolist()
        values = dict(zip(terms, scalars, strict=True))
        if not all(abs(value) < float("inf") for value in values.values()):
            raise NumericalError(
                f"epoch {progress.epoch}, batch {progress.batch}: a loss is not finite ({values}); lower the "
                "learning rate or set clip"
            )
        progress.batch += 1
        if due:
            self._update()
        return {"loss": float(loss.detach()), **values}

    def _update(self) -> None:
        options, progress = self.options, self.progress
        if options.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trainee.parameters(), options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        progress.update += 1
        if self.place.save_every and progress.update % self.place.save_every == 0:
            self._save(LAST)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _DTYPES.get(self.options.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)

    @contextlib.contextmanager
    def _bar(self, usable: int, progress: Progress) -> Iterator[Any]:
        shown = self.place.progress and self.rank == 0
        label = f"epoch {progress.epoch + 1}/{self.options.epochs}"
        with tqdm(
            total=usable, initial=progress.batch, desc=label, unit="batch", disable=None if shown else True
        ) as bar:
            yield bar

    def _close_epoch(self, means: dict[str, float], seconds: float) -> None:
        """Judge on the split "val", write the checkpoints and the line of the log."""
        progress = self.progress
        metrics = self.validate()
        score = sum(metrics[name] for name in ("AUC", "mAP", "IoUmean", "text_F1"))
        better = score > progress.best
        progress.best = max(score, progress.best)
        line = {
            "epoch": progress.epoch,
            "update": progress.update,
            "seconds": round(seconds, 1),
            "lr": self.schedule.get_last_lr(),
            "train": means,
            "val": metrics,
        }
        with (self.place.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        log.info("epoch %d: loss %.4f, val %s", progress.epoch, means["loss"], metrics)
        self._save(LAST)
        if better:
            self._save(BEST)

    def validate(self) -> dict[str, float]:
        """Metrics of the online network on the split "val"; see `dgm4.metrics.summarise`."""
        self.trainee.eval()
        with self._autocast():
            answers = collect(self.trainee.predict, self.val, self.options.batch, self.device)
        return summarise(*answers)

    def _save(self, name: str) -> None:
        if self.rank:
            return
        progress = self.progress
        write_snapshot(
            self.place.out / name,
            {
                "model": released_state(self.trainee),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                "config": {**self.options.to_dict(), "network": self.trainee.network.config.to_dict()},
                "epoch": progress.epoch,
                "progress": dict(vars(progress)),
                "random": torch.get_rng_state(),
            },
        )

    def _resume(self, path: Path) -> None:
        content = read_snapshot(path)
        ours = self.options.to_dict()
        changed = [k for k, v in ours.items() if content["config"].get(k) != v]
        if changed:
            raise InputError(
                f"{path}: was made with another recipe ({', '.join(changed)} differ); give the same one, "
                "or start anew"
            )
        load_released(self.trainee, content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["lr_scheduler"])
        self.scaler.load_state_dict(content["scaler"])
        self.progress = Progress(**content["progress"])
        torch.set_rng_state(content["random"])

    def _datasets(self, tokenizer: CaptionTokenizer) -> tuple[PairDataset, PairDataset]:
        options, place = self.options, self.place
        sidecars = _read_sidecars(place.data) if options.model == "asap" else {}
        train = PairDataset(
            read_split(place.data, "train").samples,
            tokenizer,
            flip=options.flip,
            seed=options.seed,
            cache=place.cache,
            captions=sidecars.get("captions"),
            explanations=sidecars.get("explanations"),
        )
        val = PairDataset(read_split(place.data, "val").samples, tokenizer, cache=place.cache)
        return train, val


def make_trainee(options: TrainOptions, vocabulary: int) -> Trainee:
    """Build the trainee of a recipe, with `vocabulary` word pieces."""
    config = replace(model_config(options.model, options.size), vocabulary=vocabulary)
    return Trainee(config, options.queue, options.guidance, options.refinement, options.sampled)


def _read_sidecars(data: Path) -> dict[str, dict[str, str]]:
    """ASAP's side-cars; none where there is no file, with a line in the log."""
    found = {}
    for name in _SIDECARS:
        path = data / "metadata" / f"{name}.json"
        if path.is_file():
            found[name] = read_sidecar(path)
        else:
            log.warning("%s is not there: ASAP trains without LMA and IED (dgm4 data describe)", path)
    return found if len(found) == len(_SIDECARS) else {}


def _join() -> tuple[int, int]:
    """Rank and number of processes; joins the group that torchrun describes in the environment."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def _device(name: str, rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise BackendError("device: expected cpu or auto, since torch finds no GPU here, got cuda")
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', rank))}"
    if not name.startswith(("cpu", "cuda:")):
        raise InputError(f"device: expected auto, cpu or cuda, got {name!r}")
    return torch.device(name)
