"""Attention: MGCA with and without its map, picture over text, self, heads of 96, bias, neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.bench import (
    HEADS,
    OURS,
    PATCHES,
    TEXT,
    WIDTH,
    Bench,
    Form,
    candidates,
    compiled,
    draw,
    grid,
    size,
)
from kernels import attention

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
TILES = grid((16, 32, 64, 128), (32, 64, 128), stages=(2, 3))
WITH_MAP = "attention with map, mgca"


def _sdpa(backend: SDPBackend, heads: int, mask: Tensor | None = None, bias: Tensor | None = None) -> Form:
    """Torch's own, with a mask or a bias."""
    keep = None if bias is None else bias[None]
    if mask is not None:
        keep = (mask[:, None] if mask.dim() == 3 else mask[:, None, None]) != 0

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)

    return run


def _alone(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return attention.attention_ref(query, key, value, **options)[0]


def _with_product(form: Form, heads: int) -> Form:
    """The map as one product over the columns of all heads, beside the attention of `form`."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        scale = (query.shape[-1] // heads) ** -0.5 / heads
        return form(query, key, value), (query @ key.transpose(1, 2)).float() * scale

    return run


def _schedule(heads: int, mask: Tensor | None, bias: Tensor | None, guided: bool, tiles: Any) -> Form:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
        kernel = attention._attention_kernel
        outputs = attention.launch(kernel, query, key, value, heads, mask, guided, tiles, bias)
        return outputs if guided else outputs[0]

    return run


def benches(device: str = "cuda", batch: int = 64, small: bool = False) -> Iterator[Bench]:
    """Seven cases."""
    patches, text, width, heads, wide = (17, 5, 64, 2, 2) if small else (PATCHES, TEXT, WIDTH, HEADS, 8)
    valid = torch.arange(1, batch + 1, device=device).clamp(max=text)[:, None]
    mask = (torch.arange(text, device=device)[None] < valid).long()
    neighbours = torch.rand(batch, patches - 1, patches - 1, device=device).argsort(-1) < patches // 16
    bias = draw(device, torch.bfloat16, heads, patches, patches)
    for name, n, m, h, keep, added in (
        ("mgca", text, patches, heads, None, None),
        ("picture over text", patches, text, heads, mask, None),
        ("self", patches, patches, heads, None, None),
        ("self, heads of 96", patches, patches, wide, None, None),
        ("self, bias", patches, patches, heads, None, bias),
        ("neighbours, heads of 192", patches - 1, patches - 1, wide // 2, neighbours, None),
    ):
        tensors = tuple(draw(device, torch.bfloat16, batch, length, width) for length in (n, m, m))
        yield _plain(name, tensors, h, keep, added)
        if name == "mgca":
            yield _guided(tensors, h)


def _facts(tensors: tuple[Tensor, ...], heads: int) -> dict[str, Any]:
    query, key, _ = tensors
    batch, n, width = query.shape
    m = key.shape[1]
    offered = candidates(attention.schedules(n, m, width // heads, query.dtype), TILES)
    shape = {"batch": batch, "queries": n, "keys": m, "heads": heads, "width": width}
    return {"inputs": tensors, "shape": shape, "candidates": offered}


def _plain(
    name: str, tensors: tuple[Tensor, ...], heads: int, mask: Tensor | None, bias: Tensor | None
) -> Bench:
    query, key, _ = tensors
    options: dict[str, Any] = {"heads": heads, "mask": mask, "bias": bias}
    return Bench(
        name=f"attention, {name}",
        reference=partial(_alone, **options),
        forms={
            OURS: partial(attention.attention, **options),
            **{name: _sdpa(backend, heads, mask, bias) for name, backend in BACKENDS.items()},
        },
        bytes=size(*tensors, query, *(x for x in (mask, bias) if x is not None)),
        flops=4 * query.numel() * key.shape[1],
        schedule=partial(_schedule, heads, mask, bias, False),
        **_facts(tensors, heads),
    )


def _guided(tensors: tuple[Tensor, ...], heads: int) -> Bench:
    query, key, _ = tensors
    published = partial(attention.attention_ref, heads=heads)
    guide = 4 * query.shape[0] * query.shape[1] * key.shape[1]
    return Bench(
        name=WITH_MAP,
        reference=published,
        forms={
            OURS: partial(attention.guided_attention, heads=heads),
            "published": published,
            "published, torch.compile": compiled(published),
            **{f"{name} + product": _with_product(_sdpa(b, heads), heads) for name, b in BACKENDS.items()},
        },
        bytes=size(*tensors) + size(query) + guide,
        flops=6 * query.numel() * key.shape[1],
        schedule=partial(_schedule, heads, None, None, True),
        **_facts(tensors, heads),
    )
