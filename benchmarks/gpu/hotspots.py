"""Where a network's time goes: its kernels by device time, as torch's profiler sees them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.networks import VARIANTS, inputs
from dgm4.seeded import seeded_model

RUNS, LARGEST = 3, 25


def table(events: Any, device: DeviceType, runs: int) -> list[dict[str, Any]]:
    """The `LARGEST` kernels: microseconds and launches of a run, and the share of the whole."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type == device:
            spent = event.self_cpu_time_total if device == DeviceType.CPU else event.time_range.elapsed_us()
            times[event.name].append(spent)
    total = sum(map(sum, times.values())) or 1.0
    rows = [
        {"kernel": name[:160], "us": sum(us) / runs, "launches": len(us) / runs, "share": sum(us) / total}
        for name, us in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]
    return [{"total_us": total / runs, "kernels": len(times)}, *rows[:LARGEST]]


def measure(
    name: str,
    variant: str,
    batch: int | str = 64,
    tokens: int | str = 50,
    device: str = "cuda",
    size: str = "base",
) -> Iterator[dict[str, Any]]:
    """A row with the total of a run, then a row a kernel."""
    build, _ = VARIANTS[variant]
    kind, activity = DeviceType.CUDA, ProfilerActivity.CUDA
    if device == "cpu":
        kind, activity = DeviceType.CPU, ProfilerActivity.CPU
    model = seeded_model(name, size).to(device)
    given = inputs(model.config, int(batch), int(tokens), device)
    run = build(model)
    with torch.inference_mode():
        for _ in range(RUNS):
            run(**given)
        with profile(activities=list({ProfilerActivity.CPU, activity})) as profiler:
            for _ in range(RUNS):
                run(**given)
            if device == "cuda":
                torch.cuda.synchronize()
    yield from table(profiler.events(), kind, RUNS)
