"""Write a model repository for NVIDIA Triton Inference Server from bundles.

    DIR/README.md, client.py, manifest.json (hashes of all)
    DIR/<model>/config.pbtxt, bundle.json (the bundle's manifest), tokenizer.json
    DIR/<model>/1/model.onnx and model.onnx.data, or model.plan

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
from engine.manifest import EngineEntry, Manifest
from export.bundle.writer import BundleWriter
from export.inference_server.config import (
    ENGINE_CACHE,
    GRAPH_FILE,
    PLAN_FILE,
    ServerOptions,
    check_options,
    preferred_batches,
    write_config,
)

FORMAT = "dgm4-triton-repository"
CLIENT, CONFIG, RECORD, README = "client.py", "config.pbtxt", "bundle.json", "README.md"
VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_PLACE = re.compile(rf"{_NAME.pattern}(/{_NAME.pattern})*")


_README = """# Model repository for NVIDIA Triton Inference Server

{models}

```sh
ORT_DISABLE_TELEMETRY=1 tritonserver --model-repository=/path/to/this/directory
python client.py {first} photo.jpg "Caption of the photo" --url localhost:8000
```

{note}
The server answers requests of the same shape together: {preferred} at once, and whatever has arrived after
{delay_us} microseconds otherwise. So pad captions to a few lengths, as `client.py` does to
multiples of 16.

## What a client sends

`client.py` does all of this with the package `dgm4` (no extras) and `tritonclient[http]`. In other languages:

- `image`, FP32 [batch, 3, {spec.image_size}, {spec.image_size}]: the image upright (EXIF orientation
  applied), on white where it is transparent, RGB, resized to {spec.image_size} x {spec.image_size} without
  keeping its aspect, bicubic with antialiasing as Pillow does it, rows before columns; then
  (pixel / 255 - mean) / std with mean {mean} and std {std}, channels first.
- `input_ids`, INT64 [batch, tokens]: the caption in lower case, without the characters `,.'!?"()*#:;~`, with
  `-` and `/` as spaces, its first {spec.max_words} words; by `tokenizer.json` without special tokens; [CLS]
  in front, no [SEP]; {spec.min_tokens} to {spec.max_tokens} tokens, padded with 0.
- `attention_mask`, INT64 [batch, tokens]: 1 for a token, 0 for padding.

## What comes back

- `logits_real_fake` [batch, 2]: softmax; the second is the probability that the pair is manipulated.
- `logits_multicls` [batch, 4]: sigmoid each; {types}.
- `box` [batch, 4]: centre x, centre y, width, height in shares of the image; means something where a face
  type is detected.
- `logits_tok` [batch, tokens - 1, 2]: of every token after [CLS]; softmax, the second is manipulated. Drop
  the rows of padding.
- `attention_map` [batch, tokens, patches + 1]: of ASAP alone; sigmoid, without the first column, averaged
  over the tokens after [CLS].

Thresholds, types and the record of every check of the export are in `<model>/bundle.json`. Where that has a
`score_calibration`, divide logits by its `temperatures` before softmax and sigmoid.
"""


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
        writer.add_bytes(CLIENT, Path(__file__).with_name("client.py").read_bytes())
        writer.add_text(README, _readme({n: b.manifest for n, b in bundles.items()}, options))
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
    """Copy the files of one model, each verified; return its entry in the manifest."""
    files, engine = _sources(bundle, options.plan)
    writer.add_text(f"{name}/{CONFIG}", write_config(name, bundle.manifest, engine, options))
    record = (bundle.path / MANIFEST).read_bytes()
    writer.add_bytes(f"{name}/{RECORD}", record)
    for place, source in {TOKENIZER: TOKENIZER, **files}.items():
        with bundle.held(source):
            shutil.copyfile(bundle.path / source, writer.path(f"{name}/{place}"))
    served = PLAN_FILE if engine is not None else GRAPH_FILE
    return {
        "serves": served,
        "of": files[f"{VERSION}/{served}"],
        "bundle": hashlib.sha256(record).hexdigest(),
    }


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
            "Runtime; export it as fp32, fp16 or int8, or serve its TensorRT engine (--plan)"
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


def _readme(manifests: Mapping[str, Manifest], options: ServerOptions) -> str:
    """Text of README.md: the models, how to start a server on them, and what a client sends and gets."""
    first, manifest = next(iter(manifests.items()))
    spec = manifest.preprocess
    models = (
        f"- `{name}`: {m.model.name} {m.model.size}, {m.precision}, up to {m.limits.max_batch} pairs of "
        f"{m.preprocess.min_tokens} to {m.preprocess.max_tokens} tokens"
        for name, m in manifests.items()
    )
    return _README.format(
        models="\n".join(models),
        first=first,
        note=_serving_note(options),
        preferred=" or ".join(map(str, preferred_batches(manifest, options))),
        delay_us=options.queue_delay_us,
        spec=spec,
        mean=", ".join(map(str, spec.mean)),
        std=", ".join(map(str, spec.std)),
        types=", ".join(manifest.types),
    )


def _serving_note(options: ServerOptions) -> str:
    if options.plan:
        return (
            "`model.plan` runs on the kind of GPU and with the TensorRT version that built it (`engines` in\n"
            "`bundle.json`): take a server of that version. One that is `version_compatible` there runs on\n"
            "later releases of its major version, with `--backend-config=tensorrt,version-compatible=true`.\n"
        )
    note = "The graph is of opset 20 and IR version 10: take a server with ONNX Runtime 1.18 or newer.\n"
    if options.accelerate:
        note += (
            "ONNX Runtime builds TensorRT engines when the server first starts, and keeps them in\n"
            f"`{ENGINE_CACHE}`: mount a volume there.\n"
        )
    return note
