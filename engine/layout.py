"""The names of the files in a bundle.

manifest.json       what the bundle is, and the SHA-256 of every other file
manifest.json.sig   an Ed25519 signature of that file, where the bundle was signed
README.md           the model card
tokenizer.json      WordPiece or byte pairs of the captions
model.safetensors   the weights under their released names
model.onnx          the graph; its weights are in model.onnx.data
model.flat.onnx     the graph in standard operators alone
model.fp16.onnx     the graph of a calibrated int8 bundle with float16 around its products
scales.json         scales of calibrated activations
model.*.engine      prebuilt TensorRT engines
"""

from __future__ import annotations

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
CARD = "README.md"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
SCALES = "scales.json"

GRAPH = "model.onnx"
DATA_SUFFIX = ".data"  # of the file beside a graph that holds its weights
GRAPH_DATA = GRAPH + DATA_SUFFIX
FLAT_GRAPH = "model.flat.onnx"  # for runtimes without model-local functions; shares GRAPH_DATA
HALF_GRAPH = "model.fp16.onnx"  # TensorRT builds from it: on a GPU float16 is faster, on a CPU float32

ENGINE_SUFFIX = ".engine"


def engine_name(target: str) -> str:
    """File name of the engine for `target`, as "trt-sm90"."""
    return f"model.{target}{ENGINE_SUFFIX}"
