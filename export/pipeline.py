"""From a checkpoint to a verified bundle: load, rewrite, cast, trace, quantise, build, write, try.

One straight line. Each stage is compared with the one before it; a stage that differs too much raises,
and then nothing is written.
"""

from __future__ import annotations

import ctypes
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import dgm4
from dgm4.config import ModelConfig
from dgm4.model import Detector
from dgm4.shipped import demo_of, demo_record
from engine.errors import VerificationError
from engine.network.config import NetworkConfig
from engine.network.model import InferenceModel
from engine.network.precision import activation_scales, set_precision
from engine.text import CaptionTokenizer
from export import trt
from export.bundle import BundleWriter
from export.bundle_engine import GRAPHS, MODEL, no_engine, write_engine
from export.calibrate import PairReader, read_pairs
from export.card import model_card
from export.digest import sha256_of
from export.evaluate import EvaluateOptions, evaluate
from export.gate import GATED, check_gate
from export.inference import rewrite
from export.onnx import data_of, export_onnx, flatten
from export.options import ExportOptions, check_options
from export.quantize import quantize_dynamic, quantize_static
from export.record import LONGEST_CAPTION, MAX_WORDS, manifest_fields
from export.tokenizer import DEMO_VOCABULARY, build_tokenizer, vocabulary_of
from export.verify import (
    BF16,
    CASES,
    EXACT,
    FP8,
    HALF,
    INT8,
    Arrays,
    Difference,
    check,
    compare,
    onnx_answers,
    torch_answers,
)

SEED = 1
WEIGHTS, TOKENIZER, CARD = "model.safetensors", "tokenizer.json", "README.md"
FLAT = "model.flat.onnx"  # the graph for runtimes that know no functions, with the weights of MODEL
SCALES = "scales.json"  # of fp8's activations
_CHECKED_BATCHES = 2  # of calibration pairs, for the check of static int8
# From and to which case a cast network is compared, and how near.
_CHECKS = {"fp16": ((0, 1), HALF), "bf16": ((1, 2), BF16), "fp8": ((1, 2), FP8)}
_CASTS = {
    "fp16": "float16, with norms, softmax and the box head in float32",
    "bf16": "bfloat16, with norms, softmax and the box head in float32",
    "fp8": "E4M3 in the Linear layers over tokens, bfloat16 around them, norms and the box head in float32",
}


@dataclass(frozen=True)
class Stage:
    """What one stage did, how long it took and how far it is from the stage before."""

    name: str
    text: str
    seconds: float
    differences: tuple[Difference, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "stage": self.name,
            "text": self.text,
            "seconds": round(self.seconds, 3),
            "differences": [d.to_dict() for d in self.differences],
        }


@dataclass
class _Run:
    """The state of one export: options, what was said so far, and the records for the manifest."""

    options: ExportOptions
    report: Callable[[Stage], None]
    verification: list[Difference] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    vocabulary: Path | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[_Open]:
        """Time a stage and report it once it went well."""
        start = time.perf_counter()
        current = _Open()
        yield current
        self.verification += current.differences
        self.report(Stage(name, current.text, time.perf_counter() - start, tuple(current.differences)))


@dataclass
class _Open:
    text: str = ""
    differences: list[Difference] = field(default_factory=list)


def export_bundle(options: ExportOptions, report: Callable[[Stage], None]) -> dict[str, Any]:
    """Export and return the manifest that was written; `report` hears of every finished stage.

    Raises InputError for options that do not fit, CheckpointError, VerificationError (then no bundle is
    written), BuildError, BundleError where the bundle cannot be written.
    """
    check_options(options)
    run = _Run(options, report)
    with BundleWriter(options.out) as writer:
        config, weights = _write_networks(run, writer)
        engines = _write_engine(run, writer, config)
        known = (options, config, weights, engines, run.verification)
        accuracy = _judge(run, writer, manifest_fields(*known, calibration=run.calibration))
        with run.stage("bundle") as stage:
            manifest = manifest_fields(*known, accuracy, run.calibration)
            writer.add_text(CARD, model_card(manifest))
            manifest = writer.commit(manifest)
            total = sum(entry["bytes"] for entry in manifest["files"].values())
            stage.text = (
                f"{options.out}: {len(manifest['files'])} files, {total / 1e6:.0f} MB, hashed and synced"
            )
    return manifest


