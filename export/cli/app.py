"""The `dgm4` command: export, rebuild, predict, evaluate, bench, repository, train, data, inspect, doctor.

stdout carries the answer, stderr the log and the progress. Exit codes: 0 done, 1 bad input, 2 usage, 3 a
verification failed, 4 the machine lacks something, 130 interrupted, 143 stopped (129 by a lost terminal).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import Dgm4Error
from export.cli import bench as cli_bench
from export.cli import engine_arguments as cli_engine
from export.cli import repository as cli_repository
from export.cli.arguments import backend as _backend
from export.cli.arguments import device as _device
from export.cli.arguments import export_usage, kept_layers, smoothing
from export.cli.arguments import positive as _positive
from export.cli.arguments import verb as _verb
from export.cli.arguments import whole as _whole

_BAD_INPUT, _INTERRUPTED = 1, 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a user's error shows one line, no trace."""
    from export.cli.stopping import exit_on_sigterm

    options = _parser().parse_args(arguments)
    if (wrong := options.usage_error(options)) is not None:
        options.parser.error(wrong)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # whatever the locale
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        with exit_on_sigterm():
            code = options.run(options)
            sys.stdout.flush()
            return code
    except Dgm4Error as error:
        return _fail(error, error.exit_code, options.verbose)
    except BrokenPipeError:
        # The reader of stdout went away; Python would report it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(error, _BAD_INPUT, options.verbose)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted"), _INTERRUPTED, False)


def _fail(error: BaseException, code: int, verbose: bool) -> int:
    if verbose:
        logging.getLogger(__name__).error("traceback", exc_info=error)
    sys.stderr.write(f"dgm4: error: {error}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dgm4", description="Export multimodal deepfake detectors to verified bundles, and serve them."
    )
    parser.set_defaults(usage_error=lambda options: None)
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    parser.add_argument("--verbose", action="store_true", help="log more, and show the traceback of an error")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="verb")
    _add_export(verbs)
    cli_engine.add_rebuild(verbs)
    _add_predict(verbs)
    _add_evaluate(verbs)
    _add_train(verbs)
    _add_pretrain(verbs)
    cli_bench.add_arguments(verbs)
    cli_repository.add_arguments(verbs)
    _add_inspect(verbs)
    _add_data(verbs)
    return parser


