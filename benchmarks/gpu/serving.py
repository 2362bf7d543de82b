"""A Predictor on this GPU: its stream, warm-up and threads, compared with ONNX Runtime on the CPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from engine import Predictor
from engine.errors import EngineMismatchError
from engine.manifest import Limits
from engine.result import Prediction
from export.options import ExportOptions
from export.pipeline import export_bundle
from export.trt import build as trt

CAPTION = "A man speaks in front of the flag of the new house and smiles at the crowd"
PAIRS, THREADS = 70, 4  # two whole batches of 32 and a part of one
CLOSE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 6e-2, "fp8": 0.25, "int8": 0.25}  # of probabilities
MAX_BATCH, MAX_TOKENS, TOKEN_STEP = 32, 48, 16

Row = dict[str, Any]
Pair = tuple[np.ndarray, str]


def check(
    precision: str, backend: str = "torch", device: str = "cuda", pairs: int | str = PAIRS
) -> Iterator[Row]:
    """Rows of a tiny bundle served by `backend`: its warm-up, then how far its answers are from the CPU's.

    Pairs are asked for one by one, as a batch, as a stream and by threads. Raises RuntimeError if an answer
    is too far off.
    """
    if backend == "tensorrt" and trt.find_builder() is None:
        reasons = "; ".join(f"{info.library}: {info.reason}" for info in trt.describe_builders())
        yield {"missing": reasons}
        return
    with tempfile.TemporaryDirectory() as folder:
        bundles = [_export(Path(folder), name, backend) for name in ("fp32", precision)]
        given = make_pairs(int(pairs))
        with Predictor(bundles[0], backend="ort", device="cpu") as reference:
            expected = reference.predict_batch(given)
        try:
            predictor = Predictor(bundles[1], backend=backend, device=device)
        except EngineMismatchError as error:  # TensorRT-RTX builds for some GPUs alone
            yield {"missing": str(error)}
            return
        with predictor:
            yield {"backend": backend, "precision": precision, **_warm_up(predictor)}
            distances = {
                name: float(np.abs(values - _values(expected)).max())
                for name, values in _ways(predictor, given)
            }
    yield {"distances": distances}
    wrong = [f"{name}: {x:.2g} from the CPU" for name, x in distances.items() if not x <= CLOSE[precision]]
    if wrong:
        raise RuntimeError("; ".join(wrong))


def make_pairs(count: int) -> list[Pair]:
    """Noisy images of many sizes, with captions of one word to all of `CAPTION`."""
    random = np.random.default_rng(0)
    words = CAPTION.split()
    return [
        (
            random.integers(0, 256, (*random.integers(40, 400, 2), 3), dtype=np.uint8),
            " ".join(words[: 1 + i % len(words)]),
        )
        for i in range(count)
    ]


def buckets(limits: Limits) -> list[tuple[int, int]]:
    """Every shape that is captured or compiled by itself: pairs by powers of two, tokens in steps."""
    batches = [1 << i for i in range(limits.max_batch.bit_length())]
    return [(b, n) for b in batches for n in range(TOKEN_STEP, limits.max_tokens + 1, TOKEN_STEP)]


def _export(folder: Path, precision: str, backend: str) -> Path:
    out = folder / precision
    if not out.exists():
        options = ExportOptions(
            out=out,
            model="asap",
            size="tiny",
            precision=precision,
            max_batch=MAX_BATCH,
            max_tokens=MAX_TOKENS,
            engine=backend == "tensorrt",
        )
        export_bundle(options, lambda stage: None)
    return out


def _warm_up(predictor: Predictor) -> Row:
    """Seconds of the warm-up of every bucket, and of one that finds all done."""
    shapes = buckets(predictor.manifest.limits)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        predictor.warm_up(shapes)
        seconds.append(round(time.perf_counter() - start, 3))
    return {"buckets": len(shapes), "first_s": seconds[0], "again_s": seconds[1]}


def _ways(predictor: Predictor, given: Sequence[Pair]) -> Iterator[tuple[str, np.ndarray]]:
    """The values of all pairs by every way to ask for them."""
    yield "one by one", _values([predictor.predict(*pair) for pair in given])
    yield "a batch", _values(predictor.predict_batch(given))
    yield "a stream", _values(list(predictor.stream(iter(given), batch_size=7)))
    with ThreadPoolExecutor(THREADS) as pool:
        yield "threads", _values(list(pool.map(lambda pair: predictor.predict(*pair), given)))


def _values(predictions: Sequence[Prediction]) -> np.ndarray:
    """Scores of the pairs, of their types and of their words' means, [pairs, 6]."""
    return np.array(
        [[p.score, *p.types.values(), np.mean([word.score for word in p.words])] for p in predictions]
    )
