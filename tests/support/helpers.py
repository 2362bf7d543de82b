"""What several test modules draw and do; `pythonpath` of pytest's settings makes it importable."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def draw_text(batch, tokens, seed=0, vocabulary=2000):
    """Drawn ids and masks [batch, tokens] of captions of different lengths."""
    return _text(np.random.default_rng(seed), batch, tokens, vocabulary)


def draw_feeds(batch, tokens, seed=0, size=256, vocabulary=2000):
    """Drawn inputs by name: normalised images [batch, 3, size, size], ids and masks [batch, tokens]."""
    random = np.random.default_rng(seed)
    low = random.standard_normal((batch, 3, 16, 16), dtype=np.float32)
    image = low.repeat(size // 16, 2).repeat(size // 16, 3)
    return {"image": image, **_text(random, batch, tokens, vocabulary)}


def _text(random, batch, tokens, vocabulary):
    mask = (np.arange(tokens)[None] < random.integers(1, tokens + 1, batch)[:, None]).astype(np.int64)
    return {"input_ids": random.integers(1, vocabulary, (batch, tokens)) * mask, "attention_mask": mask}


def cpu_seconds(work):
    """CPU-seconds of this thread in `work()`, whatever else the machine does and the other tests have left.

    A collection of all tests' objects, or the first touch of fresh memory, falls on whoever runs then. So
    there is no collection meanwhile, and work that seems slow is tried twice more: what is slow stays slow.
    """
    gc.disable()
    try:
        least = _cpu_seconds(work)
        return least if least < 0.5 else min(least, _cpu_seconds(work), _cpu_seconds(work))
    finally:
        gc.enable()


def _cpu_seconds(work):
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def in_threads(work, count):
    """Run `work()` in so many threads at once and wait for all; the first exception of one is raised."""
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work) for _ in range(count)]:
            future.result()


def differing(run, cases, threads, turns=1):
    """Outputs, by name, that differ from a serial run's when several threads run all cases at once."""
    serial = [run(case) for case in cases]
    wrong = []

    def work():
        for _ in range(turns):
            for case, expected in zip(cases, serial, strict=True):
                outputs = run(case)
                wrong.extend(name for name in expected if not np.array_equal(outputs[name], expected[name]))

    in_threads(work, threads)
    return wrong