def _add_export(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser("export", help="make a bundle of a checkpoint", description="Make a bundle.")
    verb.add_argument("--model", choices=("hammer", "asap", "cals"), help="network; read off a checkpoint")
    verb.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help=".pth or .safetensors; else the trained demo"
    )
    verb.add_argument("--size", choices=("base", "tiny"), help="read off a checkpoint; tiny without one")
    verb.add_argument("--drawn", action="store_true", help="drawn weights in place of the trained demo's")
    verb.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16", "int8", "fp8"),
        default="fp32",
        help="of the products (%(default)s); bf16 and fp8 are for GPUs: on a CPU torch alone serves them",
    )
    verb.add_argument(
        "--max-batch", type=_positive, default=32, metavar="N", help="largest batch (%(default)s)"
    )
    verb.add_argument(
        "--max-tokens", type=_tokens, default=128, metavar="N", help="longest caption (%(default)s)"
    )
    verb.add_argument(
        "--target",
        type=_targets,
        metavar="CC[,CC]",
        default=(),
        help="compute capabilities of the engine, as 8.6,8.9; 'none' for no engine; all by default",
    )
    cli_engine.add_arguments(verb)
    verb.add_argument("--vocab", type=Path, metavar="FILE", help="vocabulary, one word piece a line")
    verb.add_argument("--data", type=Path, metavar="DIR", help="judge it on this data: the accuracy gate")
    verb.add_argument("--split", choices=("train", "val", "test"), default="test", help="(%(default)s)")
    verb.add_argument("--out", type=Path, metavar="DIR", help="bundle-<model>-<size>-<precision> by default")
    verb.add_argument(
        "--calibration", type=Path, metavar="DIR", help="data whose training split calibrates int8 or fp8"
    )
    verb.add_argument(
        "--calibration-pairs", type=_positive, default=512, metavar="N", help="drawn from it (%(default)s)"
    )
    verb.add_argument(
        "--calibration-method",
        choices=("minmax", "percentile", "entropy"),
        default="minmax",
        help="how activations get their scale; entropy for int8 (%(default)s)",
    )
    verb.add_argument(
        "--smooth",
        type=smoothing,
        default="off",
        metavar="off|auto|ALPHA",
        help="with --calibration: move peaks of channels into the weights that read them, by ALPHA from 0 to "
        "1 (SmoothQuant); auto: by what lessens the error on the pairs (%(default)s)",
    )
    verb.add_argument(
        "--keep-layers",
        type=kept_layers,
        default=0,
        metavar="N|auto",
        help="Linear layers, the worst first, that stay a step above the precision; auto: until the gate "
        "on --data passes",
    )
    verb.add_argument(
        "--triton-repository", type=Path, metavar="DIR", help="write one too, as dgm4 repository does"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON report instead of lines")
    verb.set_defaults(run=_verb("export.cli.export", "run"), usage_error=export_usage, parser=verb)


def _add_predict(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "predict",
        help="judge pictures with captions",
        description="Judge one pair (IMAGE CAPTION), or the pairs of a JSON-lines list.",
        epilog='A line of the list: {"image": "photo.jpg", "caption": "..."} ("text" does for "caption"; '
        "paths are relative to the list). A failed item gives a line with its error, and exit code 1.",
    )
    verb.add_argument("bundle", type=Path)
    verb.add_argument("image", nargs="?", help="picture file (JPEG, PNG, WebP, BMP, GIF)")
    verb.add_argument("caption", nargs="?")
    verb.add_argument("--list", type=Path, metavar="FILE", help="JSON-lines list of pairs; - for stdin")
    verb.add_argument("--out", type=Path, metavar="FILE", help="write there instead of stdout")
    verb.add_argument("--html", action="store_true", help="write a page instead of JSON lines")
    verb.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the answer of a single pair as a picture"
    )
    verb.add_argument("--heatmap", action="store_true", help="keep the heat map in the JSON lines")
    verb.add_argument("--batch", type=_positive, default=8, metavar="N", help="pairs a run (%(default)s)")
    verb.add_argument(
        "--backend", type=_backend, default="auto", help="as dgm4 doctor lists them (%(default)s)"
    )
    verb.add_argument(
        "--device", type=_device, default="auto", help="cpu, cuda, cuda:N or auto (%(default)s)"
    )
    verb.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; all cores by default")
    verb.add_argument("--rebuild", action="store_true", help="build an engine for this GPU if there is none")
    verb.add_argument("--threshold", type=float, metavar="P", help="score from which a pair is manipulated")
    verb.set_defaults(run=_verb("export.cli.predict", "run"), usage_error=_predict_usage, parser=verb)


def _add_evaluate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "evaluate",
        help="measure a bundle on annotated pairs",
        description="The task's metrics of a bundle, beside those of the float32 network on the same pairs.",
        epilog="With --gate, exit code 3 where AUC, mAP, IoUmean or text_F1 lies further from float32 than "
        "the precision may: 1 point for int8 and fp8, 0.2 for fp16 and bf16, 0.02 for fp32.",
    )
    verb.add_argument("bundle", type=Path)
    verb.add_argument("--data", type=Path, required=True, metavar="DIR", help="DGM4 folder, as published")
    verb.add_argument("--split", choices=("train", "val", "test"), default="test")
    verb.add_argument("--limit", type=_positive, metavar="N", help="draw N pairs of the split")
    verb.add_argument(
        "--backend", type=_backend, default="auto", help="as dgm4 doctor lists them (%(default)s)"
    )
    verb.add_argument(
        "--device", type=_device, default="auto", help="cpu, cuda, cuda:N or auto (%(default)s)"
    )
    verb.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; all cores by default")
    verb.add_argument("--batch", type=_positive, metavar="N", help="pairs a run; 32 or the bundle's largest")
    verb.add_argument(
        "--reference",
        choices=("auto", "none"),
        default="auto",
        help="compare with float32 torch, or not (%(default)s)",
    )
    verb.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="the reference's weights; else the bundle's own"
    )
    verb.add_argument("--gate", action="store_true", help="fail where accuracy is lost")
    verb.add_argument(
        "--on-bad",
        choices=("skip", "raise"),
        default="skip",
        help="what an unusable record does (%(default)s)",
    )
    verb.add_argument("--json", action="store_true", help="print one JSON report instead of a table")
    verb.add_argument("--out", type=Path, metavar="FILE", help="write there instead of stdout")
    verb.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures too")
    verb.set_defaults(run=_verb("export.cli.evaluate", "run"), usage_error=_evaluate_usage, parser=verb)


