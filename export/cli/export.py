"""`dgm4 export`, which is `python export/to_trt.py` too: export, then try the bundle on a sample."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dgm4.places import check_checkpoint, check_data
from engine import Bundle, Predictor
from engine.cards.render import check_plot_path
from engine.errors import InputError
from engine.packages import require
from engine.registry import DEFAULT, network_of
from export.bundle.writer import BundleWriter
from export.cli import repository
from export.cli.arguments import Verbs
from export.cli.plot import save_plot
from export.cli.stage_lines import StageLines
from export.cli.summary import row, summary
from export.flags import add_flags, as_option, read_options
from export.options import ExportOptions, check_options
from export.output import check_output

_NEEDED = ("torch", "onnx", "onnxscript", "safetensors", "onnxruntime")
_DRAWN = (
    "dgm4: no trained weights of this network and size ship, so they are drawn, and the scores of this "
    "bundle mean nothing; --checkpoint FILE brings trained ones\n"
)
_GRAPHS = ("fp32", "fp16", "int8")  # precisions whose ONNX graph Triton Inference Server can run


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "export",
        help="make a bundle of a checkpoint",
        description="Make a bundle of a checkpoint, verified stage by stage, and try it on a sample. Without "
        "--checkpoint it is made of the trained demo.",
        epilog="examples:\n"
        "  dgm4 export --out demo\n"
        "  dgm4 export --checkpoint best.pth --precision int8 --out my-bundle\n"
        "  dgm4 export --checkpoint best.pth --data DGM4 --target 8.6,8.9 --out my-bundle",
    )
    add_flags(parser, ExportOptions)
    parser.add_argument("--drawn", action="store_true", help="drawn weights in place of the trained demo's")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="bundle-<model>-<size>-<precision> by default"
    )
    parser.add_argument(
        "--triton-repository", type=Path, metavar="DIR", help="write one too, as dgm4 repository does"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the prediction for the sample")
    parser.add_argument("--json", action="store_true", help="print one JSON report instead of lines")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Export, then run the bundle on a sample pair; see `export.pipeline`."""
    if (wrong := _usage_error(options)) is not None:
        options.parser.error(wrong)
    require("dgm4 export", *_NEEDED)
    out = options.out or _default_out(options)
    _check_paths(options, out)
    chosen = _export_options(options, out)
    try:
        check_options(chosen)
    except InputError as error:
        options.parser.error(as_option(str(error), ExportOptions))
    if chosen.checkpoint is None and not options.drawn and not options.quiet:
        sys.stderr.write(_DRAWN)
    from export.pipeline import export_bundle

    with StageLines(not options.quiet) as lines:
        manifest = export_bundle(chosen, lines.end, lines.begin)
    result = _try(out, options.plot, manifest["weights"]["sha256"])
    if options.triton_repository is not None:
        sys.stderr.write(_write_repository(out, options.triton_repository))
    if options.json:
        stages = [stage.to_dict() for stage in lines.finished]
        record = {"bundle": str(out), "stages": stages, "manifest": manifest}
        sys.stdout.write(json.dumps({**record, "sample": result}, allow_nan=False) + "\n")
    elif result is not None:
        sys.stdout.write(_summary(result))
    return 0


