"""Write a model repository for NVIDIA Triton Inference Server from bundles.

    DIR/README.md, client.py, manifest.json (hashes of all)
    DIR/<model>/config.pbtxt, bundle.json (the bundle's manifest)
    DIR/<model>/tokenizer.json, 1/model.onnx and model.onnx.data, or 1/model.plan     a network
    DIR/<model>/1/model.py, 1/bundle/ (all of the bundle)                             a Predictor
    DIR/<model>-pre/, -network/, -post/                                               an ensemble

The directory appears whole or not at all, as a bundle does (`export.bundle.writer`): the server takes every
directory in a repository for a model, so half of one must never be there.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import Bundle
from engine.errors import BundleError, InputError
from engine.layout import FLAT_GRAPH, GRAPH, GRAPH_DATA, MANIFEST, TOKENIZER
from engine.manifest import EngineEntry
from export.bundle.writer import BundleWriter
from export.inference_server.answers import BUNDLE
from export.inference_server.config import (
    ENSEMBLE,
    GRAPH_FILE,
    NETWORK,
    PLAN_FILE,
    PYTHON,
    ServerOptions,
    check_options,
    part_names,
    write_configs,
)
from export.inference_server.ends import RECORD
from export.inference_server.readme import write_readme

FORMAT = "dgm4-triton-repository"
CLIENT, CONFIG, README, MODEL = "client.py", "config.pbtxt", "README.md", "model.py"
VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_FILE = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}"
_COMPILED = re.compile(rf"{_NAME.pattern}/{VERSION}/__pycache__/model\.[\w-]+\.pyc")
_PLACE = re.compile(rf"{_FILE}(/{_FILE})*")


_MODEL = '''"""{name}: the code of this model is in the package `dgm4`."""

import os
import sys

# The interpreter of some servers does not look there itself.
paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
sys.path[:0] = [path for path in paths if path and path not in sys.path]
try:
    from export.inference_server.python_models import {kind} as TritonPythonModel  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{{error}}: install the package dgm4 for the server's Python, or name its folder in PYTHONPATH"
    ) from error
'''
_NO_FILE = "An ensemble has no file of its own, but the server looks for this folder.\n"


class RepositoryWriter(BundleWriter):
    """As `BundleWriter`, for a directory of models with files in folders."""

    format, noun = FORMAT, "model repository"

    def path(self, name: str) -> Path:
        """Path for the file `name`, "model/1/model.onnx"; its folder is made. Raises `BundleError`."""
        if name == MANIFEST or not _PLACE.fullmatch(name):
            raise BundleError(f"expected the path of a file in the repository, got {name!r}")
        path = self._opened() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @classmethod
    def is_derived(cls, name: str) -> bool:
        """Whether the server compiled it of a model.py."""
        return _COMPILED.fullmatch(name) is not None

    def _check_manifest(self, content: bytes) -> None:
        """Nothing to check: only `check_replaceable` reads it, and only the format and the files."""


def write_repository(
    bundles: Mapping[str, Bundle], out: Path, options: ServerOptions | None = None
) -> dict[str, Any]:
    """Write a repository that serves each bundle under its name; return its manifest.

    Raises InputError for a name or options that do not fit, BundleError for a bundle that is altered or
    holds nothing that the server runs, and where `out` holds something else or cannot be written.
    """
    options = options or ServerOptions()
    check_models(bundles, options)
    with RepositoryWriter(out) as writer:
        records = {name: _write_model(writer, name, bundle, options) for name, bundle in bundles.items()}
        client = "network_client.py" if options.form == NETWORK else "pair_client.py"
        writer.add_bytes(CLIENT, Path(__file__).with_name(client).read_bytes())
        writer.add_text(README, write_readme({n: b.manifest for n, b in bundles.items()}, options))
        return writer.commit({"models": records})


def check_models(bundles: Mapping[str, Bundle], options: ServerOptions) -> None:
    """Raise InputError for a name that no model may have, and for options that do not fit a bundle."""
    for name, bundle in bundles.items():
        if not _NAME.fullmatch(name):
            raise InputError(
                f"name: expected a model's name of letters, digits, '_', '-' and '.', got {name!r}"
            )
        check_options(bundle.manifest, options.plan, options)


def name_models(bundles: Sequence[Bundle]) -> dict[str, Bundle]:
    """Names as "asap-base-fp16"; raises InputError where two bundles have the same."""
    named: dict[str, Bundle] = {}
    for bundle in bundles:
        info = bundle.manifest.model
        name = f"{info.name}-{info.size}-{bundle.manifest.precision}"
        if name in named:
            raise InputError(
                f"{named[name].path} and {bundle.path} are both {name}; write one repository each"
            )
        named[name] = bundle
    return named


def _write_model(writer: BundleWriter, name: str, bundle: Bundle, options: ServerOptions) -> dict[str, Any]:
    """Write one bundle's models, every file of it verified; return its entry in the manifest."""
    record = (bundle.path / MANIFEST).read_bytes()
    served, engine = ({}, None) if options.form == PYTHON else _sources(bundle, options.plan)
    configs = write_configs(name, bundle.manifest, engine, options)
    for model, config in configs.items():
        writer.add_text(f"{model}/{CONFIG}", config)
    for place, source in _places(name, bundle, served, options.form).items():
        if source == MANIFEST:
            writer.add_bytes(place, record)
        else:
            with bundle.held(source):
                shutil.copyfile(bundle.path / source, writer.path(place))
    for model, kind in _python_models(name, options.form).items():
        writer.add_text(f"{model}/{VERSION}/{MODEL}", _MODEL.format(name=model, kind=kind))
    if options.form == ENSEMBLE:
        writer.add_text(f"{name}/{VERSION}/{README}", _NO_FILE)
    serves, of = next(iter(served.items()), (MODEL, bundle.path.name))
    return {
        "with": options.form,
        "parts": list(configs),
        "serves": serves.rpartition("/")[2],
        "of": of,
        "bundle": hashlib.sha256(record).hexdigest(),
    }


