"""The path of a GPU without one: tensors without data through the public functions and torch's operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.jit import triton

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys

sys.modules["onnx"] = None  # a machine that only runs the kernels may lack it

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from kernels.attention import attention, guided_attention
from kernels.conv_fusion import conv_fusion
from kernels.gelu import gelu
from kernels.quantize import quantize_rows
from kernels.residual_norm import residual_norm
from kernels.resize import resize

torch.cuda.get_device_capability = lambda device=None: (9, 0)


def show(*tensors):
    print(*("-" if x is None else f"{x.dtype}{list(x.shape)}" for x in tensors), sep="|")


with FakeTensorMode(allow_non_fake_inputs=True):
    x, vector = torch.empty(2, 5, 768, device="cuda").half(), torch.empty(768, device="cuda")
    rows, scale = x.narrow(1, 1, 4), torch.empty(1, device="cuda")
    for options in ({}, {"summed": True}, {"dtype": torch.int8, "summed": True},
                    {"dtype": torch.float8_e4m3fn, "scale": scale, "shift": vector}):
        show(*residual_norm(rows, rows, vector, vector, 1e-6, **options))
    for options in ({}, {"dtype": torch.float8_e4m3fn}, {"dtype": torch.int8, "scale": scale}):
        show(*gelu(x, vector, **options))
    show(*quantize_rows(rows, torch.int8))
    show(*quantize_rows(rows, torch.float8_e4m3fn, scale))
    text = x.narrow(1, 0, 3)
    show(attention(text, x, x, 12, torch.empty(2, 5, dtype=torch.int64, device="cuda")))
    pairs, bias = torch.empty(2, 3, 5, dtype=torch.bool, device="cuda"), x.new_empty(4, 3, 5)
    show(attention(text, x, x, 4, pairs, bias=bias))
    show(*guided_attention(text, x, x, 12))
    image = torch.empty(2, 3, 32, 32, device="cuda").half()
    weight = torch.empty(3072, 3, 6, 6, device="cuda").half()
    bias, packed = (torch.empty(shape, device="cuda").half() for shape in ((3072,), (1, 768, 5, 16)))
    show(conv_fusion(image, x, weight, bias, packed))
    pixels = torch.empty(3 * (4 * 6 + 40 * 5), dtype=torch.uint8, device="cuda")
    show(resize(pixels, [(4, 6), (40, 5)], 8, (0.5,) * 3, (0.2,) * 3, dtype=torch.float16))


class Rounded(torch.nn.Module):
    def forward(self, x, vector):
        return quantize_rows(residual_norm(x, None, vector, vector, 1e-6).out, torch.int8)


with FakeTensorMode(allow_non_fake_inputs=True):
    graph = torch.export.export(Rounded(), (x, vector)).graph
    print(*(node.target for node in graph.nodes if "dgm4" in str(node.target)))
"""
WANT = """\
torch.float16[2, 4, 768]|-|-
torch.float16[2, 4, 768]|torch.float16[2, 4, 768]|-
torch.int8[2, 4, 768]|torch.float16[2, 4, 768]|torch.float32[2, 4]
torch.float8_e4m3fn[2, 4, 768]|-|torch.float32[1]
torch.float16[2, 5, 768]|-
torch.float8_e4m3fn[2, 5, 768]|torch.float32[2, 5]
torch.int8[2, 5, 768]|torch.float32[1]
torch.int8[2, 4, 768]|torch.float32[2, 4]
torch.float8_e4m3fn[2, 4, 768]|torch.float32[1]
torch.float16[2, 3, 768]
torch.float16[2, 3, 768]
torch.float16[2, 3, 768]|torch.float32[2, 3, 5]
torch.float16[2, 5, 768]
torch.float16[2, 3, 8, 8]
dgm4.residual_norm.default dgm4.quantize_rows.default
"""


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_operators_tell_their_shapes():
    """In a process of its own, since torch's operators refuse the interpreter's kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == WANT, done.stderr[-2000:]