def _usage_error(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments taken together, or None."""
    default = options.parser.get_default
    if options.checkpoint is not None and options.drawn:
        return "--drawn takes no checkpoint: leave out one of --drawn and --checkpoint"
    if options.calibration is None and options.calibration_pairs != default("calibration_pairs"):
        return "--calibration-pairs says how --calibration DIR is read: give that too"
    if options.data is None and options.split != default("split"):
        return "--split is of the data to evaluate on: give --data DIR too"
    if options.triton_repository and options.precision not in _GRAPHS:
        return f"--triton-repository is for a precision with an ONNX graph: {', '.join(_GRAPHS)}"
    return None


def _check_paths(options: argparse.Namespace, out: Path) -> None:
    """Raise for a path that cannot be read or written, before torch is imported."""
    from dgm4.tokenizer import count_pieces

    if options.checkpoint is not None:
        check_checkpoint(options.checkpoint)
    for folder in (options.calibration, options.data):
        if folder is not None:
            check_data(folder)
    if options.vocabulary is not None:
        count_pieces(options.vocabulary)
    if not out.resolve().parent.is_dir():
        raise InputError(f"--out {out}: expected a directory in one that exists")
    BundleWriter.check_replaceable(out, overwrite=True)
    if options.plot is not None:
        check_plot_path(options.plot)
        check_output(options.plot, "--plot", [options.checkpoint])
    if options.triton_repository is not None:
        _check_repository(options.triton_repository, out)


def _export_options(options: argparse.Namespace, out: Path) -> ExportOptions:
    """The options of the command line; no engine where --target is none."""
    engine = {"targets": options.targets or (), "engine": options.targets is not None}
    return read_options(ExportOptions, options, out=out, checkpoint=_checkpoint(options), **engine)


def _checkpoint(options: argparse.Namespace) -> Path | None:
    """The file given, or the trained demo of a tiny network where there is one; None for drawn weights."""
    if options.checkpoint is not None or options.drawn or options.size == "base":
        path: Path | None = options.checkpoint
        return path
    from dgm4.shipped import demo_checkpoint, demo_record

    name = options.model or DEFAULT
    return demo_checkpoint(name) if name in demo_record()["networks"] else None


def _default_out(options: argparse.Namespace) -> Path:
    name = f"{options.model or DEFAULT}-{options.size or 'tiny'}"
    return Path(f"bundle-{options.checkpoint.stem if options.checkpoint else name}-{options.precision}")


def _check_repository(repository: Path, bundle: Path) -> None:
    """Raise before the export where the repository could not be written after it."""
    from export.inference_server.repository import RepositoryWriter

    if repository.resolve() == bundle.resolve():
        raise InputError(f"--triton-repository {repository}: is the bundle's own place; choose another")
    if not repository.resolve().parent.is_dir():
        raise InputError(f"--triton-repository {repository}: expected a directory in one that exists")
    RepositoryWriter.check_replaceable(repository.resolve(), overwrite=True)


def _write_repository(bundle: Path, place: Path) -> str:
    """Make a model repository of the finished bundle; what it serves, in lines."""
    from export.inference_server.repository import name_models, write_repository

    return repository.summary(place, write_repository(name_models([Bundle.open(bundle)]), place))


def _try(bundle: Path, plot: Path | None, weights: str | None) -> dict[str, Any] | None:
    """Run the finished bundle once on a sample, as production would: the demo's own, or a photograph.

    The prediction is drawn into the file `plot`, if one is given.
    """
    from export.sample import choose_sample

    sample = choose_sample(weights)
    if sample is None:
        sys.stderr.write(
            "sample            none: scikit-image, which ships the photograph, is not installed\n"
        )
        return None
    with Predictor(bundle) as predictor:
        predictor.warm_up()
        box = sample.box if network_of(predictor.manifest.model.config).box else None
        prediction = predictor.predict(sample.image, sample.caption, box)
    if plot is not None:
        save_plot(prediction, plot, instead="choose another; the bundle itself is whole")
    head = {"picture": sample.image.name, "truth": sample.truth, "drawn": plot and str(plot)}
    return {**head, **prediction.to_dict(heatmap=False)}


def _summary(result: dict[str, Any]) -> str:
    """The prediction for the sample in a few lines."""
    lines = row("truth", result["truth"]) if result["truth"] else []
    lines += row("timing", ", ".join(f"{name} {ms:.1f}" for name, ms in result["timing"].items()) + " (ms)")
    if result["drawn"]:
        lines += row("drawn", result["drawn"])
    return summary(result["picture"], result) + "\n".join(lines) + "\n"
