"""The model card of a bundle, README.md, written from its manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.layout import GRAPH
from engine.manifest import Accuracy, EngineEntry, Limits, Manifest, Verification
from engine.registry import TENSORS, network_of
from engine.registry.record import TokenizerSpec
from engine.scores import Rate
from export.bundle.licences import licence_note

_NOTES = {
    "drawn": "> **These weights are not trained** ({source}). The bundle proves the way from network to "
    "engine; its scores mean nothing. Export a trained checkpoint before use.",
    "demo": "> **A demo, not a detector.** Its weights were trained on made images. Its answers say nothing "
    "about real ones. Export a checkpoint of your own before use.",
}
_TASK = (
    "{name} takes a news image and its caption and says whether the pair is manipulated, in which of "
    "four ways ({types}), where the manipulated face is (a box), and which words of the caption were changed."
)
_USE = """It is meant as a help to people who check news images with captions, beside other evidence. It is
not meant to decide alone what is taken down or who is accused. It knows the four manipulations it was
trained for: wholly generated images, other languages than English, other crops and other kinds of faces
are outside what it has seen, and its scores are no probabilities but on pairs like those that they were
calibrated on."""
_RUN = """```python
from engine import Predictor

predictor = Predictor("path/to/this/bundle")
print(predictor.predict("photo.jpg", "Caption of the photo"{box}).to_json())
```"""


def model_card(manifest: Manifest) -> str:
    """Text of README.md (Markdown) for a bundle of format 1.

    Its `files` are not read: the card is itself one of them.
    """
    model, weights = manifest.model, manifest.weights
    network = network_of(model.config)
    name = network.title
    title = f"# {name} ({model.size}, {manifest.precision})"
    types = ", ".join(name.replace("_", " ") for name in manifest.types)
    sections = [
        _NOTES[weights.kind].format(source=weights.source) if weights.kind in _NOTES else "",
        title,
        _TASK.format(name=name, types=types),
        "## Run\n\n" + _RUN.format(box=", box=(120, 40, 220, 160)" if network.box else ""),
        "## Licence\n\n" + licence_note(weights),
        "## Network\n\n" + _network(manifest),
        "## Inputs and outputs\n\n" + _tensors(manifest),
        "## Preprocessing\n\n" + _preprocessing(manifest),
        "## Verification\n\n" + _verification(manifest.verification),
        "## Accuracy\n\n" + _accuracy(manifest.accuracy),
        "## Scores\n\n" + _scores(manifest),
        "## Engines\n\n" + _engines(manifest.engines),
        "## Limits and intended use\n\n" + _limits(manifest.limits) + "\n\n" + _USE,
        "## Made with\n\n" + _versions(manifest.versions),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _network(manifest: Manifest) -> str:
    weights = manifest.weights
    digest = f", SHA-256 `{weights.sha256}`" if weights.sha256 else ""
    head = f"Weights: {weights.source}{digest}. Inner precision: {manifest.precision}."
    if calibration := manifest.calibration:
        head += (
            f" Activations have fixed scales, calibrated ({calibration.method}) on "
            f"{calibration.pairs} pairs of {calibration.source}, drawn with seed {calibration.seed}."
        )
    head += _exceptions(manifest)
    if vocabulary := manifest.vocabulary:
        head += (
            f" Vocabulary: {vocabulary.pieces} {_tokenizer(manifest).pieces} of {vocabulary.source}, SHA-256 "
            f"`{vocabulary.sha256}`."
        )
    config = {
        name: value for name, value in manifest.model.config.to_dict().items() if name not in ("name", "size")
    }
    rows = ((f"`{name}`", value) for name, value in config.items())
    return head + "\n\n" + _table(("field", "value"), rows)


def _tokenizer(manifest: Manifest) -> TokenizerSpec:
    return network_of(manifest.model.config).tokenizer


def _exceptions(manifest: Manifest) -> str:
    floating, higher = manifest.float32_layers, manifest.kept_layers
    text = f" Modules with float32 parameters: {_code(grouped(floating))}." if floating else ""
    return text + (f" Layers kept a step above the precision: {_code(higher)}." if higher else "")


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def grouped(names: Iterable[str]) -> list[str]:
    """Names of modules, each once, with a star for every number in a list of layers."""
    return list(dict.fromkeys(re.sub(r"(?<=s\.)\d+", "*", name) for name in names))


def _tensors(manifest: Manifest) -> str:
    rows = [
        (side, f"`{tensor.name}`", tensor.dtype, " x ".join(map(_dimension, tensor.shape)))
        for side, tensors in (("input", manifest.inputs), ("output", manifest.outputs))
        for tensor in tensors
    ]
    meanings = [
        f"- `{tensor.name}`: {TENSORS[tensor.name].meaning}."
        for tensor in (*manifest.inputs, *manifest.outputs)
        if TENSORS[tensor.name].meaning
    ]
    return _table(("side", "name", "dtype", "shape"), rows) + "\n\n" + "\n".join(meanings)


def _dimension(size: int | str) -> str:
    return f"({size})" if " " in str(size) else str(size)


def _preprocessing(manifest: Manifest) -> str:
    spec, cls = manifest.preprocess, _tokenizer(manifest).cls
    size = spec.image_size
    return (
        f"The image is made RGB and resized to {size} x {size} pixels ({spec.resample}, antialiased, "
        f"neither cropped nor padded), divided by 255, less the mean {_numbers(spec.mean)}, over the "
        f"deviation {_numbers(spec.std)}. The caption is lower-cased and freed of punctuation, cut to its "
        f"first {spec.max_words} words and split by `tokenizer.json`; the ids are {cls} and the words, "
        f"nothing after them, at most {spec.max_tokens} tokens. Shorter captions have id 0 and attention "
        f"mask 0 at the end, up to the longest of the batch and to {spec.min_tokens} tokens at least."
    )


def _verification(stages: Sequence[Verification]) -> str:
    if not stages:
        return "No stage was verified."
    rows = [
        (stage.stage, stage.against, *(f"{x:.3g}" for x in (stage.max, stage.rms, stage.tolerance)))
        for stage in stages
    ]
    return _table(("stage", "against", "max", "rms", "tolerance"), rows) + (
        "\n\nLargest and root-mean-square absolute difference of the outputs on the same inputs."
    )


def _accuracy(records: Sequence[Accuracy]) -> str:
    if not records:
        return "Not measured: `dgm4 evaluate` on annotated pairs does it."
    parts = []
    for record in records:
        sides = {"this bundle": record.metrics, "float32 network": record.reference}
        sides = {title: metrics for title, metrics in sides.items() if metrics}
        names = record.metrics or record.reference
        rows = [(name, *(_percent(metrics.get(name)) for metrics in sides.values())) for name in names]
        head = f"{record.source}, {record.pairs} pairs, in percent."
        parts.append(head + "\n\n" + _table(("metric", *sides), rows))
    return "\n\n".join(parts)


def _scores(manifest: Manifest) -> str:
    """Temperatures, thresholds, and the false alarms that were measured at them."""
    calibration = manifest.score_calibration
    thresholds, temperatures = vars(manifest.thresholds), vars(manifest.temperatures)
    rows = [(f"`{name}`", f"{x:.4g}", f"{temperatures[name]:.4g}") for name, x in thresholds.items()]
    heads = ("decision", "threshold", "temperature")
    if calibration is None:
        note = "Not calibrated: `dgm4 calibrate` fits temperatures and thresholds to annotated pairs."
        return note + "\n\n" + _table(heads, rows)
    reached = (_rate(calibration.reached.get(name)) for name in thresholds)
    body = [(*row, rate) for row, rate in zip(rows, reached, strict=True)]
    text = score_calibration_text(calibration.to_dict())
    note = f"Calibrated {text}. Logits are divided by the temperature before a score is made of them."
    return note + "\n\n" + _table((*heads, "false alarms, percent"), body)


def score_calibration_text(calibration: Mapping[str, Any]) -> str:
    """What the scores were calibrated on, and for how many false alarms of the verdict."""
    verdict = calibration["reached"]["manipulated"]
    low, value, high = (100 * verdict[name] for name in ("low", "value", "high"))
    return (
        f"on {calibration['fitted']} pairs of {calibration['source']}, split {calibration['split']}, for "
        f"{100 * calibration['false_alarms']:g} % false alarms; {calibration['checked']} other pairs gave "
        f"{value:.2f} % ({low:.2f} to {high:.2f} at {100 * calibration['level']:g} %)"
    )


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return "not calibrated"
    return f"{100 * rate.value:.2f} ({100 * rate.low:.2f} to {100 * rate.high:.2f}) of {rate.count}"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f}"


def _engines(engines: Sequence[EngineEntry]) -> str:
    if not engines:
        return f"No engine is in this bundle; `dgm4 rebuild` builds one of `{GRAPH}`, where that is there."
    rows = [
        (
            f"`{engine.file}`",
            ", ".join((f"{engine.library} {engine.version}", *engine.plugins)),
            ", ".join(engine.compute_capabilities),
            largest_text(engine.to_dict()["profiles"]),
        )
        for engine in engines
    ]
    return _table(("file", "library", "compute capabilities", "most pairs x tokens"), rows) + (
        "\n\nAn engine is native code for these GPUs and this library version: load only what you trust."
    )


def largest_text(profiles: Sequence[Mapping[str, Any]]) -> str:
    """The most pairs and tokens that each profile of an engine takes: "1x32, 8x64"."""
    largest = [profile["input_ids"]["max"] for profile in profiles if "input_ids" in profile]
    return ", ".join(f"{batch}x{tokens}" for batch, tokens in largest)


def _limits(limits: Limits) -> str:
    return f"One call takes at most {limits.max_batch} pairs of at most {limits.max_tokens} tokens."


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")
