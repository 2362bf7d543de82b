"""The demo's training: `python -m benchmarks.demo --work DIR [--start DIR] [--only NAME] [--ship]`.

Makes the sample set, pretrains a visual encoder, trains the three tiny networks from it by the recipes in
dgm4/recipes, and ASAP without MGCA guidance and CALS without GLRM beside them. Evaluates all of them on the
test split and on genuine photographs set aside, into DIR/demo.json. Finished runs in DIR are not trained
again, unfinished ones are resumed; runs of `--only` may train side by side. A run that fails leaves the
others, and exit code 1.

With `--start` the three networks go on from the weights in that folder (NAME.safetensors) for a few epochs
instead, without ablations: so the present demo came of the first one's weights, which the record names by
SHA-256. `--ship` writes the weights, the record, the sample pair and the ready bundle that the package
carries, unless a run failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.demo_bundle import BUNDLE, make_bundle
from benchmarks.genuine import false_alarms, genuine_pairs
from benchmarks.results import ResultFile, Row
from benchmarks.sample import DONOR, PORTRAIT, candidates
from dgm4.config import MODEL_NAMES, TYPES, model_config
from dgm4.data.annotations import Sample, read_split
from dgm4.data.dataset import PairDataset
from dgm4.metrics import (
    TOKEN_PADDING,
    LabelledOutputs,
    bootstrap,
    bootstrap_difference,
    box_iou,
    per_type,
    summarise,
)
from dgm4.shipped import DEMO, RECIPES, RECORD, SAMPLE
from dgm4.tokenizer import DEMO_VOCABULARY, build_tokenizer, count_pieces
from dgm4.training.options import TrainOptions, read_recipe
from dgm4.training.outputs import collect
from dgm4.training.release import release
from dgm4.training.snapshot import load_released, read_snapshot
from dgm4.training.trainee import Trainee
from dgm4.training.trainer import BEST, LOG, make_trainee
from engine.files import sha256_of
from engine.inputs.text import CaptionTokenizer, clean_caption
from export.evaluation.gate import GATED

RESULT = Path(__file__).resolve().parent / "results" / "demo.json"
GOOD_BOX = 0.7
ABLATIONS = {
    "asap-no-guidance": ("asap", {"guidance": False}),
    "cals-no-glrm": ("cals", {"refinement": False}),
}
# What a run that starts from finished weights changes in its recipe.
# Without bfloat16 units, as on the machine that trained the present demo, bf16 takes many times longer.
CONTINUED = {"epochs": 1, "lr": 4e-4, "lr_vision": 2e-4, "warmup_epochs": 0.1, "precision": "fp32"}
RUNS: dict[str, tuple[str, dict[str, bool]]] = {m: (m, {}) for m in MODEL_NAMES} | ABLATIONS


@dataclass(frozen=True)
class Plan:
    """Where the runs are, and the folder of the weights that they start from; None to train from nothing."""

    work: Path
    start: Path | None = None

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of all runs; the ablations are trained from nothing alone."""
        return MODEL_NAMES if self.start else tuple(RUNS)

    def changes(self, run: str) -> dict[str, Any]:
        """What a run changes in its network's recipe."""
        return {**RUNS[run][1], **(CONTINUED if self.start else {})}

    def recipe(self, run: str) -> TrainOptions:
        """The options of a run."""
        return TrainOptions(**{**read_recipe(RECIPES / f"{RUNS[run][0]}.toml"), **self.changes(run)})

    def weights(self, run: str) -> Path | None:
        """The weights that a run starts from."""
        return self.start and self.start / f"{run}.safetensors"


