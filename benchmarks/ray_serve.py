"""Which batching is quicker on Ray Serve: `python -m benchmarks.ray_serve --out FILE`.

One replica with the engine's Batcher and one with `@serve.batch`, both on the demo, and the whole application
of `engine.serving.ray`. Each answers the same pictures from so many clients at once, in turns, so that the
others idle. Needs the extras `serve` and `ray`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import ResultFile
from benchmarks.scoring import BUNDLE, BUSY_MACHINE, CAPTION, make_list
from engine import Batcher, Predictor

if TYPE_CHECKING:
    import httpx

CLIENTS, TURNS, MOST, WAIT_S = (1, 16), 5, 32, 0.005


class WithBatcher:
    """A replica that answers through the engine's Batcher."""

    def __init__(self) -> None:
        self._batcher = Batcher(Predictor(BUNDLE, thumbnail=0, threads=1), max_batch=MOST)

    async def __call__(self, request: Any) -> dict[str, Any]:
        """Answer a picture, which is the request's body."""
        answer = await self._batcher.predict_async(await request.body(), CAPTION)
        return {"score": answer.score}


class WithServeBatch:
    """A replica whose batches Ray Serve makes; `answer` is wrapped by `@serve.batch` where it is deployed."""

    def __init__(self) -> None:
        self._predictor = Predictor(BUNDLE, thumbnail=0, threads=1)

    async def answer(self, pictures: list[bytes]) -> list[float | None]:
        """Answer the pictures of a batch."""
        pairs = [(picture, CAPTION) for picture in pictures]
        return [x.score for x in await asyncio.to_thread(self._predictor.predict_batch, pairs)]

    async def __call__(self, request: Any) -> dict[str, Any]:
        """Answer a picture, which is the request's body."""
        return {"score": await self.answer(await request.body())}


def deploy(port: int) -> dict[str, str]:
    """Start the three, one replica each; returns the routes by name."""
    from ray import serve

    from engine.serving.ray import Deployment, build

    serve.start(http_options={"port": port})
    batched = serve.batch(max_batch_size=MOST, batch_wait_timeout_s=WAIT_S)(WithServeBatch.answer)
    WithServeBatch.answer = batched  # type: ignore[method-assign]
    options = {"max_ongoing_requests": 2 * MOST, "ray_actor_options": {"num_cpus": 0}}
    apps = {
        "engine.Batcher": serve.deployment(WithBatcher, **options).bind(),
        "@serve.batch": serve.deployment(WithServeBatch, **options).bind(),
        "engine.serving.ray": build(Deployment(bundle=BUNDLE, max_batch=MOST, max_ongoing=2 * MOST)),
    }
    routes = {name: f"/{number}" for number, name in enumerate(apps)}
    for name, app in apps.items():
        serve.run(app, name=routes[name][1:], route_prefix=routes[name])
    routes["engine.serving.ray"] += "/v1/predict"
    return routes


async def load(
    client: httpx.AsyncClient, route: str, pictures: list[bytes], clients: int, requests: int
) -> dict[str, float]:
    """Send so many requests from so many clients at once; pairs a second and median milliseconds."""
    left, times = iter(range(requests)), []
    form = route.endswith("predict")

    async def one() -> None:
        for number in left:
            picture, start = pictures[number % len(pictures)], time.perf_counter()
            given: dict[str, Any] = {"content": picture}
            if form:
                given = {"files": {"image": picture}, "data": {"caption": CAPTION}}
            (await client.post(route, **given)).raise_for_status()
            times.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    seconds = time.perf_counter() - start
    return {"pairs_per_s": requests / seconds, "p50_ms": 1e3 * statistics.median(times)}


async def measure(
    port: int, routes: dict[str, str], pictures: list[bytes], turns: int
) -> list[dict[str, Any]]:
    """Load the routes in turns; medians, and the ratio to the Batcher within each turn."""
    import httpx

    rows = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits) as client:
        for clients in CLIENTS:
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in routes}
            for _ in range(turns):
                for name, route in routes.items():
                    runs[name].append(await load(client, route, pictures, clients, 4 * clients + 8))
            base = [run["pairs_per_s"] for run in runs["engine.Batcher"]]
            for name, done in runs.items():
                ratios = [run["pairs_per_s"] / first for run, first in zip(done, base, strict=True)]
                medians = {key: round(statistics.median(run[key] for run in done), 1) for key in done[0]}
                ratio = round(statistics.median(ratios), 3)
                rows.append({"clients": clients, "variant": name, **medians, "ratio": ratio})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: pairs a second of each variant, and its ratio to the Batcher."""
    lines = []
    for clients in CLIENTS:
        cells = {row["variant"]: row for row in rows if row["clients"] == clients}
        first, *others = cells.values()
        shown = [f"{first['pairs_per_s']:.1f}"]
        shown += [f"{row['pairs_per_s']:.1f} ({row['ratio']:.2f}x)" for row in others]
        lines.append(f"| {clients} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write the data, print it; 1 if it failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray_serve", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--turns", type=int, default=TURNS, help="%(default)s")
    options = parser.parse_args()
    result, rows = ResultFile(options.out), []
    import ray

    os.environ.update(BUSY_MACHINE)
    with socket.socket() as free, tempfile.TemporaryDirectory() as name:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        source = make_list(Path(name) / "list", 1)
        pictures = [path.read_bytes() for path in sorted(source.parent.glob("*.jpg"))]
    with result.case("serve"):
        ray.init("local", include_dashboard=False, object_store_memory=128 * 2**20, log_to_driver=False)
        rows = asyncio.run(measure(port, deploy(port), pictures, options.turns))
    ray.shutdown()
    result.save({"bundle": BUNDLE, "turns": options.turns, "rows": rows})
    sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
