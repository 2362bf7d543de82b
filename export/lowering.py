"""A float32 network brought to a precision and traced, each form compared with the one it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
import torch

from engine.layout import FLAT_GRAPH, GRAPH, HALF_GRAPH
from engine.network.model import InferenceModel
from engine.network.precision import float_layers, set_precision, to_precision
from engine.registry import network_of
from engine.registry.config import NetworkConfig
from export.calibration import calibration_pairs, tensors
from export.engine_stage import has_graph
from export.graph.bf16_emulation import emulate
from export.graph.choices import changed_choices
from export.graph.parity import (
    BF16,
    CASES,
    EXACT,
    FP8,
    FP16,
    INT8,
    Arrays,
    Difference,
    Feeds,
    Tolerance,
    onnx_outputs,
    torch_outputs,
)
from export.graph.rewrite import sharing
from export.graph.trace import data_of, export_onnx, flatten
from export.quantization.dynamic_int8 import dynamic_layers, quantize_dynamic
from export.quantization.qdq import fp8_as_nodes, lower, lowered_layers, to_int8
from export.stages import Calibrated, Job, Lowered, Source

_CHECKED_BATCHES = 2  # of calibration pairs, for the check of static int8
# First and last case that a cast network is compared on, and how near it must be. One is enough: float16 is
# slow here, and its graph runs them all. bf16 and fp8 take the longer one: a caption of one word has only two
# logits.
_CHECKS = {"fp16": ((0, 1), FP16), "bf16": ((1, 2), BF16), "fp8": ((1, 2), FP8)}
_ISLANDS = "with norms, softmax and the box head in float32"
_CASTS = {
    "fp16": f"float16, {_ISLANDS}",
    "bf16": f"bfloat16, {_ISLANDS}",
    "fp8": "E4M3 in the Linear layers over tokens, bfloat16 around them, norms and the box head in float32",
}


def lower_network(
    job: Job, source: Source, calibrated: Calibrated | None, keep: tuple[str, ...] = ()
) -> Lowered:
    """Bring the network to the precision of the options, and trace it where that precision has a graph.

    The layers in `keep` stay a step above the precision. `source` is not changed; the result tells whether it
    passed its checks.
    """
    if job.options.precision != "int8":
        lowered = _lower_floating(job, source, calibrated, keep)
    elif calibrated is None:
        lowered = _lower_dynamic(job, source, keep)
    else:
        lowered = _lower_static(job, source, calibrated, keep)
    if lowered.failure is None and _is_portable(job.options.precision, calibrated):
        flatten(job.writer.path(GRAPH), job.writer.path(FLAT_GRAPH))
    return lowered


def _is_portable(precision: str, calibrated: Calibrated | None) -> bool:
    """Whether runtimes besides ONNX Runtime and TensorRT take the graph: no bfloat16, no operator of ours."""
    return precision in ("fp32", "fp16") or (precision == "int8" and calibrated is not None)


def _lower_floating(
    job: Job, source: Source, calibrated: Calibrated | None, keep: tuple[str, ...]
) -> Lowered:
    """Cast to fp16, bf16 or fp8, not to fp32; then trace, but for fp8 without calibrated scales."""
    precision, network = job.options.precision, sharing(source.network)
    islands: tuple[str, ...] = ()
    checks: list[Difference] = []
    if precision != "fp32":
        scales = None if calibrated is None else calibrated.scales
        checks.append(_cast(job, source, network, scales, keep))
        islands = tuple(float_layers(network))
    if has_graph(job.options) and all(check.passed for check in checks):
        checks.append(_trace(job, source, network))
    return Lowered(network, keep, islands, tuple(checks))


def _cast(
    job: Job,
    source: Source,
    network: InferenceModel,
    scales: Mapping[str, float] | None,
    keep: tuple[str, ...],
) -> Difference:
    """Run the stage "cast": bring `network` to the precision, in place."""
    precision = job.options.precision
    first, last, tolerance = _check_of(network.config, precision)
    with job.stage("cast") as stage:
        set_precision(network, precision, scales, keep)
        feeds = source.feeds[first:last]
        outputs = torch_outputs(network, network.config, feeds)
        stage.text = _CASTS[precision] + _keep_text(keep) + _choices_text(source.network, network, feeds)
        return stage.compare("cast", "rewrite", source.outputs[first:last], outputs, tolerance)


def _trace(job: Job, source: Source, network: InferenceModel) -> Difference:
    """Run the stage "onnx" for any precision but int8: trace `network` and run the graph on the CPU."""
    precision, graph = job.options.precision, job.writer.path(GRAPH)
    with job.stage("onnx") as stage:
        stage.text = _graph_text(export_onnx(fp8_as_nodes(network), graph))
        if precision in ("fp32", "fp16"):
            tolerance = EXACT if precision == "fp32" else FP16
            outputs = onnx_outputs(graph, network.config, source.feeds)
            return stage.compare("onnx", "rewrite", source.outputs, outputs, tolerance)
        first, last, tolerance = _check_of(network.config, precision)
        stage.text += "; run in float32 rounded to bfloat16"
        outputs = _emulated_outputs(graph, network.config, source.feeds[first:last])
        return stage.compare("onnx", "rewrite", source.outputs[first:last], outputs, tolerance)


def _emulated_outputs(graph: Path, config: NetworkConfig, feeds: Feeds) -> list[Arrays]:
    draft = graph.with_name("emulated." + graph.name)
    try:
        emulate(graph, draft)
        return onnx_outputs(draft, config, feeds)
    finally:
        _remove_graph(draft)


def _lower_static(job: Job, source: Source, calibrated: Calibrated, keep: tuple[str, ...]) -> Lowered:
    """Round to int8 with calibrated scales and trace; with float16 around the products too, for engines."""
    network, graph = sharing(source.network), job.writer.path(GRAPH)
    with job.stage("quantise") as stage:
        # Drawn images are noise, beyond the ranges of real ones: scales are checked on what they are for.
        feeds = list(calibration_pairs(job, source).batches(stop=_CHECKED_BATCHES))
        before = torch_outputs(network, network.config, feeds=tensors(feeds))
        count = len(lowered_layers(network, "int8")) - len(keep)
        lower(network, "int8", calibrated.scales, keep)
        islands = tuple(float_layers(network))
        proto = export_onnx(network, graph)
        outputs = onnx_outputs(graph, network.config, feeds)
        check = stage.compare("int8", "rewrite", before, outputs, INT8)
        record = calibrated.record
        activations = f"calibrated ({record.method}) on {record.pairs} pairs of {record.source}"
        stage.text = f"{count} layers in int8, weights per channel, activations {activations}"
        stage.text += f"; {_graph_text(proto)}{_keep_text(keep)}"
        stage.text += _choices_text(source.network, network, tensors(feeds))
    if not (check.passed and job.options.engine):
        return Lowered(network, keep, islands, (check,))
    return Lowered(network, keep, islands, (check, _write_half(job, network, feeds, before)))


def _write_half(
    job: Job, network: InferenceModel, feeds: Iterable[Arrays], before: Sequence[Arrays]
) -> Difference:
    """Run the stage "half": trace the int8 network with float16 around its products, what a GPU is to run.

    Brings `network` to float16 in place. On a CPU float32 is faster, so the bundle's first graph keeps it.
    """
    graph = job.writer.path(HALF_GRAPH)
    with job.stage("half") as stage:
        proto = export_onnx(to_precision(network, torch.float16), graph)
        outputs = onnx_outputs(graph, network.config, feeds)
        stage.text = f"{graph.name} for engines: float16 around int8, {_ISLANDS}; {_graph_text(proto)}"
        return stage.compare("int8 in fp16", "rewrite", before, outputs, INT8)


def _lower_dynamic(job: Job, source: Source, keep: tuple[str, ...]) -> Lowered:
    """Trace in float32 and let ONNX Runtime's quantiser round the graph."""
    network, graph = sharing(source.network), job.writer.path(GRAPH)
    floating = graph.with_name("float." + graph.name)
    rounded = {name for name, _ in dynamic_layers(network)} - set(keep)
    islands = tuple(name for name in float_layers(network) if name not in rounded)
    with job.stage("onnx") as stage:
        stage.text = _graph_text(export_onnx(network, floating))
        before = onnx_outputs(floating, network.config, source.feeds)
        traced = stage.compare("onnx", "rewrite", source.outputs, before, EXACT)
    if not traced.passed:
        return Lowered(network, keep, islands, (traced,))
    with job.stage("quantise") as stage:
        count = quantize_dynamic(floating, graph, keep)
        rounded_outputs = onnx_outputs(graph, network.config, source.feeds)
        check = stage.compare("int8", "onnx", before, rounded_outputs, INT8)
        stage.text = f"{count} products in int8, weights per channel, activations dynamic{_keep_text(keep)}"
        emulated = to_int8(sharing(source.network), None, keep)
        stage.text += _choices_text(source.network, emulated, source.feeds)
    _remove_graph(floating)
    return Lowered(network, keep, islands, (traced, check))