def _add_train(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "train",
        help="train a network on a data folder",
        description="Train HAMMER, ASAP or CALS on a folder in the published layout; several processes "
        "through torchrun. Checkpoints have the released layout.",
    )
    verb.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with metadata/")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoints and log")
    verb.add_argument("--recipe", type=Path, metavar="FILE", help="TOML file of settings; HAMMER's published")
    verb.add_argument("--model", choices=("hammer", "asap", "cals"))
    verb.add_argument("--size", choices=("base", "tiny"))
    verb.add_argument("--set", action="append", metavar="NAME=VALUE", help="a setting over the recipe's")
    verb.add_argument("--init", type=Path, metavar="FILE", help="start from a checkpoint, or from ALBEF's")
    verb.add_argument(
        "--init-vision", metavar="FILE", help="DeiT for the visual encoder: a file or timm:NAME"
    )
    verb.add_argument("--resume", action="store_true", help="go on where the run in --out ended")
    verb.add_argument("--device", default="auto", help="cpu, cuda or auto (%(default)s)")
    verb.add_argument("--workers", type=_whole, default=0, metavar="N", help="processes that read pictures")
    verb.add_argument("--cache", action="store_true", help="keep decoded pictures in memory, 0.2 MB each")
    verb.add_argument("--save-every", type=_whole, default=0, metavar="N", help="save every N updates too")
    verb.add_argument("--stop-after", type=_whole, default=0, metavar="N", help="end after N updates in all")
    verb.add_argument("--vocab", type=Path, metavar="FILE", help="vocabulary, one word piece a line")
    verb.set_defaults(run=_verb("export.cli.train", "run"))


def _add_pretrain(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "pretrain",
        help="pretrain a small visual encoder",
        description="Teach a ViT which patches lie in a manipulated face; what it writes is for dgm4 train "
        "--init-vision, where there is no DeiT of that size.",
    )
    verb.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with metadata/")
    verb.add_argument("--out", type=Path, required=True, metavar="FILE")
    verb.add_argument("--size", choices=("base", "tiny"), help="over the recipe's; base without one")
    verb.add_argument("--recipe", type=Path, metavar="FILE", help="TOML file of settings")
    verb.add_argument("--set", action="append", metavar="NAME=VALUE", help="a setting over the recipe's")
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    verb.add_argument("--cache", action="store_true", help="keep decoded pictures in memory, 0.2 MB each")
    verb.set_defaults(run=_verb("export.cli.train", "pretrain"), model=None)


