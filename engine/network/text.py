"""Text encoder: BERT with cross-attention to the image in its upper layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from engine.network.blocks import CrossAttention, Gelu, Head, Norm, SelfAttention, empty
from engine.registry.config import BERT_EPS, FusionConfig, NetworkConfig


class TextLayer(nn.Module):
    """One BERT layer; with `stacked` its cross-attention gets keys and values from outside."""

    def __init__(self, config: NetworkConfig, fusion: bool, stacked: bool, eps: float = BERT_EPS) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.attention = SelfAttention(width, config.heads)
        self.attention_norm = Norm(width, eps)
        if fusion:
            self.cross = CrossAttention(width, config.heads, stacked)
            self.cross_norm = Norm(width, eps)
        self.up, self.act, self.down = nn.Linear(width, hidden), Gelu(), nn.Linear(hidden, width)
        self.output_norm = Norm(width, eps)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, N, D] and the mask [B, N] of its padding, or None -> [B, N, D]."""
        return self.attention_norm(self.attention(x, mask), x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.output_norm(self.down(self.act(self.up(x), self.down)), x)


class TextEncoder(nn.Module):
    """BERT's embeddings and `depth` layers."""

    def __init__(self, config: NetworkConfig, depth: int, eps: float = BERT_EPS) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.places = empty(config.positions, config.width)
        self.norm = Norm(config.width, eps)
        self.text_layers = nn.ModuleList(TextLayer(config, False, False, eps) for _ in range(depth))

    def encode(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask [B, N] -> [B, N, D]."""
        x = self.norm(self.words(input_ids) + self.places[: input_ids.shape[1]])
        for layer in layers_of(self.text_layers):
            x = layer.feed_forward(layer.attend(x, mask))
        return x


def layers_of(layers: nn.ModuleList) -> list[TextLayer]:
    """The layers with their type, which a ModuleList does not keep."""
    return [cast(TextLayer, layer) for layer in layers]


class Text(TextEncoder):
    """Text encoder; `stacked` projects keys and values of all fusion layers in one product (rewrite 5).

    With `with_map` the last fusion layer gives the map of MGCA.
    """

    def __init__(self, config: FusionConfig, stacked: bool, with_map: bool = False) -> None:
        super().__init__(config, config.fusion_start)
        width, fusions = config.width, config.text_depth - config.fusion_start
        self.with_map = with_map
        self.fusion_layers = nn.ModuleList(TextLayer(config, True, stacked) for _ in range(fusions))
        self.key_values = nn.Linear(width, 2 * width * fusions) if stacked else None
        self.classifier = Head(width, 2)

    def _keys_and_values(self, image: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        if self.key_values is None:
            return [layer.cross.project(image) for layer in layers_of(self.fusion_layers)]
        parts = self.key_values(image).chunk(2 * len(self.fusion_layers), dim=-1)
        return list(zip(parts[::2], parts[1::2], strict=True))

    def fuse(self, x: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the fusion layers of x [B, N, D] over image [B, M, D]; the map of the last one, or None."""
        guide = None
        layers = layers_of(self.fusion_layers)
        for layer, (key, value) in zip(layers, self._keys_and_values(image), strict=True):
            x = layer.attend(x, mask)
            if self.with_map and layer is layers[-1]:
                crossed, guide = layer.cross.guided(x, key, value)
            else:
                crossed = layer.cross(x, key, value)
            x = layer.feed_forward(layer.cross_norm(crossed, x))
        return x, guide
