"""TensorRT's genuine Python bindings without a GPU: what `import tensorrt` needs, and our plugins in them.

Run as a program it registers the plugins, takes each through what a build asks of it, in the bindings' own
classes, and prints what came out as JSON. Two things are stood in for: the library functions that the lean
runtime lacks, by functions that answer 0, and the expression builder of a build, by one that calculates.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

COMPILERS = (os.environ.get("CC", "cc"), "gcc", "clang")
PACKAGES = ("tensorrt_bindings", "tensorrt_lean_libs")
MISSING = {
    "nvinfer": ("createInferBuilder_INTERNAL", "getBuilderPluginRegistry"),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}
BATCHES, CAPTIONS = (1, 7, 64), (1, 2, 50, 63, 65, 128)
CAPABILITY, ISA = 90, 82


def unavailable():
    """Why the bindings cannot be had here; None where they can."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (pip install -e '.[plugins-test]')"
    return None if any(map(shutil.which, COMPILERS)) else "no C compiler"


def load():
    """Import the bindings as `tensorrt`."""
    root = Path(importlib.util.find_spec("tensorrt_lean_libs").origin).parent
    (lean,) = root.glob("libnvinfer_lean.so.*")
    ctypes.CDLL(str(lean), ctypes.RTLD_GLOBAL)
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    with tempfile.TemporaryDirectory() as folder:
        for name, functions in MISSING.items():
            library = f"lib{name}.so{lean.suffix}"
            path = Path(folder) / library
            source = "".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions)
            command = [
                compiler,
                "-x",
                "c",
                "-shared",
                "-fPIC",
                f"-Wl,-soname,{library}",
                "-o",
                str(path),
                "-",
            ]
            subprocess.run(command, input=source, text=True, check=True)
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        trt = sys.modules["tensorrt"] = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
    return trt


class Number:
    """A dimension's expression whose value is known."""

    def __init__(self, value):
        self.value = value

    def is_constant(self):
        return True

    def get_constant_value(self):
        return self.value


class Calculator:
    """Stands for TensorRT's expression builder."""

    def __init__(self, trt, tensors):
        kinds = trt.DimensionOperation
        self._wrap = tensors.SymIntExpr
        self._rules = {
            kinds.SUM: lambda a, b: a + b,
            kinds.PROD: lambda a, b: a * b,
            kinds.FLOOR_DIV: lambda a, b: a // b,
        }

    def constant(self, value):
        return Number(value)

    def operation(self, kind, first, second):
        found = self._wrap()
        found._int_expr = Number(self._rules[kind](first.value, second.value))
        return found


class Slots:
    """Stands for what a build fills: launch parameters and extra arguments."""

    def __init__(self):
        self.values = {}

    def __setitem__(self, index, value):
        self.values[index] = value


def described(trt, shape, dtype, dynamic):
    """A tensor's description as a build gives it: axes in `dynamic` are open, the shape is the optimum."""
    inner, outer = trt.PluginTensorDesc(), trt.DynamicPluginTensorDesc()
    inner.dims = trt.Dims([-1 if axis in dynamic else extent for axis, extent in enumerate(shape)])
    inner.type, inner.format = dtype, trt.TensorFormat.LINEAR
    outer.desc = inner
    outer.min, outer.opt, outer.max = (trt.Dims(list(shape)) for _ in range(3))
    return outer


def take_through(trt, calculator, name, fields, inputs, typical):
    """One plugin at one shape through a build: creation, types, shapes, tactics, launches and code.

    inputs: what the expressions are worth; typical: inputs and outputs at the profile's optimum.
    """
    creator = trt.get_plugin_registry().get_creator(name, "1", "dgm4")
    request = trt.QuickPluginCreationRequest.PREFER_AOT
    collection = trt.PluginFieldCollection(
        [trt.PluginField(key, value, trt.PluginFieldType.INT32) for key, value in fields.items()]
    )
    plugin = creator.create_plugin(name, "dgm4", collection, trt.TensorRTPhase.BUILD, request)
    types = plugin.get_output_data_types([x[1] for x in inputs], [len(x[0]) for x in inputs])
    shapes = plugin.get_output_shapes([list(x[0]) for x in inputs], [], calculator)
    tensors, count = [described(trt, *x) for x in typical], len(inputs)
    offered = plugin.get_supported_format_combinations(tensors, count)
    plugin.configure_plugin(tensors[:count], tensors[count:])
    return {
        "types": [dtype.name for dtype in types],
        "shapes": [[extent.value for extent in shape] for shape in shapes],
        "offered": [tensor.type.name for tensor in offered],
        "launches": [
            launched(plugin, tactic, tensors, count, calculator) for tactic in plugin.get_valid_tactics()
        ],
    }


