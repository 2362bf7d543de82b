"""What an export learns from annotated pairs: scales of activations, and which layers lose most."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.errors import InputError
from engine.inputs.text import CaptionTokenizer
from engine.layout import SCALES, TOKENIZER
from engine.manifest import Calibration
from engine.registry import network_of
from export.graph.parity import Arrays
from export.graph.rewrite import sharing
from export.manifest_fields import LONGEST_CAPTION, MAX_WORDS
from export.quantization.calibrate import CODES, METHOD, calibrate
from export.quantization.pairs import PairReader, read_pairs
from export.quantization.qdq import lower, lowered_layers
from export.quantization.sensitivity import PAIRS, layer_errors
from export.stages import Calibrated, Job, Source


def calibrate_source(job: Job, source: Source) -> Calibrated:
    """Run the stage "calibrate": find the scales of the layers that will be rounded, and write them."""
    precision = job.options.precision
    with job.stage("calibrate") as stage:
        reader = calibration_pairs(job, source)
        layers = lowered_layers(source.network, precision)
        scales = calibrate(source.network, layers, tensors(reader.batches()), CODES[precision])
        record = Calibration(METHOD, **reader.record)
        job.writer.add_text(SCALES, json.dumps(scales) + "\n")
        stage.text = "{} scales of activations ({method}), {pairs} pairs of {source}".format(
            len(scales), **record.to_dict()
        )
    return Calibrated(scales, record)


def calibration_pairs(job: Job, source: Source) -> PairReader:
    """The pairs of the training split that scales come from."""
    return _read_pairs(job, source, job.options.calibration, job.options.calibration_pairs, "train")


def rank_layers(job: Job, source: Source, calibrated: Calibrated | None) -> list[str]:
    """Run the stage "layers": names of the layers that the precision rounds, the largest own error first."""
    options = job.options
    scales = None if calibrated is None else calibrated.scales
    with job.stage("layers") as stage:
        data, split = options.data, options.split
        if options.calibration is not None:
            data, split = options.calibration, "train"
        pairs = tensors(_read_pairs(job, source, data, PAIRS, split).batches())
        lowered = lower(sharing(source.network), options.precision, scales)
        errors = layer_errors(source.network, lowered, options.precision, pairs)
        worst = ", ".join(f"{layer.name} {100 * layer.own:.1f} %" for layer in errors[:3])
        stage.text = f"{len(errors)} layers by their own error, the worst: {worst}"
    return [layer.name for layer in errors]


def plans(keep_layers: int | Literal["auto"], rank: Callable[[], Sequence[str]]) -> Iterator[tuple[str, ...]]:
    """Yield the layers to keep in each attempt.

    A number makes one attempt; "auto" makes one with none, then with 1, 2, 4, ... and at last all of them.
    `rank` names all layers, the worst first; it is called only where the ranking is needed.
    """
    if keep_layers != "auto":
        yield tuple(rank()[:keep_layers]) if keep_layers else ()
        return
    yield ()
    ranking = tuple(rank())
    count = 1
    while count < len(ranking):
        yield ranking[:count]
        count *= 2
    if ranking:
        yield ranking


def tensors(batches: Iterable[Arrays]) -> Iterator[dict[str, Tensor]]:
    """The batches as tensors."""
    return ({name: torch.from_numpy(x) for name, x in batch.items()} for batch in batches)


def _read_pairs(job: Job, source: Source, data: Path | None, count: int, split: str) -> PairReader:
    if data is None:
        raise InputError("expected a folder of pairs (calibration or data)")
    longest = min(LONGEST_CAPTION, job.options.max_tokens)
    network, image_size = network_of(source.config), source.config.image_size
    tokenizer = CaptionTokenizer(job.writer.path(TOKENIZER), MAX_WORDS, longest, spec=network.tokenizer)
    return read_pairs(data, count, tokenizer, image_size, split, network.box)
