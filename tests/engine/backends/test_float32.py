"""What a host program asks of torch for its own float32 products does not reach a bundle's network."""

from __future__ import annotations

import subprocess
import sys

import pytest

SETTINGS = {
    "default": "",
    "older interface": 'torch.set_float32_matmul_precision("medium"); backends.cudnn.allow_tf32 = True',
    "older interface, exact": "backends.cudnn.allow_tf32 = False",
    "everything": 'backends.fp32_precision = "tf32"',
    "by backend": 'backends.cudnn.fp32_precision = "tf32"; backends.mkldnn.fp32_precision = "bf16"',
    "by operator": 'cudnn.conv.fp32_precision = "ieee"; backends.cuda.matmul.fp32_precision = "tf32"',
    "CPU alone": 'mkldnn.matmul.fp32_precision = "bf16"; mkldnn.conv.fp32_precision = "bf16"',
}
# In a process of its own: some of these settings cannot be taken back.
CODE = """
import sys, threading, torch
from torch import backends
from torch.backends import cudnn, mkldnn
from engine.backends.float32 import full_float32

OPERATORS = {
    "cpu": (backends.mkldnn.matmul, backends.mkldnn.conv),
    "cuda": (backends.cuda.matmul, backends.cudnn.conv),
}
ALL = (backends, backends.cudnn, backends.mkldnn, backends.cudnn.rnn, *OPERATORS["cpu"], *OPERATORS["cuda"])

def attempt(read):
    try:
        return read()
    except RuntimeError:
        return "unreadable"

def state():
    older = attempt(torch.get_float32_matmul_precision), attempt(lambda: backends.cudnn.allow_tf32)
    return [x.fp32_precision for x in ALL] + list(older)

def check(device):
    assert all(x.fp32_precision in ("ieee", "none") for x in OPERATORS[device]), state()
    assert not torch.is_autocast_enabled(device)
    for was, now in zip(before[-2:], state()[-2:]):
        assert was == "unreadable" or now != "unreadable"

{setting}
before = state()
for device in OPERATORS:
    torch.set_autocast_enabled(device, True)
    with full_float32(device):
        check(device)
        with full_float32("cpu"):
            check(device)
        check(device)
    assert state() == before, (before, state())
    assert torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, False)

inside, leave = threading.Event(), threading.Event()
def other():
    with full_float32("cuda"):
        inside.set()
        leave.wait()
thread = threading.Thread(target=other)
with full_float32("cpu"):
    thread.start()
    inside.wait()
    check("cuda")
check("cuda")
leave.set()
thread.join()
assert state() == before, (before, state())

# A setting that an operator had from its parent still follows the parent.
if {inherited}:
    backends.fp32_precision = "ieee"
    assert backends.cuda.matmul.fp32_precision == backends.mkldnn.matmul.fp32_precision == "ieee"
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_exact_inside_and_the_hosts_after(setting):
    code = CODE.replace("{setting}", SETTINGS[setting]).replace("{inherited}", str(setting == "everything"))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
