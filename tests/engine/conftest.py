"""A small detector whose outputs can be computed by hand, its tokenizer, and bundles made of them."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from engine import Predictor
from engine.manifest import manifest_digest
from engine.registry.config import TYPES

WORDS = ["obama", "s", "the", "president", "speaks", "in", "person", "well", "known", "poison", "bottom"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Its token makes the fake network answer NaN.
POISON_ID = len(SPECIAL) + 2 * len(LETTERS) + WORDS.index("poison")


def build_tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = SPECIAL + list(LETTERS) + [f"##{c}" for c in LETTERS] + WORDS + list("[]<>@&%$+=_|\\^`{}")
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    # A tokenizer.json often carries these; the engine must not be misled by them.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=12)
    return tokenizer


def build_network():
    """Outputs by hand: see `expected_outputs`."""
    constants = {
        "spatial": np.array([2, 3], np.int64),
        "one_axis": np.array([1], np.int64),
        "last_axis": np.array([2], np.int64),
        "one": np.array([1], np.int64),
        "end": np.array([2**31], np.int64),
        "poison": np.array([[POISON_ID]], np.int64),
        "nan": np.array([[np.nan]], np.float32),
        "milli": np.array([[0.001]], np.float32),
        "tenth": np.array([[[0.1]]], np.float32),
        "ramp": np.linspace(-2, 2, 257, dtype=np.float32)[None, None],
    }
    n = helper.make_node
    nodes = [
        n("ReduceMean", ["image", "spatial"], ["channels"], keepdims=0),
        n("ReduceMean", ["channels", "one_axis"], ["mean"], keepdims=1),
        n("Concat", ["channels", "mean"], ["logits_multicls"], axis=1),
        n("Sigmoid", ["logits_multicls"], ["box"]),
        n("Mul", ["input_ids", "attention_mask"], ["masked"]),
        n("Cast", ["masked"], ["ids"], to=TensorProto.FLOAT),
        n("ReduceSum", ["ids", "one_axis"], ["sum"], keepdims=1),
        n("Mul", ["sum", "milli"], ["text"]),
        n("Equal", ["masked", "poison"], ["hit"]),
        n("Cast", ["hit"], ["hit_number"], to=TensorProto.FLOAT),
        n("ReduceMax", ["hit_number", "one_axis"], ["hit_max"], keepdims=1),
        n("Cast", ["hit_max"], ["poisoned"], to=TensorProto.BOOL),
        n("Where", ["poisoned", "nan", "text"], ["manipulated"]),
        n("Concat", ["mean", "manipulated"], ["logits_real_fake"], axis=1),
        n("Slice", ["ids", "one", "end", "one"], ["words"]),
        n("Unsqueeze", ["words", "last_axis"], ["column"]),
        n("Mul", ["column", "tenth"], ["fake"]),
        n("Neg", ["fake"], ["real"]),
        n("Concat", ["real", "fake"], ["logits_tok"], axis=2),
        n("Unsqueeze", ["ids", "last_axis"], ["rows"]),
        n("Mul", ["rows", "tenth"], ["scaled_rows"]),
        n("Add", ["scaled_rows", "ramp"], ["attention_map"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "fake_detector",
        [
            value("image", TensorProto.FLOAT, ["batch", 3, 256, 256]),
            value("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            value("attention_mask", TensorProto.INT64, ["batch", "tokens"]),
        ],
        [
            value("logits_real_fake", TensorProto.FLOAT, ["batch", 2]),
            value("logits_multicls", TensorProto.FLOAT, ["batch", 4]),
            value("box", TensorProto.FLOAT, ["batch", 4]),
            value("logits_tok", TensorProto.FLOAT, ["batch", "words", 2]),
            value("attention_map", TensorProto.FLOAT, ["batch", "tokens", 257]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


CONFIG = {
    "name": "asap",
    "size": "tiny",
    "width": 128,
    "heads": 2,
    "vision_depth": 4,
    "text_depth": 4,
    "fusion_start": 2,
    "mlp_ratio": 4,
    "image_size": 256,
    "patch_size": 16,
    "vocabulary": 2048,
    "positions": 512,
    "projection": 64,
    "dropout": 0.1,
}


def base_manifest():
    tensor = lambda name, dtype, *shape: {"name": name, "dtype": dtype, "shape": list(shape)}  # noqa: E731
    return {
        "format": "dgm4-bundle",
        "format_version": 1,
        "created": "2026-01-01T00:00:00Z",
        "model": {"name": "asap", "size": "tiny", "config": CONFIG},
        "weights": {
            "kind": "trained",
            "source": "checkpoint fake.pth",
            "sha256": "0" * 64,
            "licence": "not stated",
        },
        "precision": "fp32",
        "preprocess": {
            "image_size": 256,
            "patch_size": 16,
            "resample": "bicubic",
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "max_words": 50,
            "max_tokens": 127,
            "min_tokens": 2,
        },
        "inputs": [
            tensor("image", "float32", "batch", 3, 256, 256),
            tensor("input_ids", "int64", "batch", "tokens"),
            tensor("attention_mask", "int64", "batch", "tokens"),
        ],
        "outputs": [
            tensor("logits_real_fake", "float32", "batch", 2),
            tensor("logits_multicls", "float32", "batch", 4),
            tensor("box", "float32", "batch", 4),
            tensor("logits_tok", "float32", "batch", "tokens - 1", 2),
            tensor("attention_map", "float32", "batch", "tokens", 257),
        ],
        "limits": {"max_batch": 4, "max_tokens": 127},
        "types": ["face_swap", "face_attribute", "text_swap", "text_attribute"],
        "thresholds": dict.fromkeys(("manipulated", *TYPES, "words"), 0.5),
        "files": {},
        "engines": [],
        "versions": {"dgm4": "0.1.0", "python": "3.11"},
        "verification": [{"stage": "onnx", "against": "torch", "max": 1e-6, "rms": 1e-7, "tolerance": 2e-5}],
        "accuracy": [{"source": "set, split test", "pairs": 8, "metrics": {"AUC": 0.9}, "reference": {}}],
    }


def _write_manifest(directory: Path, manifest: dict) -> None:
    for path in sorted(directory.iterdir()):
        if path.name != "manifest.json":
            data = path.read_bytes()
            manifest["files"][path.name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (directory / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))


@pytest.fixture(scope="session")
def manifest_template():
    """A function that returns a fresh manifest without files."""
    return lambda: copy.deepcopy(base_manifest())


@pytest.fixture(scope="session")
def write_manifest():
    """A function (directory, manifest) that enters every file of the directory and writes manifest.json."""
    return _write_manifest


@pytest.fixture(scope="session")
def network():
    return build_network()


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory, network):
    """A bundle that nobody may change."""
    directory = tmp_path_factory.mktemp("bundle")
    onnx.save(network, directory / "model.onnx")
    build_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "README.md").write_text("# A model card\n")
    _write_manifest(directory, base_manifest())
    return directory


@pytest.fixture
def bundle_copy(bundle_dir, tmp_path):
    """A bundle that the test may damage."""
    return Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def predictor(bundle_dir):
    with Predictor(bundle_dir, threads=1) as made:
        yield made


@pytest.fixture(scope="session")
def special_ids():
    """The ids that no text of a user may become."""
    return {SPECIAL.index(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}


@pytest.fixture(scope="session")
def photo():
    """A smooth, noisy RGB picture of 64 x 48 pixels."""
    rows, columns = np.mgrid[0:48, 0:64]
    noise = np.random.default_rng(7).integers(0, 40, (48, 64, 3))
    base = np.stack([rows * 4, columns * 3, rows + columns], axis=-1)
    return Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def encode():
    """A function (image, format, **options) -> the bytes of a file."""

    def encode_image(image: Image.Image, kind: str, **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode_image


@pytest.fixture(scope="session")
def expected_outputs():
    """The fake network in float64: (pixels [3, H, W], ids) -> outputs of one item."""

    def compute(pixels: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
        channels = pixels.astype(np.float64).mean(axis=(1, 2))
        multicls = np.append(channels, channels.mean())
        words = ids[1:].astype(np.float64) * 0.1
        return {
            "logits_real_fake": np.array([channels.mean(), ids.sum() * 0.001]),
            "logits_multicls": multicls,
            "box": 1 / (1 + np.exp(-multicls)),
            "logits_tok": np.stack([-words, words], axis=-1),
            "attention_map": ids[:, None] * 0.1 + np.linspace(-2, 2, 257)[None],
        }

    return compute
