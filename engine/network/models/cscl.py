"""CSCL for inference: CLIP and RoBERTa, two streams of fusion, consistency within and across them.

P patches, n = N - 1 words. Every pair reads its own neighbours, whatever its batch and its padding. Words are
padded to at least the number of neighbours, which the tokenizer of the network's bundle sees to.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.network.blocks import (
    Choice,
    CrossAttention,
    Gelu,
    Head,
    LatentPool,
    Norm,
    QuickGelu,
    SelfAttention,
    dtype_of,
    empty,
)
from engine.network.fold import fold_cls, fold_places, fold_positions, fold_type, position_codes, stack
from engine.network.model import InferenceModel
from engine.network.output import Output
from engine.network.parts import Part, linears
from engine.network.released import (
    Released,
    State,
    fold_cross,
    fold_head,
    fold_layer,
    fold_pool,
    renamed,
    under,
)
from engine.network.text import TextEncoder, TextLayer, layers_of
from engine.network.vision import Vision
from engine.registry.config import BERT_EPS, TORCH_EPS
from engine.registry.cscl import FIRST_POSITION, CsclConfig

FLOOR = 1e-6  # of a word's score, before its logarithm
PADDING_SCORE = 0.5  # of what is no word
NO_FACE = 0.5  # the logit below which, as published, a face type asks for no box


class _Clip(Vision):
    """CLIP's ViT: a norm before the blocks as well, QuickGELU within."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__(config, TORCH_EPS, QuickGelu, bias=False)
        self.first_norm = Norm(config.width, TORCH_EPS)

    def embed(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 1+P, D]."""
        x: Tensor = self.first_norm(super().embed(image))
        return x


class _ContextLayer(nn.Module):
    """Post-norm transformer layer on features with their positions added."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.intra_hidden
        self.attention = SelfAttention(width, config.heads)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm1, self.norm2 = Norm(width, TORCH_EPS), Norm(width, TORCH_EPS)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """[B, n, D], positions [n, D] and the mask [B, n] of padding, or None -> [B, n, D]."""
        x = x + positions
        x = self.norm1(self.attention(x, mask), x)
        return self.norm2(self.ffn(x), x)


class _Consistency(Part):
    """Encodes what is compared. In float32 throughout, since a choice of neighbours follows, which jumps."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__()
        one, two, three = config.consistency_widths
        self.layers = nn.Sequential(
            nn.Linear(config.width, one),
            Norm(one, TORCH_EPS),
            Gelu(),
            nn.Linear(one, two),
            Norm(two, TORCH_EPS),
            Gelu(),
            nn.Linear(two, three),
        )

    def float_parameters(self) -> Iterator[nn.Parameter]:
        """All; see `Part`."""
        return self.parameters()

    def unquantised(self, precision: str) -> Iterator[nn.Linear]:
        """All; see `Part`."""
        return linears(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, D] -> unit vectors [B, n, E], at least float32."""
        encoded = self.layers(x.to(dtype_of(self)))
        return encoded / encoded.norm(dim=-1, keepdim=True)


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """Of unit vectors [B, n, E] and [B, m, E]: [B, n, m] from 0, opposite, to 1, the same."""
    return ((one @ other.transpose(1, 2) + 1) / 2).clamp(0, 1)


