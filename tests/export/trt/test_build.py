import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine.errors import BackendError, BuildError
from export.bundle.writer import BundleWriter
from export.trt import build, worker
from export.trt.build import RTX_CAPABILITIES, EngineSpec, build_engine, describe_builders, find_builder
from export.trt.worker import RefusedError

ROOT = Path(__file__).resolve().parents[3]
WIDTH = 32
PROFILE = {"x": ((1, 2, WIDTH), (4, 16, WIDTH), (8, 64, WIDTH))}


@pytest.fixture
def rtx():
    return pytest.importorskip("tensorrt_rtx")


def attention_nodes():
    """y = LayerNorm(x + softmax(x w x^T) x), statistics in the precision of x."""
    return [
        helper.make_node("MatMul", ["x", "weight"], ["query"], name="attention/query"),
        helper.make_node("Transpose", ["x"], ["key"], name="attention/key", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["query", "key"], ["scores"], name="attention/scores"),
        helper.make_node("Softmax", ["scores"], ["share"], name="attention/softmax", axis=-1),
        helper.make_node("MatMul", ["share", "x"], ["mixed"], name="attention/mix"),
        helper.make_node("Add", ["mixed", "x"], ["sum"], name="attention/add"),
        helper.make_node("LayerNormalization", ["sum", "scale", "shift"], ["y"], name="norm", axis=-1),
    ]


