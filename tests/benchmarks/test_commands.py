"""Every benchmark by its command line at tiny size: a case that fails leaves the others, and exit code 1."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, agreement, demo, deployment, engines, networks, spinning
from benchmarks.results import ResultFile
from dgm4.shipped import RECIPES
from kernels.jit import triton

ROOT = Path(__file__).resolve().parents[2]
MODULE = re.compile(r"python -m ((?:benchmarks|export|kernels)[\w.]*)")
COMPILERS = ("kernels.tools.aot", "export.trt.plugins")  # which need Triton


def modules():
    """The modules that the documentation and the docstrings run."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    texts += [
        path for folder in ("benchmarks", "export", "kernels") for path in (ROOT / folder).rglob("*.py")
    ]
    found = {name.rstrip(".") for path in texts for name in MODULE.findall(path.read_text())}
    return sorted(found - {"benchmarks.gpu.worker"})  # a child's, with no options


def test_commands_are_found():
    assert {"benchmarks.networks", "benchmarks.gpu", "benchmarks.gpu.report", "export.cli"} <= set(modules())
    assert len(modules()) >= 11


@pytest.mark.parametrize("module", modules())
def test_a_named_module_is_a_command(module, monkeypatch, capsys):
    if triton is None and module in COMPILERS:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(module, run_name="__main__")
    assert not caught.value.code
    assert "usage: " in capsys.readouterr().out


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a benchmark's main with `arguments`: its exit code and the result file."""

    def command(module, *arguments):
        out = tmp_path / "results" / "out.json"
        monkeypatch.setattr(sys, "argv", [module.__name__, "--out", str(out), *map(str, arguments)])
        code = module.main()
        return code, json.loads(out.read_text())

    return command


def cases(result):
    return [failure["case"] for failure in result.get("failures", [])]