def _judge(run: _Run, writer: BundleWriter, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure the task's metrics of the unpublished bundle; raise VerificationError outside the gate."""
    options = run.options
    if options.data is None:
        own = run.vocabulary is not None and run.vocabulary.read_bytes() == DEMO_VOCABULARY.read_bytes()
        return _shipped_accuracy(manifest["weights"]["sha256"]) if own else []
    with run.stage("accuracy") as stage:
        settings = EvaluateOptions(split=options.split, checkpoint=options.checkpoint, repeats=1)
        found = evaluate(writer.preview(manifest), options.data, settings)
        metrics = found.scores.metrics
        reference = {} if found.comparison is None else found.comparison.scores.metrics
        failures = check_gate(options.precision, metrics, reference)
        if failures:
            raise VerificationError(f"the accuracy gate failed: {'; '.join(map(str, failures))}")
        named = ", ".join(f"{name} {100 * metrics[name]:.2f}" for name in GATED)
        stage.text = f"{found.pairs} pairs of {options.split}: {named}; within the gate of float32"
    source = f"{options.data.name}, split {options.split}"
    return [{"source": source, "pairs": found.pairs, "metrics": metrics, "reference": reference}]


def _shipped_accuracy(weights: str | None) -> list[dict[str, Any]]:
    """What the demo's own record says of its weights (by SHA-256); nothing of any others."""
    name = demo_of(weights)
    if name is None:
        return []
    record = demo_record()
    source = f"the demo's {record['data']}, measured before this export"
    known = record["networks"][name]["metrics"]
    return [{"source": source, "pairs": record["pairs"], "metrics": {}, "reference": known}]


def _write_networks(run: _Run, writer: BundleWriter) -> tuple[ModelConfig, dict[str, Any]]:
    """Load, rewrite and trace; leave the graph and the weights in the bundle."""
    model, weights = _load(run)
    config = model.config
    _write_tokenizer(run, writer, config)
    _write_weights(run, writer, model)
    with run.stage("rewrite") as stage:
        reference = torch_answers(model, config)
        inference = rewrite(model)
        answers = torch_answers(inference, config)
        stage.differences.append(check(compare("rewrite", "trained network", reference, answers, EXACT)))
        stage.text = "exact rewrites composed"
    del model
    _write_graph(run, writer, inference, answers)
    _release(inference)
    return config, weights


def _write_graph(
    run: _Run, writer: BundleWriter, inference: InferenceModel, reference: Sequence[Arrays]
) -> None:
    """Bring the network to its precision and trace it, where that precision has a graph."""
    graph, precision = writer.path(MODEL), run.options.precision
    if precision == "int8":
        _trace_and_quantize(run, inference, graph, writer.path(TOKENIZER), reference)
        if run.options.calibration is not None:  # dynamic int8 is made of ONNX Runtime's own operators
            flatten(graph, writer.path(FLAT))
        return
    if precision != "fp32":
        _cast(run, writer, inference, reference)
    if precision in GRAPHS:
        _trace(run, inference, graph, reference, EXACT if precision == "fp32" else HALF)
        flatten(graph, writer.path(FLAT))


def _release(model: torch.nn.Module) -> None:
    """Give the weights' memory back to the system: the builder, another process, needs the room.

    torch's tracer keeps the parameters of its last trace, so they are emptied rather than dropped; and
    the C library keeps freed blocks of this size until it is asked for them.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)


def _load(run: _Run) -> tuple[Detector, dict[str, Any]]:
    options = run.options
    with run.stage("load") as stage:
        if options.checkpoint is None:
            model = dgm4.seeded_model(options.model or "asap", options.size or "tiny", SEED)
            weights: dict[str, Any] = {"trained": False, "source": f"drawn from seed {SEED}", "sha256": None}
        else:
            model, weights = _load_checkpoint(options, options.checkpoint)
        count = sum(p.numel() for p in model.parameters())
        stage.text = (
            f"{model.config.name} {model.config.size}, {count / 1e6:.1f} M parameters, {weights['source']}"
        )
    return model, weights


def _load_checkpoint(options: ExportOptions, path: Path) -> tuple[Detector, dict[str, Any]]:
    checkpoint = dgm4.read_checkpoint(path)
    trained = checkpoint.layout != "albef"
    name = options.model or (checkpoint.layout if trained else None)
    config = dgm4.model_config(name, options.size) if name and options.size else None
    source = path.name if trained else f"{path.name} (ALBEF initialisation, heads untrained)"
    weights = {"trained": trained, "source": source, "sha256": sha256_of(path)}
    return dgm4.load_state(checkpoint, options.model, config), weights


def _write_weights(run: _Run, writer: BundleWriter, model: Detector) -> None:
    """Keep the live tensors under their released names, for the backends that run torch."""
    half = run.options.precision != "fp32"
    with run.stage("weights") as stage:
        state = {
            name: value.half() if half and value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
        path = writer.path(WEIGHTS)
        safetensors.torch.save_file(state, path, metadata={"config": json.dumps(model.config.to_dict())})
        stage.text = (
            f"{len(state)} tensors, {path.stat().st_size / 1e6:.0f} MB, {'float16' if half else 'float32'}"
        )


def _cast(run: _Run, writer: BundleWriter, inference: InferenceModel, reference: Sequence[Arrays]) -> None:
    """Cast in place. One case is enough: float16 is slow here, and its graph answers them all; bf16 and fp8
    are judged on the longer one, since a caption of one word has two numbers for an answer.
    """
    precision = run.options.precision
    (first, last), tolerance = _CHECKS[precision]
    scales = _write_scales(run, writer, inference)
    with run.stage("cast") as stage:
        set_precision(inference, precision, scales)
        answers = torch_answers(inference, inference.config, CASES[:last])[first:]
        stage.differences.append(check(compare("cast", "rewrite", reference[first:last], answers, tolerance)))
        stage.text = _CASTS[precision]


def _write_scales(run: _Run, writer: BundleWriter, inference: InferenceModel) -> dict[str, float] | None:
    """Calibrate what fp8's Linear layers read, and keep the scales; None without calibration."""
    data = run.options.calibration
    if data is None:
        return None
    with run.stage("calibrate") as stage:
        reader = _read_calibration(run, data, inference.config, writer.path(TOKENIZER))
        batches = ({k: torch.from_numpy(v) for k, v in x.items()} for x in reader.batches())
        scales = activation_scales(inference, batches)
        writer.add_text(SCALES, json.dumps(scales, indent=1) + "\n")
        stage.text = "{} scales of activations, {pairs} pairs of {source}".format(
            len(scales), **run.calibration or {}
        )
    return scales


def _trace(
    run: _Run, inference: InferenceModel, graph: Path, reference: Sequence[Arrays], tolerance: Any
) -> None:
    with run.stage("onnx") as stage:
        proto = export_onnx(inference, graph)
        answers = onnx_answers(graph, inference.config)
        stage.differences.append(check(compare("onnx", "rewrite", reference, answers, tolerance)))
        custom = sum(node.domain != "" for node in proto.graph.node)
        stage.text = (
            f"opset {proto.opset_import[0].version}, {len(proto.graph.node)} nodes, {custom} of them ours"
        )


def _trace_and_quantize(
    run: _Run, inference: InferenceModel, graph: Path, tokenizer: Path, reference: Sequence[Arrays]
) -> None:
    config, options = inference.config, run.options
    data = options.calibration
    reader = None if data is None else _read_calibration(run, data, config, tokenizer)
    floating = graph.with_name("float." + graph.name)
    _trace(run, inference, floating, reference, EXACT)
    with run.stage("quantise") as stage:
        # Drawn pictures are noise, beyond the ranges of real ones: scales are judged on what they are for.
        feeds = None if reader is None else list(reader.batches(stop=_CHECKED_BATCHES))
        before = onnx_answers(floating, config, feeds)
        if reader is None:
            count, activations = quantize_dynamic(floating, graph), "dynamic"
        else:
            count = quantize_static(floating, graph, reader, options.calibration_method)
            activations = "calibrated ({method}) on {pairs} pairs of {source}".format(**run.calibration or {})
        answers = onnx_answers(graph, config, feeds)
        stage.differences.append(check(compare("int8", "onnx", before, answers, INT8)))
        stage.text = f"{count} products in int8, weights per channel, activations {activations}"
    floating.unlink()
    data_of(floating).unlink()


def _read_calibration(run: _Run, data: Path, config: NetworkConfig, tokenizer: Path) -> PairReader:
    """Draw the pairs and note them for the manifest."""
    options = run.options
    words = CaptionTokenizer(tokenizer, MAX_WORDS, min(LONGEST_CAPTION, options.max_tokens))
    reader = read_pairs(data, options.calibration_pairs, words, config.image_size)
    run.calibration = {"method": options.calibration_method, **reader.record}
    return reader


def _write_tokenizer(run: _Run, writer: BundleWriter, config: ModelConfig) -> None:
    with run.stage("tokenizer") as stage:
        path = run.options.vocabulary or vocabulary_of(run.options.checkpoint, config.vocabulary)
        run.vocabulary = path
        tokenizer = build_tokenizer(path, config.vocabulary)
        writer.add_text(TOKENIZER, tokenizer.to_str())
        stage.text = f"WordPiece, {tokenizer.get_vocab_size()} pieces of {path.name}"


def _write_engine(run: _Run, writer: BundleWriter, config: ModelConfig) -> list[dict[str, Any]]:
    """Build the engine where this machine can; say in one line why not where it cannot."""
    options = run.options
    with run.stage("engine") as stage:
        builder = trt.find_builder()
        reason = no_engine(options, builder)
        if reason is not None or builder is None:
            stage.text = f"none: {reason}"
            return []
        record, stage.text = write_engine(options, config, builder, writer)
    return [record]
