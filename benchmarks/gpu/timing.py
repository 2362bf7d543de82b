"""Times of device work, and the two rates of a GPU that bound it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3
FLUSHED = 256 << 20  # bytes written between runs, several times the L2 cache
LARGEST_RUNS = 200


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of `values` lie."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def capture(run: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of `run`, warmed up on a side stream as torch asks; call it to replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(kept: Any = kept) -> None:  # which holds the outputs: their memory is the graph's
        graph.replay()

    return replay


def time_ms(run: Callable[[], Any], budget_s: float = 0.3, cold: bool = True) -> dict[str, float]:
    """p50 and p95 of a call's device time, by events; `cold` flushes the L2 cache before each."""
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda") if cold else None
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < WARM_UP or (sum(times) < 1e3 * budget_s and len(times) < LARGEST_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush is not None:
            flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return {"p50_ms": statistics.median(times), "p95_ms": quantile(times, 0.95), "runs": len(times)}


def rates() -> dict[str, float]:
    """Measured copy rate in TB/s (bytes read plus written) and bf16 matrix rate in TFLOP/s, random data."""
    count, side = 1 << 30, 8192
    source = torch.randn(count, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copied = time_ms(lambda: target.copy_(source), cold=False)["p50_ms"]
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    multiplied = time_ms(lambda: left @ right, cold=False)["p50_ms"]
    return {"copy_tb_s": 2 * 2 * count / copied / 1e9, "bf16_tflop_s": 2 * side**3 / multiplied / 1e9}
