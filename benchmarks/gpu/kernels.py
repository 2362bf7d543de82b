"""Every kernel beside torch's ways to the same answer, at the shapes of the base networks.

A contender is timed only when its answer is right: within 2e-2 of float64, RMS over RMS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.timing import capture, time_ms
from kernels import attention, conv_fusion, gaussian_guidance, latent_pool

RIGHT = 2e-2
HEADS, WIDTH, PATCHES, TEXT = 12, 768, 257, 50
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}

Form = Callable[..., Any]


@dataclass(frozen=True)
class Bench:
    """One operator at one shape: `forms` by name, ours first; `bytes` and `flops` are the fewest possible."""

    name: str
    inputs: tuple[Tensor, ...]
    reference: Form
    forms: dict[str, Form]
    bytes: int
    flops: int
    note: str = ""
    shape: dict[str, int] = field(default_factory=dict)


def _draw(device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=device)).to(dtype)


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _sdpa(backend: SDPBackend, heads: int, mask: Tensor | None = None) -> Form:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        keep = None if mask is None else mask[:, None, None] != 0
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)

    return run


def _attention_alone(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    return attention.attention_ref(query, key, value, heads, mask)[0]


def _with_product(form: Form, heads: int) -> Form:
    """The map as one product over the columns of all heads, beside the attention of `form`."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        scale = (query.shape[-1] // heads) ** -0.5 / heads
        return form(query, key, value), (query @ key.transpose(1, 2)).float() * scale

    return run


def attention_benches(device: str, dtype: torch.dtype, batch: int, small: bool) -> Iterator[Bench]:
    """MGCA's attention, with and without its map; picture over text; self-attention; heads of 96."""
    patches, text, width = (17, 5, 64) if small else (PATCHES, TEXT, WIDTH)
    heads = 2 if small else HEADS
    wide = 2 if small else 8
    mask = (
        torch.arange(text, device=device)[None] < torch.arange(1, batch + 1, device=device)[:, None]
    ).long()
    for name, n, m, h, with_mask in (
        ("mgca", text, patches, heads, False),
        ("picture over text", patches, text, heads, True),
        ("self", patches, patches, heads, False),
        ("self, heads of 96", patches, patches, wide, False),
    ):
        tensors = tuple(_draw(device, dtype, batch, length, width) for length in (n, m, m))
        keep = mask if with_mask else None
        forms: dict[str, Form] = {
            "ours": partial(attention.attention, heads=h, mask=keep),
            **{name: _sdpa(backend, h, keep) for name, backend in BACKENDS.items()},
        }
        moved = _size(*tensors) + _size(tensors[0])
        flops = 4 * batch * n * m * width
        shape = {"batch": batch, "queries": n, "keys": m, "heads": h, "width": width}
        exact = partial(_attention_alone, heads=h, mask=keep)
        yield Bench(f"attention, {name}", tensors, exact, forms, moved, flops, shape=shape)
        if name != "mgca":
            continue
        published = partial(attention.attention_ref, heads=h)
        forms = {
            "ours": partial(attention.guided_attention, heads=h),
            "published": published,
            "published, torch.compile": torch.compile(published),
            **{f"{name} + product": _with_product(_sdpa(b, h), h) for name, b in BACKENDS.items()},
        }
        guide = 4 * batch * n * m
        yield Bench(
            "attention with map, mgca", tensors, published, forms, moved + guide, 3 * flops // 2, shape=shape
        )


