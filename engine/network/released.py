"""Maps a released checkpoint's tensors to the inference network's, through the rewrites of `fold`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from engine.errors import CheckpointError
from engine.network.config import NetworkConfig
from engine.network.fold import (
    Affine,
    Statistics,
    fold_cls,
    fold_conv_fusion,
    fold_latent_query,
    fold_places,
    split_packed,
    stack,
    stack_gates,
)
from kernels.conv_fusion import pack

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
_POST_NORM = {"layer_norm1": "norm1", "layer_norm2": "norm2", "ffn.0": "ffn.0", "ffn.2": "ffn.2"}
_GUIDANCE = {"0": "first", "2": "rest.0", "4": "rest.2", "7": "rest.5"}
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
    folded = {
        **_under("vision", _vision(released.at("visual_encoder"), config)),
        **_under("text", _text(released.at("text_encoder"), config, stacked)),
        **_under("branch", _branch(released, config)),
    }
    if unread := released.unread():
        raise CheckpointError(
            f"{len(unread)} tensors are none of {config.name}'s, the first is {unread[0]!r}; "
            "expected the weights of that network alone"
        )
    return folded


def _under(prefix: str, tensors: Mapping[str, Tensor] | Affine) -> State:
    """The same tensors with a prefix before their names."""
    named = tensors._asdict() if isinstance(tensors, Affine) else tensors
    return {f"{prefix}.{name}": tensor for name, tensor in named.items()}


def _renamed(released: Released, names: Mapping[str, str]) -> State:
    """Rename layers without changing their weight and bias."""
    folded: State = {}
    for name, new in names.items():
        folded |= _under(new, released.affine(name))
    return folded


def _vision(released: Released, config: NetworkConfig) -> State:
    cls, positions = fold_cls(released.tensor("cls_token"), released.tensor("pos_embed"))
    folded = {"cls": cls, "positions": positions}
    folded |= _renamed(released, {"patch_embed.proj": "patch_embed.proj", "norm": "norm"})
    for i in range(config.vision_depth):
        folded |= _under(f"blocks.{i}", _renamed(released.at(f"blocks.{i}"), _BLOCK))
    return folded | (_caformer(released, config) if config.name == "cals" else {})


def _caformer(released: Released, config: NetworkConfig) -> State:
    block = released.at("MHA2")
    branches = ["Conv", *(f"Scales.{i}" for i in range(len(config.caformer_kernels) - 1))]
    fusion = stack([_conv_branch(released.at(name)) for name in branches])
    return {
        **_renamed(block, _POST_NORM),
        **_under("attention.qkv", block.packed("mha")),
        **_under("attention.out", block.affine("mha.out_proj")),
        **_under("fusion", fusion),
        "fusion.packed": pack(*fusion, config.width),
    }


def _conv_branch(conv: Released) -> Affine:
    """One convolution of CAFormer with its BatchNorm, at the pixels that count."""
    statistics = Statistics(conv.tensor("bn2.running_mean"), conv.tensor("bn2.running_var"))
    return fold_conv_fusion(conv.tensor("conv.weight"), conv.affine("bn2"), statistics)


def _text(released: Released, config: NetworkConfig, stacked: bool) -> State:
    embeddings, layers = released.at("bert.embeddings"), released.at("bert.encoder.layer")
    start = config.fusion_start
    positions, types = (embeddings.tensor(f"{x}_embeddings.weight") for x in ("position", "token_type"))
    folded = {"words.weight": embeddings.tensor("word_embeddings.weight")}
    folded["places"] = fold_places(positions, types)
    folded |= _under("norm", embeddings.affine("LayerNorm"))
    folded |= _head(released, "classifier")
    for i in range(start):
        folded |= _under(f"text_layers.{i}", _layer(layers.at(str(i))))
    fusion = [layers.at(str(i)) for i in range(start, config.text_depth)]
    products = [[x.affine(f"crossattention.self.{y}") for y in ("key", "value")] for x in fusion]
    for i, layer in enumerate(fusion):
        folded |= _under(f"fusion_layers.{i}", _layer(layer) | _renamed(layer, _CROSS))
        if not stacked:
            folded |= _under(f"fusion_layers.{i}.cross.key_value", stack(products[i]))
    if stacked:
        folded |= _under("key_values", stack([product for pair in products for product in pair]))
    return folded


def _layer(layer: Released) -> State:
    """One BERT layer but for its cross-attention."""
    products = [layer.affine(f"attention.self.{name}") for name in ("query", "key", "value")]
    return {**_renamed(layer, _LAYER), **_under("attention.qkv", stack(products))}


def _head(released: Released, name: str) -> State:
    return _renamed(released, {f"{name}.{i}": f"{name}.{i}" for i in _HEAD})


def _branch(released: Released, config: NetworkConfig) -> State:
    folded = _renamed(released, {"norm_layer_it_cross_atten": "norm"})
    for name in ("bbox_head", "itm_head", "cls_head"):
        folded |= _head(released, name)
    folded |= _under("pool", _pool(released, "cls_token_local", config.heads))
    if config.name == "asap":
        return folded | _asap(released)
    folded |= _under("cross", _cross(released, "it_cross_attn"))
    return folded | (_cals(released, config.heads) if config.name == "cals" else {})


def _asap(released: Released) -> State:
    return {
        **_under("cross", _cross(released, "it_cross_attn.crossatten")),
        **_under("own", _cross(released, "it_cross_attn.selfatten")),
        "share_real_fake": released.tensor("UtilsB"),
        "share_classes": released.tensor("UtilsC"),
    }


def _cals(released: Released, heads: int) -> State:
    faces = released.at("fch")
    gates = stack_gates([faces.affine(f"conv_attention.{i}") for i in range(2)])
    return {
        **_renamed(released.at("LIG.conv_net"), _GUIDANCE),
        **_under("refined_pool", _pool(released, "cls_token_local_e", heads)),
        "faces.lambda_param": faces.tensor("lambda_param"),
        **_under("faces.gate", gates),
        **_under("faces.fc_global", faces.affine("fc_global")),
    }


def _cross(released: Released, name: str) -> State:
    """A packed attention as a product for the query and one for key and value."""
    query, key, value = split_packed(released.packed(name))
    return {
        **_under("query", query),
        **_under("key_value", stack([key, value])),
        **_under("out", released.affine(f"{name}.out_proj")),
    }


def _pool(released: Released, query: str, heads: int) -> State:
    """The shared aggregator, folded with one learnt query."""
    norm = released.affine("norm_layer_aggr")
    folded = fold_latent_query(released.tensor(query), norm, released.packed("aggregator"), heads)
    return {
        **_under("norm", norm),
        **folded._asdict(),
        **_under("out", released.affine("aggregator.out_proj")),
    }
