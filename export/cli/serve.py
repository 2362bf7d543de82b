"""`dgm4 serve`: a bundle as a web service."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import InputError
from engine.logs import level_of_environment
from export.cli.arguments import Verbs, add_backend, add_thresholds, check_batch
from export.cli.parser import usage_errors
from export.flags import POSITIVE, SECONDS, Number

if TYPE_CHECKING:
    from engine.serving.settings import Settings

TOKEN = "DGM4_SERVE_TOKEN"
_MB = 2**20
_CONNECTIONS = 512
_PORT = Number("a port from 0 to 65535", int, 0, 65_535)
_RATE = Number("a number above 0", float, 1e-6)
_WAIT = Number("milliseconds from 0 to 60000", float, 0, 60_000)
_DRAIN = Number("seconds from 0, an hour at most", float, 0, 3600)
_EPILOG = f"""
POST /v1/predict takes a form (image, caption) or JSON; / is a page to try it, /docs the reference. /v2 is the
Open Inference Protocol. /healthz, /readyz and /metrics are for an operator's tools.

The token that clients must send, Authorization: Bearer TOKEN, is read from --token-file or from the variable
{TOKEN}. Health, readiness and the pages need none; metrics do.

The log on stderr is JSON lines, without captions, images, file names and addresses. SIGTERM and SIGINT stop
the service once what it took is answered.

examples:
  dgm4 serve demo:asap
  dgm4 serve my-bundle --host 0.0.0.0 --token-file /run/secrets/token --rate 5
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "serve",
        help="serve a bundle over HTTP",
        description="Serve a bundle over HTTP: predictions, a page to try it, health, metrics.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("bundle", help="folder of a bundle, or the name of one that ships, as demo:asap")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (%(default)s)")
    add("--port", type=_PORT, default=8000, metavar="N", help="%(default)s; 0 for any that is free")
    add("--token-file", type=Path, metavar="FILE", help="file with the token that clients must send")
    add("--name", metavar="NAME", help="of the model under /v2; <model>-<size>-<precision>")
    _add_limits(parser.add_argument_group("limits"))
    add_backend(parser)
    add("--rebuild", action="store_true", help="build an engine for this GPU if there is none")
    add(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="its owner must have signed the bundle; DGM4_PUBLIC_KEY",
    )
    add_thresholds(parser)
    parser.set_defaults(run=run, parser=parser)


def _add_limits(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--batch", type=POSITIVE, metavar="N", help="pairs a run; the bundle's largest")
    add(
        "--max-wait-ms",
        type=_WAIT,
        default=5.0,
        metavar="MS",
        help="for a batch to fill (%(default)g)",
    )
    add(
        "--max-pending",
        type=POSITIVE,
        default=256,
        metavar="N",
        help="waiting pairs (%(default)s), --max-pairs at least; else 503",
    )
    add("--max-pairs", type=POSITIVE, default=32, metavar="N", help="pairs of one request (%(default)s)")
    add("--max-body", type=POSITIVE, default=48, metavar="MB", help="size of one request (%(default)s)")
    add(
        "--max-buffered",
        type=POSITIVE,
        default=256,
        metavar="MB",
        help="of all requests (%(default)s), --max-body at least",
    )
    add("--connections", type=POSITIVE, default=_CONNECTIONS, metavar="N", help="open at once (%(default)s)")
    add("--timeout", type=SECONDS, default=30.0, metavar="S", help="for an answer (%(default)g); else 504")
    add("--read-timeout", type=SECONDS, default=15.0, metavar="S", help="for a body (%(default)g); else 408")
    add("--rate", type=_RATE, metavar="N", help="pairs a second of one client, else 429; no limit")
    add("--burst", type=POSITIVE, default=32, metavar="N", help="pairs at once under --rate (%(default)s)")
    add("--trust-proxy", metavar="ADDRESS[,..]", help="proxies whose X-Forwarded-For names the client")
    add(
        "--drain",
        type=_DRAIN,
        default=0.0,
        metavar="S",
        help="to go on after SIGTERM, not ready (%(default)g)",
    )


def run(options: argparse.Namespace) -> int:
    """Serve until a signal, which then acts as for every verb: exit code 143 after SIGTERM."""
    from engine.serving.logs import set_up
    from engine.serving.settings import Settings

    with usage_errors(options.parser):
        settings = Settings(
            name=options.name,
            token=_read_token(options.token_file),
            max_body=_MB * options.max_body,
            max_buffered=_MB * options.max_buffered,
            max_pairs=options.max_pairs,
            max_batch=options.batch,
            max_wait_ms=options.max_wait_ms,
            max_pending=options.max_pending,
            timeout_s=options.timeout,
            read_timeout_s=options.read_timeout,
            rate=options.rate,
            burst=options.burst,
        )
    check_batch(options)
    louder = logging.DEBUG if getattr(options, "verbose", 0) > 1 else level_of_environment() or logging.INFO
    set_up(logging.ERROR if options.quiet else louder)
    _serve(options, settings)
    return 0


def _serve(options: argparse.Namespace, settings: Settings) -> None:
    from engine import Predictor
    from engine.serving.application import create_app
    from engine.serving.server import is_loopback, serve

    logger = logging.getLogger("engine.serving")
    if settings.token is None and not is_loopback(options.host):
        logger.warning(
            "other machines may reach this address, and no token is set: --token-file, or %s", TOKEN
        )
    with Predictor(
        options.bundle,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        thumbnail=0,
        thresholds=dict(options.thresholds),
        rebuild=options.rebuild,
        public_key=options.public_key,
    ) as predictor:
        serve(
            create_app(predictor, settings),
            options.host,
            options.port,
            connections=options.connections,
            drain_s=options.drain,
            proxies=options.trust_proxy,
            announce=lambda address: logger.info("listening", extra={"fields": {"address": address}}),
        )


def _read_token(path: Path | None) -> str | None:
    """The token of a file or of the environment; None where there is neither. Raises InputError."""
    if path is None:
        return os.environ.get(TOKEN)
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"token-file: {path}: expected a file of text with the token: {error}") from error