def _published_fusion(image: Tensor, tokens: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """CAFormer's fusion at the picture's resolution, BatchNorm folded."""
    size, grid = image.shape[-1], image.shape[-1] // conv_fusion.STRIDE
    field = tokens[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
    local = F.relu(F.conv2d(image, kernel, bias, padding=2))
    up = F.interpolate(field, size=(size, size), mode="bilinear", align_corners=False) + local
    down = F.interpolate(up, size=(grid, grid), mode="bilinear", align_corners=False)
    return torch.cat([tokens[:, :1], down.flatten(2).transpose(1, 2)], dim=1)


def _placed(kernel: Tensor) -> Tensor:
    """The 5x5 kernel at its four positions in a 6x6 one."""
    return torch.cat([F.pad(kernel, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)])


def _exact_fusion(image: Tensor, tokens: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """At the token grid: the published form would hold 26 GB a tensor in float64 at a batch of 64."""
    return conv_fusion.conv_fusion_ref(image, tokens, _placed(kernel), bias.repeat(conv_fusion.POSITIONS))


def fusion_bench(device: str, dtype: torch.dtype, batch: int, small: bool) -> Bench:
    """CAFormer's fusion."""
    grid, width = (2, 32) if small else (16, WIDTH)
    image = _draw(device, dtype, batch, 3, 16 * grid, 16 * grid)
    tokens = _draw(device, dtype, batch, 1 + grid**2, width)
    kernel, bias = _draw(device, dtype, width, 3, 5, 5, scale=0.1), _draw(device, dtype, width)
    placed, repeated = _placed(kernel), bias.repeat(conv_fusion.POSITIONS)
    read = image.numel() * 6 // 16 * image.element_size()
    return Bench(
        "conv-attention fusion",
        (image, tokens, kernel, bias),
        _exact_fusion,
        {
            "ours": lambda image, tokens, *_: conv_fusion.conv_fusion(image, tokens, placed, repeated),
            "composed": lambda image, tokens, *_: conv_fusion.conv_fusion_ref(
                image, tokens, placed, repeated
            ),
            "published": _published_fusion,
        },
        read + 2 * _size(tokens) + _size(placed),
        2 * batch * grid**2 * 108 * 4 * width,
        shape={"batch": batch, "grid": grid, "width": width},
    )


def guidance_bench(device: str, dtype: torch.dtype, batch: int, small: bool) -> Bench:
    """GLRM's Gaussian and first convolution."""
    size, channels = (32, 4) if small else (256, 64)
    box = torch.rand(batch, 4, device=device)
    weight, bias = _draw(device, dtype, channels, 1, 4, 4), _draw(device, dtype, channels)
    written = batch * channels * (size // 2) ** 2
    return Bench(
        "gaussian guidance",
        (box, weight, bias),
        partial(gaussian_guidance.gaussian_guidance_ref, size=size),
        {
            "ours": partial(gaussian_guidance.gaussian_guidance, size=size),
            "composed": partial(gaussian_guidance.gaussian_guidance_ref, size=size),
        },
        written * weight.element_size(),
        2 * 4 * written,
        shape={"batch": batch, "size": size, "channels": channels},
    )


def pool_bench(device: str, dtype: torch.dtype, batch: int, small: bool) -> Bench:
    """Pooling by the learnt query."""
    patches, heads, width = (9, 2, 32) if small else (PATCHES - 1, HEADS, WIDTH)
    tokens = _draw(device, dtype, batch, patches, width)
    weight, bias = _draw(device, torch.float32, width), _draw(device, torch.float32, width)
    query = _draw(device, torch.float32, heads, width, scale=width**-0.5)
    return Bench(
        "latent pooling",
        (tokens, weight, bias, query),
        latent_pool.latent_pool_ref,
        {
            "ours": latent_pool.latent_pool,
            "composed": lambda *tensors: latent_pool.latent_pool_ref(*(x.float() for x in tensors)),
        },
        _size(tokens) + batch * heads * width * tokens.element_size(),
        4 * batch * patches * heads * width,
        shape={"batch": batch, "patches": patches, "width": width},
    )


def benches(device: str = "cuda", batch: int = 64, small: bool = False) -> Iterator[Bench]:
    """All operators in bf16; `small` shapes serve the test of this file."""
    dtype = torch.bfloat16
    yield from attention_benches(device, dtype, batch, small)
    yield fusion_bench(device, dtype, batch, small)
    yield guidance_bench(device, dtype, batch, small)
    yield pool_bench(device, dtype, batch, small)


def error(bench: Bench, form: Form) -> float:
    """RMS error over RMS of the float64 answer, the worst of the outputs."""
    found, exact = form(*bench.inputs), bench.reference(*(x.double() for x in bench.inputs))
    found, exact = (x if isinstance(x, tuple) else (x,) for x in (found, exact))
    pairs = zip(found, exact, strict=True)
    return max(float((x.double() - y).norm() / y.norm()) for x, y in pairs)


def measure(bench: Bench, bandwidth: float, rate: float) -> dict[str, Any]:
    """Times of all forms that are right; the floor from measured bandwidth (TB/s) and rate (TFLOP/s)."""
    floor = max(bench.bytes / bandwidth / 1e9, bench.flops / rate / 1e9)
    rows = []
    for name, form in bench.forms.items():
        row: dict[str, Any] = {"form": name}
        try:
            row["error"] = error(bench, form)
            if row["error"] <= RIGHT:
                row |= time_ms(capture(partial(form, *bench.inputs)))
        except RuntimeError as failure:  # a backend of torch that does not take this shape
            row["failed"] = str(failure).splitlines()[0][:200]
        rows.append(row)
    return {"name": bench.name, **bench.shape, "floor_ms": floor, "forms": rows}
