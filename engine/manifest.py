"""The manifest of a bundle (format 1) as typed, frozen dataclasses, and its parser.

Every mistake is a BundleError that names the field by its path, e.g. `limits.max_batch`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from engine.errors import BundleError
from engine.fields import MANIFEST, Fields

FORMAT = "dgm4-bundle"
FORMAT_VERSION = 1
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
_HARDWARE = ("ampere", "same")
INPUTS = ("image", "input_ids", "attention_mask")
OUTPUTS = ("logits_real_fake", "logits_multicls", "box", "logits_tok")
OPTIONAL_OUTPUTS = ("attention_map",)
TYPES = ("face_swap", "face_attribute", "text_swap", "text_attribute")


@dataclass(frozen=True)
class ModelInfo:
    """Which network: its `name`, `size` and every field of its configuration."""

    name: str
    size: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Weights:
    """Where the weights come from; `trained` is false for drawn ones."""

    trained: bool
    source: str
    sha256: str | None


@dataclass(frozen=True)
class Preprocess:
    """What the network's inputs are made with; sizes in pixels, lengths in words and tokens."""

    image_size: int
    patch_size: int
    resample: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    max_words: int
    max_tokens: int
    min_tokens: int


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the graph; a dimension is a number or a symbolic expression."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Limits:
    """The largest batch and the most tokens that one call may have."""

    max_batch: int
    max_tokens: int


@dataclass(frozen=True)
class Thresholds:
    """Scores in [0, 1] from which an answer counts as manipulated."""

    manipulated: float
    types: float
    words: float


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (hex) and size in bytes of one file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class EngineEntry:
    """A prebuilt engine: what built it, for which GPUs and which ranges of shapes.

    profiles: each input's min, opt and max shape. plugins: how many nodes our own kernels run, by operator.
    fused_attention: how many attentions are the library's own.
    stripped: its weights are those of the graph `onnx_sha256`, and enter when it is loaded.
    version_compatible: it runs on later releases of the same major version. hardware: "ampere" for
    compute capability 8.0 and later, "same" for every model of GPU of its own; None without either.
    """

    file: str
    library: str
    version: str
    compute_capabilities: tuple[str, ...]
    onnx_sha256: str
    profiles: tuple[dict[str, Any], ...]
    plugins: dict[str, int] = field(default_factory=dict)
    fused_attention: int = 0
    stripped: bool = False
    version_compatible: bool = False
    hardware: str | None = None


@dataclass(frozen=True)
class Verification:
    """One stage of the export against another: largest and RMS difference, and what was allowed."""

    stage: str
    against: str
    max: float
    rms: float
    tolerance: float


@dataclass(frozen=True)
class Accuracy:
    """Metrics of the task (fractions; `dgm4.metrics.summarise` names them) on `pairs` annotated pairs.

    `metrics` are this bundle's, `reference` those of the float32 network on the same pairs; either may be
    empty where it was not measured.
    """

    source: str
    pairs: int
    metrics: dict[str, float]
    reference: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """What the scales of a static graph come from: `method`, `pairs` of `source`, drawn with `seed`."""

    method: str
    pairs: int
    source: str
    seed: int


@dataclass(frozen=True)
class Manifest:
    """A whole manifest.json of format 1.

    `float32_layers` name the modules that hold float32 parameters in a network below fp32, `kept_layers` the
    Linear layers that stay a step above the precision for the sake of accuracy.
    """

    created: str
    model: ModelInfo
    weights: Weights
    precision: str
    preprocess: Preprocess
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    limits: Limits
    types: tuple[str, ...]
    thresholds: Thresholds
    files: dict[str, FileEntry]
    engines: tuple[EngineEntry, ...]
    versions: dict[str, str]
    verification: tuple[Verification, ...]
    accuracy: tuple[Accuracy, ...] = ()
    calibration: Calibration | None = None
    float32_layers: tuple[str, ...] = ()
    kept_layers: tuple[str, ...] = ()


