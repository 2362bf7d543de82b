"""The whole networks, base size, drawn weights: the published form beside ours, in one run.

Ours is the inference network with its Triton kernels in one CUDA graph a shape. Inputs are normalised
pictures and token ids on the device, or (`pictures`) the bytes of photographs. A row's FLOP are those of the
network after the exact rewrites, whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.resize import photographs, prepared
from benchmarks.published import Published
from benchmarks.timing import capture, time_ms
from dgm4.model import Detector
from dgm4.seeded import seeded_model
from engine.backends.float32 import full_float32
from engine.network.linear import E4M3
from engine.network.model import Output
from engine.network.precision import fp8_layers, set_precision
from engine.registry import NETWORKS, network_of
from engine.registry.config import NetworkConfig
from export.graph.rewrite import rewrite
from export.quantization.calibrate import calibrate

SHAPES = tuple((batch, tokens) for batch in (1, 8, 64, 256) for tokens in (24, 50))
LARGEST_GFLOP = 22_000  # of a call, 256 pairs of CALS; a larger network has no rows beyond it
LARGEST_PUBLISHED = 64  # of CALS, which holds 201 MB a picture in each of several tensors
JUDGED = {"batch": 16, "tokens": 50}  # inputs of the errors, and of FP8's calibration
PHOTOGRAPH = (480, 640)
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Inputs = dict[str, Tensor]  # by the names that the network's record gives them
Answers = tuple[Tensor | None, ...]  # an Output, of the trained network or of ours
Network = Callable[..., Answers]
Row = dict[str, Any]


def inputs(config: NetworkConfig, batch: int, tokens: int, device: str, seed: int = 0) -> Inputs:
    """Random pictures and ids, and boxes where the network judges them; all rows are full, the worst case."""
    draw: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(seed)}
    side = config.image_size
    image = torch.randn(batch, 3, side, side, **draw)
    ids = torch.randint(0, config.vocabulary, (batch, tokens), **draw)
    given = {"image": image, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, shape in network_of(config).further(config).items():
        given[name] = 0.25 + torch.rand(batch, *map(int, shape), **draw) / 2
    return given


def published(model: Detector, precision: str, mode: str | None = None) -> Network:
    """The published form, cast whole as its users do; `mode` is torch.compile's."""
    dtype = HALVES.get(precision, torch.float32)
    form = Published(model).to(dtype)
    run = torch.compile(form, mode=mode, dynamic=False) if mode else form
    return lambda image, **rest: run(image=image.to(dtype), **rest)


def ours(model: Detector, precision: str, calibrated: bool = False) -> Network:
    """The rewritten network with its float32 islands; FP8 has its scales from 16 pairs, or from each row."""
    device, network = next(model.parameters()).device, rewrite(model)
    scales = None
    if calibrated:
        batch = inputs(model.config, **JUDGED, device=str(device), seed=1)
        scales = calibrate(network, fp8_layers(network), [batch], E4M3)
    return set_precision(network, precision, scales).to(device)


# How a variant is built of a trained network, and whether it is captured.
VARIANTS: dict[str, tuple[Callable[[Detector], Network], bool]] = {
    "published-fp32": (partial(published, precision="fp32"), False),
    "published-bf16": (partial(published, precision="bf16"), False),
    "compile-default-bf16": (partial(published, precision="bf16", mode="default"), False),
    "compile-max-autotune-bf16": (partial(published, precision="bf16", mode="max-autotune"), False),
    "ours-bf16": (partial(ours, precision="bf16"), True),
    "ours-fp16": (partial(ours, precision="fp16"), True),
    "ours-fp8": (partial(ours, precision="fp8", calibrated=True), True),
    "ours-fp8-rows": (partial(ours, precision="fp8"), True),
}


def distance(outputs: Answers, exact: Answers) -> dict[str, float]:
    """RMS of the difference over RMS of the float32 answer, by output; 0 where they are equal."""
    pairs = zip(Output._fields, outputs, exact, strict=True)
    return {
        # Boxes may all be empty.
        k: 0.0 if torch.equal(x.float(), y) else float((x.float() - y).norm() / y.norm())
        for k, x, y in pairs
        if x is not None and y is not None
    }


def _judged(model: Detector, build: Callable[[Detector], Network], device: str) -> tuple[Network, Row]:
    """The built network, and its distance from the trained one in float32 without TF32."""
    given = inputs(model.config, **JUDGED, device=device)
    with full_float32(torch.device(device).type):
        with torch.inference_mode():
            exact = model(**given)
        run = build(model)
        with torch.inference_mode():
            return run, distance(run(**given), exact)


