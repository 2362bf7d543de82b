"""The configuration of a model in NVIDIA Triton Inference Server: config.pbtxt, in protobuf's text format.

Field names, types and meanings are those of the server's model_config.proto. The batch is left out of
`dims`, as the server wants it where `max_batch_size` is above 0; a dimension with a name becomes -1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError
from engine.manifest import EngineEntry, Manifest, TensorSpec

ONNX, PLAN = "onnxruntime_onnx", "tensorrt_plan"
KINDS = ("auto", "cpu", "gpu")
GRAPH_FILE, PLAN_FILE = "model.onnx", "model.plan"  # the names that the server looks for
ENGINE_CACHE = "/tmp/dgm4-tensorrt"  # on the server
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
_PRECISIONS = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}
_USUAL_BATCH, _USUAL_TOKENS = 8, 24
_INDENT = "  "


@dataclass(frozen=True)
class ServerOptions:
    """How the server runs a model.

    plan: serve the bundle's TensorRT engine, not its graph. kind: where instances run, "auto" for a GPU if
    the server has one. instances: copies of the network on each device. queue_delay_us: microseconds that
    a request may wait for others to share its batch. preferred: batch sizes that are sent at once; empty
    for 8 and the largest. accelerate: let ONNX Runtime build TensorRT engines on the server. threads: CPU
    threads of one instance; None for all cores.
    """

    plan: bool = False
    kind: str = "auto"
    instances: int = 1
    queue_delay_us: int = 500
    preferred: tuple[int, ...] = ()
    accelerate: bool = False
    threads: int | None = None


class Enum(str):
    """A value that is written without quotes."""


def write_config(name: str, manifest: Manifest, engine: EngineEntry | None, options: ServerOptions) -> str:
    """The text of config.pbtxt of one model; `engine` is the plan that is served, None for the graph.

    Raises InputError for options that do not fit the bundle or each other.
    """
    check_options(manifest, engine is not None, options)
    platform = ONNX if engine is None else PLAN
    fields = {
        "name": name,
        "platform": platform,
        "default_model_filename": GRAPH_FILE if engine is None else PLAN_FILE,
        "max_batch_size": manifest.limits.max_batch,
        "input": [_tensor(spec) for spec in manifest.inputs],
        "output": [_tensor(spec) for spec in manifest.outputs],
        "instance_group": [_instances(engine, options)],
        **_batching(manifest, options),
        **(_acceleration(manifest) if options.accelerate else {}),
        **_threads(options),
        "model_warmup": _warm_up(manifest),
    }
    return "\n".join(_lines(fields)) + "\n"


def preferred_batches(manifest: Manifest, options: ServerOptions) -> tuple[int, ...]:
    """Batches that the server sends as soon as they are full."""
    largest = manifest.limits.max_batch
    return tuple(sorted(set(options.preferred or (min(_USUAL_BATCH, largest), largest))))


def check_options(manifest: Manifest, plan: bool, options: ServerOptions) -> None:
    """Raise InputError for options that do not fit the bundle or each other; `plan`: an engine is served."""
    if options.kind not in KINDS:
        raise InputError(f"kind: expected one of {', '.join(KINDS)}, got {options.kind!r}")
    if plan and options.kind == "cpu":
        raise InputError("kind: a TensorRT plan runs on a GPU; leave out the plan or choose kind gpu")
    if options.preferred and max(options.preferred) > manifest.limits.max_batch:
        raise InputError(
            f"preferred: expected batches up to {manifest.limits.max_batch}, the bundle's limit, "
            f"got {max(options.preferred)}"
        )
    if options.accelerate and (plan or options.kind == "cpu"):
        raise InputError("accelerate is for ONNX Runtime on a GPU: leave it out with a plan or kind cpu")
    if options.accelerate and manifest.precision == "int8" and manifest.calibration is None:
        raise InputError("accelerate: TensorRT takes int8 from a calibrated graph, not from a dynamic one")
    if options.threads is not None and plan:
        raise InputError("threads are those of ONNX Runtime: leave them out with a plan")


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": Enum(_TYPES[spec.dtype]),
        "dims": [size if isinstance(size, int) else -1 for size in spec.shape[1:]],
    }


def _instances(engine: EngineEntry | None, options: ServerOptions) -> dict[str, Any]:
    kind = "gpu" if engine is not None else options.kind
    profile = {} if engine is None else {"profile": [str(n) for n in range(len(engine.profiles))]}
    return {"count": options.instances, "kind": Enum(f"KIND_{kind.upper()}"), **profile}


def _batching(manifest: Manifest, options: ServerOptions) -> dict[str, Any]:
    if manifest.limits.max_batch == 1:
        return {}
    return {
        "dynamic_batching": {
            "preferred_batch_size": list(preferred_batches(manifest, options)),
            "max_queue_delay_microseconds": options.queue_delay_us,
        }
    }


def _acceleration(manifest: Manifest) -> dict[str, Any]:
    parameters = {
        "precision_mode": _PRECISIONS[manifest.precision],
        "trt_layer_norm_fp32_fallback": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": ENGINE_CACHE,
    }
    accelerator = {"name": "tensorrt", "parameters": _map(parameters)}
    return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}}


def _threads(options: ServerOptions) -> dict[str, Any]:
    if options.threads is None:
        return {}
    return {"parameters": _map({"intra_op_thread_count": {"string_value": str(options.threads)}})}


def _warm_up(manifest: Manifest) -> list[dict[str, Any]]:
    """Blank requests of one pair and of a full batch before the server calls itself ready."""
    spec = manifest.preprocess
    tokens = min(max(_USUAL_TOKENS, spec.min_tokens), spec.max_tokens)
    inputs = {}
    for tensor in manifest.inputs:
        dims = [size if isinstance(size, int) else tokens for size in tensor.shape[1:]]
        inputs[tensor.name] = {"data_type": Enum(_TYPES[tensor.dtype]), "dims": dims, "zero_data": True}
    batches = sorted({1, manifest.limits.max_batch})
    return [{"name": f"batch {n}", "batch_size": n, "inputs": _map(inputs)} for n in batches]


def _map(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A map of the format: one message an entry."""
    return [{"key": key, "value": value} for key, value in values.items()]


def _lines(fields: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """A message's fields, a repeated message by one block each."""
    for name, value in fields.items():
        if isinstance(value, list) and not isinstance(value[0], dict):
            yield f"{_INDENT * depth}{name}: [{', '.join(map(_scalar, value))}]"
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield f"{_INDENT * depth}{name} {{"
                yield from _lines(item, depth + 1)
                yield f"{_INDENT * depth}}}"
            else:
                yield f"{_INDENT * depth}{name}: {_scalar(item)}"


def _scalar(value: str | int | Sequence[Any]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (Enum, int)) else json.dumps(value)
