"""`dgm4 export`, which is `python export/to_trt.py` too."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from engine.errors import BackendError, InputError
from export.cli.engine_arguments import engine_options

_NEEDED = {"torch": "torch", "onnx": "onnx", "onnxscript": "onnxscript", "safetensors": "safetensors"}


def run(options: argparse.Namespace) -> int:
    """Export, then let the bundle answer for a sample picture; see `export.pipeline`."""
    missing = [package for package, module in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise BackendError(
            f"export needs {', '.join(missing)}: pip install -e '.[export]' in a clone of the project"
        )
    from export.cli.arguments import as_option
    from export.options import ExportOptions, check_options
    from export.pipeline import Stage, export_bundle

    stages: list[Stage] = []

    def report(stage: Stage) -> None:
        stages.append(stage)
        sys.stderr.write(_line(stage))

    out = options.out or _default_out(options)
    drawn = _check_drawing(out)
    if options.triton_repository is not None:
        _check_repository(options.triton_repository, out)
    chosen = ExportOptions(
        out=out,
        model=options.model,
        checkpoint=_checkpoint(options),
        size=options.size,
        precision=options.precision,
        max_batch=options.max_batch,
        max_tokens=options.max_tokens,
        targets=options.target or (),
        engine=options.target is not None,
        building=engine_options(options),
        vocabulary=options.vocab,
        data=options.data,
        split=options.split,
        calibration=options.calibration,
        calibration_pairs=options.calibration_pairs,
        calibration_method=options.calibration_method,
        keep_layers=options.keep_layers,
        smooth=options.smooth,
    )
    try:
        check_options(chosen)
    except InputError as error:
        options.parser.error(as_option(str(error)))
    manifest = export_bundle(chosen, report)
    answer = _try(out, drawn, manifest["weights"]["sha256"])
    if options.triton_repository is not None:
        sys.stderr.write(_write_repository(out, options.triton_repository))
    if options.json:
        record = {"bundle": str(out), "stages": [s.to_dict() for s in stages], "manifest": manifest}
        sys.stdout.write(json.dumps({**record, "sample": answer}, allow_nan=False) + "\n")
    elif answer is not None:
        sys.stdout.write(_summary(answer))
    return 0


def _checkpoint(options: argparse.Namespace) -> Path | None:
    """The file given; without one the trained demo at size tiny, drawn weights (None) otherwise.

    Raises InputError where a file and drawn weights are asked for at once.
    """
    if options.checkpoint is not None and options.drawn:
        raise InputError("--drawn takes no checkpoint: leave out one of --drawn and --checkpoint")
    if options.checkpoint is not None or options.drawn or options.size == "base":
        return options.checkpoint
    from dgm4.shipped import demo_checkpoint

    return demo_checkpoint(options.model or "asap")


def _default_out(options: argparse.Namespace) -> Path:
    name = (
        options.checkpoint.stem
        if options.checkpoint
        else f"{options.model or 'asap'}-{options.size or 'tiny'}"
    )
    return Path(f"bundle-{name}-{options.precision}")


def _line(stage: Any) -> str:
    """One line a stage: name, seconds, what it did, and its distance from the stage before."""
    distances = "".join(
        f" | from the {d.against}: max {d.max:.1e}, RMS {d.rms:.1e} (allowed: {d.kind} {d.tolerance:g})"
        for d in stage.differences
    )
    return f"{stage.name:<10}{stage.seconds:7.1f} s  {stage.text}{distances}\n"


def _check_drawing(bundle: Path) -> Path:
    """Where the sample's picture goes; raises InputError for a file there that no earlier export made."""
    drawn = bundle.with_name(f"{bundle.name}-sample.png")
    if drawn.exists() and not (drawn.is_file() and bundle.is_dir()):
        raise InputError(
            f"{drawn}: the sample's picture goes there; move what is there, or choose another --out"
        )
    return drawn


def _check_repository(repository: Path, bundle: Path) -> None:
    """Raise before the export where the repository could not be written after it."""
    from export.inference_server.repository import RepositoryWriter

    if repository.resolve() == bundle.resolve():
        raise InputError(f"--triton-repository {repository}: is the bundle's own place; choose another")
    if not repository.resolve().parent.is_dir():
        raise InputError(f"--triton-repository {repository}: expected a directory in one that exists")
    RepositoryWriter.check_replaceable(repository.resolve(), overwrite=True)


def _write_repository(bundle: Path, repository: Path) -> str:
    """Make a model repository of the finished bundle; what it serves, in lines."""
    from engine import Bundle
    from export.cli.repository import summary
    from export.inference_server.repository import name_models, write_repository

    return summary(repository, write_repository(name_models([Bundle.open(bundle)]), repository))


def _try(bundle: Path, drawn: Path, weights: str | None) -> dict[str, Any] | None:
    """Run the finished bundle once on a sample, as production would: the demo's own, or a photograph."""
    from engine import Predictor
    from export.cli.sample import choose_sample

    sample = choose_sample(weights)
    if sample is None:
        sys.stderr.write(
            "sample            none: scikit-image, which ships the photograph, is not installed\n"
        )
        return None
    with Predictor(bundle) as predictor:
        predictor.warm_up()
        answer = predictor.predict(sample.picture, sample.caption)
    try:
        answer.plot(drawn)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{drawn}: cannot be written: {reason}; the bundle itself is whole") from error
    known = {"picture": sample.picture.name, "truth": sample.truth, "drawn": str(drawn)}
    return {**known, **answer.to_dict(heatmap=False)}


def _summary(answer: dict[str, Any]) -> str:
    """The answer for the sample picture in a few lines."""
    verdict = "manipulated" if answer["manipulated"] else "pristine"
    types = ", ".join(f"{name} {score:.2f}" for name, score in answer["types"].items())
    box = "none" if answer["box"] is None else ", ".join(f"{x:.0f}" for x in answer["box"])
    marked = " ".join(f"[{w['text']}]" if w["manipulated"] else w["text"] for w in answer["words"])
    timing = ", ".join(f"{name} {ms:.1f}" for name, ms in answer["timing"].items())
    lines = [
        f"{answer['picture']}: {verdict} (score {answer['score']:.3f})",
        f"  types    {types}",
        f"  box      {box} (pixels of the picture: x1, y1, x2, y2)",
        f"  words    {marked}",
        *([f"  truth    {answer['truth']}"] if answer["truth"] else []),
        f"  timing   {timing} (ms)",
        f"  drawn    {answer['drawn']}",
        *(f"  warning  {warning}" for warning in answer["warnings"]),
    ]
    return "\n".join(lines) + "\n"