def save_model(path, nodes=None, dtype=TensorProto.FLOAT, external=False, functions=(), width=WIDTH):
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    draw = np.random.default_rng(0)
    weights = {
        "weight": draw.standard_normal((width, WIDTH)),
        "scale": np.ones(WIDTH),
        "shift": np.zeros(WIDTH),
    }
    shape = ["batch", "tokens", WIDTH]
    graph = helper.make_graph(
        nodes or attention_nodes(),
        "block",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, shape)],
        [numpy_helper.from_array(value.astype(kind), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("dgm4", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)
    options = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 16}
    onnx.save_model(model, path, **(options if external else {}))
    return path


def spec_of(path, **fields):
    return EngineSpec(path, [PROFILE], library="tensorrt_rtx", **fields)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_builds_an_engine(rtx, tmp_path, dtype):
    path = save_model(tmp_path / "model.onnx", dtype=dtype)
    phases = []
    report = build_engine(spec_of(path), tmp_path / "model.engine", lambda *step: phases.append(step))
    assert (tmp_path / "model.engine").stat().st_size == report.engine_bytes > 1000
    assert (report.library, report.version) == ("tensorrt_rtx", rtx.__version__)
    assert report.compute_capabilities == RTX_CAPABILITIES
    assert 0 < report.seconds < 120
    assert 20 < report.peak_memory_mb < 5000
    name = "float32" if dtype == TensorProto.FLOAT else "float16"
    assert [(item.name, item.dtype, item.shape) for item in report.inputs] == [("x", name, (-1, -1, WIDTH))]
    assert [(item.name, item.dtype, item.shape) for item in report.outputs] == [("y", name, (-1, -1, WIDTH))]
    assert len({phase for phase, _, _ in phases}) > 3
    assert all(0 <= step <= total for _, step, total in phases)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.engine", "model.onnx"]


@pytest.mark.parametrize("targets", [("8.6",), ("8.0", "12.0"), ("8.9", "12.0", "12.1")])
def test_builds_for_the_targets_asked_for(rtx, tmp_path, targets):
    path = save_model(tmp_path / "model.onnx")
    report = build_engine(spec_of(path, compute_capabilities=targets), tmp_path / "model.engine")
    assert report.compute_capabilities == targets


def test_target_that_cannot_run_the_network(rtx, tmp_path):
    path = save_model(tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"attention/query' for Turing \(SM75\)"):
        build_engine(spec_of(path, compute_capabilities=("7.5", "8.0")), tmp_path / "model.engine")


def test_unknown_target_is_named(rtx, tmp_path):
    path = save_model(tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"compute capability \['9.0'\]; only SM120"):
        build_engine(spec_of(path, compute_capabilities=("8.0", "9.0")), tmp_path / "model.engine")


def test_external_data_beside_the_model_and_another_working_directory(rtx, tmp_path, monkeypatch):
    (tmp_path / "bündel 1").mkdir()
    path = save_model(tmp_path / "bündel 1" / "model.onnx", external=True)
    assert path.with_name("model.onnx.data").is_file()
    monkeypatch.chdir(ROOT / "export")
    report = build_engine(spec_of(path, workspace_mb=512), tmp_path / "model.engine")
    assert report.engine_bytes > 0


def test_missing_external_data(rtx, tmp_path):
    path = save_model(tmp_path / "model.onnx", external=True)
    path.with_name("model.onnx.data").unlink()
    with pytest.raises(BuildError, match=r"weight(.|\n)*Failed to open file: .*model.onnx.data"):
        build_engine(spec_of(path), tmp_path / "model.engine")


def test_local_function_is_inlined(rtx, tmp_path):
    body = [
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        helper.make_node("Mul", ["q", "half"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["o"], axis=-1),
    ]
    opset = [helper.make_opsetid("", 20)]
    function = helper.make_function("dgm4", "ScaledSoftmax", ["q"], ["o"], body, opset)
    node = helper.make_node(
        "ScaledSoftmax",
        ["x"],
        ["y"],
        name="fused",
        domain="dgm4",
        plugin_namespace="dgm4",
        plugin_version="1",
    )
    path = save_model(tmp_path / "model.onnx", [node], functions=[function])
    assert build_engine(spec_of(path), tmp_path / "model.engine").engine_bytes > 0


@pytest.mark.parametrize(
    ("node", "cause"),
    [
        (helper.make_node("StringNormalizer", ["x"], ["y"], name="odd"), "no such operator"),
        (helper.make_node("Unheard", ["x"], ["y"], name="odd", domain="dgm4"), "no function of the model"),
        (helper.make_node("MatMul", ["x", "weight"], ["y"], name="odd"), "must match"),
    ],
)
def test_refused_graph_names_the_node(rtx, tmp_path, node, cause):
    path = save_model(tmp_path / "model.onnx", [node], width=WIDTH - 1)
    with pytest.raises(BuildError, match=rf"node 'odd' \({node.op_type}\): .*{cause}"):
        build_engine(spec_of(path), tmp_path / "model.engine")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("content", [b"", b"this is no protobuf message at all"])
def test_file_that_is_no_model(rtx, tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(BuildError, match="not an ONNX model|parser refused"):
        build_engine(spec_of(tmp_path / "model.onnx"), tmp_path / "model.engine")


def test_builder_failure_carries_its_log(rtx, tmp_path):
    node = helper.make_node("Attention", list("qkv"), ["y"], name="attention")
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, "tokens", 64]) for name in "qkvy"
    ]
    graph = helper.make_graph([node], "block", value[:3], value[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save_model(model, tmp_path / "model.onnx")
    shapes = ((1, 4, 2, 64), (4, 4, 16, 64), (8, 4, 64, 64))
    spec = replace(spec_of(tmp_path / "model.onnx"), profiles=[dict.fromkeys("qkv", shapes)])
    with pytest.raises(BuildError, match=r"gave no engine(.|\n)*Attention operation was not supported"):
        build_engine(spec, tmp_path / "model.engine")


def test_real_crash_of_the_builder_is_an_error(rtx, tmp_path):
    """RTX 1.7.1 dies by SIGSEGV on an Attention whose query, key and value are one tensor."""
    node = helper.make_node("Attention", ["q", "q", "q"], ["y"], name="attention")
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, "tokens", 64]) for name in "qy"
    ]
    graph = helper.make_graph([node], "block", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save_model(model, tmp_path / "model.onnx")
    shapes = ((1, 4, 2, 64), (4, 4, 16, 64), (8, 4, 64, 64))
    spec = replace(spec_of(tmp_path / "model.onnx"), profiles=[{"q": shapes}])
    with pytest.raises(BuildError, match="SIGSEGV|gave no engine"):
        build_engine(spec, tmp_path / "model.engine")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_engine_inside_a_bundle_that_fails_leaves_nothing(rtx, tmp_path):
    path = save_model(tmp_path / "model.onnx", [helper.make_node("Unheard", ["x"], ["y"], domain="dgm4")])
    with pytest.raises(BuildError), BundleWriter(tmp_path / "bundle") as writer:
        build_engine(spec_of(path), writer.path("model.rtx.engine"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_profile_error_reaches_the_caller(rtx, tmp_path):
    path = save_model(tmp_path / "model.onnx")
    spec = replace(spec_of(path), profiles=[PROFILE, {"image": PROFILE["x"]}])
    with pytest.raises(BuildError, match=r"profile 2 names inputs \['image'\]"):
        build_engine(spec, tmp_path / "model.engine")


def script(tmp_path, body):
    """Command of a worker that reads its request and runs `body`, and a specification to give to it."""
    path = tmp_path / "worker.py"
    path.write_text(f"import json, os, sys, time\nrequest = json.loads(sys.stdin.readline())\n{body}\n")
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    return spec_of(tmp_path / "model.onnx"), [sys.executable, str(path)]


@pytest.mark.parametrize(
    "number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1]
)
def test_worker_killed_by_a_signal(tmp_path, number):
    body = f"print('layer 12 of 13', file=sys.stderr, flush=True)\nos.kill(os.getpid(), {int(number)})"
    spec, worker = script(tmp_path, body)
    with pytest.raises(BuildError, match=rf"{number.name}(.|\n)*layer 12 of 13") as raised:
        build_engine(spec, tmp_path / "model.engine", worker=worker)
    assert ("out of memory" in str(raised.value)) == (number == signal.SIGKILL)


@pytest.mark.parametrize("body", ["sys.exit(7)", "raise RuntimeError('lost')", "os.close(1)", ""])
def test_worker_that_ends_without_an_engine(tmp_path, body):
    spec, worker = script(tmp_path, body)
    with pytest.raises(BuildError, match="ended with status [017] and no engine"):
        build_engine(spec, tmp_path / "model.engine", worker=worker)


def test_worker_that_never_reads(tmp_path):
    spec, _ = script(tmp_path, "")
    with pytest.raises(BuildError, match="status 1"):
        build_engine(spec, tmp_path / "model.engine", worker=["false"])
    with pytest.raises(BuildError, match="cannot be started"):
        build_engine(spec, tmp_path / "model.engine", worker=[str(tmp_path / "absent")])


def test_worker_that_hangs_meets_the_limit(tmp_path):
    spec, worker = script(tmp_path, 'print(\'{"event": "started"}\', flush=True)\ntime.sleep(3600)')
    with pytest.raises(BuildError, match="longer than its limit of 0.5 s"):  # or the test's own limit ends it
        build_engine(replace(spec, time_limit_s=0.5), tmp_path / "model.engine", worker=worker)


def test_half_an_engine_never_replaces_a_whole_one(tmp_path):
    done = {"event": "done", "version": "1", "engine_bytes": 10, "peak_memory_mb": 1.0}
    body = f"open(request['engine'], 'wb').write(b'half')\nprint({json.dumps(json.dumps(done))})"
    spec, worker = script(tmp_path, body)
    (tmp_path / "model.engine").write_bytes(b"whole")
    with pytest.raises(BuildError, match="10 bytes and wrote 4"):
        build_engine(spec, tmp_path / "model.engine", worker=worker)
    assert (tmp_path / "model.engine").read_bytes() == b"whole"
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_exception_of_the_caller_ends_the_worker(tmp_path, error):
    event = '{"event": "progress", "phase": "a", "step": 1, "total": 2}'
    body = (
        f"open('{tmp_path}/pid', 'w').write(str(os.getpid()))\nprint('{event}', flush=True)\ntime.sleep(60)"
    )
    spec, worker = script(tmp_path, body)

    def stop(*step):
        raise error

    with pytest.raises(error):
        build_engine(spec, tmp_path / "model.engine", stop, worker=worker)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def is_running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_worker_dies_with_its_parent():
    code = (
        "import subprocess, sys, time\n"
        f"worker = subprocess.Popen({list(build.WORKER)!r}, stdout=subprocess.PIPE)\n"
        "print(worker.stdout.readline().decode(), flush=True)\n"
        "time.sleep(60)\n"
    )
    held, unused = os.pipe()  # the worker's stdin stays open when its parent is gone
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=held, stdout=subprocess.PIPE, env=environment
    ) as parent:
        pid = json.loads(parent.stdout.readline())["pid"]
        assert is_running(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)
    os.close(held)
    os.close(unused)


def test_bad_requests_start_no_worker(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(BuildError, match="is not a file"):
        build_engine(spec_of(path), tmp_path / "model.engine")
    path.write_bytes(b"onnx")
    with pytest.raises(BuildError, match="is not a directory"):
        build_engine(spec_of(path), tmp_path / "absent" / "model.engine")
    with pytest.raises(BuildError, match="expected the library"):
        build_engine(replace(spec_of(path), library="tvm"), tmp_path / "model.engine")
    with pytest.raises(BuildError, match="time limit above 0"):
        build_engine(spec_of(path, time_limit_s=0), tmp_path / "model.engine")


def test_builders_are_described_without_loading_them():
    infos = describe_builders()
    assert [info.library for info in infos] == ["tensorrt", "tensorrt_rtx"]
    assert all(info.reason for info in infos)
    assert find_builder() == next((info for info in infos if info.usable), None)
    code = (
        "import sys; from export.trt.build import find_builder; find_builder()\n"
        "maps = open('/proc/self/maps').read()\n"
        "print([m for m in sys.modules if 'tensorrt' in m], 'libcuda' in maps, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[] False False\n"


def test_tensorrt_needs_a_gpu_and_rtx_does_not(libraries, monkeypatch):
    libraries(tensorrt=True, tensorrt_rtx=True)
    no_driver = {"compute_capability": None, "gpu": None, "reason": "no CUDA driver"}
    monkeypatch.setattr(build, "_probe_driver", lambda: no_driver)
    assert [info.usable for info in describe_builders()] == [False, True]
    assert find_builder().library == "tensorrt_rtx"
    monkeypatch.setattr(
        build, "_probe_driver", lambda: {"compute_capability": "9.0", "gpu": "H", "reason": "GPU"}
    )
    assert (find_builder().library, find_builder().gpu) == ("tensorrt", "H")


def test_no_library_at_all(libraries, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    libraries(tensorrt=False, tensorrt_rtx=False)
    assert find_builder() is None
    with pytest.raises(BackendError, match=r'pip install "dgm4\[rtx\]"'):
        build_engine(EngineSpec(tmp_path / "model.onnx", [PROFILE]), tmp_path / "model.engine")


def test_library_that_cannot_be_imported(tmp_path):
    if build.importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed")
    path = save_model(tmp_path / "model.onnx")
    with pytest.raises(BuildError, match="library tensorrt cannot be imported"):
        build_engine(replace(spec_of(path), library="tensorrt"), tmp_path / "model.engine")


def test_tensorrt_builds_for_the_gpu_of_the_machine_only(monkeypatch):
    def driver(capability):
        return lambda: {"compute_capability": capability, "reason": ""}

    monkeypatch.setattr(worker, "probe_driver", driver("9.0"))
    assert worker._set_capabilities(None, object(), []) == ["9.0"]
    assert worker._set_capabilities(None, object(), ["8.0", "9.0"]) == ["9.0"]
    with pytest.raises(RefusedError, match=r"this machine's GPU \(9.0\), not for \['8.6'\]"):
        worker._set_capabilities(None, object(), ["8.6"])
    monkeypatch.setattr(worker, "probe_driver", driver(None))
    with pytest.raises(RefusedError, match="this machine shows none"):
        worker._set_capabilities(None, object(), [])


def test_timing_cache_is_left_alone_by_rtx(rtx, tmp_path):
    path = save_model(tmp_path / "model.onnx")
    build_engine(spec_of(path, timing_cache=tmp_path / "timing.cache"), tmp_path / "model.engine")
    assert not (tmp_path / "timing.cache").exists()
