"""The training loop: one process, or as many as torchrun started."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dgm4.config import ModelConfig, model_config
from dgm4.data.annotations import read_split
from dgm4.data.dataset import Batch, PairDataset, read_sidecar
from dgm4.losses import WEIGHTS
from dgm4.losses.contrastive import ALPHA
from dgm4.metrics import summarise
from dgm4.model import Output
from dgm4.tokenizer import VOCABULARY, vocabulary_digest
from dgm4.training.initialise import Initialisation, start_from
from dgm4.training.journal import append_line, keep_lines
from dgm4.training.optimizer import make_optimizer, make_schedule
from dgm4.training.options import TrainOptions
from dgm4.training.order import BatchOrder
from dgm4.training.outputs import collect, to_device
from dgm4.training.processes import any_process, join, pick_device, random_states, set_random_state, wait
from dgm4.training.reading import Unreadable, load, make_loader
from dgm4.training.resume import Progress as Progress
from dgm4.training.resume import restore, taking_up
from dgm4.training.snapshot import load_released, read_snapshot, released_state, write_snapshot
from dgm4.training.trainee import Terms, Trainee
from engine.errors import BackendError, InputError, NumericalError
from engine.inputs.text import CaptionTokenizer
from engine.progress import progress_bar
from engine.registry.config import FusionConfig

log = logging.getLogger(__name__)

LAST, BEST, LOG = "checkpoint_last.pth", "checkpoint_best.pth", "log.jsonl"
_SCORE = ("AUC", "mAP", "IoUmean", "text_F1")  # NaN, where "val" lacks a class, counts as 0
_SIDECARS = ("captions", "explanations")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where a run reads, writes and computes.

    `data` is a folder in the published layout, `out` takes checkpoints and log. `save_every` adds a
    checkpoint every so many updates, 0 only at the end of each epoch; `stop_after` ends the run after so
    many updates in all, to be taken up later. `cache` keeps decoded images in memory.
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


class _Stopped(Exception):
    """The run was asked to stop while it was judged."""


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

        `initialisation` is for a new run only. Raises InputError for data that cannot be used, and for an
        `out` that holds another run; CheckpointError for a checkpoint that does not fit; BackendError for a
        device that is not there.
        """
        self.options, self.place = options, place
        self.device = pick_device(place.device)
        _check_start(options, place, self.device)
        self.rank, self.world = join(self.device)
        config = replace(model_config(options.model, options.size), vocabulary=vocabulary)
        self.train, self.val = _datasets(options, place, tokenizer, config.image_size)
        self.order = BatchOrder(
            len(self.train), options.batch, options.seed, options.accumulate, self.rank, self.world
        )
        if self.order.whole == 0:
            raise InputError(
                f"{place.data}: {len(self.train)} training pairs do not fill one update of {options.batch} x "
                f"{options.accumulate} x {self.world} processes"
            )
        torch.manual_seed(options.seed)
        self.trainee = _trainee(options, config).to(self.device)
        if initialisation is not None and not place.resume:
            start_from(self.trainee, initialisation)
        self.optimizer = make_optimizer(self.trainee, options)
        updates = options.epochs * (self.order.whole // options.accumulate)
        self.schedule = make_schedule(self.optimizer, options, updates)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16")
        self.progress = Progress()
        self._asked = False
        splits = {"train": self.train, "val": self.val}
        self._unreadable = {split: Unreadable(split, len(pairs)) for split, pairs in splits.items()}
        place.out.mkdir(parents=True, exist_ok=True)
        if place.resume:
            self._resume(place.out / LAST)
        # Another random stream for each process: dropout differs.
        elif self.rank:
            torch.manual_seed(options.seed + self.rank)

    def run(self) -> Progress:
        """Train to the end, to `stop_after` or to where `stop` finds it; return how far it came.

        Writes `checkpoint_last.pth` and, by the sum of AUC, mAP, IoU and token F1 on the split "val",
        `checkpoint_best.pth`, both in the released layout, and one line of JSON an epoch in `log.jsonl`,
        whose losses are means over the epoch's batches of the first process. The epoch is saved before it is
        judged, too: a run that ends meanwhile is taken up there. An image that cannot be read is counted, and
        the next sample takes its place. Raises NumericalError where a loss or a gradient is no longer finite,
        InputError for too many unreadable images, BackendError where a worker fails.
        """
        model, loader = self._parallel(), self._loader()
        while self.progress.epoch < self.options.epochs and not self._stopped():
            self._epoch(model, loader)
            if self.progress.batch < self.order.whole:  # stopped within the epoch
                break
            self._close_epoch()
        return self.progress

    def stop(self) -> None:
        """Let `run` save and return after the update under way; a signal's handler may call it."""
        self._asked = True

    def _stopped(self) -> bool:
        """Whether the run ends between these two updates, the same in every process."""
        if self.progress.batch % self.options.accumulate:
            return False
        reached = 0 < self.place.stop_after <= self.progress.update
        return any_process(self._asked, self.device) or reached

    def _save_due(self) -> bool:
        """Whether the batch just trained ended an update after which to save."""
        progress, every = self.progress, self.place.save_every
        return every > 0 and progress.batch % self.options.accumulate == 0 and progress.update % every == 0

    def _parallel(self) -> nn.Module:
        if self.world == 1:
            return self.trainee
        devices = [self.device] if self.device.type == "cuda" else None
        # Ablations, and batches without side-cars, leave parameters without a gradient. The queues are the
        # same in every process, since each gathers the features of all.
        return DistributedDataParallel(
            self.trainee, devices, find_unused_parameters=True, forward_sync_buffers=False
        )

    def _loader(self) -> DataLoader[Any]:
        """Batches of the epoch that `order` is at."""
        pin = self.device.type == "cuda"
        return make_loader(self.train, self.place.workers, order=self.order, pin=pin)

    def _epoch(self, model: nn.Module, loader: DataLoader[Any]) -> None:
        """Train one epoch, or what is left of it, or to where the run is to stop."""
        model.train()
        progress = self.progress
        self.order.seek(progress.epoch, progress.batch)
        self.train.set_epoch(progress.epoch)
        clock = time.perf_counter()
        label = f"epoch {progress.epoch + 1} of {self.options.epochs}"
        with progress_bar(label, self.order.whole, "batches", self._shown, progress.batch) as bar:
            for batch, problems in load(loader):
                self._unreadable["train"].add(problems)
                if batch is None:
                    raise InputError(f"{self.place.data}: no image of a whole batch can be read")
                values = self._step(model, to_device(batch, self.device))
                now = time.perf_counter()
                progress.count(values, now - clock)
                clock = now
                bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
                bar.update()
                within = self._stopped() and progress.batch < self.order.whole
                if within or self._save_due():
                    self._save((LAST,), random_states(self.device))
                    wait()
                if within:
                    break

    def _step(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """One forward and backward pass, and an update where enough have gathered; return the losses."""
        options, progress = self.options, self.progress
        due = (progress.batch + 1) % options.accumulate == 0
        alpha = ALPHA if progress.epoch else ALPHA * progress.batch / self.order.whole
        waiting: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(model, DistributedDataParallel) and not due:
            waiting = model.no_sync()
        with waiting:
            with self._autocast():
                terms = cast(Terms, model(batch, alpha))
            weights = WEIGHTS[options.model]
            loss = torch.stack([weights[name] * value.float() for name, value in terms.items()]).sum()
            self.scaler.scale(loss / options.accumulate).backward()
        scalars = torch.stack([value.detach().float() for value in (loss, *terms.values())]).tolist()
        values = dict(zip(("loss", *terms), scalars, strict=True))
        if not all(math.isfinite(value) for value in scalars):
            raise self._diverged(f"a loss is not finite ({values})")
        progress.batch += 1
        if due:
            self._update()
        return values

    def _update(self) -> None:
        """Step optimiser and schedule; fp16's scaler passes over steps whose gradient overflows."""
        self.scaler.unscale_(self.optimizer)
        bound = self.options.clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.trainee.parameters(), bound)
        if not self.scaler.is_enabled() and not norm.isfinite():
            raise self._diverged("the gradient is not finite")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.progress.update += 1

    def _diverged(self, what: str) -> NumericalError:
        where = f"epoch {self.progress.epoch}, update {self.progress.update}"
        return NumericalError(f"{where}: {what}; lower the learning rate or set clip")

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _DTYPES.get(self.options.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)

    @property
    def _shown(self) -> bool:
        return self.place.progress and self.rank == 0

    def _close_epoch(self) -> None:
        """Save, then judge on the split "val" and write the line of the log and the checkpoints."""
        states = random_states(self.device)
        self._save((LAST,), states)
        if self.rank:
            self.progress.close_epoch()
        else:
            with contextlib.suppress(_Stopped):
                self._record_epoch(self.validate(), states)
        wait()

    def _record_epoch(self, metrics: dict[str, float], states: list[dict[str, Any]]) -> None:
        progress = self.progress
        losses = {name: total / self.order.whole for name, total in progress.sums.items()}
        seconds = progress.epoch_seconds
        progress.close_epoch()
        score = sum(metrics[name] for name in _SCORE if not math.isnan(metrics[name]))
        names = (BEST, LAST) if score > progress.best else (LAST,)
        progress.best = max(score, progress.best)
        line = {"epoch": progress.epoch, "update": progress.update, "seconds": round(seconds, 1)}
        rates = self.schedule.get_last_lr()
        append_line(self.place.out / LOG, {**line, "lr": rates, "train": losses, "val": metrics})
        log.info("epoch %d: loss %.4f, val %s", progress.epoch, losses["loss"], metrics)
        self._save(names, states)

    def validate(self) -> dict[str, float]:
        """Metrics of the online network on the split "val"; see `dgm4.metrics.summarise`."""
        self.trainee.eval()
        place, batch, unreadable = self.place, self.options.batch, self._unreadable["val"]
        with self._autocast():
            judged = (self._predict, self.val, batch, self.device, place.workers)
            outputs = collect(*judged, progress=self._shown, unreadable=unreadable)
        return summarise(*outputs)

    def _predict(self, batch: Batch) -> Output:
        if self._asked:
            raise _Stopped
        return self.trainee.predict(batch)

    def _config(self) -> dict[str, Any]:
        """What a run has to have in common with one that it takes up."""
        network = self.trainee.network.config.to_dict()
        given = {"pairs": len(self.train), "processes": self.world}
        return {**self.options.to_dict(), "network": network, **given}

    def _save(self, names: tuple[str, ...], states: list[dict[str, Any]]) -> None:
        """Write checkpoints, in the first process; `states` are the random streams of all."""
        if self.rank:
            return
        vocabulary = self.place.out / VOCABULARY
        content = {
            "model": released_state(self.trainee),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": self._config(),
            "epoch": self.progress.epoch,
            "progress": dict(vars(self.progress)),
            "random": states,
            "vocabulary": vocabulary_digest(vocabulary) if vocabulary.is_file() else None,
        }
        for name in names:
            write_snapshot(self.place.out / name, content)

    def _resume(self, path: Path) -> None:
        with taking_up(path, path.with_name(BEST)):
            content = read_snapshot(path)
            theirs = content["config"]
            if changed := [name for name, value in self._config().items() if theirs.get(name) != value]:
                raise InputError(
                    f"{path}: was made with another recipe, number of pairs or number of processes "
                    f"({', '.join(changed)} differ); give the same one, or start anew"
                )
            load_released(self.trainee, content["model"])
            self.progress = restore(content, self.optimizer, self.schedule, self.scaler)
            set_random_state(content["random"][self.rank], self.device)
            if self.rank == 0:
                keep_lines(path.with_name(LOG), self.progress.epoch)


def _datasets(
    options: TrainOptions, place: Place, tokenizer: CaptionTokenizer, image_size: int
) -> tuple[PairDataset, PairDataset]:
    """The splits "train" and "val"; raises InputError where one of them is empty."""
    sidecars = _read_sidecars(place.data) if options.model == "asap" else {}
    train = PairDataset(
        read_split(place.data, "train").usable(f"{place.data}, split train"),
        tokenizer,
        image_size,
        flip=options.flip,
        seed=options.seed,
        cache=place.cache,
        captions=sidecars.get("captions"),
        explanations=sidecars.get("explanations"),
    )
    judged = read_split(place.data, "val").usable(f"{place.data}, split val")
    val = PairDataset(judged, tokenizer, image_size, cache=place.cache)
    return train, val


def make_trainee(options: TrainOptions, vocabulary: int) -> Trainee:
    """Build the trainee of a recipe, with `vocabulary` word pieces."""
    return _trainee(options, replace(model_config(options.model, options.size), vocabulary=vocabulary))


def _check_start(options: TrainOptions, place: Place, device: torch.device) -> None:
    """Raise BackendError for a precision that the device lacks, InputError for an `out` in use."""
    if options.precision == "fp16" and device.type != "cuda":
        raise BackendError("training in fp16 needs a GPU; bf16 and fp32 run on a CPU too")
    if not place.resume and (place.out / LAST).exists():
        raise InputError(f"{place.out / LAST}: a run is there; resume it, or choose another folder")


def _trainee(options: TrainOptions, config: ModelConfig) -> Trainee:
    shape = cast(FusionConfig, config)  # every network that can be trained has one
    return Trainee(shape, options.queue, options.guidance, options.refinement, options.sampled)


def _read_sidecars(data: Path) -> dict[str, dict[str, str]]:
    """ASAP's side-cars; none where a file is missing, with a line in the log."""
    paths = {name: data / "metadata" / f"{name}.json" for name in _SIDECARS}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        log.warning("%s: not there, so ASAP trains without LMA and IED", " and ".join(missing))
        return {}
    return {name: read_sidecar(path) for name, path in paths.items()}
