"""The manifest of a bundle (format 1): frozen dataclasses that read and write it, and its SHA-256.

Every mistake is a BundleError that names the field by its path, e.g. `limits.max_batch`. The types are the
schema (`engine.schema`); `problems` says how fields must fit each other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from engine.errors import BundleError, why_no_json
from engine.layout import MANIFEST
from engine.registry import network_of
from engine.registry.config import LARGEST_CAPTION, TYPES, NetworkConfig
from engine.registry.record import ANSWERS, PAIR
from engine.schema import NOTHING, Check, Record, at_least, fail, matching, one_of, parse_json, whole, within
from engine.scores import ScoreCalibration, Temperatures, Thresholds

FORMAT = "dgm4-bundle"
FORMAT_VERSION = 1
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
INPUTS = tuple(tensor.name for tensor in PAIR)
OUTPUTS = tuple(tensor.name for tensor in ANSWERS)  # every network's; a heat map may be beside them
NOT_STATED = "not stated"
_ENVELOPE = ("format", "format_version", "sha256")  # beside the content, which the last is of
_REMEDY = "export or copy the bundle again"

# The demo weights of bundles that were written before a manifest said what kind its weights are.
FIRST_DEMOS = (
    "63c148846bba7f7753c85ea8c297a413036ae6c5db530690ae7b23b640e42028",
    "5de2f0947c266d7b73d93c43238baafc171d6ce890ad1dc073338ff1c8d5392e",
    "87e49c3a2d3434fda3ee50252fe39e251e170a204ead026c6f169d4f53ad3d44",
)

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
LARGEST_BATCH = 4096
_Count = Annotated[int, at_least(1)]
_CountOrNone = Annotated[int, at_least(0)]
_Batch = Annotated[int, whole(1, LARGEST_BATCH)]
_Tokens = Annotated[int, whole(1, LARGEST_CAPTION)]
_Dimension = Annotated[int, whole(1, 2**20)]
_Difference = Annotated[float, within(0, 1e38)]
_Fraction = Annotated[float, within(0, 1)]
_Colour = Annotated[float, within(-1000, 1000)]
_Module = Annotated[str, matching(r"[\w.]{1,200}", "the name of a module")]
_Sha256 = Annotated[str, matching("[0-9a-f]{64}", "64 lower-case hexadecimal digits")]
_Scale = Check("three numbers from 0.001 to 1000", lambda values: 1e-3 <= min(values) <= max(values) <= 1e3)


@dataclass(frozen=True)
class ModelInfo(Record):
    """Which network: its `name`, `size` and every field of its configuration."""

    name: str
    size: str
    config: NetworkConfig

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        for name in ("name", "size"):
            if getattr(self, name) != getattr(self.config, name):
                yield name, f"{getattr(self.config, name)!r} as in config", getattr(self, name)


@dataclass(frozen=True)
class Weights(Record):
    """Where the weights come from.

    kind: "trained" for a user's checkpoint, "demo" for the weights that ship with the package, whose answers
    say nothing about real images, "drawn" for weights drawn from a formula. licence: the weights' own.
    """

    kind: Annotated[str, one_of("trained", "demo", "drawn")]
    source: str
    sha256: _Sha256 | None
    licence: str = NOT_STATED

    @property
    def warning(self) -> str | None:
        """Why the answers of these weights must not be trusted; None for a user's own checkpoint."""
        if self.kind == "demo":
            return "demo_weights: trained on made images; the answers say nothing about real ones"
        if self.kind == "drawn":
            return f"untrained_weights: the scores mean nothing ({self.source})"
        return None

    @classmethod
    def upgrade(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Tell the kind of weights of bundles that said only whether they were trained."""
        if not isinstance(raw.get("trained"), bool):
            return raw
        raw = dict(raw)
        trained = raw.pop("trained")
        kind = "demo" if raw.get("sha256") in FIRST_DEMOS else "trained" if trained else "drawn"
        return {"kind": kind, **raw}


@dataclass(frozen=True)
class Vocabulary(Record):
    """What tokenizer.json is made of: a file's name, its pieces, and their SHA-256, one piece a line.

    After byte pairs come an empty line and the merges, one a line.
    """

    source: str
    pieces: _Count
    sha256: _Sha256


@dataclass(frozen=True)
class Preprocess(Record):
    """How the network's inputs are made; sizes in pixels, lengths in words and tokens."""

    image_size: _Dimension
    patch_size: _Dimension
    resample: Annotated[str, one_of("bicubic")]
    mean: tuple[_Colour, _Colour, _Colour]
    std: Annotated[tuple[float, float, float], _Scale]
    max_words: _Tokens
    max_tokens: _Tokens
    min_tokens: _Tokens

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        if self.image_size % self.patch_size:
            yield "patch_size", f"a divisor of image_size {self.image_size}", self.patch_size
        if self.min_tokens > self.max_tokens:
            yield "min_tokens", f"at most max_tokens {self.max_tokens}", self.min_tokens


@dataclass(frozen=True)
class TensorSpec(Record):
    """One input or output of the graph; a dimension is a number or a symbolic expression."""

    name: str
    dtype: Annotated[str, one_of("float32", "int64")]
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Limits(Record):
    """The largest batch and the most tokens that one call may have."""

    max_batch: _Batch
    max_tokens: _Tokens


@dataclass(frozen=True)
class FileEntry(Record):
    """SHA-256 (hex) and size in bytes of one file of the bundle."""

    sha256: _Sha256
    bytes: _CountOrNone


@dataclass(frozen=True)
class BuildCost(Record):
    """What a build took: seconds, and megabytes of memory (2**20 bytes) at its peak."""

    seconds: _Difference
    peak_memory_mb: _CountOrNone


@dataclass(frozen=True)
class ShapeRange(Record):
    """The shapes of one input that an engine takes: the smallest, the one it is best at, the largest."""

    min: tuple[_Dimension, ...]
    opt: tuple[_Dimension, ...]
    max: tuple[_Dimension, ...]

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        shapes = self.min, self.opt, self.max
        ordered = all(low <= best <= high for low, best, high in zip(*shapes, strict=False))
        if len({len(shape) for shape in shapes}) > 1 or not ordered:
            yield "max", "min <= opt <= max in every dimension", [list(shape) for shape in shapes]


@dataclass(frozen=True)
class EngineEntry(Record):
    """A prebuilt engine: what built it, for which GPUs and which ranges of shapes.

    profiles: each input's min, opt and max shape. plugins: how many nodes our own kernels run, by operator.
    fused_attention: how many attentions the library fuses itself.
    stripped: its weights are those of the graph `onnx_sha256`, and enter when it is loaded.
    version_compatible: it runs on later releases of the same major version. hardware: "ampere" for
    compute capability 8.0 and later, "same" for every GPU model of the same compute capability; None without
    either.
    """

    file: str
    library: Annotated[str, one_of("tensorrt", "tensorrt_rtx")]
    version: Annotated[str, matching(r"\d[\w.+-]{0,63}", "a version")]
    compute_capabilities: tuple[Annotated[str, matching(r"\d{1,2}\.\d", "a number such as 8.9")], ...]
    onnx_sha256: _Sha256
    profiles: tuple[dict[str, ShapeRange], ...]
    plugins: dict[str, _Count] = field(default_factory=dict)
    fused_attention: _CountOrNone = 0
    stripped: bool = False
    version_compatible: bool = False
    hardware: Annotated[str, one_of("ampere", "same")] | None = None
    build: BuildCost | None = None

    @classmethod
    def upgrade(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Make a list of the single profile of bundles written before there were several."""
        if "profiles" in raw or "profile" not in raw:
            return raw
        return {"profiles": [raw["profile"]], **{name: x for name, x in raw.items() if name != "profile"}}


@dataclass(frozen=True, kw_only=True)
class Verification(Record):
    """How far one stage of the export is from another, and what was allowed.

    `max` and `rms` are absolute. `tolerance` bounds `max` or, of the `kind` "relative", `relative`: the worst
    output's RMS of the difference over the RMS of the reference; `worst` names that output.
    """

    stage: str
    against: str
    max: _Difference
    rms: _Difference
    relative: _Difference | None = None
    worst: str | None = None
    tolerance: _Difference
    kind: str | None = None


@dataclass(frozen=True)
class Accuracy(Record):
    """Metrics of the task (fractions; `dgm4.metrics.summarise` names them) on `pairs` annotated pairs.

    `metrics` are this bundle's, `reference` those of the float32 network on the same pairs; either may be
    empty where it was not measured.
    """

    source: str
    pairs: _Count
    metrics: dict[str, _Fraction]
    reference: dict[str, _Fraction]


@dataclass(frozen=True)
class Calibration(Record):
    """What the scales of a static graph come from: `method`, `pairs` of `source`, drawn with `seed`."""

    method: str
    pairs: _Count
    source: str
    seed: _CountOrNone

    @classmethod
    def upgrade(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Refuse a bundle whose channels were rescaled; its weights do not fit its scales any more."""
        if "smoothing" in raw:
            raise BundleError(
                f"{MANIFEST}: calibration: written with --smooth, which is no longer supported; "
                "export the bundle again"
            )
        return raw


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """A whole manifest.json of format 1.

    `float32_layers` name the modules that hold float32 parameters in a network below fp32, `kept_layers` the
    Linear layers that stay a step above the precision for the sake of accuracy. `files` is empty while the
    bundle is being written.
    """

    created: Annotated[
        str, matching(r"\d{4}-\d\d-\d\dT[\d:.+Z-]{5,30}", "a time, such as 2026-01-31T12:00:00Z")
    ]
    model: ModelInfo
    weights: Weights
    precision: Annotated[str, one_of(*PRECISIONS)]
    preprocess: Preprocess
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    limits: Limits
    types: tuple[str, ...]
    thresholds: Thresholds
    engines: tuple[EngineEntry, ...]
    versions: dict[str, str]
    verification: tuple[Verification, ...]
    accuracy: tuple[Accuracy, ...] = ()
    float32_layers: tuple[_Module, ...] = ()
    kept_layers: tuple[_Module, ...] = ()
    calibration: Calibration | None = None
    vocabulary: Vocabulary | None = None
    score_calibration: ScoreCalibration | None = None
    files: dict[str, FileEntry]

    @property
    def temperatures(self) -> Temperatures:
        """What the logits are divided by: 1 where no scores were calibrated."""
        return Temperatures() if self.score_calibration is None else self.score_calibration.temperatures

    @classmethod
    def upgrade(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Refuse another format than this release reads; leave out what is no field of the content."""
        for name, expected, remedy in (
            ("format", FORMAT, ""),
            ("format_version", FORMAT_VERSION, f"{cls.newer}, or export the bundle again"),
        ):
            value = raw.get(name, NOTHING)
            if type(value) is not type(expected) or value != expected:
                fail(name, repr(expected), value, remedy)
        return {name: value for name, value in raw.items() if name not in _ENVELOPE}

    def to_dict(self) -> dict[str, Any]:
        """Return the content of manifest.json but its own SHA-256."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION} | super().to_dict()

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        network = network_of(self.model.config)
        inputs, outputs = ([x.name for x in tensors] for tensors in (network.inputs, network.outputs))
        yield from _name_problems("inputs", self.inputs, inputs, ())
        yield from _name_problems("outputs", self.outputs, OUTPUTS, outputs)
        yield from self._shape_problems()
        if self.types != TYPES:
            yield "types", str(list(TYPES)), list(self.types)
        tokens, most = self.preprocess.max_tokens, self.limits.max_tokens
        if tokens > most:
            yield "preprocess.max_tokens", f"at most limits.max_tokens {most}", tokens
        for name in self.files:
            if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
                yield "files", "plain file names beside the manifest", name
        missing = [(i, x.file) for i, x in enumerate(self.engines) if x.file not in self.files]
        yield from ((f"engines[{i}].file", "one of the bundle's files", file) for i, file in missing)

    def _shape_problems(self) -> Iterator[tuple[str, str, object]]:
        config, preprocess = self.model.config, self.preprocess
        for name in ("image_size", "patch_size"):
            found, wanted = getattr(preprocess, name), getattr(config, name)
            if found != wanted:
                yield f"preprocess.{name}", f"{wanted} of model.config", found
        least = network_of(config).tokenizer.min_tokens
        if preprocess.min_tokens < least:
            yield "preprocess.min_tokens", f"at least {least}, as {config.name} takes", preprocess.min_tokens
        if preprocess.max_tokens > config.positions:
            yield "preprocess.max_tokens", f"at most {config.positions} positions", preprocess.max_tokens
        network = network_of(config)
        tensors = {x.name: (x.dtype, x.shape_of(config)) for x in (*network.inputs, *network.outputs)}
        for kind, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            for i, spec in enumerate(specs):
                expected = tensors[spec.name]
                if (spec.dtype, spec.shape) != expected:
                    found = f"{spec.dtype} {list(spec.shape)}"
                    yield f"{kind}[{i}]", f"{expected[0]} {list(expected[1])} for {spec.name}", found


def _name_problems(
    kind: str, tensors: Sequence[TensorSpec], needed: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str, str, object]]:
    names = [tensor.name for tensor in tensors]
    missing = [name for name in needed if name not in names]
    if missing or not {*names} <= {*needed, *optional} or len(set(names)) != len(names):
        yield kind, f"{list(needed)}" + (f", missing {missing}" if missing else ""), names


def manifest_digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a manifest's content, its own entry "sha256" left out; spacing does not count."""
    content = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_digest(data: bytes) -> bytes:
    """Return the bytes of a manifest.json whose content agrees with its own SHA-256; else BundleError."""
    fields = _load(data)
    if not isinstance(fields, dict) or "sha256" not in fields:
        raise BundleError(f"{MANIFEST}: expected a JSON object with its own sha256; {_REMEDY}")
    if fields["sha256"] != manifest_digest(fields):
        raise BundleError(
            f"{MANIFEST}: was altered, its content has another SHA-256 than it states; "
            f"{_REMEDY} (to change thresholds, pass them to Predictor)"
        )
    return data


def _load(data: bytes) -> Any:
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST}: not valid JSON: {why_no_json(error)}; {_REMEDY}") from error


def parse_manifest(data: bytes) -> Manifest:
    """Parse and check the bytes of a manifest.json; raises BundleError naming the field at fault."""
    return Manifest.from_dict(_load(data))
