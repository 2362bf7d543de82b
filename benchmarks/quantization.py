"""Ways to static int8 and fp8, compared: `python -m benchmarks.quantization --data DIR --out FILE`.

The three trained tiny networks that ship with the package, and ASAP with outliers planted into its norms,
as large vision transformers have them, are calibrated on 512 training pairs of the sample set in DIR by
every method, with channels as they are and rescaled where layers lose less so
(`export.quantization.smoothquant`). Each answers the test split as torch computes it, beside float32:
relative errors of the outputs, differences of metrics, equal decisions, the gate. stdout gets a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import dgm4
from benchmarks.machine import describe_machine
from dgm4.data.annotations import read_split
from dgm4.data.dataset import PairDataset
from dgm4.metrics import LabelledOutputs, summarise
from dgm4.shipped import demo_checkpoint
from dgm4.tokenizer import build_tokenizer, vocabulary_of
from engine.inputs.text import CaptionTokenizer
from engine.network.model import InferenceModel
from engine.network.rescale import rescale
from engine.network.vision import Block
from export.evaluation.agreement import measure_agreement
from export.evaluation.gate import GATED, check_gate
from export.evaluation.scoring import Network, score
from export.graph.parity import relative_errors, torch_answers
from export.graph.rewrite import rewrite, sharing
from export.manifest_fields import LONGEST_CAPTION, MAX_WORDS
from export.quantization.calibrate import CODES, Calibrated, observe_shifted
from export.quantization.pairs import read_pairs
from export.quantization.qdq import lower, lowered_layers
from export.quantization.ranges import observe, scales_of
from export.quantization.smoothquant import Channels, Smooth, choose_shifts, readers_of

PAIRS, BATCH = 512, 32
METHODS = {"int8": ("minmax", "percentile", "entropy"), "fp8": ("minmax", "percentile")}
SMOOTH: tuple[Smooth, ...] = ("off", "auto")
NETWORKS = ("hammer", "asap", "cals", "asap outliers")
PLANTED, EVERY = 30.0, 16  # factor of a planted outlier, and how many channels have one
OUTPUTS = ("logits_real_fake", "logits_multicls", "logits_tok", "pred_box")
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Torch:
    """An inference network of any precision, for `score`."""

    model: InferenceModel

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {name: torch.from_numpy(x) for name, x in feeds.items()}
        return dict(torch_answers(self.model, self.model.config, feeds=[tensors])[0])


def plant(model: InferenceModel) -> InferenceModel:
    """Blow up some channels of the image blocks' norms and undo it in what reads them, in place."""
    for block in (cast(Block, x) for x in model.vision.blocks):
        for norm, reader in ((block.norm1, block.attention.qkv), (block.norm2, block.mlp.fc1)):
            factor = torch.ones_like(norm.weight)
            factor[::EVERY] = PLANTED
            norm.weight, norm.bias = (nn.Parameter(x * factor, False) for x in (norm.weight, norm.bias))
            reader.weight = nn.Parameter(reader.weight / factor, False)
    return model


def calibrations(
    model: InferenceModel, batches: Sequence[Batch]
) -> Iterator[tuple[str, str, Smooth, Calibrated]]:
    """Every precision, method and smoothing, with its scales and shifts."""
    seen = observe(model, lowered_layers(model, "int8"), batches, Channels)
    for precision, methods in METHODS.items():
        found = {name: seen[name] for name, _ in lowered_layers(model, precision)}
        for smooth in SMOOTH:
            shifts = choose_shifts(model, found, CODES[precision], smooth)
            names = [name for name in readers_of(model, shifts) if name in found]
            shifted = {**found, **observe_shifted(model, shifts, names, lambda: batches)}
            for method in methods:
                scales = scales_of(shifted, CODES[precision], method)
                yield precision, method, smooth, Calibrated(scales, shifts)


def measure(network: str, data: Path, limit: int | None) -> list[dict[str, Any]]:
    """Records of every calibration of one network."""
    name, _, planted = network.partition(" ")
    path = demo_checkpoint(name)
    model = rewrite(dgm4.load_checkpoint(path))
    model = plant(model) if planted else model
    words = _tokenizer(path, model.config.vocabulary)
    reader = read_pairs(data, PAIRS, words, model.config.image_size)
    batches = [{key: torch.from_numpy(x) for key, x in batch.items()} for batch in reader.batches()]
    made = {(p, m, str(s)): found for p, m, s, found in calibrations(model, batches)}
    del batches
    lowered = {key: lower(rescale(sharing(model), x.shifts), key[0], x.scales) for key, x in made.items()}
    runs: dict[str, Network] = {" ".join(key): _Torch(x) for key, x in lowered.items()}
    samples = read_split(data, "test").samples[:limit]
    dataset = PairDataset(samples, words, model.config.image_size)
    answers = score({"float32": _Torch(model), **runs}, dataset, BATCH, "raise", progress=True).outputs
    return [
        {
            **{"network": network, "precision": key[0], "method": key[1], "smooth": key[2]},
            **{"calibration": reader.record, "seams": len(made[key].shifts)},
            **_compare(key[0], answers[" ".join(key)], answers["float32"]),
        }
        for key in made
    ]


def _tokenizer(checkpoint: Path, vocabulary: int) -> CaptionTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(build_tokenizer(vocabulary_of(checkpoint, vocabulary), vocabulary).to_str())
        return CaptionTokenizer(path, MAX_WORDS, LONGEST_CAPTION)


def _compare(precision: str, ours: LabelledOutputs, theirs: LabelledOutputs) -> dict[str, Any]:
    own, reference = (summarise(*answers) for answers in (ours, theirs))
    sides = [[{name: getattr(answers, name) for name in OUTPUTS}] for answers in (theirs, ours)]
    return {
        "pairs": len(ours.labels),
        "errors": relative_errors(*sides),
        "metrics": {name: own[name] for name in GATED},
        "changes": {name: own[name] - reference[name] for name in GATED},
        "agreement": asdict(measure_agreement(ours, theirs)),
        "gate": [str(failure) for failure in check_gate(precision, own, reference)],
    }


def table(records: list[dict[str, Any]]) -> str:
    """Errors in percent of float32's outputs, metrics in points from float32's, equal verdicts in percent."""
    head = ["network", "precision", "method", "smooth", "logits"]
    head += ["real/fake", "types", "tokens", "box", *GATED, "same verdict", "gate"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for x in records:
        errors = [x["errors"][name] for name in OUTPUTS]
        cells = [x["network"], x["precision"], x["method"], x["smooth"]]
        # Without the box, of which one that jumps would be all there is to see.
        cells += [f"{100 * e:.2f}" for e in (np.sqrt(np.mean(np.square(errors[:-1]))), *errors)]
        cells += [f"{100 * x['changes'][name]:+.2f}" for name in GATED]
        cells += [f"{100 * x['agreement']['verdict']:.1f}", "failed" if x["gate"] else "passed"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every network, or some: others stay as FILE has them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the sample set")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--limit", type=int, help="test pairs; all by default")
    options = parser.parse_args()
    kept = json.loads(options.out.read_text())["records"] if options.out.exists() else []
    found = {network: [x for x in kept if x["network"] == network] for network in NETWORKS}
    for network in options.networks:
        found[network] = measure(network, options.data, options.limit)
        records = [x for network in NETWORKS for x in found[network]]
        result = {"machine": describe_machine(), "records": records}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(records))


if __name__ == "__main__":
    main()