def _places(name: str, bundle: Bundle, served: Mapping[str, str], form: str) -> dict[str, str]:
    """Place in the repository -> file of the bundle; `served` are those of the network by their place."""
    if form == PYTHON:
        return {f"{name}/{VERSION}/{BUNDLE}/{file}": file for file in (*bundle.manifest.files, MANIFEST)}
    before, network, after = part_names(name) if form == ENSEMBLE else (name, name, name)
    places = {f"{network}/{place}": file for place, file in served.items()}
    for model in (before, after):
        places |= {f"{model}/{RECORD}": MANIFEST, f"{model}/{TOKENIZER}": TOKENIZER}
    return places


def _python_models(name: str, form: str) -> dict[str, str]:
    """The models that run in the server's Python backend, and their class in `python_models`."""
    before, _, after = part_names(name)
    return {
        NETWORK: {},
        PYTHON: {name: "PredictorModel"},
        ENSEMBLE: {before: "PrepareModel", after: "AnswerModel"},
    }[form]


def _sources(bundle: Bundle, plan: bool) -> tuple[dict[str, str], EngineEntry | None]:
    """Return place in the model's folder -> file of the bundle, and the engine if that is served."""
    files = bundle.manifest.files
    if plan:
        engine = _plan_of(bundle)
        return {f"{VERSION}/{PLAN_FILE}": engine.file}, engine
    # The server may hand the graph to TensorRT or OpenVINO, which do not read functions.
    graph = FLAT_GRAPH if FLAT_GRAPH in files else GRAPH
    if graph not in files or bundle.manifest.precision in ("bf16", "fp8"):
        raise BundleError(
            f"{bundle.path}: a bundle in {bundle.manifest.precision} has no ONNX graph for the server's ONNX "
            "Runtime; export it as fp32, fp16 or int8, serve its TensorRT engine (--plan), or a Predictor "
            "(--with python)"
        )
    data = {f"{VERSION}/{GRAPH_DATA}": GRAPH_DATA} if GRAPH_DATA in files else {}
    return {f"{VERSION}/{GRAPH_FILE}": graph, **data}, None


def _plan_of(bundle: Bundle) -> EngineEntry:
    """The bundle's TensorRT engine; the server does not run those of TensorRT-RTX."""
    plans = [engine for engine in bundle.manifest.engines if engine.library == "tensorrt"]
    whole = [engine for engine in plans if not engine.stripped]
    if whole:
        return whole[0]
    if plans:
        raise BundleError(
            f"{bundle.path}: expected a plan with its weights, and the server does not refit "
            f"{plans[0].file}; build one without --strip-weights, or serve the ONNX graph"
        )
    kinds = ", ".join(sorted({engine.library for engine in bundle.manifest.engines})) or "none"
    raise BundleError(
        f"{bundle.path}: expected an engine of tensorrt for a plan, got {kinds}; export the bundle on the "
        "server's GPU with tensorrt installed, or serve the ONNX graph"
    )