def launched(plugin, tactic, tensors, count, calculator):
    """What a build gets for one tactic."""
    plugin.set_tactic(tactic)
    parameters, extra = Slots(), Slots()
    plugin.get_launch_params(None, tensors, count, parameters, extra, calculator)
    plain = [tensor.desc for tensor in tensors]
    entry, code = plugin.get_kernel(plain[:count], plain[count:])
    assert len(extra.values) == extra.nbSymExprs
    numbers = {key: value for key, value in vars(parameters).items() if key != "values"}
    return {
        "tactic": tactic,
        "entry": entry,
        "parameters": code.decode().count(".param ."),
        "scalars": list(extra.values.values()),
        **numbers,
    }


def attention_case(trt, dtype, batch, queries):
    """The operator, its attributes, and (shape, type, open axes) of its inputs and outputs; base network."""
    query, key = ((batch, queries, 768), dtype, {0, 1}), ((batch, 257, 768), dtype, {0})
    outputs = [query, ((batch, queries, 257), trt.float32, {0, 1})]
    return "GuidedHeadAttention", {"heads": np.array([12], np.int32)}, [query, key, key], outputs


def fusion_case(trt, dtype, batch):
    """The same of the fusion."""
    tokens = ((batch, 257, 768), dtype, {0})
    inputs = [((batch, 3, 256, 256), dtype, {0}), tokens, ((1, 768, 5, 16), dtype, set())]
    return "ConvTokenFusion", {}, inputs, [tokens]


def rows(trt, calculator):
    """Every shape in float16, and one in float32; the optimum is 8 pairs of 50 tokens."""
    for dtype in (trt.float16, trt.float32):
        wide = dtype == trt.float16
        for make, shapes in (
            (attention_case, itertools.product(BATCHES, CAPTIONS) if wide else [(2, 50)]),
            (fusion_case, [(batch,) for batch in BATCHES] if wide else [(2,)]),
        ):
            for shape in shapes:
                name, fields, inputs, _ = make(trt, dtype, *shape)
                _, _, *typical = make(trt, dtype, *(8, 50)[: len(shape)])
                found = take_through(trt, calculator, name, fields, inputs, typical[0] + typical[1])
                yield {"operator": name, "dtype": dtype.name, "shape": shape, **found}


def main():
    """Print what the bindings registered and what each shape gave."""
    trt = load()
    from export.trt.plugins import registration
    from export.trt.plugins.ptx import Target

    tensors = importlib.import_module("tensorrt_bindings.plugin._tensor")
    calculator = Calculator(trt, tensors)
    # A real builder's objects would take these; ours are Python's.
    tensors.SymExprImpl = lambda expression: expression._expr.value
    trt.DimsExprs = lambda length: [None] * length
    registration.use(Target(CAPABILITY, ISA))
    library = importlib.import_module("tensorrt_bindings.plugin._lib")
    registered = {
        name: {
            "inputs": found.input_tensor_names,
            "outputs": found.num_outputs,
            "attributes": list(found.input_attrs),
        }
        for name, found in library.QDP_REGISTRY.items()
    }
    creators = [
        [c.name, c.plugin_namespace, c.plugin_version] for c in trt.get_plugin_registry().all_creators
    ]
    found = {"version": trt.__version__, "registered": registered, "creators": creators}
    json.dump(found | {"rows": list(rows(trt, calculator))}, sys.stdout)


if __name__ == "__main__":
    main()