def test_networks(run, monkeypatch, capsys):
    """A calibrated variant comes after the published form of the same network."""

    def refuse(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # where pytest-benchmark would measure nothing
    wanted = "hammer and 1-24-0 and (published or compile or qdq) and not openvino"
    code, result = run(networks, "--size", "tiny", "--select", wanted)
    assert code == 1
    assert [row["variant"] for row in result["rows"]] == ["published", "ort-qdq"]
    assert all(row["median_ms"] > 0 and row["speedup"] > 0 for row in result["rows"])
    (failure,) = result["failures"]
    assert failure == {"case": ["hammer", "compile", "1x24"], "error": "RuntimeError: no compiler here"}
    assert "| hammer | 1 | 24 |" in capsys.readouterr().out


def test_networks_refuses_a_wrong_selection(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["networks", "--out", str(tmp_path / "a"), "--select", "nothing"])
    assert networks.main() != 0
    assert not (tmp_path / "a").exists()


def test_deployment(run, monkeypatch):
    monkeypatch.setattr(deployment, "STARTS", 1)
    monkeypatch.setattr(deployment, "PRECISIONS", ("int8", "int3"))
    code, result = run(deployment, "--network", "hammer", "--size", "tiny")
    assert (code, cases(result)) == (1, [["int3"]])
    assert "invalid choice: 'int3'" in result["failures"][0]["error"]
    assert result["network"] == "hammer"
    assert result["int8"]["export"]["seconds"] > 0
    assert result["int8"]["first_answer"]["peak_mb"] > 50


def test_spinning(run, bundle, monkeypatch):
    def copied(model, path):
        for file in bundle("asap", "fp32").path.glob("model.onnx*"):
            shutil.copyfile(file, path.parent / file.name)

    monkeypatch.setattr(spinning, "export_onnx", copied)
    monkeypatch.setattr(spinning, "TURNS", 1)
    monkeypatch.setattr(spinning, "_BUSY", "import time; time.sleep(600)")
    code, result = run(spinning, "--size", "tiny")
    assert (code, cases(result)) == (0, [])
    assert [(row["beside"], row["spinning"]) for row in result["rows"]] == [
        ("nothing", True),
        ("nothing", False),
        ("one busy process", True),
        ("one busy process", False),
    ]


def test_agreement(run, bundle, monkeypatch):
    """A network that chooses neighbours tells what float32 and each precision do to its choices."""

    def copied(model, path):
        for file in bundle(model.config.name, "fp32").path.glob("model.onnx*"):
            shutil.copyfile(file, path.parent / file.name)

    monkeypatch.setattr(agreement, "export_onnx", copied)
    monkeypatch.setattr(agreement, "SHAPES", [(1, 9)])
    monkeypatch.setattr(agreement, "PRECISIONS", ("bf16",))
    code, result = run(agreement, "--size", "tiny", "--network", "cscl")
    assert (code, cases(result)) == (0, [])
    (row,) = result["rows"]
    (shape,) = row["float32"]
    assert 0 < max(shape["largest"].values()) < 1e-4
    assert shape["jumped"] == {"patch_scores": 0} and shape["values"] == {"patch_scores": 256}
    assert 0 < row["precisions"][0]["changed"] < row["precisions"][0]["choices"] == row["choice"]["choices"]
    assert 0 < row["choice"]["noise"] < 1e-6


def test_accuracy(run, annotated, capsys):
    """The second variant has no training split to calibrate on."""
    data = annotated(6)
    arguments = ("--data", data, "--weights", "demo", "--network", "hammer", "--variants")
    code, result = run(accuracy, *arguments, "fp8", "int8 static")
    assert (code, cases(result)) == (1, [["demo", "hammer", "int8 static"]])
    assert [accuracy.key_of(record) for record in result["bundles"]] == [("demo", "hammer", "fp8")]
    assert "| HAMMER | fp8 |" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx")
def test_engines(run, annotated, capsys):
    """The second precision has no training split to calibrate on."""
    code, result = run(
        engines, "--data", annotated(1), "--network", "hammer", "--precision", "fp16", "fp8", "--size", "tiny"
    )
    assert (code, cases(result)) == (1, [["hammer", "fp8", "plugins off"]])
    (row,) = result["rows"]
    assert 0 < row["build_s"] < 300
    assert row["build_peak_mb"] > 100
    assert row["engine_mb"] > row["weights_mb"] > 1
    assert row["plugins"] == 0
    assert "| HAMMER | fp16 | 0 |" in capsys.readouterr().out


def test_demo(tmp_path, annotated, monkeypatch, capsys):
    """Of two runs one has a field that no recipe knows; the other is trained, evaluated and tabulated."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name in ("hammer", "vision"):
        text = (RECIPES / f"{name}.toml").read_text()
        text = re.sub(r"(?m)^epochs = .*", "epochs = 1", text)
        (recipes / f"{name}.toml").write_text(re.sub(r"(?m)^(batch|queue) = .*", r"\1 = 4", text))
    work = tmp_path / "work"
    work.mkdir()
    data = annotated(6)
    for split in ("train", "val"):
        shutil.copyfile(data / "metadata" / "test.json", data / "metadata" / f"{split}.json")
    data.rename(work / "set")
    monkeypatch.setattr(demo, "RECIPES", recipes)
    monkeypatch.setattr(demo, "RUNS", {"hammer": ("hammer", {}), "odd": ("hammer", {"no_such_field": False})})
    monkeypatch.setattr(demo, "ABLATIONS", {})
    monkeypatch.setattr(sys, "argv", ["demo", "--work", str(work)])
    assert demo.main() == 1
    said = capsys.readouterr()
    assert "| hammer | " in said.out
    assert "odd: failed: " in said.err


def test_a_failure_is_gone_when_its_case_succeeds(tmp_path, capsys):
    result = ResultFile(tmp_path / "folder" / "out.json")
    for name in ("a", "b"):
        with result.case(name):
            raise KeyError("missing")
    result.save({"rows": [1]})
    assert "KeyError: 'missing'" in capsys.readouterr().err
    again = ResultFile(result.path)
    assert again.load("rows") == [1]
    assert (again.exit_code, cases({"failures": again.failures})) == (1, [["a"], ["b"]])
    with again.case("a"):
        pass
    assert cases({"failures": again.failures}) == [["b"]]
    with again.case("b"):
        pass
    again.save({"rows": []})
    assert again.exit_code == 0
    assert "failures" not in json.loads(result.path.read_text())


def test_a_stopped_benchmark_is_no_failed_case(tmp_path):
    result = ResultFile(tmp_path / "out.json")
    with pytest.raises(KeyboardInterrupt), result.case("a"):
        raise KeyboardInterrupt
    assert result.failures == []
