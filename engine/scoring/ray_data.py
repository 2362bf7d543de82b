"""Scores shards on a Ray cluster: a data set of shards, mapped by a pool of actors with a Predictor each.

Only the numbers of shards and their counts travel through Ray. An actor reads its pairs and pictures itself,
and writes its own files, so the object store stays empty and nothing has to fit into the driver's memory.
Ray starts an actor anew that was killed, and gives its shard out again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import errors
from engine.errors import BackendError, Dgm4Error, InputError
from engine.packages import require
from engine.scoring.shards import Shard
from engine.scoring.worker import Tally, Work, Worker

_OBJECT_STORE = 128 * 2**20  # bytes, where we start the cluster
_START_S = "120"  # that a cluster of ours may take to start; Ray's own 30 are too few on a busy machine
_BLOCKS = 10_000  # that are given out; each holds one shard or, of a longer list, several
_TRIES = 5  # of a shard whose worker dies: one that always kills it must end the job


@dataclass(frozen=True)
class Cluster:
    """Which Ray cluster scores, and with how many workers (None: as many as it has GPUs, or cores for).

    `address` is "local" for one on this machine that ends with the job, else what `ray.init` takes: "auto",
    or HOST:PORT. `cores` are those of one worker without a GPU.
    """

    address: str = "local"
    workers: int | None = None
    cores: int = 1


class ShardActor:
    """What Ray Data maps over the numbers of shards; an error that ends the job is returned like a count."""

    def __init__(self, work: Work, shards: Sequence[Shard]) -> None:
        self._worker, self._shards = Worker(work), shards

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Score the shards of a batch of numbers."""
        return {"done": [json.dumps(self._score(self._shards[number])) for number in batch["id"]]}

    def _score(self, shard: Shard) -> dict[str, Any]:
        tries = self._worker.work.out / f".{shard.name}.tries"
        try:
            # Ray gives a shard out for ever whose worker dies.
            with tries.open("ab") as file:
                file.write(b".")
                if file.tell() > _TRIES:
                    raise BackendError(
                        f"{shard.name}: {_TRIES} workers died over these pairs, by a crash or for want of "
                        "memory; the logs of the Ray session say how. What is done is kept"
                    )
            done = self._worker(shard).to_dict()
        except Dgm4Error as error:
            return {"error": type(error).__name__, "message": str(error)}
        except OSError as error:  # the disk is full, as the driver tells it for its own
            return {"refused": [error.errno, error.strerror or str(error), error.filename]}
        tries.unlink(missing_ok=True)
        return done


def score_on(cluster: Cluster, work: Work, shards: Sequence[Shard]) -> Iterator[Tally]:
    """Score shards on a cluster; yields the count of each when its file is written, in any order.

    Raises the error that ended a worker's shard, and BackendError for Ray's own.
    """
    require("--ray", "ray", "pyarrow")
    with _connected(cluster.address):
        from ray.exceptions import RayError

        try:
            for row in _dataset(cluster, work, shards).iter_rows():
                done = json.loads(row["done"])
                if "refused" in done:
                    raise OSError(*done["refused"])
                if "error" in done:
                    raise getattr(errors, done["error"])(done["message"])
                yield Tally(done["pairs"], Counter(done["failed"]))
        except RayError as error:
            raise BackendError(
                f"Ray: {_line(error)}; what is done is kept, and the same command goes on"
            ) from error


def _line(error: Exception) -> str:
    """What kind of error it is and what it says, of several lines the last."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[-1]}" if said else type(error).__name__


def _dataset(cluster: Cluster, work: Work, shards: Sequence[Shard]) -> Any:
    import ray
    from ray.data import ActorPoolStrategy

    gpus = int(ray.cluster_resources().get("GPU", 0)) if work.device != "cpu" else 0
    if work.device.startswith("cuda") and not gpus:
        raise BackendError("--device cuda: the Ray cluster has no GPU; see ray status")
    cores = int(ray.cluster_resources().get("CPU", 1))
    if cluster.address == "local" and not gpus and cores < cluster.cores:
        raise InputError(f"threads: expected at most {cores}, the cores of this machine, got {cluster.cores}")
    workers = cluster.workers or gpus or max(1, cores // cluster.cores)
    resources = {"num_gpus": 1} if gpus else {"num_cpus": cluster.cores}
    # Of items that are there, not of `range`: its reading would wait for a core that the actors never leave.
    numbers = ray.data.from_items(
        [{"id": number} for number in range(len(shards))], override_num_blocks=min(len(shards), _BLOCKS)
    )
    return numbers.map_batches(
        ShardActor,
        batch_size=None,
        # One shard at a time: a second would wait behind the first while another worker has none.
        compute=ActorPoolStrategy(size=min(workers, len(shards)), max_tasks_in_flight_per_actor=1),
        fn_constructor_args=(work, shards),
        **resources,
    )


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """A connection to the cluster at `address`, or a cluster on this machine, for the time of the block."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", _START_S)
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(local if address == "local" else {}),
        )
    except Exception as error:  # a bare one where a part of it does not start in time
        raise BackendError(f"--ray {address}: cannot be reached or started: {_line(error)}") from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own prints a trace
        from ray.data import DataContext

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        DataContext.get_current().enable_progress_bars = False
        yield
    finally:
        ray.shutdown()
