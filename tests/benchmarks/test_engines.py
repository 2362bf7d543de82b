"""The benchmark of engines: its table of made-up rows, and what counts as a weight."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from benchmarks import engines
from benchmarks.gpu import rtx
from export.trt import build as trt


def row(precision, latency=None, **more):
    facts = {"network": "asap", "precision": precision, "plugins": 3, "build_s": 12.34, "build_peak_mb": 2004}
    facts["fused_attention"] = 31
    size = {"engine_mb": 485.4, "weights_mb": 465.4, "size_ratio": 1.043}
    return {**facts, **size, "latency": latency or {}, **more}


def test_weights_are_counted_in_their_own_types(tmp_path):
    kinds = {
        TensorProto.FLOAT16: 2,
        TensorProto.INT8: 1,
        TensorProto.FLOAT8E4M3FN: 1,
        TensorProto.BFLOAT16: 2,
    }
    tensors = [
        helper.make_tensor(f"t{kind}", kind, [3, 5], bytes(15 * size), raw=True)
        for kind, size in kinds.items()
    ]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], tensors)), path)
    assert engines.weights_bytes(path) == 15 * (2 + 1 + 1 + 2)


def test_the_table_has_latencies_where_an_engine_ran():
    ran = row("bf16", {"1": {"p50": 0.42}, "8": {"p50": 1.5}}, size_ratio=1.2)
    lines = engines.table([row("fp16"), ran]).splitlines()
    assert lines[0].endswith("| ratio | 1 pairs, p50 ms | 8 pairs, p50 ms |")
    assert lines[2] == "| ASAP | fp16 | 3 | 31 | 12.3 | 2,004 | 485 | 465 | 1.043 | - | - |"
    assert lines[3].endswith("| 1.200 | 0.42 | 1.50 |")
    assert engines.asked([row("fp16"), ran]).startswith("1 of 2 within")


def test_rows_have_one_order_and_a_key_each():
    rows = [
        row("bf16", plugins=plugins) | {"network": name} for name in ("cals", "hammer") for plugins in (0, 9)
    ]
    keys = sorted(map(engines.key_of, rows), key=engines._place)
    assert keys == [(name, "bf16", inside) for name in ("hammer", "cals") for inside in (True, False)]


def test_a_part_without_full_tensorrt_says_what_is_missing(monkeypatch):
    builders = (trt.BuilderInfo("tensorrt", None, False, "not installed"),)
    monkeypatch.setattr(trt, "describe_builders", lambda: builders)
    assert list(engines.part("asap", "fp16")) == [{"missing": "tensorrt: not installed"}]
    monkeypatch.setattr(rtx, "LIBRARY", "no_such_library")
    assert list(rtx.check()) == [{"missing": "no_such_library is not installed"}]
