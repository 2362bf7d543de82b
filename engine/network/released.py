"""Maps a released checkpoint's tensors to the inference network's, through the rewrites of `fold`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.network.fold import Affine, fold_cls, fold_latent_query, fold_places, split_packed, stack
from engine.registry import network_of
from engine.registry.config import FusionConfig, NetworkConfig

State = dict[str, Tensor]
_COUNTER = "num_batches_tracked"
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_LAYER = {
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "output_norm",
}
_CROSS = {
    "crossattention.self.query": "cross.query",
    "crossattention.output.dense": "cross.out",
    "crossattention.output.LayerNorm": "cross_norm",
}
_HEAD = (0, 1, 3, 4, 6)  # the layers of a head with parameters


class Released:
    """Tensors by their released names, below a prefix; remembers which were read."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str = "", read: set[str] | None = None) -> None:
        self._state, self._prefix = state, prefix
        self._read: set[str] = set() if read is None else read

    def at(self, name: str) -> Released:
        """The tensors below `name`."""
        return Released(self._state, f"{self._prefix}{name}.", self._read)

    def tensor(self, name: str) -> Tensor:
        """One tensor; raises CheckpointError where it is missing."""
        key = self._prefix + name
        if key not in self._state:
            raise CheckpointError(f"expected the tensor {key!r} among the weights, which is missing")
        self._read.add(key)
        return self._state[key].detach()

    def affine(self, name: str) -> Affine:
        """Weight and bias of one layer."""
        return Affine(self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"))

    def packed(self, name: str) -> Affine:
        """The three input projections of torch's packed attention."""
        return Affine(self.tensor(f"{name}.in_proj_weight"), self.tensor(f"{name}.in_proj_bias"))

    def unread(self) -> list[str]:
        """Names that were not read, except BatchNorm's counter."""
        return sorted(x for x in set(self._state) - self._read if not x.endswith(_COUNTER))


def fold_network(state: Mapping[str, Tensor], config: NetworkConfig, stacked: bool = True) -> State:
    """Compose the exact rewrites over the tensors of a trained network; those unchanged are shared.

    Raises CheckpointError for a missing tensor, and for one that the network of `config` does not have.
    """
    released = Released(state)
    folded: State = network_of(config).load_model().fold(released, config, stacked)
    if unread := released.unread():
        raise CheckpointError(
            f"{len(unread)} tensors are none of {config.name}'s, the first is {unread[0]!r}; "
            "expected the weights of that network alone"
        )
    return folded


def unchanged(released: Released, config: NetworkConfig, stacked: bool) -> State:
    """The `fold` of a network whose released names are those of its `Model`."""
    with torch.device("meta"):
        names = network_of(config).load_model().Model(config, stacked).state_dict()
    return {name: released.tensor(name) for name in names}


def under(prefix: str, tensors: Mapping[str, Tensor] | Affine) -> State:
    """The same tensors with a prefix before their names."""
    named = tensors._asdict() if isinstance(tensors, Affine) else tensors
    return {f"{prefix}.{name}": tensor for name, tensor in named.items()}


def renamed(released: Released, names: Mapping[str, str]) -> State:
    """Rename layers without changing their weight and bias."""
    folded: State = {}
    for name, new in names.items():
        folded |= under(new, released.affine(name))
    return folded


def fold_vision(released: Released, config: NetworkConfig) -> State:
    """A ViT under timm's names."""
    cls, positions = fold_cls(released.tensor("cls_token"), released.tensor("pos_embed"))
    folded = {"cls": cls, "positions": positions}
    folded |= renamed(released, {"patch_embed.proj": "patch_embed.proj", "norm": "norm"})
    for i in range(config.vision_depth):
        folded |= under(f"blocks.{i}", renamed(released.at(f"blocks.{i}"), _BLOCK))
    return folded


def fold_text_layers(released: Released, depth: int) -> State:
    """BERT's embeddings and its first `depth` layers, without cross-attention."""
    embeddings, layers = released.at("bert.embeddings"), released.at("bert.encoder.layer")
    positions, types = (embeddings.tensor(f"{x}_embeddings.weight") for x in ("position", "token_type"))
    folded = {"words.weight": embeddings.tensor("word_embeddings.weight")}
    folded["places"] = fold_places(positions, types)
    folded |= under("norm", embeddings.affine("LayerNorm"))
    for i in range(depth):
        folded |= under(f"text_layers.{i}", fold_layer(layers.at(str(i))))
    return folded


def fold_text(released: Released, config: FusionConfig, stacked: bool) -> State:
    """BERT with cross-attention from `fusion_start` on, and the classifier of its tokens."""
    layers, start = released.at("bert.encoder.layer"), config.fusion_start
    folded = fold_text_layers(released, start) | fold_head(released, "classifier")
    fusion = [layers.at(str(i)) for i in range(start, config.text_depth)]
    products = [[x.affine(f"crossattention.self.{y}") for y in ("key", "value")] for x in fusion]
    for i, layer in enumerate(fusion):
        folded |= under(f"fusion_layers.{i}", fold_layer(layer, crossed=True))
        if not stacked:
            folded |= under(f"fusion_layers.{i}.cross.key_value", stack(products[i]))
    if stacked:
        folded |= under("key_values", stack([product for pair in products for product in pair]))
    return folded


def fold_layer(layer: Released, crossed: bool = False) -> State:
    """One BERT layer; its cross-attention, where it has one, without the product of keys and values."""
    products = [layer.affine(f"attention.self.{name}") for name in ("query", "key", "value")]
    names = _LAYER | _CROSS if crossed else _LAYER
    return {**renamed(layer, names), **under("attention.qkv", stack(products))}


def fold_head(released: Released, name: str, new: str | None = None) -> State:
    """A `Head`, which keeps its name unless it gets a new one."""
    return renamed(released, {f"{name}.{i}": f"{new or name}.{i}" for i in _HEAD})


def fold_cross(released: Released, name: str) -> State:
    """A packed attention as a product for the query and one for key and value."""
    query, key, value = split_packed(released.packed(name))
    return {
        **under("query", query),
        **under("key_value", stack([key, value])),
        **under("out", released.affine(f"{name}.out_proj")),
    }


def fold_pool(
    released: Released, query: str, heads: int, norm: str = "norm_layer_aggr", attention: str = "aggregator"
) -> State:
    """A packed attention, folded with one learnt query; several queries may share it."""
    affine = released.affine(norm)
    folded = fold_latent_query(released.tensor(query), affine, released.packed(attention), heads)
    return {
        **under("norm", affine),
        **folded._asdict(),
        **under("out", released.affine(f"{attention}.out_proj")),
    }
