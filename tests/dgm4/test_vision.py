"""The visual encoders against NumPy in float64, written from the formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from scipy.special import erf

import dgm4
from dgm4.models.cals import CAFormer
from dgm4.seeded import draw
from dgm4.vision import VisionTransformer

EXACT = 1e-10
SIZE, PATCH, GRID, WIDTH = 64, 16, 4, 24
CONFIG = replace(
    dgm4.model_config("cals", "tiny"),
    width=WIDTH,
    heads=3,
    vision_depth=4,
    caformer_start=2,
    caformer_heads=2,
    image_size=SIZE,
)


def drawn(module):
    state = {k: torch.from_numpy(draw(k, tuple(v.shape), 1)) for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    return module.double().eval()


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE))


class Plain:
    """The formulas, over a state of NumPy arrays."""

    def __init__(self, module):
        self.p = {k: v.numpy() for k, v in module.state_dict().items()}

    def linear(self, name, x):
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def norm(self, name, x, eps):
        x = x - x.mean(-1, keepdims=True)
        return (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * self.p[f"{name}.weight"]
            + self.p[f"{name}.bias"]
        )

    @staticmethod
    def heads(q, k, v, heads):
        """One head after another."""
        width = q.shape[-1] // heads
        out = np.empty_like(q)
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(width)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[..., part] = weights / weights.sum(-1, keepdims=True) @ v[..., part]
        return out

    def embed(self, image):
        kernel = self.p["patch_embed.proj.weight"].reshape(WIDTH, -1)
        tokens = [np.repeat(self.p["cls_token"][:, 0], len(image), 0)]
        for y in range(GRID):
            for x in range(GRID):
                window = image[:, :, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
                tokens.append(window.reshape(len(image), -1) @ kernel.T + self.p["patch_embed.proj.bias"])
        return np.stack(tokens, 1) + self.p["pos_embed"]

    def block(self, i, x):
        name = f"blocks.{i}"
        q, k, v = np.split(self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x, 1e-6)), 3, -1)
        x = x + self.linear(f"{name}.attn.proj", self.heads(q, k, v, 3))
        y = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x, 1e-6))
        return x + self.linear(f"{name}.mlp.fc2", y * 0.5 * (1 + erf(y / np.sqrt(2))))

    def post_norm(self, x):
        weight = np.split(self.p["MHA2.mha.in_proj_weight"], 3)
        bias = np.split(self.p["MHA2.mha.in_proj_bias"], 3)
        q, k, v = (x @ w.T + b for w, b in zip(weight, bias, strict=True))
        x = self.norm("MHA2.layer_norm1", x + self.linear("MHA2.mha.out_proj", self.heads(q, k, v, 2)), 1e-5)
        y = np.maximum(self.linear("MHA2.ffn.0", x), 0)
        return self.norm("MHA2.layer_norm2", x + self.linear("MHA2.ffn.2", y), 1e-5)

    def local(self, image):
        """ReLU(BN(conv 5x5)) of every pixel."""
        p, out = self.p, np.zeros((len(image), WIDTH, SIZE, SIZE))
        for b in range(len(image)):
            for o in range(WIDTH):
                for c in range(3):
                    out[b, o] += correlate2d(image[b, c], p["Conv.conv.weight"][o, c], mode="same")
        mean, var = p["Conv.bn2.running_mean"], p["Conv.bn2.running_var"]
        gain = p["Conv.bn2.weight"] / np.sqrt(var + 1e-5)
        return np.maximum(
            (out - mean[:, None, None]) * gain[:, None, None] + p["Conv.bn2.bias"][:, None, None], 0
        )

    def fuse(self, x, image):
        tokens = self.post_norm(x)
        field = tokens[:, 1:].reshape(len(x), GRID, GRID, WIDTH).transpose(0, 3, 1, 2)
        up, down = bilinear(GRID, SIZE), bilinear(SIZE, GRID)
        field = down @ (up @ field @ up.T + self.local(image)) @ down.T
        return np.concatenate([tokens[:, :1], field.reshape(len(x), WIDTH, -1).swapaxes(1, 2)], 1)


def bilinear(source, target):
    """Bilinear resampling of an axis as a matrix, pixel centres at halves, replicated edges, no antialias."""
    matrix = np.zeros((target, source))
    for i in range(target):
        place = max((i + 0.5) * source / target - 0.5, 0)
        low = int(place)
        matrix[i, low] += 1 - (place - low)
        matrix[i, min(low + 1, source - 1)] += place - low
    return matrix


def test_vit_is_the_formula(image):
    model = drawn(VisionTransformer(replace(CONFIG, name="hammer")))
    plain = Plain(model)
    x = plain.embed(image)
    for i in range(4):
        x = plain.block(i, x)
    with torch.inference_mode():
        text, picture = model(torch.from_numpy(image))
    assert torch.equal(text, picture)
    assert np.abs(text.numpy() - plain.norm("norm", x, 1e-6)).max() <= EXACT


def test_caformer_is_the_formula(image):
    model = drawn(CAFormer(CONFIG))
    plain = Plain(model)
    x = plain.embed(image)
    for i in range(2):
        x = plain.block(i, x)
    fused = plain.fuse(x, image)
    with torch.inference_mode():
        got = model.fuse(torch.from_numpy(x), torch.from_numpy(image))
    assert np.abs(got.numpy() - fused).max() <= EXACT
    for i in (2, 3):
        x, fused = plain.block(i, x), plain.block(i, fused)
    with torch.inference_mode():
        for_text, for_image = model(torch.from_numpy(image))
    assert np.abs(for_text.numpy() - plain.norm("norm", fused, 1e-6)).max() <= EXACT
    assert np.abs(for_image.numpy() - plain.norm("norm", x, 1e-6)).max() <= EXACT


def test_batch_norm_follows_the_mode(image):
    """Running statistics in evaluation, batch statistics in training."""
    branch = drawn(CAFormer(CONFIG)).Conv
    before = branch.bn2.running_mean.clone()
    branch.train()(torch.from_numpy(image))
    assert not torch.equal(branch.bn2.running_mean, before)
    assert branch.bn2.momentum == 0.1


def test_the_sampled_fusion_is_the_full_one(tiny):
    """In evaluation; and while training up to the pixels that the batch norm counts."""
    vision = tiny("cals", torch.float64).visual_encoder
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 257, 128, generator=random, dtype=torch.float64)
    image = torch.randn(2, 3, 256, 256, generator=random, dtype=torch.float64)
    with torch.no_grad():
        full = vision.fuse(tokens, image)
        vision.sampled = True
        assert (vision.fuse(tokens, image) - full).abs().max() <= 1e-10
