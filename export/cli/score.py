"""`dgm4 score`: a list of millions of pairs in; files of answers out, on one machine or on a Ray cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine import Bundle
from engine.errors import InputError
from engine.packages import require
from engine.scoring import Cluster, Work, score
from engine.scoring.pairs import STDIN
from engine.scoring.worker import manifest_digest
from engine.signing import key_in_use
from export.cli.arguments import Verbs, add_device, add_thresholds, backend, check_batch
from export.flags import POSITIVE, WHOLE
from export.output import is_bundle
from export.writing import writing

_BATCH, _SHARD = 32, 2000
_EPILOG = """
SOURCE is a list as for dgm4 predict --list, or Parquet with the columns image and caption, in one file or
several of a folder. DIR gets a file of answers for every N pairs, whole or not at all, and _SUCCESS at the
end. Run the same command again after a stop or a crash: what is there is kept. A pair that fails gives a row
with its error.

Without --ray one process scores. --ray alone starts a cluster on this machine, --ray auto takes the one that
the machine belongs to.

examples:
  dgm4 score my-bundle pairs.jsonl --out answers/
  dgm4 score my-bundle s.parquet --out answers/ --format parquet --ray auto
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "score",
        help="classify millions of pairs, on one machine or a cluster",
        description="Classify the pairs of a long list into a folder; a run that was stopped goes on.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("bundle", type=Path)
    add("source", type=Path, help="list of pairs, or a folder of them")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the answers")
    add("--format", choices=("jsonl", "parquet"), default="jsonl", help="of the answers (%(default)s)")
    add("--heatmap", action="store_true", help="keep the heat map in the JSON lines")
    add("--shard", type=POSITIVE, default=_SHARD, metavar="N", help="pairs a file (%(default)s)")
    add("--batch", type=POSITIVE, metavar="N", help=f"pairs a run; {_BATCH} or the bundle's largest")
    add(
        "--max-failed",
        type=WHOLE,
        metavar="N",
        help="stop where more pairs fail; by default any number may, and the exit code is 0",
    )
    add(
        "--backend",
        type=backend,
        default="auto",
        metavar="NAME",
        help="as dgm4 doctor lists them (%(default)s)",
    )
    add_device(parser)
    add("--threads", type=POSITIVE, metavar="N", help="CPU threads of a worker; all cores, or 1 with --ray")
    add_thresholds(parser)
    add(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="its owner must have signed the bundle; DGM4_PUBLIC_KEY",
    )
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help="score on a Ray cluster; here by default")
    add("--workers", type=POSITIVE, metavar="N", help="workers on the cluster; one a GPU, or all its cores")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Score the list; 0 also where pairs failed, which their rows say."""
    _check(options)
    work = _work(options)
    cluster = Cluster(options.ray, options.workers, work.threads or 1) if options.ray else None
    with writing(options.out, "--out"):
        tally = score(work, options.shard, options.max_failed, cluster, options.quiet)
    failed = ", ".join(f"{kind} {count}" for kind, count in tally.failed.most_common())
    why = f" ({failed}; their rows hold the errors)" if failed else ""
    sys.stdout.write(f"{options.out}: {tally.pairs} pairs, {tally.failed.total()} failed{why}\n")
    return 0


def _check(options: argparse.Namespace) -> None:
    """Stop with an error of usage, or raise, before anything is loaded or written."""
    if options.workers is not None and options.ray is None:
        options.parser.error("--workers is for a cluster: it needs --ray")
    if options.heatmap and options.format == "parquet":
        options.parser.error("--heatmap is for JSON lines: it goes without --format parquet")
    if options.ray is not None and ":" in options.device:
        options.parser.error("--device: a worker on a cluster has one GPU; give cuda, cpu or auto with --ray")
    if options.format == "parquet":
        require("--format parquet", "pyarrow")
    if options.ray is not None:
        require("--ray", "ray", "pyarrow")
    check_batch(options)
    source, out = options.source, options.out
    if source == STDIN or source.is_fifo():
        raise InputError(f"{source}: expected a file or a folder; a stream cannot be read again after a stop")
    if any(is_bundle(folder) for folder in (out.resolve(), *out.resolve().parents)):
        raise InputError(f"--out {out}: lies in a bundle, which it would damage; choose another place")
    if (out.exists() and not out.is_dir()) or not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: expected the name of a folder, in a folder that exists")


def _work(options: argparse.Namespace) -> Work:
    """What the workers are told."""
    key = key_in_use(options.public_key)
    bundle = Bundle.open(options.bundle, public_key=key)
    return Work(
        # A bundle that ships may lie elsewhere on another machine.
        bundle=str(bundle.path if options.bundle.exists() else options.bundle),
        digest=manifest_digest(bundle),
        source=options.source.absolute(),
        out=options.out.absolute(),
        format=options.format,
        heatmap=options.heatmap,
        batch=options.batch or _BATCH,
        backend=options.backend,
        device=options.device,
        threads=options.threads or (1 if options.ray else None),
        thresholds=dict(options.thresholds),
        public_key=key,
    )
