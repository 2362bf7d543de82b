"""The inference model as one ONNX graph, batch and token count dynamic.

Hot paths are nodes of the domain `dgm4` with a body of standard operators (kernels/onnx/bodies.py), which
ONNX Runtime inlines; `flatten` writes the same network without them, for tools that know no functions.
Inputs and outputs are float32 and int64 whatever the inner precision.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

import onnx
import onnx.inliner
import torch

from engine.errors import BuildError
from engine.layout import DATA_SUFFIX
from engine.network.model import InferenceModel
from engine.registry import network_of
from engine.registry.config import NetworkConfig
from kernels.onnx import ops as onnx_ops
from kernels.onnx.bodies import bodies

_FLOATS = "DequantizeLinear"
_IR_VERSION = 10  # the newest that every supported runtime reads
_TRACE_BATCH, _TRACE_TOKENS = 2, 12


def outputs_of(config: NetworkConfig) -> tuple[str, ...]:
    """Names of a network's outputs."""
    return tuple(output.name for output in network_of(config).outputs)


def example_inputs(config: NetworkConfig, batch: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw inputs for checks: a smooth random image, random ids, captions of every length to `tokens`.

    image float32 [batch, 3, S, S]; input_ids and attention_mask int64 [batch, tokens].
    """
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, config.grid, config.grid, generator=draw)
    smooth = coarse.repeat_interleave(config.patch_size, 2).repeat_interleave(config.patch_size, 3)
    image = smooth + 0.3 * torch.randn(smooth.shape, generator=draw)
    ids = torch.randint(1000, config.vocabulary, (batch, tokens), generator=draw)
    ids[:, 0] = 101
    lengths = tokens - torch.arange(batch) * (tokens - 1) // max(batch, 2)
    mask = (torch.arange(tokens)[None] < lengths[:, None]).long()
    inputs = {"image": image, "input_ids": ids * mask, "attention_mask": mask}
    for name, shape in network_of(config).further(config).items():
        size = [batch, *map(int, shape)]
        inputs[name] = 0.25 + torch.rand(size, generator=draw) / 2  # a box that is not empty
    return inputs


def export_onnx(model: InferenceModel, path: Path) -> onnx.ModelProto:
    """Trace the model and write `path` and its weights `<path>.data`.

    Returns the written graph, whose weights stay in the file. Raises OSError where it cannot be written.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    opset = onnx_ops.BF16_OPSET if torch.bfloat16 in dtypes else onnx_ops.OPSET
    network = network_of(model.config)
    least = network.tokenizer.min_tokens
    sizes = {"batch": torch.export.Dim("batch", min=1), "tokens": torch.export.Dim("tokens", min=least)}
    dynamic = {
        tensor.name: {axis: sizes[d] for axis, d in enumerate(tensor.shape) if d in sizes}
        for tensor in network.inputs
    }
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations while tracing
        program = torch.onnx.export(
            model,
            kwargs=example_inputs(model.config, _TRACE_BATCH, _TRACE_TOKENS),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=dynamic,
            input_names=list(dynamic),
            output_names=list(outputs_of(model.config)),
            verbose=False,
        )
    if program is None:
        raise BuildError("the tracer of torch returned no ONNX program")
    data_of(path).unlink(missing_ok=True)
    program.save(path, external_data=True)
    return _finish(path, opset)


def data_of(path: Path) -> Path:
    """The file that holds the weights of the graph at `path`."""
    return path.with_name(path.name + DATA_SUFFIX)


def _finish(path: Path, opset: int) -> onnx.ModelProto:
    """Append the bodies of the custom nodes, drop what the tracer leaves behind, check and rewrite `path`."""
    proto = onnx.load_model(path, load_external_data=False)
    used = sorted({node.op_type for node in proto.graph.node if node.domain == onnx_ops.DOMAIN})
    del proto.functions[:]
    proto.functions.extend(bodies(used, opset))
    proto.ir_version = _IR_VERSION
    proto.producer_name, proto.producer_version = "dgm4", ""
    graph = proto.graph
    give_own_codes(graph)
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    # Inferred shapes of the traced example; quantisers trip over them.
    del proto.graph.value_info[:]
    path.write_bytes(proto.SerializeToString())
    onnx.checker.check_model(path, full_check=True)
    return proto


def give_own_codes(graph: onnx.GraphProto) -> None:
    """Let each product read int8 codes of its own, in place: initializers over the same bytes of the file.

    ONNX Runtime makes codes unsigned where a CPU needs it (engine/backends/ort.py), product by product, and
    fails at shared ones. CALS's two pools share a layer.
    """
    codes = {x.name: x for x in graph.initializer if x.data_type == onnx.TensorProto.INT8 and x.dims}
    floats = {
        node.output[0]: node for node in graph.node if node.op_type == _FLOATS and node.input[0] in codes
    }
    nodes = list(graph.node)
    for node, i, fresh in _repeated_reads(nodes, floats):
        own = onnx.NodeProto()
        own.CopyFrom(floats[node.input[i]])
        own.name = own.output[0] = node.input[i] = fresh
        nodes.insert(0, own)  # it reads initializers alone
    del graph.node[:]
    graph.node.extend(nodes)
    for node, i, fresh in _repeated_reads(graph.node, codes):
        tensor = graph.initializer.add()
        tensor.CopyFrom(codes[node.input[i]])
        tensor.name = node.input[i] = fresh


def _repeated_reads(
    nodes: Iterable[onnx.NodeProto], names: Collection[str]
) -> list[tuple[onnx.NodeProto, int, str]]:
    """Every input but the first that reads one of `names`: its node, its index and a name of its own."""
    reads, repeated = Counter[str](), []
    for node in nodes:
        for i, name in enumerate(node.input):
            if name in names:
                if reads[name]:
                    repeated.append((node, i, f"{name}_{reads[name]}"))
                reads[name] += 1
    return repeated


def flatten(path: Path, flat: Path) -> onnx.ModelProto:
    """Write the graph of `path` in standard operators alone to `flat`, beside it, sharing its weights."""
    proto = onnx.inliner.inline_local_functions(onnx.load_model(path, load_external_data=False))
    flat.write_bytes(proto.SerializeToString())
    return proto
