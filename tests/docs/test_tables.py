"""The tables of the documentation: numbers are those of the results, options and fields those of the code."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest

from benchmarks import (
    accuracy,
    agreement,
    decoding,
    demo,
    engines,
    inference_server,
    preprocessing,
    projection,
    serving,
)
from dgm4.training.options import TrainOptions
from engine import ImageOptions, backends, errors, manifest, scores
from engine.registry import TENSORS
from engine.schema import Record
from export.bundle.licences import upstream
from export.cli.app import make_parser
from export.evaluation.gate import GATES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CODE = re.compile(r"`([^`]+)`")
LATENCIES = {
    "published, eager": "published",
    "ours, torch": "torch",
    "ours, torch.compile": "compile",
    "ONNX Runtime float32": "ort-fp32",
    "ONNX Runtime float32, ours": "ort-fp32",
    "the same graph, ONNX Runtime as it comes": "plain-fp32",
    "OpenVINO float32": "openvino-fp32",
    "ONNX Runtime int8, dynamic": "ort-int8",
    "ONNX Runtime int8, calibrated": "ort-qdq",
    "OpenVINO int8, calibrated": "openvino-qdq",
}


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "page", "make"),
    [
        ("accuracy-cpu", "precision-and-accuracy", lambda result: accuracy.table(result["bundles"])),
        (
            "agreement-cpu",
            "precision-and-accuracy",
            lambda result: agreement.table(result["rows"]) + agreement.choice_table(result["rows"]),
        ),
        ("ablations", "training", demo.table),
        ("demo", "training", demo.table),
        ("inference-server-cpu", "triton-server", inference_server.table),
        ("engines-cpu", "engines", lambda result: engines.table(result["rows"])),
        ("serving-cpu", "serving", serving.table),
        ("scoring-cpu", "scale-out", lambda _: projection.table() + projection.overhead()),
        ("preprocessing-cpu", "preprocessing", preprocessing.table),
        ("decoding-cpu", "preprocessing", lambda result: decoding.table(result["files"])),
        ("decoding-cpu", "preprocessing", lambda result: decoding.price_table(result["accuracy"])),
    ],
)
def test_tables_are_the_results(name, page, make, pages):
    rows = make(result(name)).strip().splitlines()
    assert len(rows) >= 5
    assert [row for row in rows if row not in pages[page].splitlines()] == []


@pytest.mark.parametrize("page", ["README", "precision-and-accuracy"])
def test_accuracy_of_the_demo(page, tables):
    shown = [row for row in tables(page, "Accuracy") if row[0] != "network"]
    measured = accuracy.table(result("accuracy-demo-cpu")["bundles"]).splitlines()
    whole = [[cell.strip() for cell in line.strip("| ").split(" | ")][:8] for line in measured]
    assert len(shown) >= 6
    assert [row for row in shown if row not in whole] == []


@pytest.mark.parametrize(
    ("page", "heading", "name"),
    [
        ("README", "Performance", "networks-cpu"),
        ("precision-and-accuracy", "Performance", "networks-cpu"),
        ("networks", "Speed", "networks-avx2-cpu"),
    ],
)
def test_latencies_are_the_results(page, heading, name, tables):
    measured = {(row["network"], row["variant"]): row for row in result(name)["rows"]}
    head, *rows = tables(page, heading)
    assert len(rows) >= 5
    for label, *cells in rows:
        for network, cell in zip(head, cells, strict=True):
            row = measured[network.lower(), LATENCIES[label]]
            speedup = "" if LATENCIES[label] == "published" else f" ({row['speedup']:.2f}x)"
            assert cell == f"{row['median_ms']:.0f} ms{speedup}"


def options(parser):
    """The options of a parser and of the verbs below it."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from options(verb)


def test_options_exist(pages):
    known = {*options(make_parser())}
    for name, text in pages.items():
        rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `--")]
        assert {*re.findall(r"--[\w-]+", " ".join(rows))} <= known, name


def test_command_line_page_is_current(pages):
    reference = runpy.run_path(str(ROOT / "docs" / "cli_reference.py"))["reference"]
    assert pages["cli"] == reference(), "run: python docs/cli_reference.py > docs/cli.md"


def records():
    """The records of the manifest by name."""
    return {
        name: kind
        for module in (manifest, scores)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Record) and kind.__module__ == module.__name__
    }


@pytest.mark.parametrize("name", records())
def test_fields_of_the_manifest(name, tables):
    shown = [field for row in tables("bundle-format", name) for field in CODE.findall(row[0])]
    wanted = [field.name for field in dataclasses.fields(records()[name])]
    if name == "TensorSpec":  # whose second table has the tensors
        wanted += TENSORS
    assert sorted(shown) == sorted(wanted)


@pytest.mark.parametrize(
    ("page", "heading", "kind"), [("training", "Recipes", TrainOptions), ("serving", "Inputs", ImageOptions)]
)
def test_settings_and_defaults(page, heading, kind, tables):
    shown = {row[0].strip("`"): row[1] for row in tables(page, heading)[1:]}
    assert shown == {field.name: str(field.default) for field in dataclasses.fields(kind)}


