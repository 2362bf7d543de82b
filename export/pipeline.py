"""From a checkpoint to a verified bundle: load, rewrite, calibrate, lower, evaluate, build, write.

One straight line of immutable records (`export.stages`). Each stage is compared with the one before it; where
one differs too much, nothing is written.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dgm4.config import ModelConfig
from dgm4.places import check_data
from engine import Bundle, Predictor
from engine.backends.torch import load_float
from engine.errors import BuildError, NumericalError, VerificationError
from engine.layout import CARD
from engine.manifest import Accuracy, EngineEntry, Manifest, Verification
from engine.registry import network_of
from export.accuracy_stage import measure_accuracy
from export.bundle.card import model_card
from export.bundle.writer import BundleWriter
from export.calibration import calibrate_source, plans, rank_layers
from export.engine_stage import no_engine, write_engine
from export.graph.parity import EXACT, FP16, Difference, check, torch_outputs
from export.lowering import lower_network
from export.manifest_fields import describe_export
from export.options import ExportOptions, check_options
from export.sample import SAMPLE_CAPTION, choose_sample
from export.source import load_source
from export.stages import Calibrated, Job, Lowered, Source, Stage
from export.trt import build

_BLANK = np.zeros((32, 32, 3), np.uint8)


def export_bundle(
    options: ExportOptions,
    report: Callable[[Stage], None],
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Export and return the manifest that was written.

    `begin` hears the name of every stage as it begins, `report` of every finished one.
    Raises InputError for options that do not fit, CheckpointError, VerificationError (then no bundle is
    written), BuildError, BundleError where the bundle cannot be written.
    """
    check_options(options)
    for folder in (options.calibration, options.data):
        if folder is not None:
            check_data(folder)
    with BundleWriter(options.out) as writer:
        job = Job(options, writer, report, begin)
        source = load_source(job)
        calibrated = None if options.calibration is None else calibrate_source(job, source)
        lowered, accuracy = _lower_and_evaluate(job, source, calibrated)
        engines = _write_engine(job, source.config)
        draft = describe_export(options, source, calibrated, lowered, engines, accuracy)
        written = _check_written(job, source, draft)
        with job.stage("bundle") as stage:
            record = Verification(**written.to_dict())
            draft = replace(draft, verification=(*draft.verification, record))
            writer.add_text(CARD, model_card(draft))
            manifest = writer.commit(draft.to_dict())
            total = sum(entry["bytes"] for entry in manifest["files"].values())
            files = f"{len(manifest['files'])} files, {total / 1e6:.0f} MB"
            stage.text = f"{options.out}: {files}, hashed and synced"
    return manifest


def _lower_and_evaluate(
    job: Job, source: Source, calibrated: Calibrated | None
) -> tuple[Lowered, tuple[Accuracy, ...]]:
    """Lower the network by the first plan that passes every check and the accuracy gate.

    Leaves that graph in the bundle and frees the networks' weights. Raises VerificationError where none does,
    with the failure of the last.
    """
    failure: str | None = None
    for keep in plans(job.options.keep_layers, lambda: rank_layers(job, source, calibrated)):
        lowered = lower_network(job, source, calibrated, keep)
        failure = lowered.failure
        if failure is None:
            measured = measure_accuracy(
                job, source, describe_export(job.options, source, calibrated, lowered)
            )
            failure = measured.failure
        if failure is None:
            _release(source.network, lowered.network)
            return lowered, measured.records
    raise VerificationError(failure)


def _check_written(job: Job, source: Source, draft: Manifest) -> Difference:
    """Run the stage "written": the files' weights against the network, and one answer as production gives it.

    Raises VerificationError: what differs from what was verified is not published.
    """
    bundle = Bundle.open(job.writer.preview(draft.to_dict()))
    sample = choose_sample(source.weights.sha256)
    pair: Any = (_BLANK, SAMPLE_CAPTION) if sample is None else (sample.image, sample.caption)
    if network_of(source.config).box is not None:
        pair = (_BLANK, SAMPLE_CAPTION, (0, 0, *_BLANK.shape[:2]))
    with job.stage("written") as stage:
        outputs = torch_outputs(load_float(bundle), source.config, source.feeds)
        tolerance = EXACT if job.options.precision == "fp32" else FP16
        check(difference := stage.compare("written", "rewrite", source.outputs, outputs, tolerance))
        with Predictor(bundle) as predictor:
            try:
                predictor.predict(*pair)
            except NumericalError as error:
                raise VerificationError(f"stage 'written': {error}; no bundle was written") from error
            stage.text = f"weights read back, a pair answered by {predictor.model['backend']}"
    return difference


def _release(*networks: torch.nn.Module) -> None:
    """Give the weights' memory back to the system: the builder, another process, needs the room.

    torch's tracer keeps the parameters of its last trace, so they are emptied rather than dropped; and
    the C library keeps freed blocks of this size until it is asked for them.
    """
    for network in networks:
        for parameter in network.parameters():
            parameter.data = parameter.data.new_empty(0)
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)


def _write_engine(job: Job, config: ModelConfig) -> list[EngineEntry]:
    """Build the engine where this machine can; say in one line why not where it cannot."""
    with job.stage("engine") as stage:
        builder = build.find_builder()
        reason = no_engine(job.options, builder)
        if reason is not None or builder is None:
            stage.text = f"none: {reason}"
            return []
        try:
            entry, stage.text = write_engine(job.options, config, builder, job.writer)
        except BuildError as error:
            raise BuildError(
                f"{error}\nwithout an engine (--target none) the bundle would be whole"
            ) from error
    return [entry]