class _Intra(nn.Module):
    """Consistency within one stream: contextual features, each of which reads its neighbours.

    `places` is the most tokens that a stream has.
    """

    def __init__(self, config: CsclConfig, places: int, count: int) -> None:
        super().__init__()
        width, heads = config.width, config.neighbour_heads
        self.choice = Choice(count)
        self.positions = empty(places, width)
        self.layers = nn.ModuleList(_ContextLayer(config) for _ in range(config.intra_depth))
        self.consistency = _Consistency(config)
        self.alike, self.unlike = SelfAttention(width, heads), SelfAttention(width, heads)
        self.alike_mlp, self.unlike_mlp = Head(width, width, tokens=True), Head(width, width, tokens=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, n, D] and the mask [B, n] of its padding, or None -> [B, n, D]."""
        for layer in self.layers:
            x = layer(x, self.positions[: x.shape[1]], mask)
        alike, unlike = self.choose(x, mask)
        x = x + self.alike_mlp(self.alike(x, alike))
        return x + self.unlike_mlp(self.unlike(x, unlike))

    def choose(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Masks [B, n, n] of the most alike, of which a token itself is the last, and of the least alike."""
        encoded = self.consistency(x)
        scores = similarity(encoded, encoded)
        valid = None if mask is None else mask[:, :, None] * mask[:, None]
        itself = torch.eye(x.shape[1], dtype=scores.dtype, device=x.device)
        alike, unlike = self.choice(scores - itself, scores, valid)
        nobody = torch.zeros_like(scores, dtype=torch.int32)
        chosen = nobody.scatter(-1, alike, 1), nobody.scatter(-1, unlike, 1)
        return chosen if valid is None else (chosen[0] * valid, chosen[1] * valid)


