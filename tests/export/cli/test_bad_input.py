"""What a user's machine does to an export: one clear error each, nothing half-written."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from dgm4.shipped import demo_checkpoint
from engine.errors import BundleError, InputError
from export import cli
from export.cli.plot import save_plot
from export.output import open_output, write_whole
from export.trt import probe, worker
from export.trt.worker import RefusedError
from export.writing import refusal

ROOT = Path(__file__).resolve().parents[3]
FULL = OSError(errno.ENOSPC, "No space left on device")


def line_of(capsys, arguments, code=1):
    """The one line that a failing command writes."""
    assert cli.main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.fixture
def theirs(tmp_path):
    """An ONNX file that is none of ours."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "theirs", value[:1], value[1:])
    path = tmp_path / "theirs.onnx"
    onnx.save_model(helper.make_model(graph, ir_version=10), path)
    return path


@pytest.mark.parametrize("verb", [["predict", __file__, "A man"], ["inspect"], ["bench"], ["repository"]])
def test_an_onnx_file_in_place_of_a_bundle(theirs, tmp_path, capsys, verb):
    more = ["--out", tmp_path / "r"] if verb == ["repository"] else []
    line = line_of(capsys, [verb[0], theirs, *verb[1:], *more])
    assert line.startswith(
        f"dgm4: error: {theirs}: not a bundle, expected the directory with a manifest.json"
    )
    assert line.endswith("that dgm4 export writes, got a file\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["theirs.onnx"]


def test_an_onnx_file_in_place_of_a_checkpoint(theirs, tmp_path, capsys):
    line = line_of(capsys, ["export", "-q", "--checkpoint", theirs, "--out", tmp_path / "b"])
    assert f"{theirs}: expected a .pth or .safetensors checkpoint, but it is something else" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["theirs.onnx"]


def test_a_full_disk_in_the_words_of_a_library(tmp_path):
    """safetensors tells the number in words, torch and NumPy none; a limit stands in for a disk."""
    code = """
        import resource, signal, sys
        import numpy as np, torch
        from pathlib import Path
        from dgm4.saving import save_pickle, save_safetensors
        from engine.errors import BundleError
        from export.bundle.writer import BundleWriter

        array = np.zeros(200_000, np.float32)
        writes = {
            "safetensors": lambda path: save_safetensors({"a": torch.zeros(200_000)}, path),
            "numpy": lambda path: array.tofile(path),
            "python": lambda path: path.write_bytes(bytes(800_000)),
            "torch": lambda path: save_pickle({"a": torch.zeros(200_000)}, path),
        }
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with BundleWriter(sys.argv[1]) as writer:
                writes[sys.argv[2]](writer.path("model.safetensors"))
        except BundleError as error:
            print(error)
    """
    told = {}
    for library in ("safetensors", "torch", "numpy", "python"):
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "b"), library]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        told[library] = done.stdout
    start = f"the bundle {tmp_path / 'b'}: cannot be written: "
    large = "File too large; it is larger than the file system or a limit (ulimit -f) allows: choose another"
    assert told["safetensors"] == told["torch"] == told["python"] == f"{start}{large} --out\n"
    assert told["numpy"].startswith(start)
    assert told["numpy"].endswith("; check whether the disk is full, or choose another --out\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "room", "number"),
    [
        (OSError(errno.EFBIG, "File too large"), 1 << 30, errno.EFBIG),
        (RuntimeError("write failed"), 1000, errno.ENOSPC),
        (RuntimeError("write failed"), 1 << 30, None),
        (OSError("1048576 requested and 131072 written"), 1000, errno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1 << 30, errno.EDQUOT),
        (OSError(errno.EIO, "Input/output error"), 1000, None),
        (BundleError("its own word"), 1000, None),
        (KeyboardInterrupt(), 1000, None),
    ],
)
def test_what_counts_as_a_refusal(tmp_path, monkeypatch, error, room, number):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=room, f_frsize=1))
    found = refusal(error, tmp_path)
    assert (found.errno if found else None) == number


def test_a_full_disk_elsewhere_is_not_the_bundles(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "/elsewhere/file")
    assert refusal(full, tmp_path) is None
    copied = OSError(errno.ENOSPC, "No space left on device", "/elsewhere/file", None, str(tmp_path / "file"))
    assert refusal(copied, tmp_path) is copied