def manifest_digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a manifest's content, its own entry "sha256" left out; spacing does not count."""
    content = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_digest(data: bytes) -> bytes:
    """Return the bytes of a manifest.json whose content agrees with its own SHA-256; else BundleError."""
    fields = _load(data)
    if not isinstance(fields, dict) or "sha256" not in fields:
        raise BundleError(f"{MANIFEST}: expected a JSON object with its own sha256")
    if fields["sha256"] != manifest_digest(fields):
        raise BundleError(
            f"{MANIFEST}: was altered, its content has another SHA-256 than it states; export or copy the "
            "bundle again (to change thresholds, pass them to Predictor)"
        )
    return data


def _load(data: bytes) -> Any:
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST}: not valid JSON: {error}") from error


def parse_manifest(data: bytes) -> Manifest:
    """Parse and check the bytes of a manifest.json; raises BundleError naming the field at fault."""
    root = Fields(_load(data), "")
    if root.value("format") != FORMAT:
        root.fail("format", repr(FORMAT))
    if root.integer("format_version") != FORMAT_VERSION:
        root.fail("format_version", f"{FORMAT_VERSION}; update the package or export the bundle again")
    manifest = Manifest(
        created=root.text("created"),
        model=_model(root.child("model")),
        weights=_weights(root.child("weights")),
        precision=root.choice("precision", _PRECISIONS),
        preprocess=_preprocess(root.child("preprocess")),
        inputs=tuple(_tensor(f) for f in root.children("inputs")),
        outputs=tuple(_tensor(f) for f in root.children("outputs")),
        limits=_limits(root.child("limits")),
        types=root.texts("types"),
        thresholds=_thresholds(root.child("thresholds")),
        files=_files(root.child("files")),
        engines=tuple(_engine(f) for f in root.children("engines")),
        versions={name: root.child("versions").text(name) for name in root.child("versions").raw},
        verification=tuple(_verification(f) for f in root.children("verification")),
        accuracy=tuple(_accuracy(f) for f in root.children("accuracy")) if "accuracy" in root.raw else (),
        calibration=_calibration(root.child("calibration")) if "calibration" in root.raw else None,
        float32_layers=root.texts("float32_layers") if "float32_layers" in root.raw else (),
        kept_layers=root.texts("kept_layers") if "kept_layers" in root.raw else (),
    )
    _check_consistency(manifest)
    return manifest


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _model(fields: Fields) -> ModelInfo:
    return ModelInfo(fields.text("name"), fields.text("size"), fields.child("config").raw)


def _weights(fields: Fields) -> Weights:
    digest = None if fields.value("sha256") is None else fields.digest("sha256")
    return Weights(fields.boolean("trained"), fields.text("source"), digest)


def _preprocess(fields: Fields) -> Preprocess:
    spec = Preprocess(
        image_size=fields.integer("image_size"),
        patch_size=fields.integer("patch_size"),
        resample=fields.choice("resample", ("bicubic",)),
        mean=fields.triple("mean"),
        std=fields.triple("std"),
        max_words=fields.integer("max_words"),
        max_tokens=fields.integer("max_tokens"),
        min_tokens=fields.integer("min_tokens"),
    )
    if min(spec.std) <= 0:
        fields.fail("std", "three numbers > 0")
    if spec.image_size % spec.patch_size:
        fields.fail("patch_size", f"a divisor of image_size {spec.image_size}")
    if spec.min_tokens > spec.max_tokens:
        fields.fail("min_tokens", f"at most max_tokens {spec.max_tokens}")
    return spec


def _tensor(fields: Fields) -> TensorSpec:
    shape = fields.value("shape")
    if not isinstance(shape, list) or not all(type(n) in (int, str) for n in shape):
        fields.fail("shape", "a list of numbers and names")
    return TensorSpec(fields.text("name"), fields.choice("dtype", ("float32", "int64")), tuple(shape))


