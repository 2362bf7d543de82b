"""Load a checkpoint, write its tokenizer and weights into the bundle, and rewrite it for inference."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

import dgm4
from dgm4.config import ModelConfig
from dgm4.model import Detector
from dgm4.shipped import demo_of
from dgm4.tokenizer import build_tokenizer, vocabulary_of
from engine.files import sha256_of
from engine.layout import TOKENIZER, WEIGHTS
from engine.manifest import FIRST_DEMOS, Weights
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
    model, weights = _load(job)
    vocabulary = _write_tokenizer(job, model.config)
    _write_weights(job, model)
    with job.stage("rewrite") as stage:
        trained = torch_outputs(model, model.config)
        network = rewrite(model)
        outputs = torch_outputs(network, network.config)
        difference = check(stage.compare("rewrite", "trained network", trained, outputs, EXACT))
        stage.text = "exact rewrites composed"
    return Source(model.config, weights, vocabulary, network, outputs, difference)


def _load(job: Job) -> tuple[Detector, Weights]:
    options = job.options
    with job.stage("load") as stage:
        if options.checkpoint is None:
            model = dgm4.seeded_model(options.model or "asap", options.size or "tiny", SEED)
            weights = Weights(kind="drawn", source=f"drawn from seed {SEED}", sha256=None)
        else:
            model, weights = _load_checkpoint(options, options.checkpoint)
        count = sum(p.numel() for p in model.parameters())
        stage.text = (
            f"{model.config.name} {model.config.size}, {count / 1e6:.1f} M parameters, {weights.source}"
        )
    return model, weights


def _load_checkpoint(options: ExportOptions, path: Path) -> tuple[Detector, Weights]:
    checkpoint = dgm4.read_checkpoint(path)
    trained = checkpoint.layout != "albef"
    name = options.model or (checkpoint.layout if trained else None)
    config = dgm4.model_config(name, options.size) if name and options.size else None
    source = path.name if trained else f"{path.name} (ALBEF initialisation, heads untrained)"
    digest = sha256_of(path)
    kind = "demo" if demo_of(digest) or digest in FIRST_DEMOS else "trained" if trained else "drawn"
    weights = Weights(kind, source, digest)
    return dgm4.load_state(checkpoint, options.model, config), weights


def _write_tokenizer(job: Job, config: ModelConfig) -> Path:
    """Write the tokenizer and return the vocabulary it is made of."""
    with job.stage("tokenizer") as stage:
        path = job.options.vocabulary or vocabulary_of(job.options.checkpoint, config.vocabulary)
        tokenizer = build_tokenizer(path, config.vocabulary)
        job.writer.add_text(TOKENIZER, tokenizer.to_str())
        stage.text = f"WordPiece, {tokenizer.get_vocab_size()} pieces of {path.name}"
    return path


def _write_weights(job: Job, model: Detector) -> None:
    """Write the live tensors under their released names, for the backends that run torch."""
    half = job.options.precision != "fp32"
    with job.stage("weights") as stage:
        state = {
            name: value.half() if half and value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
        path = job.writer.path(WEIGHTS)
        safetensors.torch.save_file(state, path, metadata={"config": json.dumps(model.config.to_dict())})
        stage.text = (
            f"{len(state)} tensors, {path.stat().st_size / 1e6:.0f} MB, {'float16' if half else 'float32'}"
        )