class _Extra(nn.Module):
    """Consistency of one stream with the other: which of its tokens agree, and one feature of all."""

    def __init__(self, config: CsclConfig, count: int) -> None:
        super().__init__()
        width, heads = config.width, config.neighbour_heads
        self.choice = Choice(count)
        self.own, self.other = Head(width, width, tokens=True), Head(width, width, tokens=True)
        self.consistency = _Consistency(config)
        self.about, self.pool = LatentPool(width, config.heads), LatentPool(width, config.heads)
        self.alike, self.unlike = CrossAttention(width, heads), CrossAttention(width, heads)
        self.alike_mlp, self.unlike_mlp = Head(width, width), Head(width, width)

    def forward(
        self, own: Tensor, whole: Tensor, other: Tensor, mask: Tensor | None, other_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, n, D] and [CLS] [B, 1, D] of a stream, tokens [B, m, D] of the other, masks of padding.

        Returns the feature [B, D], and scores [B, n], at least float32: 1 agrees with the other stream.
        """
        own = self.own(own)
        about = self.about(self.other(other), other_mask)
        scores = similarity(self.consistency(own), self.consistency(about[:, None]))[..., 0]
        present = None if mask is None else nn.functional.pad(mask, (1, 0), value=1)
        x = self.pool(torch.cat([whole, own], dim=1), present)[:, None]
        alike, unlike = self.choice(scores, scores, mask)
        x = x + self.alike_mlp(_read(self.alike, x, own, mask, alike))
        x = x + self.unlike_mlp(_read(self.unlike, x, own, mask, unlike))
        return x[:, 0], scores


def _read(attend: CrossAttention, x: Tensor, tokens: Tensor, mask: Tensor | None, chosen: Tensor) -> Tensor:
    """Let x [B, 1, D] read the chosen rows [B, k] of tokens [B, n, D]; padding among them is ignored."""
    rows = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
    return attend(x, *attend.project(rows), None if mask is None else mask.gather(1, chosen))


class Model(InferenceModel):
    """CSCL. It has no products to stack across layers, since the memory of each is new."""

    def __init__(self, config: CsclConfig, stacked: bool = True) -> None:
        super().__init__(config)
        width = config.width
        self.vision = _Clip(config)
        self.text = TextEncoder(config, config.text_depth, TORCH_EPS)
        self.image_transform, self.text_transform = nn.Linear(width, width), nn.Linear(width, width)
        self.image_fusion, self.text_fusion = (
            nn.ModuleList(TextLayer(config, True, False, BERT_EPS) for _ in range(config.fusion_depth))
            for _ in range(2)
        )
        self.image_pooler, self.text_pooler = nn.Linear(width, width), nn.Linear(width, width)
        self.fusion_head, self.itm_head = Head(2 * width, width), Head(width, 2)
        self.image_intra = _Intra(config, config.patches, config.image_neighbours)
        self.text_intra = _Intra(config, config.positions - 1, config.text_neighbours)
        self.image_extra = _Extra(config, config.image_neighbours)
        self.text_extra = _Extra(config, config.text_neighbours)
        self.bbox_head = Head(width, 4, exact=True)
        self.image_classes, self.text_classes = Head(width, 2), Head(width, 2)

    def see(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens [B, 1+P, D] before fusion; both are the same, since the whole network reads them."""
        x = self.image_transform(self.vision(image.to(self.vision.dtype))[0])
        return x, x

    def answer(
        self, for_text: Tensor, for_image: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Output:
        """Answer captions about images of which only the features are given."""
        mask = attention_mask.to(torch.int32)
        text = self.text_transform(self.text.encode(input_ids, mask))
        image, text = self.fuse(for_image, text, mask)
        pooled = torch.cat([self.text_pooler(text[:, 0]), self.image_pooler(image[:, 0])], dim=-1).tanh()
        words = mask[:, 1:]
        patches, read = self.image_intra(image[:, 1:]), self.text_intra(text[:, 1:], words)
        picture, image_scores = self.image_extra(patches, image[:, :1], read, None, words)
        caption, text_scores = self.text_extra(read, text[:, :1], patches, words, None)
        faces, texts = self.image_classes(picture), self.text_classes(caption)
        box = self.bbox_head(picture.to(dtype_of(self.bbox_head))).sigmoid()
        text_scores = text_scores.masked_fill(words == 0, PADDING_SCORE)
        return Output(
            self.itm_head(self.fusion_head(pooled)),
            torch.cat([faces, texts], dim=-1),
            torch.where(faces.amax(-1, keepdim=True) < NO_FACE, 0, box),
            torch.stack([text_scores, 1 - text_scores], dim=-1).clamp(min=FLOOR).log(),
            patch_scores=image_scores,
        ).widened()

    def fuse(self, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams [B, 1+P, D] and [B, N, D] through their layers, each of which reads the old pair."""
        layers = zip(layers_of(self.image_fusion), layers_of(self.text_fusion), strict=True)
        for seeing, reading in layers:
            image, text = _fuse(seeing, image, None, text, mask), _fuse(reading, text, mask, image, None)
        return image, text


def _fuse(
    layer: TextLayer, x: Tensor, mask: Tensor | None, memory: Tensor, memory_mask: Tensor | None
) -> Tensor:
    """One stream's fusion layer over the other stream, with the masks of their padding."""
    x = layer.attend(x, mask)
    crossed = layer.cross(x, *layer.cross.project(memory), memory_mask)
    return layer.feed_forward(layer.cross_norm(crossed, x))


def fold(released: Released, config: CsclConfig, stacked: bool) -> State:
    """The tensors of `Model`."""
    meter = released.at("meter")
    types = meter.tensor("token_type_embeddings.weight")
    folded = {
        **under("vision", _clip(meter.at("vit_model.visual"), config)),
        **under("text", _roberta(meter.at("text_transformer"), config)),
        **under("image_transform", fold_type(meter.affine("cross_modal_image_transform"), types[1])),
        **under("text_transform", fold_type(meter.affine("cross_modal_text_transform"), types[0])),
        **_heads(released),
    }
    tables = {
        "image": _positions(released.at("emb_img_pos"), image_places(config)),
        "text": _positions(released.at("emb_text_pos"), text_places(config)),
    }
    for name, short in (("image", "img"), ("text", "text")):
        layers = meter.at(f"cross_modal_{name}_layers")
        for i in range(config.fusion_depth):
            folded |= under(f"{name}_fusion.{i}", _fusion(layers.at(str(i))))
        folded |= under(f"{name}_pooler", meter.affine(f"cross_modal_{name}_pooler.dense"))
        folded |= under(f"{name}_intra", _intra(released.at(f"{short}_intra_model"), config))
        folded |= under(f"{name}_extra", _extra(released.at(f"{short}_extra_model"), config))
        folded[f"{name}_intra.positions"] = tables[name]
    return folded


_CLIP_BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.out_proj": "attention.out",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_CONTEXT = {
    "self_attn.out_proj": "attention.out",
    "FFN.0": "ffn.0",
    "FFN.2": "ffn.2",
    "norm1": "norm1",
    "norm2": "norm2",
}
_ENCODER = {str(i): f"layers.{i}" for i in (0, 1, 3, 4, 6)}


def _clip(visual: Released, config: CsclConfig) -> State:
    first = visual.tensor("class_embedding")[None, None]
    cls, positions = fold_cls(first, visual.tensor("positional_embedding")[None])
    folded = {
        "cls": cls,
        "positions": positions,
        "patch_embed.proj.weight": visual.tensor("conv1.weight"),
        **renamed(visual, {"ln_pre": "first_norm", "ln_post": "norm"}),
    }
    for i in range(config.vision_depth):
        block = visual.at(f"transformer.resblocks.{i}")
        folded |= under(f"blocks.{i}", renamed(block, _CLIP_BLOCK))
        folded |= under(f"blocks.{i}.attention.qkv", block.packed("attn"))
    return folded


def _roberta(released: Released, config: CsclConfig) -> State:
    embeddings = released.at("embeddings")
    positions, types = (embeddings.tensor(f"{x}_embeddings.weight") for x in ("position", "token_type"))
    folded = {
        "words.weight": embeddings.tensor("word_embeddings.weight"),
        "places": fold_places(positions[FIRST_POSITION:], types),
        **under("norm", embeddings.affine("LayerNorm")),
    }
    for i in range(config.text_depth):
        folded |= under(f"text_layers.{i}", fold_layer(released.at(f"encoder.layer.{i}")))
    return folded


def _fusion(layer: Released) -> State:
    products = [layer.affine(f"crossattention.self.{name}") for name in ("key", "value")]
    return {**fold_layer(layer, crossed=True), **under("cross.key_value", stack(products))}


def _heads(released: Released) -> State:
    names = {"cls_head_img": "image_classes", "cls_head_text": "text_classes"}
    names |= {name: name for name in ("fusion_head", "itm_head", "bbox_head")}
    return {k: v for old, new in names.items() for k, v in fold_head(released, old, new).items()}


def _intra(released: Released, config: CsclConfig) -> State:
    folded = under("consistency", renamed(released.at("consist_encoder"), _ENCODER))
    for i in range(config.intra_depth):
        layer = released.at(f"correlation_model.layers.{i}")
        folded |= under(f"layers.{i}", renamed(layer, _CONTEXT))
        folded |= under(f"layers.{i}.attention.qkv", layer.packed("self_attn"))
    for name, new in (("aggregator", "alike"), ("aggregator_2", "unlike")):
        folded |= under(f"{new}.qkv", released.packed(name))
        folded |= under(f"{new}.out", released.affine(f"{name}.out_proj"))
    return folded | _mlps(released)


def _extra(released: Released, config: CsclConfig) -> State:
    folded = under("consistency", renamed(released.at("consist_encoder_feat"), _ENCODER)) | _mlps(released)
    for name, new in (("feat_encoder", "own"), ("cross_encoder", "other")):
        folded |= fold_head(released, name, new)
    for name, new in (("cross", "about"), ("feat", "pool")):
        pool = fold_pool(
            released, f"cls_token_{name}", config.heads, f"norm_layer_{name}", f"aggregator_{name}"
        )
        folded |= under(new, pool)
    for name, new in (("aggregator", "alike"), ("aggregator_2", "unlike")):
        folded |= under(new, fold_cross(released, name))
    return folded


def _mlps(released: Released) -> State:
    return fold_head(released, "aggregator_mlp", "alike_mlp") | fold_head(
        released, "aggregator_mlp_2", "unlike_mlp"
    )


def _positions(released: Released, codes: Tensor) -> Tensor:
    return fold_positions(codes, released.affine("0"), released.affine("1"))


def image_places(config: CsclConfig) -> Tensor:
    """The codes [P, 2 D] of the patches' centres, y before x."""
    code = position_codes((torch.arange(config.grid) + 0.5) / config.grid, config.width)
    return torch.cat([code.repeat_interleave(config.grid, 0), code.repeat(config.grid, 1)], dim=-1)


def text_places(config: CsclConfig) -> Tensor:
    """The codes [n, D] of words, counted from 0."""
    return position_codes(torch.arange(config.positions - 1), config.width)
