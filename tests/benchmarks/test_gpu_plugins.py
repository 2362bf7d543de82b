"""The plugins' proof on a GPU: its calls of the CUDA driver, by a double that records and decodes them."""

from __future__ import annotations

import ctypes
import functools
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu.driver import Driver
from engine.errors import BackendError
from kernels.jit import Tiles, triton

STREAM = 4711


class Cuda:
    """Takes what a driver's functions take; `status` is what the named one answers."""

    def __init__(self, fails="", fill=None):
        self.calls, self._fails, self._fill = [], fails, fill
        for name in [name for name in dir(self) if name.startswith("cu")]:
            setattr(self, name, functools.partial(getattr(self, name)))  # which can have `argtypes`

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = 13000
        return self._status("cuDriverGetVersion")

    def cuModuleLoadData(self, module, image):  # noqa: N802
        module._obj.value = 11
        self.calls.append(("load", image.value))
        return self._status("cuModuleLoadData")

    def cuModuleGetFunction(self, function, module, name):  # noqa: N802
        function._obj.value = 22
        self.calls.append(("function", module.value, name))
        return self._status("cuModuleGetFunction")

    def cuLaunchKernel(self, function, *arguments):  # noqa: N802
        *sizes, stream, parameters, extra = arguments
        self.calls.append(("launch", function.value, list(sizes), stream, extra))
        if self._fill:
            self._fill(parameters)
        return self._status("cuLaunchKernel")

    def cuGetErrorString(self, status, text):  # noqa: N802
        text._obj.value = b"invalid argument"
        return 0

    def _status(self, name):
        return int(name == self._fails)


def number(parameters, index, kind):
    return ctypes.cast(parameters[index], ctypes.POINTER(kind)).contents.value


def test_version():
    assert Driver(Cuda()).version() == 13000


def test_a_launch_passes_pointers_and_numbers_in_order():
    tensors = torch.zeros(3), torch.zeros(5)
    seen = []

    def read(parameters):
        assert len(parameters) == 3
        pointers = [number(parameters, i, ctypes.c_uint64) for i in (0, 2)]
        seen.extend([*pointers, number(parameters, 1, ctypes.c_int32)])

    cuda = Cuda(fill=read)
    driver = Driver(cuda)
    function = driver.load(".version 8.2", "twice")
    driver.launch(function, (4, 3, 2), 128, 1024, STREAM, (tensors[0], -7, tensors[1]))
    assert seen == [tensors[0].data_ptr(), tensors[1].data_ptr(), -7]
    assert cuda.calls == [
        ("load", b".version 8.2"),
        ("function", 11, b"twice"),
        ("launch", 22, [4, 3, 2, 128, 1, 1, 1024], STREAM, None),
    ]


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"])
def test_a_refusal_is_the_drivers_own_words(name):
    driver = Driver(Cuda(fails=name))
    with pytest.raises(BackendError, match=rf"{name}: invalid argument \(error 1\)"):
        driver.launch(driver.load("", "twice"), (1, 1, 1), 32, 0, 0, ())


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_a_program_runs_with_its_own_numbers(on_cpu):
    """The double writes as the kernel would: the answer is the fenced buffer that was passed for it."""
    from benchmarks.gpu.plugins import run
    from export.trt.plugins.programs import attend
    from export.trt.plugins.ptx import Kernel

    program = attend(2, 5, 17, 32, 2, torch.float16, Tiles(16, 16, 4, 1))
    shapes = {
        "query": (2, 5, 32),
        "key": (2, 17, 32),
        "value": (2, 17, 32),
        "out": (2, 5, 32),
        "guide": (2, 5, 17),
    }
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}

    def write(parameters):
        given = [number(parameters, i, ctypes.c_uint64) for i in range(3)]
        assert given == [tensors[name].data_ptr() for name in ("query", "key", "value")]
        assert [number(parameters, i, ctypes.c_int32) for i in (3, 4)] == [5, 5 * 32]
        ctypes.memset(number(parameters, 5, ctypes.c_uint64), 0, 2 * 5 * 32 * 2)

    cuda = Cuda(fill=write)
    found = run(Driver(cuda), Kernel("_attention_kernel", "ptx", 128, 512), program, tensors)
    assert (found["out"] == 0).all()
    assert found["guide"].isnan().all()
    assert cuda.calls[-1][2:4] == ([1, 4, 2, 128, 1, 1, 512], STREAM)

    def overrun(parameters):
        ctypes.memset(number(parameters, 5, ctypes.c_uint64), 0, 2 * 5 * 32 * 2 + 2)

    with pytest.raises(RuntimeError, match="_attention_kernel writes outside out"):
        run(Driver(Cuda(fill=overrun)), Kernel("_attention_kernel", "ptx", 128, 512), program, tensors)