def _check_of(config: NetworkConfig, precision: str) -> tuple[int, int, Tolerance]:
    """First and last case that a cast network is compared on, and how near it must be.

    All cases where single values jump, which is worth more in fewer values.
    """
    (first, last), tolerance = _CHECKS[precision]
    jumps = any(output.jumps for output in network_of(config).outputs)
    return (0, len(CASES), tolerance) if jumps else (first, last, tolerance)


def _choices_text(
    reference: InferenceModel, candidate: InferenceModel, feeds: Iterable[Mapping[str, torch.Tensor]]
) -> str:
    """How many of the network's choices changed; nothing for one that makes none."""
    changed, total = changed_choices(reference, candidate, feeds)
    return f"; {changed} of {total} choices of neighbours changed" if total else ""


def _keep_text(keep: Sequence[str]) -> str:
    return f", but {len(keep)} layers kept higher: {', '.join(keep)}" if keep else ""


def _graph_text(proto: onnx.ModelProto) -> str:
    custom = sum(node.domain != "" for node in proto.graph.node)
    return f"opset {proto.opset_import[0].version}, {len(proto.graph.node)} nodes, {custom} of them ours"


def _remove_graph(path: Path) -> None:
    path.unlink(missing_ok=True)
    data_of(path).unlink(missing_ok=True)
