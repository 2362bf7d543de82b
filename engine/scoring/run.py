"""Runs a job: on this machine in this process, or on a cluster through Ray Data."""

from __future__ import annotations

from engine.progress import progress_bar
from engine.scoring.job import open_job
from engine.scoring.ray_data import Cluster, score_on
from engine.scoring.worker import Tally, Work, Worker


def score(
    work: Work,
    size: int,
    max_failed: int | None = None,
    cluster: Cluster | None = None,
    quiet: bool = True,
) -> Tally:
    """Answer the pairs of a list into the files of a folder, a shard of `size` pairs a file.

    What an earlier run of the same job has answered is kept. Without a cluster one process does the rest, and
    needs no Ray. Raises InputError as `open_job` does and where more than `max_failed` pairs fail,
    BundleError and BackendError for what a worker cannot open or run.
    """
    with open_job(work, size, max_failed) as job:
        with progress_bar("score", job.pairs, "pairs", not quiet, initial=job.tally.pairs) as bar:
            if not job.missing:
                pass
            elif cluster is None:
                worker = Worker(work, bar.update)
                for shard in job.missing:
                    job.count(worker(shard))
            else:
                for tally in score_on(cluster, work, job.missing):
                    bar.update(tally.pairs)
                    job.count(tally)
        return job.finish()