def _add_inspect(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser("inspect", help="verify a bundle and show what it is")
    verb.add_argument("bundle", type=Path)
    verb.add_argument("--layers", action="store_true", help="each Linear layer's error against float32 too")
    verb.add_argument("--data", type=Path, metavar="DIR", help="its pairs for --layers; else drawn inputs")
    verb.add_argument("--split", choices=("train", "val", "test"), default="test", help="(%(default)s)")
    verb.add_argument("--json", action="store_true", help="print the whole record as JSON")
    verb.set_defaults(run=_verb("export.cli.inspect", "inspect"))
    verb = verbs.add_parser("doctor", help="show what this machine can do")
    verb.add_argument("--json", action="store_true")
    verb.set_defaults(run=_verb("export.cli.inspect", "doctor"))


def _add_data(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser("data", help="make the sample set, or a folder's side-cars")
    subverbs = verb.add_subparsers(title="verbs", required=True, metavar="verb")
    make = subverbs.add_parser(
        "make",
        help="write a small data set in the format of DGM4",
        description="Write a sample set in the format of DGM4, from pictures that ship with scikit-image.",
    )
    make.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder, or an old sample set"
    )
    make.add_argument("--pairs", type=_positive, default=5200, metavar="N", help="in all (%(default)s)")
    make.add_argument("--seed", type=_whole, default=1, metavar="S", help="(%(default)s)")
    make.set_defaults(run=_verb("export.cli.data", "make"))
    _add_describe(subverbs)
    pieces = subverbs.add_parser("vocabulary", help="choose a small vocabulary for a data folder")
    pieces.add_argument("--data", type=Path, required=True, metavar="DIR")
    pieces.add_argument("--size", type=_positive, default=2048, metavar="N", help="pieces (%(default)s)")
    pieces.add_argument("--out", type=Path, required=True, metavar="FILE")
    pieces.add_argument("--vocab", type=Path, metavar="FILE", help="large vocabulary; bert-base-uncased's")
    pieces.set_defaults(run=_verb("export.cli.data", "vocabulary"))


def _add_describe(subverbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = subverbs.add_parser(
        "describe",
        help="write the texts that ASAP trains with",
        description="Write DIR/metadata/captions.json and explanations.json with local models of the "
        "transformers library; nothing is downloaded. Texts that are there already are kept.",
        epilog="Without --instructor only captions.json is written, without --captioner only "
        "explanations.json; pictures without a caption are then explained by their news caption alone. "
        "One run at a time may write a folder.",
    )
    verb.add_argument("--data", type=Path, required=True, metavar="DIR", help="DGM4 folder, as published")
    verb.add_argument(
        "--captioner", type=Path, metavar="DIR", help="model that captions a picture: BLIP, GIT, LLaVA, ..."
    )
    verb.add_argument(
        "--instructor", type=Path, metavar="DIR", help="language model that follows instructions, T5 included"
    )
    verb.add_argument("--split", nargs="+", choices=("train", "val", "test"), default=["train"])
    verb.add_argument("--batch", type=_positive, default=8, metavar="N", help="pairs at once (%(default)s)")
    verb.add_argument("--limit", type=_positive, metavar="N", help="only the first N pictures")
    verb.add_argument(
        "--device", type=_device, default="auto", help="cpu, cuda, cuda:N or auto (%(default)s)"
    )
    verb.add_argument("--redo", action="store_true", help="replace the texts that are there")
    verb.set_defaults(run=_verb("export.cli.data", "describe"), usage_error=_describe_usage, parser=verb)


def _tokens(text: str) -> int:
    """A count of tokens that BERT has positions for, for argparse."""
    if not text.isdecimal() or not 2 <= int(text) <= 512:
        raise argparse.ArgumentTypeError(f"expected 2 to 512 tokens, got {text!r}")
    return int(text)


def _targets(text: str) -> tuple[str, ...] | None:
    """Compute capabilities, or None for no engine, for argparse."""
    targets = tuple(part.strip() for part in text.split(","))
    if targets == ("none",):
        return None
    if not all(re.fullmatch(r"\d+\.\d", target) for target in targets):
        raise argparse.ArgumentTypeError(f"expected compute capabilities as 8.6,8.9 or none, got {text!r}")
    return targets


def _predict_usage(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments of predict taken together, or None."""
    given = options.image is not None, options.caption is not None, options.list is not None
    if given not in ((True, True, False), (False, False, True)):
        return "expected IMAGE and CAPTION, or --list FILE"
    if options.plot and options.list:
        return "--plot draws a single pair; use --html for a list"
    return None


def _evaluate_usage(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments of evaluate taken together, or None."""
    if options.reference == "none" and (options.gate or options.checkpoint):
        return "--gate and --checkpoint need the reference that --reference none leaves out"
    if options.out and options.html and options.out.absolute() == options.html.absolute():
        return "--out and --html name the same file"
    return None


def _describe_usage(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments of data describe taken together, or None."""
    if not options.captioner and not options.instructor:
        return "expected --captioner DIR, --instructor DIR or both"
    return None


def _version() -> str:
    try:
        return importlib.metadata.version("dgm4")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
