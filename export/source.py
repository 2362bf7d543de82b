"""Load a checkpoint, write its tokenizer and weights into the bundle, and rewrite it for inference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

import dgm4
from dgm4.checkpoint import ALBEF, Checkpoint, grid_of
from dgm4.config import ModelConfig
from dgm4.model import Detector
from dgm4.places import check_checkpoint
from dgm4.saving import save_safetensors
from dgm4.shipped import demo_of
from dgm4.state import some
from dgm4.tokenizer import build_tokenizer, vocabulary_digest, vocabulary_of
from engine.errors import CheckpointError, InputError
from engine.files import sha256_of
from engine.layout import TOKENIZER, WEIGHTS
from engine.manifest import FIRST_DEMOS, Vocabulary, Weights
from engine.registry import DEFAULT, NETWORKS, network_of
from engine.registry.config import NetworkConfig
from export.graph.choices import CLEAR, clear_inputs
from export.graph.parity import EXACT, check, torch_outputs
from export.graph.rewrite import rewrite
from export.options import ExportOptions
from export.stages import Job, Source

SEED = 1


def load_source(job: Job) -> Source:
    """Run the stages "load", "tokenizer", "weights" and "rewrite".

    Raises CheckpointError, InputError for a vocabulary that does not fit, VerificationError where rewriting
    changed the outputs.
    """
    model, weights, trained_with = _load(job)
    if job.options.max_tokens > model.config.positions:
        raise InputError(
            f"max_tokens: expected at most {model.config.positions}, the checkpoint's text positions, got "
            f"{job.options.max_tokens}; give --max-tokens {model.config.positions}"
        )
    vocabulary = _write_tokenizer(job, model.config, trained_with)
    _write_weights(job, model)
    with job.stage("rewrite") as stage:
        network = rewrite(model)
        feeds, margin = clear_inputs(network)
        trained = torch_outputs(model, model.config, feeds)
        outputs = torch_outputs(network, network.config, feeds)
        difference = check(stage.compare("rewrite", "trained network", trained, outputs, EXACT))
        stage.text = "exact rewrites composed" + _margin_text(margin)
    return Source(model.config, weights, vocabulary, network, feeds, outputs, difference)


def _margin_text(margin: float) -> str:
    """How clear the choices are on the inputs of the checks; nothing for a network that makes none."""
    if margin == math.inf:
        return ""
    tie = "" if margin >= CLEAR else ", so that rounding may decide one and fail an exact check"
    return f"; compared on inputs whose choices of neighbours are clear by {margin:.1g}{tie}"


def _load(job: Job) -> tuple[Detector, Weights, str | None]:
    """The trained network, the record of its weights, and the digest of its vocabulary where it is known."""
    options, vocabulary = job.options, None
    with job.stage("load") as stage:
        if options.checkpoint is None:
            model = dgm4.seeded_model(options.model or DEFAULT, options.size or "tiny", SEED)
            weights = Weights(kind="drawn", source=f"drawn from seed {SEED}", sha256=None)
        else:
            model, weights, vocabulary = _load_checkpoint(options, options.checkpoint)
        count = sum(p.numel() for p in model.parameters())
        origin = f"{weights.source}, SHA-256 {weights.sha256}" if weights.sha256 else weights.source
        stage.text = f"{model.config.name} {model.config.size}, {count / 1e6:.1f} M parameters, {origin}"
    return model, weights, vocabulary


def _load_checkpoint(options: ExportOptions, path: Path) -> tuple[Detector, Weights, str | None]:
    check_checkpoint(path)
    digest = sha256_of(path)
    if options.sha256 not in (None, digest):
        raise CheckpointError(
            f"{path}: expected SHA-256 {options.sha256}, got {digest}; the file is damaged or another one: "
            "fetch it again"
        )
    checkpoint = dgm4.read_checkpoint(path)
    trained = checkpoint.layout != "albef"
    if options.model is not None and checkpoint.layout not in (options.model, ALBEF):
        found, asked = (NETWORKS[name].title for name in (checkpoint.layout, options.model))
        raise CheckpointError(f"{path}: expected {asked}, got the keys of {found}; leave --model out")
    model = dgm4.load_state(checkpoint, options.model)
    if options.size not in (None, model.config.size):
        raise CheckpointError(f"{path}: expected a network of size {options.size}, got {model.config.size}")
    known = demo_of(digest) or digest in FIRST_DEMOS
    kind = "demo" if known else "trained" if trained else "drawn"
    notes = _notes(checkpoint, model.config)
    weights = Weights(kind, path.name + (f" ({'; '.join(notes)})" if notes else ""), digest)
    return model, weights, checkpoint.vocabulary


def _notes(checkpoint: Checkpoint, config: ModelConfig) -> list[str]:
    """What manifest and card say of how the weights were read."""
    notes = [checkpoint.note] if checkpoint.note else []
    if checkpoint.layout == "albef":
        notes.append("ALBEF initialisation, heads untrained")
        grid = grid_of(checkpoint.state)
        if grid not in (None, config.grid):
            notes.append(f"positions of a {grid} x {grid} grid resampled to {config.grid} x {config.grid}")
    return notes


def _write_tokenizer(job: Job, config: NetworkConfig, trained_with: str | None) -> Vocabulary:
    """Write the tokenizer and return the record of the vocabulary it is made of."""
    kind, pieces = network_of(config).tokenizer.kind, config.vocabulary
    with job.stage("tokenizer") as stage:
        path = job.options.vocabulary or vocabulary_of(job.options.checkpoint, pieces, trained_with, kind)
        tokenizer = build_tokenizer(path, pieces, kind)
        job.writer.add_text(TOKENIZER, tokenizer.to_str())
        vocabulary = Vocabulary(path.name, tokenizer.get_vocab_size(), vocabulary_digest(path))
        digest = f"SHA-256 {vocabulary.sha256[:16]}..."
        stage.text = f"{type(tokenizer.model).__name__}, {pieces} pieces of {path.name}, {digest}"
    return vocabulary


def _write_weights(job: Job, model: Detector) -> None:
    """Write the live tensors under their released names, for the backends that run torch."""
    state = model.state_dict()
    half = job.options.precision != "fp32"
    with job.stage("weights") as stage:
        if half:
            state = {name: _narrowed(value) for name, value in state.items()}
        path = job.writer.path(WEIGHTS)
        save_safetensors(state, path, {"config": json.dumps(model.config.to_dict())})
        stage.text = (
            f"{len(state)} tensors, {path.stat().st_size / 1e6:.0f} MB, {'float16' if half else 'float32'}"
        )
        beyond = [name for name, value in state.items() if half and value.dtype == torch.float32]
        if beyond:
            stage.text += f", but {some(beyond)}, beyond its range, in float32"


def _narrowed(value: Tensor) -> Tensor:
    """A tensor in float16, or as it is where that would not hold its numbers."""
    half = value.half() if value.is_floating_point() else value
    return half if bool(half.isfinite().all()) else value
