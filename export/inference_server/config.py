"""The configuration of a model in NVIDIA Triton Inference Server: config.pbtxt, in protobuf's text format.

Field names, types and meanings are those of the server's model_config.proto. The batch is left out of
`dims`, as the server wants it where `max_batch_size` is above 0; a dimension with a name becomes -1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError
from engine.manifest import EngineEntry, Manifest, TensorSpec
from engine.registry import network_of
from export.inference_server.answers import ANSWER, PAIR, PICTURE, PIXELS, Spec
from export.inference_server.pbtxt import Enum, as_map, write_message

ONNX, PLAN = "onnxruntime_onnx", "tensorrt_plan"
NETWORK, PYTHON, ENSEMBLE = FORMS = ("network", "python", "ensemble")
KINDS = ("auto", "cpu", "gpu")
GRAPH_FILE, PLAN_FILE = "model.onnx", "model.plan"  # the names that the server looks for
ENGINE_CACHE = "/tmp/dgm4-tensorrt"  # on the server
_TYPES = {"float32": "FP32", "int64": "INT64"}
_PRECISIONS = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}
_IMAGE = "image"
_USUAL_BATCH, _USUAL_TOKENS = 8, 24


@dataclass(frozen=True)
class ServerOptions:
    """How the server runs a model.

    form: what is served, see `write_configs`. plan: serve the bundle's TensorRT engine, not its graph. kind:
    where instances run, "auto" for a GPU if the server has one. instances: copies of the network on each
    device. queue_delay_us: microseconds that a request may wait for others to share its batch. queue_size:
    requests that may wait; the next is refused. preferred: batch sizes that are sent at once; empty for 8 and
    the largest. accelerate: let ONNX Runtime build TensorRT engines on the server. threads: CPU threads of
    one instance; None for all cores.
    """

    form: str = NETWORK
    plan: bool = False
    kind: str = "auto"
    instances: int = 1
    queue_delay_us: int = 500
    queue_size: int = 256
    preferred: tuple[int, ...] = ()
    accelerate: bool = False
    threads: int | None = None


def part_names(name: str) -> tuple[str, str, str]:
    """Names of the models that the ensemble `name` joins: before the network, the network, after it."""
    return f"{name}-pre", f"{name}-network", f"{name}-post"


def write_configs(
    name: str, manifest: Manifest, engine: EngineEntry | None, options: ServerOptions
) -> dict[str, str]:
    """The text of config.pbtxt of each model by its name; `engine` is the plan that is served, if any.

    A "network" is served by itself, as tensors; "python" serves a whole Predictor; an "ensemble" has both
    ends of the network, which the server runs, as models of their own. Raises InputError for options that do
    not fit the bundle or each other.
    """
    check_options(manifest, engine is not None, options)
    if options.form == NETWORK:
        configs = {name: _network(manifest, engine, options)}
    elif options.form == PYTHON:
        configs = {name: _predictor(manifest, options)}
    else:
        before, network, after = part_names(name)
        configs = {
            name: _ensemble(name, manifest),
            before: _before(manifest, options),
            network: _network(manifest, engine, options),
            after: _after(manifest),
        }
    return {model: write_message({"name": model, **fields}) for model, fields in configs.items()}


def preferred_batches(manifest: Manifest, options: ServerOptions) -> tuple[int, ...]:
    """Batches that the server sends as soon as they are full."""
    largest = manifest.limits.max_batch
    return tuple(sorted(set(options.preferred or (min(_USUAL_BATCH, largest), largest))))


def check_options(manifest: Manifest, plan: bool, options: ServerOptions) -> None:
    """Raise InputError for options that do not fit the bundle or each other; `plan`: an engine is served."""
    if network_of(manifest.model.config).box is not None:
        raise InputError(
            f"{manifest.model.name} judges a box that each pair brings, for which a model repository has no "
            "input; serve it with dgm4 serve, dgm4 predict or engine.Predictor"
        )
    if options.form not in FORMS:
        raise InputError(f"with: expected one of {', '.join(FORMS)}, got {options.form!r}")
    if options.kind not in KINDS:
        raise InputError(f"kind: expected one of {', '.join(KINDS)}, got {options.kind!r}")
    if options.form == PYTHON and (plan or options.accelerate):
        raise InputError(
            f"{'plan' if plan else 'accelerate'} is for the server's own runtimes: leave it out with "
            "python, where the Predictor chooses the fastest backend that the server's machine has"
        )
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
        raise InputError("threads are those of a network on a CPU: leave them out with a plan")


def _network(manifest: Manifest, engine: EngineEntry | None, options: ServerOptions) -> dict[str, Any]:
    threads = {} if options.threads is None else {"intra_op_thread_count": options.threads}
    return {
        "platform": ONNX if engine is None else PLAN,
        "default_model_filename": GRAPH_FILE if engine is None else PLAN_FILE,
        "max_batch_size": manifest.limits.max_batch,
        "input": [_tensor(*spec) for spec in _specs(manifest.inputs)],
        "output": [_tensor(*spec) for spec in _specs(manifest.outputs)],
        "instance_group": [_instances(engine, options)],
        **_batching(manifest, options, _waiting(manifest, options)),
        **(_acceleration(manifest) if options.accelerate else {}),
        **_parameters(threads),
        "model_warmup": _warm_up(manifest),
    }


def _predictor(manifest: Manifest, options: ServerOptions) -> dict[str, Any]:
    return {
        **_python(manifest, _pair(), ANSWER),
        "instance_group": [_instances(None, options)],
        **_batching(manifest, options, _waiting(manifest, options)),
        **_parameters({} if options.threads is None else {"threads": options.threads}),
    }


def _before(manifest: Manifest, options: ServerOptions) -> dict[str, Any]:
    """Pictures that have arrived are prepared together, in threads of one process; none waits for others."""
    tensors = _specs(manifest.inputs)
    outputs = [(PIXELS if name == _IMAGE else name, dtype, dims) for name, dtype, dims in tensors]
    outputs.append((PICTURE, "STRING", (1,)))
    return {**_python(manifest, _pair(), outputs), **_host(), **_batching(manifest, options, {})}


def _after(manifest: Manifest) -> dict[str, Any]:
    caption = _pair()[1]
    inputs = [
        *(_tensor(*spec) for spec in _specs(manifest.outputs)),
        _tensor(PICTURE, "STRING", (1,)),
        caption,
    ]
    return {**_python(manifest, inputs, ANSWER), **_host()}


def _ensemble(name: str, manifest: Manifest) -> dict[str, Any]:
    """The three models as steps, which hand their tensors on."""
    before, network, after = part_names(name)
    pair, answer = [name for name, *_ in PAIR], [name for name, *_ in ANSWER]
    inputs = {spec.name: PIXELS if spec.name == _IMAGE else spec.name for spec in manifest.inputs}
    outputs = {spec.name: f"network_{spec.name}" for spec in manifest.outputs}  # the answer has a box too
    steps = [
        _step(before, _same(pair), _same([*inputs.values(), PICTURE])),
        _step(network, inputs, outputs),
        _step(after, {**outputs, **_same([PICTURE, "caption"])}, _same(answer)),
    ]
    return {
        "platform": ENSEMBLE,
        "max_batch_size": manifest.limits.max_batch,
        "input": _pair(),
        "output": [_tensor(*spec) for spec in ANSWER],
        "ensemble_scheduling": {"step": steps},
    }


def _step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> dict[str, Any]:
    """A step of an ensemble: what the model calls a tensor, and what the ensemble does."""
    return {
        "model_name": model,
        "model_version": -1,
        "input_map": as_map(inputs),
        "output_map": as_map(outputs),
    }


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def _python(manifest: Manifest, inputs: list[dict[str, Any]], outputs: Iterable[Spec]) -> dict[str, Any]:
    return {
        "backend": PYTHON,
        "max_batch_size": manifest.limits.max_batch,
        "input": inputs,
        "output": [_tensor(*spec) for spec in outputs],
    }


def _pair() -> list[dict[str, Any]]:
    """A picture and its caption, either of which a request may leave out."""
    return [{**_tensor(*spec), "optional": True} for spec in PAIR]


def _host() -> dict[str, Any]:
    return {"instance_group": [{"count": 1, "kind": Enum("KIND_CPU")}]}


def _specs(tensors: Sequence[TensorSpec]) -> list[Spec]:
    return [
        (
            spec.name,
            _TYPES[spec.dtype],
            tuple(size if isinstance(size, int) else -1 for size in spec.shape[1:]),
        )
        for spec in tensors
    ]


def _tensor(name: str, dtype: str, dims: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "data_type": Enum(f"TYPE_{dtype}"), "dims": list(dims)}


def _instances(engine: EngineEntry | None, options: ServerOptions) -> dict[str, Any]:
    kind = "gpu" if engine is not None else options.kind
    profile = {} if engine is None else {"profile": [str(n) for n in range(len(engine.profiles))]}
    return {"count": options.instances, "kind": Enum(f"KIND_{kind.upper()}"), **profile}


def _batching(manifest: Manifest, options: ServerOptions, more: dict[str, Any]) -> dict[str, Any]:
    if manifest.limits.max_batch == 1:
        return {}
    policy = {"default_queue_policy": {"max_queue_size": options.queue_size}}
    return {"dynamic_batching": {**more, **policy}}


def _waiting(manifest: Manifest, options: ServerOptions) -> dict[str, Any]:
    """How requests wait for others to share a run of the network."""
    return {
        "preferred_batch_size": list(preferred_batches(manifest, options)),
        "max_queue_delay_microseconds": options.queue_delay_us,
    }


def _acceleration(manifest: Manifest) -> dict[str, Any]:
    parameters = {
        "precision_mode": _PRECISIONS[manifest.precision],
        "trt_layer_norm_fp32_fallback": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": ENGINE_CACHE,
    }
    accelerator = {"name": "tensorrt", "parameters": as_map(parameters)}
    return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}}


def _parameters(values: dict[str, int]) -> dict[str, Any]:
    texts = {name: {"string_value": str(value)} for name, value in values.items()}
    return {"parameters": as_map(texts)} if texts else {}


def _warm_up(manifest: Manifest) -> list[dict[str, Any]]:
    """Blank requests of one pair and of a full batch before the server calls itself ready."""
    spec = manifest.preprocess
    tokens = min(max(_USUAL_TOKENS, spec.min_tokens), spec.max_tokens)
    inputs = {}
    for name, dtype, sizes in _specs(manifest.inputs):
        dims = [tokens if size < 0 else size for size in sizes]
        inputs[name] = {"data_type": Enum(f"TYPE_{dtype}"), "dims": dims, "zero_data": True}
    batches = sorted({1, manifest.limits.max_batch})
    return [{"name": f"batch {n}", "batch_size": n, "inputs": as_map(inputs)} for n in batches]
