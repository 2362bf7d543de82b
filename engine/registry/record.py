"""What the project knows of a network beside its computation: one frozen record each, without torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from engine.registry.config import TYPES, NetworkConfig

Shape = tuple[int | str, ...]


class HeatMap(NamedTuple):
    """How an output becomes the map that shows where an answer comes from.

    read: float64 values of one pair, padding cut off, and the number of patches along a side to float32
    [grid, grid] in [0, 1]. label: what a high value says of its patch, for a legend.
    """

    read: Callable[[np.ndarray, int], np.ndarray]
    label: str


@dataclass(frozen=True)
class Tensor:
    """One input or output of a graph.

    A dimension is a number, "batch", "tokens", "tokens - 1" (the words, without [CLS]), or the name of a
    property of the network's config. meaning: what its values are, for whoever runs the graph; empty where
    the name says it. heatmap: for an output that a heat map is read from. jumps: single values follow a
    choice that rounding may decide, so that an exact form is held to the RMS of its difference in place of
    the largest.
    """

    name: str
    dtype: str
    shape: Shape
    meaning: str = ""
    heatmap: HeatMap | None = None
    jumps: bool = False

    def rows(self, tokens: int) -> int | None:
        """Rows of axis 1 for a caption of `tokens` tokens; None where that axis is none of tokens."""
        return {"tokens": tokens, "tokens - 1": tokens - 1}.get(str(self.shape[1]))

    def shape_of(self, config: NetworkConfig) -> Shape:
        """The shape for one configuration: numbers, "batch", "tokens" and "tokens - 1"."""
        return tuple(
            getattr(config, d) if isinstance(d, str) and hasattr(config, d) else d for d in self.shape
        )


IMAGE = Tensor("image", "float32", ("batch", 3, "image_size", "image_size"))
INPUT_IDS = Tensor("input_ids", "int64", ("batch", "tokens"))
ATTENTION_MASK = Tensor("attention_mask", "int64", ("batch", "tokens"))
PAIR = (IMAGE, INPUT_IDS, ATTENTION_MASK)
_CORNERS = "(center x, center y, width, height) in parts of the image"
BOX_GIVEN = Tensor("box_given", "float32", ("batch", 4), f"the box to judge, {_CORNERS}")
ANSWERS = (
    Tensor("logits_real_fake", "float32", ("batch", 2), "the second speaks for manipulation; softmax"),
    Tensor("logits_multicls", "float32", ("batch", len(TYPES)), f"{', '.join(TYPES)}; sigmoid of each"),
    Tensor("box", "float32", ("batch", 4), f"the manipulated face, {_CORNERS}"),
    Tensor(
        "logits_tok",
        "float32",
        ("batch", "tokens - 1", 2),
        "a row for each token but the first; the second speaks for manipulation; softmax",
    ),
)


@dataclass(frozen=True)
class TokenizerSpec:
    """How captions become ids: the library's kind of model, and its tokens by the part they play.

    min_tokens: the shortest input that the network takes, [CLS] and padding included.
    """

    kind: str
    cls: str
    unknown: str | None
    min_tokens: int

    @property
    def pieces(self) -> str:
        """What the pieces of its vocabulary are called."""
        return "byte pairs" if self.kind == "byte_bpe" else "word pieces"


# First names of what training on ALBEF keeps; its momentum towers and queues are told by their endings.
DEAD = frozenset({"temp", "vision_proj", "text_proj", "queue_ptr"})
WORDPIECE = TokenizerSpec("wordpiece", "[CLS]", "[UNK]", 2)
BYTE_BPE = TokenizerSpec("byte_bpe", "<s>", None, 2)


@dataclass(frozen=True)
class Keys:
    """The names in a network's checkpoints.

    marks: beginnings of keys; a file with one of them may be this network's. extends: networks whose marks
    its files have too. dead: beginnings of keys, up to a dot, that inference never reads. renamed: beginnings
    that some files have, and those read here. remarks: what is said of a file with keys that begin so.
    parts: names of several files that are one network's, by the prefix that joins them. words,
    text_positions, image_positions, width: the keys whose shapes tell the vocabulary, the longest caption,
    the resolution and the width. shape: further fields of the config, from the shapes of all tensors by key.
    """

    marks: tuple[str, ...]
    extends: tuple[str, ...] = ()
    dead: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Keys] = field(default_factory=dict)
    words: str = "text_encoder.bert.embeddings.word_embeddings.weight"
    text_positions: str = "text_encoder.bert.embeddings.position_embeddings.weight"
    image_positions: str = "visual_encoder.pos_embed"
    width: str = "visual_encoder.cls_token"
    shape: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]] = lambda shapes: {}


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network.

    title: as its paper writes it; source: the paper. licence: of the published weights. sizes: "base", the
    paper's shape, and "tiny", the same code in a test's size; one of them is enough, and the larger is first.
    parameters: how many are live at inference, for each of the sizes. gflop: of the form for inference at the
    first size, for a pair of 24 and of 50 tokens. residual: the scale of drawn weights where a residual
    branch ends (`dgm4.seeded`). compares: all answers but the verdict come of comparing the image with words,
    so that a caption without any leaves the verdict alone. trainable: `dgm4 train` has an objective for it.

    Modules with the computation, by convention: `engine.network.models.<name>` has `Model` and `fold`,
    `dgm4.models.<name>` has `Published`, the published form under the names of the released checkpoints. A
    network whose `Published` is its `Model`, or that is registered from outside, names in `module` the one
    that has all three.
    """

    name: str
    title: str
    source: str
    licence: str
    sizes: Mapping[str, NetworkConfig]
    keys: Keys
    parameters: Mapping[str, int]
    gflop: tuple[float, float]
    inputs: tuple[Tensor, ...] = PAIR
    outputs: tuple[Tensor, ...] = ANSWERS
    tokenizer: TokenizerSpec = WORDPIECE
    trainable: bool = False
    residual: float = 1.5
    compares: bool = False
    module: str = ""

    @property
    def config(self) -> type[NetworkConfig]:
        """The class of its configurations."""
        return type(next(iter(self.sizes.values())))

    @property
    def box(self) -> str | None:
        """The input of the boxes to judge, which the caller gives; None where the network finds them."""
        return BOX_GIVEN.name if BOX_GIVEN in self.inputs else None

    def further(self, config: NetworkConfig) -> dict[str, Shape]:
        """Names of the inputs beside a pair's own, and the shape of one pair's."""
        return {x.name: x.shape_of(config)[1:] for x in self.inputs if x not in PAIR}

    @property
    def heatmap(self) -> Tensor | None:
        """The output that a heat map is read from; None where the network has none."""
        return next((output for output in self.outputs if output.heatmap), None)

    def load_model(self) -> ModuleType:
        """The module of the form for inference; it imports torch."""
        return importlib.import_module(self.module or f"engine.network.models.{self.name}")

    def load_published(self) -> ModuleType:
        """The module of the published form; it imports torch and dgm4."""
        return importlib.import_module(self.module or f"dgm4.models.{self.name}")