def test_errors_and_exit_codes(tables):
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in classes if issubclass(kind, errors.Dgm4Error) and kind is not errors.Dgm4Error]
    shown = {row[0].strip("`"): row[1] for row in tables("serving", "Errors")[1:]}
    assert shown == {kind.__name__: str(kind.exit_code) for kind in kinds}


def test_codes_of_refusals(tables):
    problems = pytest.importorskip("engine.serving.problems")
    shown = {row[0].strip("`"): f"{row[1]}: {row[2]}" for row in tables("serving", "Refusals")[1:]}
    assert shown == problems.CODES


def test_metrics(tables):
    metrics = pytest.importorskip("engine.serving.metrics")
    made = metrics.Metrics()
    model = dict.fromkeys(("name", "size", "precision", "backend", "device", "weights"), "")
    made.watch(metrics.BatcherStatistics, model)
    known = {family.name for family in made.registry.collect() if family.name.startswith("dgm4_")}
    assert {row[0].strip("`") for row in tables("serving", "Operation")[1:]} == known


def test_outputs_of_the_protocol(tables):
    tensors = pytest.importorskip("engine.serving.tensors")
    shown = {row[0].strip("`"): row[1] for row in tables("serving", "Open Inference Protocol")[1:]}
    inner = {name: ", ".join(["n", *map(str, shape)]) for name, (_, shape) in tensors.OUTPUTS.items()}
    assert shown == {name: f"{kind} [{inner[name]}]" for name, (kind, _) in tensors.OUTPUTS.items()}


def test_backends(tables):
    assert [row[0].strip("`") for row in tables("serving", "Backends")[1:]] == backends.known()


def test_gates(tables):
    shown = {
        precision: float(row[1].split()[0])
        for row in tables("evaluation", "Gate")[1:]
        for precision in row[0].split(", ")
    }
    assert shown == pytest.approx({precision: 100 * gate for precision, gate in GATES.items()})


def messages(*folders):
    """The text of every string in the code, with a blank for each part that a run fills in."""
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_quoted_messages_are_the_codes_own(tables):
    known = "\n".join(messages("engine", "export", "dgm4"))
    quoted = [row[0].strip("`") for row in tables("troubleshooting") if row[0].startswith("`")]
    assert len(quoted) > 20
    assert [text for text in quoted if text not in known] == []


def test_warnings_are_all_told(tables):
    """A warning begins with its code: two words or more in snake case, and a colon."""
    found = {match[1] for text in messages("engine") if (match := re.match(r"([a-z]+_[a-z]+): ", text))}
    fields = {field.name for field in dataclasses.fields(ImageOptions)} | {
        "input_ids",
        "image_options",
        "keep_layers",
        "max_batch",
        "public_key",
        "to_rows",
    }
    assert found - fields == {row[0].strip("`") for row in tables("serving", "Warnings")[1:]}


def test_stages(tables):
    source = "".join(path.read_text() for path in (ROOT / "export").glob("*.py"))
    assert {*re.findall(r'job\.stage\("(\w+)"\)', source)} == {
        row[0].strip("`") for row in tables("export", "Stages")[1:]
    }


def test_licences(tables):
    assert {row[0]: row[1] for row in tables("licences")[1:]} == upstream()


def test_extras(tables):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for row in tables("installation")[1:] for name in CODE.findall(row[0])} == extras.keys()


def test_the_readme_tests_as_the_ci_does(pages):
    (extras,) = re.findall(r'-e "(.*)"', (ROOT / ".ci" / "run").read_text())
    assert f'pip install -c constraints.txt -e "{extras}" && pytest -n 2' in pages["README"]


def test_false_alarms_of_the_readme(pages):
    rates = [100 * run["genuine"]["rate"] for run in result("demo")["runs"].values()]
    assert f"{min(rates):g} to {max(rates):g} % false alarms" in " ".join(pages["README"].split())
