"""README.md of a model repository: its models, how a server is started, what goes in and comes out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from engine.manifest import Manifest
from engine.registry import network_of
from export.inference_server.config import (
    ENGINE_CACHE,
    ENSEMBLE,
    NETWORK,
    PYTHON,
    ServerOptions,
    part_names,
    preferred_batches,
)

_HEAD = """# Model repository for NVIDIA Triton Inference Server

{models}

```sh
ORT_DISABLE_TELEMETRY=1 tritonserver --model-repository=/path/to/this/directory
python client.py {first} photo.jpg "Caption of the photo" --url localhost:8000
```

{note}
The server answers requests {alike}together: {preferred} at once, and whatever has arrived after
{delay_us} microseconds otherwise. {queue_size} may wait; the next is refused ("Exceeds maximum queue size").
"""

_PAIR = """
## What a client sends

`client.py` shows it, and needs `tritonclient[http]` alone.

- `image`, BYTES [batch, 1]: the file of a picture (JPEG, PNG, WebP, BMP, GIF), as it is.
- `caption`, BYTES [batch, 1]: the caption in UTF-8.

Either may be left out, and is then judged as absent; an empty caption is a caption. Send one pair a request,
a batch of 1: the server makes batches of requests, and a pair that fails is an error of its whole request.

## What comes back

- `score` FP32 [batch, 1]: how sure the network is that the pair is manipulated, 0 to 1.
- `types` FP32 [batch, 4]: scores of {types}.
- `box` FP32 [batch, 4]: left, top, right, bottom of a manipulated face in pixels; read it where a face type
  is detected.
- `words` INT32 [batch, words, 2]: begin and end of each word that was read, in characters (code points) of
  the caption.
- `word_scores` FP32 [batch, words]: score of each word.
- `prediction` BYTES [batch, 1]: the whole answer as JSON, with the verdict, thresholds and warnings;
  `Prediction.from_json` of the package `dgm4` reads it.

A number of -1 stands for no answer: a pair without caption or image has no score, a picture may have no box.
"""

_NETWORK = """So pad captions to a few lengths, as `client.py` does to multiples of 16.

## What a client sends

`client.py` does all of this with the package `dgm4` (no extras) and `tritonclient[http]`. In other languages:

- `image`, FP32 [batch, 3, {spec.image_size}, {spec.image_size}]: the image upright (EXIF orientation
  applied), on white where it is transparent, RGB, resized to {spec.image_size} x {spec.image_size} without
  keeping its aspect, bicubic with antialiasing as Pillow does it, rows before columns; then
  (pixel / 255 - mean) / std with mean {mean} and std {std}, channels first.
- `input_ids`, INT64 [batch, tokens]: the caption in lower case, without the characters `,.'!?"()*#:;~`, with
  `-` and `/` as spaces, its first {spec.max_words} words; by `tokenizer.json` without special tokens; {cls}
  in front, nothing behind; {spec.min_tokens} to {spec.max_tokens} tokens, padded with 0.
- `attention_mask`, INT64 [batch, tokens]: 1 for a token, 0 for padding.

## What comes back

- `logits_real_fake` [batch, 2]: softmax; the second is the probability that the pair is manipulated.
- `logits_multicls` [batch, 4]: sigmoid each; {types}.
- `box` [batch, 4]: centre x, centre y, width, height in shares of the image; means something where a face
  type is detected.
- `logits_tok` [batch, tokens - 1, 2]: of every token after {cls}; softmax, the second is manipulated. Drop
  the rows of padding.
- `attention_map` [batch, tokens, patches + 1]: of ASAP alone; sigmoid, without the first column, averaged
  over the tokens after {cls}.

Thresholds, types and the record of every check of the export are in `<model>/bundle.json`. Where that has a
`score_calibration`, divide logits by its `temperatures` before softmax and sigmoid.
"""

_PACKAGE = """\
The server's Python needs the package `dgm4` (3.11 or newer; the containers have 3.12 from 24.12 on): install
it in the image, `pip install "dgm4[{extra}]"`, or in a folder, `pip install --target /opt/dgm4 ...`, that is
mounted into the container and named by `PYTHONPATH`. Pictures reach it through shared memory: give a
container `--shm-size=1g` or more.
"""


_PLAN = """`model.plan` runs on the kind of GPU and with the TensorRT version that built it (`engines` in
`bundle.json`): take a server of that version. One that is `version_compatible` there runs on
later releases of its major version, with `--backend-config=tensorrt,version-compatible=true`.
"""
_GRAPH = """The graph is of opset 20 and IR version 10: take a server with ONNX Runtime 1.18 or newer.
"""
_NO_VNNI = """\
On an x86 CPU without VNNI the server's ONNX Runtime adds int8 products in 16 bits, which saturate: answers
are wrong without a word, and no setting of the server changes that. Serve such a bundle `--with python`.
"""
_ACCELERATED = f"""ONNX Runtime builds TensorRT engines when the server first starts, and keeps them in
`{ENGINE_CACHE}`: mount a volume there.
"""


def write_readme(manifests: Mapping[str, Manifest], options: ServerOptions) -> str:
    """The text for the models of a repository by their names."""
    first, manifest = next(iter(manifests.items()))
    spec = manifest.preprocess
    text = _HEAD + (_NETWORK if options.form == NETWORK else _PAIR)
    return text.format(
        models="\n".join(_model(name, m, options) for name, m in manifests.items()),
        first=first,
        note=_serving_note(manifests.values(), options),
        alike="" if options.form == PYTHON else "of the same shape ",
        preferred=" or ".join(map(str, preferred_batches(manifest, options))),
        delay_us=options.queue_delay_us,
        queue_size=options.queue_size,
        spec=spec,
        cls=network_of(manifest.model.config).tokenizer.cls,
        mean=", ".join(map(str, spec.mean)),
        std=", ".join(map(str, spec.std)),
        types=", ".join(manifest.types),
    )


def _model(name: str, manifest: Manifest, options: ServerOptions) -> str:
    info, spec = manifest.model, manifest.preprocess
    text = (
        f"- `{name}`: {info.name} {info.size}, {manifest.precision}, up to {manifest.limits.max_batch} pairs"
    )
    if options.form == NETWORK:
        return f"{text} of {spec.min_tokens} to {spec.max_tokens} tokens"
    if options.form == ENSEMBLE:
        text += f"; an ensemble of {', '.join(f'`{part}`' for part in part_names(name))}"
    return text if manifest.weights.warning is None else f"{text}. {manifest.weights.warning}"


def _serving_note(manifests: Collection[Manifest], options: ServerOptions) -> str:
    notes = (
        [_PACKAGE.format(extra="gpu" if options.kind == "gpu" else "cpu")] if options.form == PYTHON else []
    )
    if options.form == ENSEMBLE:
        notes.append(_PACKAGE.replace("[{extra}]", ""))
    if options.plan:
        notes.append(_PLAN)
    elif options.form != PYTHON:
        notes.append(_GRAPH)
        if options.kind != "gpu" and any(manifest.precision == "int8" for manifest in manifests):
            notes.append(_NO_VNNI)
    if options.accelerate:
        notes.append(_ACCELERATED)
    return "\n".join(notes)
