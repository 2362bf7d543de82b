"""PTX as a plugin takes it: parameters counted, debug information gone, no newer than the driver."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from engine.errors import BuildError
from export.trt.plugins.ptx import SHARED_LIMIT, Kernel, Target, assemble, compile_kernel, target_of, trim

ROOT = Path(__file__).resolve().parents[4]
REPORT = ROOT / "benchmarks" / "results" / "plugins-aot.jsonl"
SIGNATURES = {
    "GuidedHeadAttention": ("query key value n_queries query_batch out guide", "u64 u64 u64 u32 u32 u64 u64"),
    "ConvTokenFusion": ("image tokens packed out", "u64 u64 u64 u64"),
}
PTX = """.version 8.2
.target sm_90a
.address_size 64

.visible .entry twice(
\t.param .u64 .ptr .global .align 1 twice_param_0,
\t.param .u32 twice_param_1,
\t.param .u64 .ptr .global .align 1 twice_param_2,
\t.param .u64 .ptr .global .align 1 twice_param_3
)
.reqntid 128
{
\t.reg .b64 \t%rd<3>;
\t.loc\t1 20 0                         // secret.py:20:0
\tld.param.b64 \t%rd1, [twice_param_0];
\tld.param.b64 \t%rd2, [twice_param_READ];
\tret;
}
\t.file\t1 "/home/someone/secret.py"
\t.section\t.debug_abbrev
\t{
.b8 1                                   // Abbreviation Code
\t}
\t.section\t.debug_macinfo\t{\t}
"""


def test_hidden_parameters_and_debug_information_go():
    trimmed = trim(PTX.replace("READ", "1"), "twice", 2)
    assert "twice_param_1\n)" in trimmed
    assert trimmed.count(".param .") == 2
    assert not [word for word in (".loc", ".file", ".section", ".b8", "secret", "{\t}") if word in trimmed]
    assert trimmed.endswith("\tret;\n}\n")


def test_the_trimmed_code_still_assembles():
    code = PTX.replace("[twice_param_READ]", "[twice_param_0]")
    registers, stack, _ = assemble(Kernel("twice", trim(code, "twice", 2), 128, 0), 90)
    assert (registers > 0, stack) == (True, 0)


def test_a_hidden_parameter_that_is_read_is_refused():
    with pytest.raises(BuildError, match="twice reads its hidden parameter twice_param_3: it needs scratch"):
        trim(PTX.replace("READ", "3"), "twice", 2)


@pytest.mark.parametrize(("entry", "count", "got"), [("twice", 5, 4), ("thrice", 1, 0)])
def test_too_few_parameters_are_refused(entry, count, got):
    with pytest.raises(BuildError, match=f"{entry}: expected {count} parameters in its PTX, got {got}"):
        trim(PTX, entry, count)


def test_code_that_is_none_is_refused():
    with pytest.raises(BuildError, match="twice: the assembler refuses the code"):
        assemble(Kernel("twice", PTX, 128, 0), 90)


@pytest.mark.parametrize("shared", [SHARED_LIMIT, SHARED_LIMIT + 8])
def test_a_tactic_that_needs_too_much_shared_memory_is_logged(shared, caplog):
    about = SimpleNamespace(name="twice", num_warps=4, num_stages=1, shared=shared)
    compiled = SimpleNamespace(metadata=about, asm={"ptx": PTX.replace("READ", "1")})
    program = SimpleNamespace(arguments=("a", "b"), compile=lambda capability, ptx_version: compiled)
    with caplog.at_level(logging.INFO, "export.trt.plugins.ptx"):
        kernel = compile_kernel(program, Target(90, 82))
    assert kernel.fits == (shared == SHARED_LIMIT)
    message = (
        "twice, 4 warps, 1 stages: no tactic: it needs 49160 bytes of shared memory and a plugin gets 49152"
    )
    assert caplog.messages == ([] if kernel.fits else [message])


@pytest.mark.parametrize(
    ("capability", "driver", "isa"),
    [(80, 12000, 80), (90, 12020, 82), (90, 12060, 85), (100, 12080, 87), (120, 13000, 90)],
)
def test_the_isa_is_what_the_driver_reads(capability, driver, isa):
    assert target_of(capability, driver).isa == isa


def test_a_driver_newer_than_the_compiler_is_no_reason_for_newer_code():
    assert target_of(90, 99000).isa < 200


@pytest.mark.parametrize(
    ("capability", "driver", "message"),
    [
        (120, 12060, "this GPU needs PTX 8.7 and its driver .CUDA 12.6. reads 8.5; update the driver"),
        (90, 11080, "needs PTX 8.0 and its driver .CUDA 11.8. reads 7.8"),
        (75, 13000, "expected a GPU of compute capability 8.0, .* got 7.5"),
    ],
)
def test_what_cannot_be_served_is_refused(capability, driver, message):
    with pytest.raises(BuildError, match=message):
        target_of(capability, driver)


def check(rows):
    """Every row's signature is the operator's; what fits has no spills, and every target has a tactic."""
    for row in rows:
        names, types = (words.split() for words in SIGNATURES[row["operator"]])
        assert (row["arguments"], row["parameters"]) == (names, types)
        assert row["fits"] == (row["shared"] <= SHARED_LIMIT)
        assert 0 < row["registers"] <= 255
        assert row["stack"] == 0 or not row["fits"], row
    kinds = {(row["operator"], row["dtype"], row["capability"]) for row in rows}
    assert kinds == {(row["operator"], row["dtype"], row["capability"]) for row in rows if row["fits"]}
    return kinds


def test_the_committed_report():
    kinds = check([json.loads(line) for line in REPORT.read_text().splitlines()])
    assert len(kinds) == 2 * 3 * 6


def test_the_first_tactics_compile_and_assemble():
    """In a process of its own, since the interpreter and the compiler exclude each other."""
    command = [
        sys.executable,
        "-m",
        "export.trt.plugins",
        "--dtypes",
        "fp16",
        "--tactics",
        "1",
        "--targets",
        "90",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(check([json.loads(line) for line in done.stdout.splitlines()])) == 2