def pretrain(data: Path, work: Path) -> Path:
    """The pretrained visual encoder, made where it is not there yet."""
    out = work / "vision.pth"
    if not (work / "vision.json").is_file():
        recipe_file = str(RECIPES / "vision.toml")
        command = [sys.executable, "-m", "export.cli", "pretrain", "--data", str(data), "--out", str(out)]
        command += ["--recipe", recipe_file, "--cache"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        (work / "vision.json").write_text(done.stdout)
    return out


def train(plan: Plan, run: str, data: Path) -> None:
    """Train `run` in a process of its own, unless it is finished; an unfinished run is taken up."""
    out = plan.work / run
    if (out / "done.json").is_file():
        return
    command = [sys.executable, "-m", "export.cli", "train", "--data", str(data), "--out", str(out), "--cache"]
    command += ["--recipe", str(RECIPES / f"{RUNS[run][0]}.toml")]
    weights = plan.weights(run)
    command += ["--init", str(weights)] if weights else ["--init-vision", str(pretrain(data, plan.work))]
    for field, value in plan.changes(run).items():
        command += ["--set", f"{field}={str(value).lower()}"]
    if (out / "checkpoint_last.pth").is_file():
        command.append("--resume")
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    (out / "done.json").write_text(done.stdout)


def make_data(folder: Path) -> Path:
    """The sample set, made where it is not there yet."""
    if not (folder / "metadata").is_dir():
        subprocess.run([sys.executable, "-m", "export.cli", "data", "make", "--out", str(folder)], check=True)
    return folder


def tokenizer_of(folder: Path) -> CaptionTokenizer:
    """The demo's tokenizer, written into `folder`."""
    path = folder / "tokenizer.json"
    path.write_text(build_tokenizer(DEMO_VOCABULARY, count_pieces(DEMO_VOCABULARY)).to_str())
    return CaptionTokenizer(path)


def load(plan: Plan, run: str) -> Trainee:
    """A run's best checkpoint in float32 with the weights that ship: float16's."""
    trainee = make_trainee(plan.recipe(run), model_config("asap", "tiny").vocabulary)
    load_released(trainee, read_snapshot(plan.work / run / BEST)["model"])
    return trainee.half().float().eval()


def judge(trainee: Trainee, samples: Sequence[Sample], tokenizer: CaptionTokenizer) -> LabelledOutputs:
    """A network's outputs to `samples`."""
    data = PairDataset(samples, tokenizer)
    return collect(trainee.predict, data, 32, torch.device("cpu"))


def scores(answers: LabelledOutputs) -> dict[str, Any]:
    """Metrics with their 95 % intervals, those of every type, and the IoU where there is a box to find."""
    face = (answers.true_box != 0).any(1)
    return {
        "metrics": summarise(*answers),
        "face_iou": float(box_iou(answers.pred_box[face], answers.true_box[face]).mean()),
        "intervals": bootstrap(answers),
        "types": per_type(answers.labels, answers.logits_multicls),
    }


def training_record(plan: Plan, run: str) -> dict[str, Any]:
    """Recipe, seconds of training, the best epoch of a finished run, and what it started from."""
    out, weights = plan.work / run, plan.weights(run)
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    best = read_snapshot(out / BEST)["epoch"]
    seconds = round(sum(line["seconds"] for line in lines))
    start = {"start": sha256_of(weights)} if weights else {}
    record = {"seconds": seconds, "best_epoch": best, "epochs": len(lines)}
    return {"recipe": plan.recipe(run).to_dict(), **start, **record}


def pick_sample(answers: LabelledOutputs) -> tuple[int, dict[str, Any]]:
    """The first pair that is answered right, and how many are.

    Right: the box overlaps the true one by more than GOOD_BOX, every word and the four types are as
    annotated. Raises ValueError where none is.
    """
    boxes = box_iou(answers.pred_box, answers.true_box) > GOOD_BOX
    said = answers.logits_tok.argmax(-1)
    words = ((said == answers.token_labels) | (answers.token_labels == TOKEN_PADDING)).all(1)
    true = np.array([[name in label.split("&") for name in TYPES] for label in answers.labels])
    types = ((answers.logits_multicls >= 0) == true).all(1)
    right = np.flatnonzero(boxes & words & types)
    if not len(right):
        raise ValueError("no candidate for the sample is answered right")
    return int(right[0]), {"answered_right": len(right), "of": len(answers.labels)}


def ship(plan: Plan, result: dict[str, Any], tokenizer: CaptionTokenizer) -> None:
    """Write weights, record, sample and the ready bundle into the package."""
    record: dict[str, Any] = {"data": "sample set, test split", "pairs": result["pairs"], "networks": {}}
    for name in MODEL_NAMES:
        # One entry: safetensors writes several in no fixed order.
        metadata = {"demo": json.dumps({"network": name, **result["runs"][name]["training"]})}
        path = DEMO / f"{name}.safetensors"
        size = release(plan.work / name / BEST, path, metadata)
        record["networks"][name] = {"bytes": size, "sha256": sha256_of(path), **result["runs"][name]}
    record["sample"] = ship_sample(plan, tokenizer)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    make_bundle(BUNDLE)


def ship_sample(plan: Plan, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """Write the first candidate that ASAP answers right; return its record."""
    folder = plan.work / "sample"
    folder.mkdir(exist_ok=True)
    samples = list(candidates(folder))
    index, right = pick_sample(judge(load(plan, "asap"), samples, tokenizer))
    sample = samples[index]
    shutil.copyfile(sample.picture, SAMPLE)
    words = clean_caption(sample.text).text.split(" ")
    changed = [words[i] for i in sample.fake_words]
    truth = {"fake_cls": sample.fake_cls, "box": sample.box, "words": changed}
    return {"id": sample.id, "text": sample.text, "photographs": [PORTRAIT, DONOR], **truth, **right}


def table(result: dict[str, Any]) -> str:
    """Each run's metrics in percent; what each ablation changed, with its interval."""
    head = ["run", *GATED, "IoU where a face", "false alarms", "training"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for run, record in result["runs"].items():
        cells = [f"{100 * record['metrics'][name]:.1f}" for name in GATED]
        aside = record.get("genuine")  # not measured of the first demo
        cells += [f"{100 * record['face_iou']:.1f}", f"{100 * aside['rate']:.1f}" if aside else ""]
        cells.append(f"{record['training']['seconds'] / 60:.0f} min")
        lines.append("| " + " | ".join([run, *cells]) + " |")
    for run, intervals in result["ablations"].items():
        whole = ABLATIONS[run][0]
        ours, ablated = (result["runs"][name]["metrics"] for name in (whole, run))
        cells = [_change(ours[name], ablated[name], intervals[name]) for name in GATED]
        lines.append("| " + " | ".join([f"{whole} against {run}", *cells, "", "", ""]) + " |")
    return "\n".join(lines)


def _change(ours: float, ablated: float, interval: Sequence[float]) -> str:
    """Difference in points with its interval."""
    low, high = (100 * x for x in interval)
    return f"{100 * (ours - ablated):+.1f} ({low:+.1f} to {high:+.1f})"


def train_all(plan: Plan, runs: Sequence[str], data: Path, result: ResultFile) -> None:
    """Train each of `runs`; one that fails is a failure of `result`."""
    for run in runs:
        start = time.perf_counter()
        with result.case(run):
            train(plan, run, data)
            print(f"{run}: {time.perf_counter() - start:.0f} s")


def evaluate(plan: Plan, data: Path, tokenizer: CaptionTokenizer, result: ResultFile) -> Row:
    """The record of all finished runs and their ablations."""
    samples = list(read_split(data, "test").samples)
    genuine = genuine_pairs(plan.work / "genuine")
    outputs: dict[str, LabelledOutputs] = {}
    runs: dict[str, Row] = {}
    for run in plan.runs:
        if (plan.work / run / "done.json").is_file():
            with result.case(run):
                trainee = load(plan, run)
                outputs[run] = judge(trainee, samples, tokenizer)
                aside = false_alarms(genuine, judge(trainee, genuine, tokenizer))
                training = training_record(plan, run)
                runs[run] = {"training": training, "genuine": aside, **scores(outputs[run])}
    ablations = {
        run: bootstrap_difference(outputs[name], outputs[run])
        for run, (name, _) in ABLATIONS.items()
        if run in outputs and name in outputs
    }
    record: Row = {"pairs": len(samples), "runs": runs, "ablations": ablations}
    if plan.start is None:
        trained = json.loads((plan.work / "vision.json").read_text())
        record["pretraining"] = {**read_recipe(RECIPES / "vision.toml"), **trained, "out": "vision.pth"}
    return record


def main() -> int:
    """Train what is asked for, evaluate what is there, write the result; 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the sample set and the runs")
    parser.add_argument("--start", type=Path, help="folder of the weights to go on from")
    parser.add_argument("--only", action="append", choices=tuple(RUNS), help="train just this run")
    parser.add_argument("--ship", action="store_true", help="write dgm4/demo and the result file")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    plan = Plan(options.work, options.start)
    data = make_data(options.work / "set")
    result = ResultFile(options.work / "demo.json")
    train_all(plan, options.only or plan.runs, data, result)
    if options.only and not options.ship:
        return result.exit_code
    tokenizer = tokenizer_of(options.work)
    record = evaluate(plan, data, tokenizer, result)
    result.save(record)
    if options.ship and not result.failures:
        shutil.copyfile(result.path, RESULT)
        ship(plan, record, tokenizer)
    print(table(record))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
