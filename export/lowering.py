"""A float32 network brought to a precision and traced, each form compared with the one it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.backends.torch import SHIFTS
from engine.errors import InputError
from engine.inputs.text import CaptionTokenizer
from engine.layout import FLAT_GRAPH, GRAPH, HALF_GRAPH, SCALES, TOKENIZER
from engine.network.config import NetworkConfig
from engine.network.model import InferenceModel
from engine.network.precision import float_layers, set_precision, to_precision
from engine.network.rescale import rescale
from export.bundle.writer import BundleWriter
from export.engine_stage import has_graph
from export.graph.bf16_emulation import emulate
from export.graph.parity import (
    BF16,
    CASES,
    EXACT,
    FP8,
    INT8,
    Arrays,
    check,
    compare,
    onnx_answers,
    torch_answers,
)
from export.graph.parity import (
    HALF as ROUNDED,
)
from export.graph.rewrite import sharing
from export.graph.trace import data_of, export_onnx, flatten
from export.manifest_fields import LONGEST_CAPTION, MAX_WORDS
from export.quantization.calibrate import calibrate
from export.quantization.dynamic_int8 import dynamic_layers, quantize_dynamic
from export.quantization.pairs import PairReader, read_pairs
from export.quantization.qdq import fp8_as_nodes, lower, lowered_layers
from export.quantization.sensitivity import PAIRS, layer_errors
from export.stages import Open, Run

_CHECKED_BATCHES = 2  # of calibration pairs, for the check of static int8
# From and to which case a cast network is compared, and how near: one is enough, since float16 is slow here
# and its graph answers them all; bf16 and fp8 are judged on the longer one, since a caption of one word has
# two numbers for an answer.
_CHECKS = {"fp16": ((0, 1), ROUNDED), "bf16": ((1, 2), BF16), "fp8": ((1, 2), FP8)}
_ISLANDS = "with norms, softmax and the box head in float32"
_CASTS = {
    "fp16": f"float16, {_ISLANDS}",
    "bf16": f"bfloat16, {_ISLANDS}",
    "fp8": "E4M3 in the Linear layers over tokens, bfloat16 around them, norms and the box head in float32",
}


def write_graph(
    run: Run, writer: BundleWriter, inference: InferenceModel, reference: Sequence[Arrays]
) -> None:
    """Bring the float32 network to its precision and trace it, where that precision has a graph.

    `reference` are its answers to the cases. It stays as it is where layers may be kept. Raises
    VerificationError where the result is too far from it.
    """
    options, graph = run.options, writer.path(GRAPH)
    if options.calibration is not None and run.scales is None:
        _calibrate(run, writer, inference)
    if isinstance(options.keep_layers, int) and options.keep_layers and not run.kept:
        run.kept = _ranking(run, writer, inference)[: options.keep_layers]
    work = sharing(inference) if options.keep_layers else inference
    if options.precision == "int8":
        _write_int8(run, writer, work, reference)
    else:
        if options.precision != "fp32":
            _cast(run, work, reference)
        if has_graph(options):
            _trace(run, work, graph, reference)
    if has_graph(options) and _is_portable(run):
        flatten(graph, writer.path(FLAT_GRAPH))


def keep_more(run: Run, writer: BundleWriter, inference: InferenceModel) -> bool:
    """Name more layers to keep for another attempt: 1, 2, 4, ... of the worst; False where none are left."""
    if run.options.keep_layers != "auto":
        return False
    ranking = _ranking(run, writer, inference)
    count = min(max(1, 2 * len(run.kept)), len(ranking))
    grown = count > len(run.kept)
    run.kept = ranking[:count]
    return grown


def _is_portable(run: Run) -> bool:
    """Whether runtimes besides ONNX Runtime and TensorRT take the graph: no bfloat16, no operator of ours."""
    precision = run.options.precision
    return precision in ("fp32", "fp16") or (precision == "int8" and run.scales is not None)


def _ranking(run: Run, writer: BundleWriter, inference: InferenceModel) -> list[str]:
    """Names of the layers that the precision rounds, the one with the largest own error first."""
    if not run.ranking:
        with run.stage("layers") as stage:
            options = run.options
            data = options.calibration or options.data
            split = "train" if options.calibration else options.split
            reader = _read_pairs(run, data, inference.config, writer.path(TOKENIZER), PAIRS, split)
            lowered = lower(sharing(inference), options.precision, run.scales)
            found = layer_errors(inference, lowered, options.precision, _tensors(reader.batches()))
            run.ranking = [layer.name for layer in found]
            worst = ", ".join(f"{layer.name} {100 * layer.own:.1f} %" for layer in found[:3])
            stage.text = f"{len(found)} layers by their own error, the worst: {worst}"
    return run.ranking


def _cast(run: Run, model: InferenceModel, reference: Sequence[Arrays]) -> None:
    precision = run.options.precision
    (first, last), tolerance = _CHECKS[precision]
    with run.stage("cast") as stage:
        set_precision(model, precision, run.scales, run.kept)
        answers = torch_answers(model, model.config, CASES[:last])[first:]
        stage.differences.append(check(compare("cast", "rewrite", reference[first:last], answers, tolerance)))
        run.float_layers = float_layers(model)
        stage.text = _CASTS[precision] + _kept_text(run)


def _kept_text(run: Run) -> str:
    return f", but {len(run.kept)} layers kept higher: {', '.join(run.kept)}" if run.kept else ""


def _trace(run: Run, model: InferenceModel, graph: Path, reference: Sequence[Arrays]) -> None:
    """Trace a network of any precision but int8, and let a CPU answer from the graph."""
    precision = run.options.precision
    with run.stage("onnx") as stage:
        proto = export_onnx(fp8_as_nodes(model), graph)
        stage.text = _graph_text(proto)
        if precision in ("fp32", "fp16"):
            answers, tolerance = onnx_answers(graph, model.config), EXACT if precision == "fp32" else ROUNDED
        else:
            (first, last), tolerance = _CHECKS[precision]
            answers, reference = _emulated_answers(graph, model.config)[first:last], reference[first:last]
            stage.text += "; answered in float32 rounded to bfloat16"
        stage.differences.append(check(compare("onnx", "rewrite", reference, answers, tolerance)))


def _emulated_answers(graph: Path, config: NetworkConfig) -> list[Arrays]:
    draft = graph.with_name("emulated." + graph.name)
    try:
        emulate(graph, draft)
        return onnx_answers(draft, config)
    finally:
        _remove_graph(draft)


def _graph_text(proto: Any) -> str:
    custom = sum(node.domain != "" for node in proto.graph.node)
    return f"opset {proto.opset_import[0].version}, {len(proto.graph.node)} nodes, {custom} of them ours"


def _write_int8(run: Run, writer: BundleWriter, model: InferenceModel, reference: Sequence[Arrays]) -> None:
    if run.scales is None:
        _write_dynamic(run, model, writer.path(GRAPH), reference)
        return
    with run.stage("quantise") as stage:
        # Drawn pictures are noise, beyond the ranges of real ones: scales are judged on what they are for.
        reader = _calibration_pairs(run, model.config, writer.path(TOKENIZER))
        feeds = list(reader.batches(stop=_CHECKED_BATCHES))
        before = torch_answers(model, model.config, feeds=list(_tensors(feeds)))
        count = len(lowered_layers(model, "int8")) - len(run.kept)
        lowered = lower(model, "int8", run.scales, run.kept)
        run.float_layers = float_layers(lowered)
        proto = export_onnx(lowered, writer.path(GRAPH))
        _check_int8(stage, before, onnx_answers(writer.path(GRAPH), model.config, feeds), "rewrite")
        activations = "calibrated ({method}) on {pairs} pairs of {source}".format(**run.calibration or {})
        stage.text = f"{count} layers in int8, weights per channel, activations {activations}"
        stage.text += f"; {_graph_text(proto)}{_kept_text(run)}"
    if run.options.engine:
        _write_half(run, model, writer.path(HALF_GRAPH), feeds, before)


def _write_half(
    run: Run, model: InferenceModel, graph: Path, feeds: Sequence[Arrays], before: Sequence[Arrays]
) -> None:
    """Trace the quantised network with float16 around its products: what a GPU is to run.

    On a CPU float32 is faster, so that the bundle's own graph keeps it.
    """
    with run.stage("half") as stage:
        proto = export_onnx(to_precision(model, torch.float16), graph)
        answers = onnx_answers(graph, model.config, feeds)
        stage.differences.append(check(compare("int8 in fp16", "rewrite", before, answers, INT8)))
        stage.text = f"{graph.name} for engines: float16 around int8, {_ISLANDS}; {_graph_text(proto)}"


def _write_dynamic(run: Run, model: InferenceModel, graph: Path, reference: Sequence[Arrays]) -> None:
    floating = graph.with_name("float." + graph.name)
    with run.stage("onnx") as stage:
        stage.text = _graph_text(export_onnx(model, floating))
        before = onnx_answers(floating, model.config)
        stage.differences.append(check(compare("onnx", "rewrite", reference, before, EXACT)))
    with run.stage("quantise") as stage:
        count = quantize_dynamic(floating, graph, run.kept)
        rounded = {name for name, _ in dynamic_layers(model)} - set(run.kept)
        run.float_layers = [name for name in float_layers(model) if name not in rounded]
        _check_int8(stage, before, onnx_answers(graph, model.config), "onnx")
        stage.text = f"{count} products in int8, weights per channel, activations dynamic{_kept_text(run)}"
    _remove_graph(floating)


def _check_int8(stage: Open, before: Sequence[Arrays], answers: Sequence[Arrays], against: str) -> None:
    stage.differences.append(check(compare("int8", against, before, answers, INT8)))


def _remove_graph(path: Path) -> None:
    path.unlink(missing_ok=True)
    data_of(path).unlink(missing_ok=True)


def _calibrate(run: Run, writer: BundleWriter, model: InferenceModel) -> None:
    """Choose scales of what the rounded layers read, and shifts, which the model takes; write both."""
    options = run.options
    with run.stage("calibrate") as stage:
        reader = _calibration_pairs(run, model.config, writer.path(TOKENIZER))
        method, smooth = options.calibration_method, options.smooth
        made = calibrate(model, options.precision, method, smooth, lambda: _tensors(reader.batches()))
        rescale(model, made.shifts)
        run.calibrated, run.calibration = made, {"method": method, **reader.record, **made.record()}
        shifts = {SHIFTS: made.shifts} if made.shifts else {}
        writer.add_text(SCALES, json.dumps({**made.scales, **shifts}) + "\n")
        stage.text = "{} scales of activations ({method}), {pairs} pairs of {source}".format(
            len(made.scales), **run.calibration
        )
        if made.smoothing is not None:
            text = "; outputs off by {plain:.2%}, by {smoothed:.2%} with channels rescaled (alpha {alpha}), "
            stage.text += (text + "which {seams} places are").format(**asdict(made.smoothing))


def _calibration_pairs(run: Run, config: NetworkConfig, tokenizer: Path) -> PairReader:
    options = run.options
    return _read_pairs(run, options.calibration, config, tokenizer, options.calibration_pairs, "train")


def _read_pairs(
    run: Run, data: Path | None, config: NetworkConfig, tokenizer: Path, count: int, split: str
) -> PairReader:
    if data is None:
        raise InputError("expected a folder of pairs (calibration or data)")
    words = CaptionTokenizer(tokenizer, MAX_WORDS, min(LONGEST_CAPTION, run.options.max_tokens))
    return read_pairs(data, count, words, config.image_size, split)


def _tensors(batches: Iterator[dict[str, np.ndarray]] | Sequence[Arrays]) -> Iterator[dict[str, Tensor]]:
    return ({name: torch.from_numpy(x) for name, x in batch.items()} for batch in batches)