def test_a_file_that_does_not_fit_is_not_left(tmp_path, monkeypatch):
    (tmp_path / "answers.jsonl").write_text("old")
    expected = "--out .*answers.jsonl: cannot be written: No space left on device; free space"
    with pytest.raises(InputError, match=expected), open_output(tmp_path / "answers.jsonl") as out:
        out.write("new")
        raise FULL
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(FULL))
    with pytest.raises(InputError, match="--plot .*chart.svg: cannot be written: No space left on device"):
        write_whole(tmp_path / "chart.svg", b"<svg/>", "--plot")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("answers.jsonl", "old")]


def test_a_picture_that_cannot_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(FULL))
    prediction = SimpleNamespace(plot=lambda: Image.new("RGB", (4, 4)))
    with pytest.raises(InputError, match=r"--plot .*a.png: .*; free space or choose another --plot"):
        save_plot(prediction, tmp_path / "a.png")
    with pytest.raises(InputError, match="free space or choose another; the bundle itself is whole"):
        save_plot(prediction, tmp_path / "a.png", instead="choose another; the bundle itself is whole")
    assert not list(tmp_path.iterdir())


def test_an_engine_that_does_not_fit(tmp_path):
    engine = memoryview(bytes(300_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(
            RefusedError, match=r"\(300,000 bytes\) cannot be written: File too large; free space"
        ):
            worker._write_engine(str(tmp_path / "model.engine"), engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_library_without_its_own_libraries(tmp_path, monkeypatch):
    """As tensorrt is where libnvinfer is not found."""
    (tmp_path / "tensorrt_rtx.py").write_text("import ctypes; ctypes.CDLL('libnvinfer-none.so.10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    expected = (
        r"tensorrt_rtx cannot be imported: libnvinfer-none.so.10: .*; install it: pip install .dgm4\[rtx\]"
    )
    with pytest.raises(RefusedError, match=expected):
        worker._import_library("tensorrt_rtx")


class Driver:
    """libcuda.so.1 of a driver for CUDA 12.4, whose start answers `status`."""

    def __init__(self, status):
        self.status = status
        for name in [name for name in dir(self) if name.startswith("cu")]:
            setattr(self, name, functools.partial(getattr(self, name)))  # which can have `argtypes`

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = 12040
        return 0

    def cuInit(self, flags):  # noqa: N802
        return self.status

    def cuDeviceGet(self, device, ordinal):  # noqa: N802
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDeviceGetName(self, text, size, device):  # noqa: N802
        text.value = b"NVIDIA H200"
        return 0

    def cuGetErrorString(self, status, text):  # noqa: N802
        return 0


@pytest.mark.parametrize(
    ("status", "capability", "reason"),
    [
        (0, "9.0", "GPU of compute capability 9.0, driver for CUDA up to 12.4"),
        (803, None, "CUDA up to 12.4 refuses to start (status 803): its library and its kernel module"),
        (100, None, "(status 100): it shows no GPU"),
        (1, None, "(status 1): nvidia-smi may tell why"),
    ],
)
def test_what_a_driver_says(monkeypatch, status, capability, reason):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver(status))
    found = probe.probe_driver()
    assert (found["compute_capability"], found["gpu"]) == (capability, capability and "NVIDIA H200")
    assert reason in found["reason"]


def test_a_driver_that_is_too_old(monkeypatch):
    """TensorRT's constructor returns a null pointer then, of which its binding makes a TypeError."""

    def builder(_logger):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver(0))
    library = SimpleNamespace(__name__="tensorrt", __version__="11.4.0", Builder=builder)
    expected = r"tensorrt 11.4.0 cannot start .* CUDA up to 12.4\); update the NVIDIA driver, or install"
    with pytest.raises(RefusedError, match=expected):
        worker._make_builder(library, None)


def test_a_full_disk_in_the_middle_of_an_export(tmp_path, monkeypatch, capsys):
    """Where the weights are written; the demo's checkpoint, nothing traced."""
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    arguments = [
        "export",
        "--checkpoint",
        demo_checkpoint("asap"),
        "--out",
        tmp_path / "b",
        "--target",
        "none",
    ]
    assert cli.main([str(argument) for argument in arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"dgm4: error: the bundle {tmp_path / 'b'}: cannot be written: No space left on device; "
        "free space or choose another --out"
    )
    assert not list(tmp_path.iterdir())