def measure(
    name: str,
    variant: str,
    shapes: Iterable[tuple[int, int]] | str = SHAPES,
    device: str = "cuda",
    size: str = "base",
) -> Iterator[Row]:
    """A row with the error, then a row a shape; `shapes` may be text, "64x50,1x24".

    Shapes that do not fit (`fits`) are left out.
    Raises RuntimeError where a shape failed otherwise than for lack of memory.
    """
    if isinstance(shapes, str):
        shapes = [(int(b), int(n)) for b, n in (shape.split("x") for shape in shapes.split(","))]
    build, graphed = VARIANTS[variant]
    facts = {"network": name, "variant": variant}
    failed: list[str] = []
    model = seeded_model(name, size).to(device)
    config = model.config
    if variant.startswith("compile"):  # whose every shape costs minutes
        run = build(model)
    else:
        run, error = _judged(model, build, device)
        yield {**facts, "error": error}
    del model
    for batch, tokens in shapes:
        if not fits(name, batch, tokens):
            continue
        if name == "cals" and not graphed and batch > LARGEST_PUBLISHED:
            continue
        times = shape_row(run, inputs(config, batch, tokens, device), graphed, name)
        yield {**facts, "batch": batch, "tokens": tokens, **times}
        failed += [f"{batch}x{tokens}: {times['failed']}"] if "failed" in times else []
    if failed:
        raise RuntimeError("; ".join(failed))


def pictures(
    name: str,
    variant: str,
    batches: Iterable[int] = (1, 8, 64),
    device: str = "cuda",
    size: str = "base",
) -> Iterator[Row]:
    """Bytes of photographs to logits in one graph: the bytes on the device, then in pinned memory.

    Raises RuntimeError where one failed otherwise than for lack of memory.
    """
    failed: list[str] = []
    build, _ = VARIANTS[variant]
    dtype = HALVES.get(variant.split("-")[1], torch.bfloat16)
    tokens = 50
    model = seeded_model(name, size).to(device)
    run, config = build(model), model.config
    del model
    for batch in batches:
        pixels = photographs(device, batch, *PHOTOGRAPH)
        resized = prepared(batch, *PHOTOGRAPH, config.image_size, dtype, device)
        given = inputs(config, batch, tokens, device) | {"image": pixels}
        host = pixels.cpu().pin_memory() if device == "cuda" else pixels.clone()

        def from_device(image: Tensor, **rest: Tensor) -> Answers:
            return run(image=resized(image), **rest)  # noqa: B023 - called within the turn

        def from_host(image: Tensor, **rest: Tensor) -> Answers:
            return from_device(image.copy_(host, non_blocking=True), **rest)  # noqa: B023

        for place, form in (("device", from_device), ("pinned memory", from_host)):
            row = {"network": name, "variant": variant, "batch": batch, "tokens": tokens, "from": place}
            row |= shape_row(form, given, True, name)
            yield row
            failed += [f"{batch} from {place}: {row['failed']}"] if "failed" in row else []
    if failed:
        raise RuntimeError("; ".join(failed))


def gflop(name: str, tokens: int) -> float:
    """Of a pair at the network's largest size, after the exact rewrites."""
    return NETWORKS[name].gflop[0 if tokens <= 24 else 1]


def fits(name: str, batch: int, tokens: int) -> bool:
    """Whether a shape has no more work than `LARGEST_GFLOP`, which bounds the time of a part."""
    return batch * gflop(name, tokens) <= LARGEST_GFLOP


@torch.inference_mode()
def shape_row(run: Network, given: Inputs, graphed: bool, name: str) -> Row:
    """Times, throughput and memory at one shape, or why it failed; the graph is freed at the end."""
    on_gpu = given["image"].is_cuda
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        call: Callable[[], Any] = partial(run, **given)
        times = time_ms(capture(call) if graphed else call)
    except torch.OutOfMemoryError as failure:
        return {"too large": str(failure)[:200]}
    except RuntimeError as failure:
        if on_gpu:
            torch.cuda.synchronize()  # a fault leaves the process useless: better to end here
        return {"failed": f"{type(failure).__name__}: {failure}"[:300]}
    batch, tokens = given["input_ids"].shape
    second = batch / times["p50_ms"] * 1e3
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    return {**times, "pairs_s": second, "tflop_s": second * gflop(name, tokens) / 1e3, "peak_gb": peak}
