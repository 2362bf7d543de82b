"""The baseline: the networks as the papers' code runs them in eager torch.

Same weights, same answers as `dgm4`, with what that code does beside: attention spelled out as products
and a softmax, torch's nn.MultiheadAttention returning its averaged weights, a second run of all BERT
layers for the token logits, CAFormer's fusion at the picture's resolution, both streams of CALS apart. The
masks of CSCL's neighbours are those of each pair, which costs the same as those of others.
"""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn

from dgm4.layers import PackedAttention, merge_heads, padding_bias
from dgm4.model import Detector, Output
from dgm4.text import BertAttention
from dgm4.vision import SelfAttention


def spelled_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention in separate operators; query [B, H, N, d], key and value [B, H, M, d]."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ value


class PublishedVisionAttention(nn.Module):
    """ViT self-attention, spelled out."""

    def __init__(self, trained: SelfAttention) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = trained.heads, trained.qkv, trained.proj

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(merge_heads(spelled_attention(q, k, v, None)))


class PublishedBertAttention(BertAttention):
    """BERT attention, spelled out."""

    def __init__(self, trained: BertAttention) -> None:
        nn.Module.__init__(self)
        self.self, self.output, self.dropout = trained.self, trained.output, trained.dropout

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, N, D], [B, M, D] -> [B, N, D]."""
        q, k, v = self.self(x, memory)
        return self.output(merge_heads(spelled_attention(q, k, v, bias)), x)


class PublishedPackedAttention(nn.Module):
    """torch's own module, which averages its weights over the heads too, but in CLIP."""

    averages = True

    def __init__(self, trained: PackedAttention) -> None:
        super().__init__()
        width = trained.out_proj.in_features
        self.mha = nn.MultiheadAttention(width, trained.heads, batch_first=True, device="meta")
        self.mha.load_state_dict(trained.state_dict(), assign=True)

    def forward(self, query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, N, D], [B, M, D] -> [B, N, D]; bias [B, 1, 1, M] of padding, or [B, 1, N, M] of pairs."""
        padding = pairs = None
        if bias is not None and bias.shape[2] == 1:
            padding = bias[:, 0, 0] != 0
        elif bias is not None:
            pairs = bias.expand(-1, self.mha.num_heads, -1, -1).flatten(0, 1)
        masks = {"key_padding_mask": padding, "attn_mask": pairs}
        return cast(Tensor, self.mha(query, key, key, need_weights=self.averages, **masks)[0])


_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    SelfAttention: PublishedVisionAttention,
    BertAttention: PublishedBertAttention,
    PackedAttention: PublishedPackedAttention,
}


_CLIP = ".resblocks."


def _spell_out(module: nn.Module) -> None:
    """Replace every attention below `module` by the published form, sharing its weights."""
    for name, child in module.named_children():
        form = _FORMS.get(type(child))
        if form is None:
            _spell_out(child)
        else:
            setattr(module, name, form(child))


class Published(nn.Module):
    """A network as published, over the same weights; the given model stays as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Parameters of its own, without a copy of their values: casting this form must not cast the model.
        shared: dict[int, Tensor] = {id(x): nn.Parameter(x.detach(), False) for x in model.parameters()}
        shared |= {id(x): x for x in model.buffers()}
        self.model = copy.deepcopy(model, shared)
        _spell_out(self.model)
        self.model.eval()  # the new attentions too
        for name, module in self.model.named_modules():
            if isinstance(module, PublishedPackedAttention):
                module.averages = _CLIP not in name

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> Output:
        """As the network's own `forward`."""
        model = self.model
        if not isinstance(model, Detector):  # its published form has the second run itself
            return cast(Output, model(image, input_ids, attention_mask, **others))
        bert = model.text_encoder.bert
        for_text, for_image = model.visual_encoder(image)
        text, bias = bert.encode_text(input_ids, attention_mask)
        fused, scores = bert.fuse(text, bias, for_text, model.has_map)
        key_bias = padding_bias(attention_mask, float("-inf"), text.dtype)
        box, real_fake, classes = model.branch(for_image, text, key_bias, fused[:, 0])[:3]
        again, bias = bert.encode_text(input_ids, attention_mask)
        again, _ = bert.fuse(again, bias, for_text, model.has_map)
        return Output(real_fake, classes, box, model.text_encoder.classifier(again[:, 1:]), scores)
