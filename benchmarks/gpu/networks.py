"""The whole networks, base size, drawn weights: the published form beside ours, in one run.

Ours is the inference network of the export with its Triton kernels in one CUDA graph a shape. Inputs are
normalised pictures and token ids on the device; a row's FLOP are those of models.md after the rewrites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import capture, time_ms
from benchmarks.published import Published
from dgm4.seeded import seeded_model
from engine.network.model import InferenceModel, Output
from engine.network.precision import to_precision
from export.inference import rewrite

BATCHES = (1, 8, 64, 256)
TOKENS = (24, 50)
# GFLOP a pair at base size after the exact rewrites, at 24 and 50 tokens.
GFLOP = {"hammer": (56.1, 61.3), "asap": (57.5, 62.7), "cals": (79.0, 84.2)}
LARGEST_PUBLISHED = 64  # CALS holds 201 MB a picture in each of several tensors

Inputs = tuple[Tensor, Tensor, Tensor]
Answers = tuple[Tensor | None, ...]  # an Output, of the trained network or of ours


@dataclass(frozen=True)
class Variant:
    """A way to run a network; `build` gives a callable on the device."""

    name: str
    build: Callable[[str], Callable[..., Answers]]
    graphed: bool


def inputs(batch: int, tokens: int, device: str = "cuda") -> Inputs:
    """Random pictures and ids; every row is full, the worst case."""
    generator = torch.Generator(device).manual_seed(batch + tokens)
    image = torch.randn(batch, 3, 256, 256, device=device, generator=generator)
    ids = torch.randint(1000, 30000, (batch, tokens), device=device, generator=generator)
    return image, ids, torch.ones_like(ids)


def published(dtype: torch.dtype, compiled: bool = False) -> Callable[[str], Callable[..., Answers]]:
    """The published form, cast whole as its users do."""

    def build(name: str) -> Callable[..., Answers]:
        model = Published(seeded_model(name)).to("cuda", dtype)
        run = torch.compile(model, mode="max-autotune") if compiled else model
        return lambda image, ids, mask: run(image.to(dtype), ids, mask)

    return build


def ours(dtype: torch.dtype) -> Callable[[str], InferenceModel]:
    """The rewritten network with its float32 islands."""
    return lambda name: to_precision(rewrite(seeded_model(name)), dtype).to("cuda")


VARIANTS = (
    Variant("published, eager float32", published(torch.float32), False),
    Variant("published, eager bf16", published(torch.bfloat16), False),
    Variant("ours, bf16", ours(torch.bfloat16), True),
    Variant("ours, fp16", ours(torch.float16), True),
    Variant("published, torch.compile bf16", published(torch.bfloat16, compiled=True), False),
)


def distance(found: Answers, exact: Answers) -> dict[str, float]:
    """RMS of the difference over RMS of the float32 answer, by output."""
    pairs = zip(Output._fields, found, exact, strict=True)
    return {
        k: float((x.float() - y).norm() / y.norm()) for k, x, y in pairs if x is not None and y is not None
    }


def measure(variant: Variant, name: str, rate: float) -> list[dict[str, Any]]:
    """Rows of `variant`: its error, then every shape."""
    return list(_rows(variant, name, rate))


def _rows(variant: Variant, name: str, rate: float) -> Iterator[dict[str, Any]]:
    """A row for every shape: times, throughput, peak memory, share of the matrix rate; first the error."""
    with torch.inference_mode():
        run = variant.build(name)
        exact = ours(torch.float32)(name)
        errors = distance(run(*inputs(2, 24)), exact(*inputs(2, 24)))
        del exact
        yield {"network": name, "variant": variant.name, "error": errors}
        for batch in BATCHES:
            if name == "cals" and variant.name.startswith("published") and batch > LARGEST_PUBLISHED:
                continue
            for tokens, gflop in zip(TOKENS, GFLOP[name], strict=True):
                given = inputs(batch, tokens)
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                call: Callable[[], Any] = partial(run, *given)
                call = capture(call) if variant.graphed else call
                times = time_ms(call, cold=False)
                second = batch / times["p50_ms"] * 1e3
                yield {
                    "network": name,
                    "variant": variant.name,
                    "batch": batch,
                    "tokens": tokens,
                    **times,
                    "pairs_s": second,
                    "tflop_s": second * gflop / 1e3,
                    "share": second * gflop / 1e3 / rate,
                    "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
                }