def _limits(fields: Fields) -> Limits:
    return Limits(fields.integer("max_batch"), fields.integer("max_tokens"))


def _thresholds(fields: Fields) -> Thresholds:
    manipulated, types, words = (fields.number(name, 0, 1) for name in ("manipulated", "types", "words"))
    return Thresholds(manipulated, types, words)


def _files(fields: Fields) -> dict[str, FileEntry]:
    entries = {}
    for name in fields.raw:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise BundleError(f"{MANIFEST}: files: {name!r} is not a plain file name beside the manifest")
        entry = fields.child(name)
        entries[name] = FileEntry(entry.digest("sha256"), entry.integer("bytes", low=0))
    return entries


def _engine(fields: Fields) -> EngineEntry:
    return EngineEntry(
        file=fields.text("file"),
        library=fields.text("library"),
        version=fields.text("version"),
        compute_capabilities=fields.texts("compute_capabilities"),
        onnx_sha256=fields.digest("onnx_sha256"),
        profiles=tuple(profile.raw for profile in _profiles(fields)),
        plugins=_counts(fields.child("plugins")) if "plugins" in fields.raw else {},
        fused_attention=fields.integer("fused_attention", low=0) if "fused_attention" in fields.raw else 0,
        stripped="stripped" in fields.raw and fields.boolean("stripped"),
        version_compatible="version_compatible" in fields.raw and fields.boolean("version_compatible"),
        hardware=fields.choice("hardware", _HARDWARE) if "hardware" in fields.raw else None,
    )


def _profiles(fields: Fields) -> list[Fields]:
    """The list of today, or the single profile of bundles written before there were several."""
    return fields.children("profiles") if "profiles" in fields.raw else [fields.child("profile")]


def _counts(fields: Fields) -> dict[str, int]:
    return {name: fields.integer(name) for name in fields.raw}


def _verification(fields: Fields) -> Verification:
    largest, rms, tolerance = (fields.number(name, 0) for name in ("max", "rms", "tolerance"))
    return Verification(fields.text("stage"), fields.text("against"), largest, rms, tolerance)


def _accuracy(fields: Fields) -> Accuracy:
    sides = []
    for name in ("metrics", "reference"):
        side = fields.child(name)
        sides.append({metric: side.number(metric) for metric in side.raw})
    return Accuracy(fields.text("source"), fields.integer("pairs"), *sides)


def _calibration(fields: Fields) -> Calibration:
    method, source = fields.text("method"), fields.text("source")
    if "smoothing" in fields.raw:
        raise BundleError(
            f"{MANIFEST}: calibration: written with --smooth, which is no longer supported; "
            "export the bundle again"
        )
    return Calibration(method, fields.integer("pairs"), source, fields.integer("seed", low=0))


def _check_consistency(manifest: Manifest) -> None:
    """Check what one field says about another; raises BundleError."""
    _check_names("inputs", [spec.name for spec in manifest.inputs], INPUTS, ())
    _check_names("outputs", [spec.name for spec in manifest.outputs], OUTPUTS, OPTIONAL_OUTPUTS)
    if manifest.types != TYPES:
        raise BundleError(f"{MANIFEST}: types: expected {list(TYPES)}, got {list(manifest.types)}")
    if manifest.preprocess.max_tokens > manifest.limits.max_tokens:
        raise BundleError(
            f"{MANIFEST}: preprocess.max_tokens {manifest.preprocess.max_tokens} is above "
            f"limits.max_tokens {manifest.limits.max_tokens}"
        )
    for engine in manifest.engines:
        if engine.file not in manifest.files:
            raise BundleError(f"{MANIFEST}: engines: {engine.file!r} is not among the files")


def _check_names(kind: str, found: list[str], needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in found]
    unknown = [name for name in found if name not in needed + optional]
    if missing or unknown or len(set(found)) != len(found):
        raise BundleError(f"{MANIFEST}: {kind}: expected {list(needed)}, got {found}; missing {missing}")
