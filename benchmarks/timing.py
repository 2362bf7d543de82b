"""Times of device work by CUDA events; on a CPU, where only tests run this, by the clock."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
LARGEST_RUNS = 200
CACHE = 60 << 20  # bytes of L2 of an H200
MOST_SETS = 32

Times = dict[str, float]


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of `values` lie."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def capture(run: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of `run`, warmed up on a side stream as torch asks; call it to replay.

    On a CPU: `run` itself.
    """
    if not torch.cuda.is_available():
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(kept: Any = kept) -> Any:  # which holds the outputs: their memory is the graph's
        graph.replay()
        return kept

    return replay


def elapsed_ms(run: Callable[[], Any]) -> float:
    """Time from before to after one call on the device; what was queued before has ended."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def time_ms(run: Callable[[], Any], budget_s: float = 0.3) -> Times:
    """p50 and p95 of single calls, each waited for."""
    for _ in range(WARM_UP):
        elapsed_ms(run)
    times: list[float] = []
    while len(times) < WARM_UP or (sum(times) < 1e3 * budget_s and len(times) < LARGEST_RUNS):
        times.append(elapsed_ms(run))
    return {"p50_ms": statistics.median(times), "p95_ms": quantile(times, 0.95), "runs": len(times)}


def sets_for(inputs: Sequence[Tensor], moved: int) -> list[tuple[Tensor, ...]]:
    """As many copies of `inputs` as move four times the L2 cache, where a run moves `moved` bytes."""
    count = min(max(math.ceil(4 * CACHE / moved), 1), MOST_SETS)
    return [tuple(x.clone() for x in inputs) for _ in range(count if inputs[0].is_cuda else 1)]


def time_rotating(
    run: Callable[..., Any], sets: Sequence[Sequence[Tensor]], budget_s: float = 0.3, graphed: bool = True
) -> Times:
    """Times of one call over inputs that the L2 cache does not hold: one graph calls all `sets` in turn.

    The launch of the graph is shared by its calls. What cannot be captured is timed call by call.
    """

    def all_sets() -> list[Any]:
        return [run(*inputs) for inputs in sets]

    replay: Callable[[], Any] = partial(run, *sets[0])
    calls = 0
    if graphed:
        with contextlib.suppress(RuntimeError):  # it waits for the device, or allocates outside of torch
            replay, calls = capture(all_sets), len(sets)
    times = time_ms(replay, budget_s)
    for name in ("p50_ms", "p95_ms"):
        times[name] /= calls or 1
    return {**times, "calls_a_graph": calls}


def rates(device: str = "cuda", count: int = 1 << 30, side: int = 8192) -> Iterator[tuple[str, float]]:
    """Measured on random data: copy in TB/s, read plus written; host to device; products in TFLOP/s."""
    source = torch.randn(count, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    yield "copy_tb_s", 4 * count / time_ms(lambda: target.copy_(source))["p50_ms"] / 1e9
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    yield "bf16_tflop_s", 2 * side**3 / time_ms(lambda: left @ right)["p50_ms"] / 1e9
    one = torch.ones((), device=device)
    yield "small_graph_us", 1e3 * time_ms(capture(lambda: one + 1))["p50_ms"]
    host = torch.empty(count // 4, dtype=torch.bfloat16, pin_memory=device == "cuda")
    sent = time_ms(lambda: target[: count // 4].copy_(host, non_blocking=True))["p50_ms"]
    yield "host_gb_s", host.nbytes / sent / 1e6
    left8, right8 = (x.to(torch.float8_e4m3fn) for x in (left, right))

    def product() -> Tensor:
        return torch._scaled_mm(left8, right8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    yield "fp8_tflop_s", 2 * side**3 / time_ms(product)["p50_ms"] / 1e9
