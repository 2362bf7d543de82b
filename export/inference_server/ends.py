"""Both ends of a network that a server runs: its inputs of an image and a caption, and its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from engine.backends.base import Backend, Finished, Outputs
from engine.backends.buckets import Arrays
from engine.bundle import Bundle
from engine.errors import InputError
from engine.inputs.network_input import join_slots
from engine.inputs.options import ImageOptions
from engine.inputs.pairs import Caption
from engine.inputs.preparation import Item, Picture, Preparation
from engine.inputs.sources import ImageInput
from engine.inputs.text import CaptionTokenizer
from engine.manifest import Manifest, check_digest, parse_manifest
from engine.prediction import Prediction
from engine.registry import network_of
from engine.running import Runner, Submitted, raised

RECORD = "bundle.json"
TOKEN_STEP = 16  # requests of one shape share a batch: few lengths, full batches


class _Elsewhere(Backend[None]):
    """Stands in for the server, which runs the network."""

    name = "tritonserver"
    library = "Triton Inference Server"

    def _run(self, network: None, feeds: Arrays, batch: int, tokens: int) -> Outputs:
        raise NotImplementedError


class NetworkEnds:
    """Prepares pairs for one network and decides on its outputs; safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """Read and verify bundle.json and tokenizer.json in `folder`; raises BundleError, OSError."""
        self.manifest: Manifest = parse_manifest(check_digest((folder / RECORD).read_bytes()))
        spec, info, weights = self.manifest.preprocess, self.manifest.model, self.manifest.weights
        tokenizer = CaptionTokenizer.of(Bundle(folder, self.manifest))
        network, options = network_of(info.config), ImageOptions()
        self._preparation = Preparation(spec, network, tokenizer, options, thumbnail=0, resize=True)
        model = {
            "name": info.name,
            "size": info.size,
            "precision": self.manifest.precision,
            "backend": _Elsewhere.name,
            "device": "server",
            "weights": weights.kind,
        }
        warnings = () if weights.warning is None else (weights.warning,)
        backend = _Elsewhere(None, self.manifest, "cpu")
        self._runner = Runner(backend, self._preparation, self.manifest, model, warnings)

    def prepare(self, name: str, image: ImageInput | None, caption: Caption | None) -> Item:
        """Prepare one pair, which messages call `name` if that is not empty; raises InputError."""
        return self._preparation.pair(name, image, caption)

    def join(self, name: str, picture: Picture, caption: Caption | None) -> Item:
        """Prepare a pair whose picture was prepared; its pixels are not read. Raises InputError."""
        return self._preparation.caption(name, picture, caption)

    def feeds(self, items: Sequence[Item]) -> dict[str, np.ndarray]:
        """The network's inputs by name: image [B, 3, S, S], input_ids and attention_mask [B, N].

        N is a multiple of TOKEN_STEP, or the most tokens that the network takes.
        """
        pixels = join_slots([item.picture.pixels for item in items])
        text = self._preparation.text(items)
        tokens = text["input_ids"].shape[1]
        padding = min(-(-tokens // TOKEN_STEP) * TOKEN_STEP, self.manifest.limits.max_tokens) - tokens
        padded = {name: np.pad(ids, ((0, 0), (0, padding))) for name, ids in text.items()}
        return {"image": pixels, **padded}

    def answers(self, items: Sequence[Item], outputs: Outputs, inference: float) -> Iterator[Prediction]:
        """Decide on the outputs for prepared pairs; `inference` is the network's time in milliseconds.

        Raises InputError for outputs of fewer tokens than the pairs have, NumericalError for NaN.
        """
        needed, given = max(len(item.tokens.ids) for item in items) - 1, outputs["logits_tok"].shape[1]
        if given < needed:
            raise InputError(f"logits_tok: expected the rows of {needed} tokens, got {given}")
        return raised(self._runner.results(Submitted(items, Finished(outputs), inference)))
