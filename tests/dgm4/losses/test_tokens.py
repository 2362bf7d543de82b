"""Classification losses against sums written out in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from dgm4.losses import bic, ied, mlc, tmg

EXACT = 1e-12
PADDED = -100


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_softmax(row):
    return [x - math.log(sum(math.exp(y) for y in row)) for x in row]


def cross_entropy(rows, targets):
    return sum(
        -sum(t * lp for t, lp in zip(target, log_softmax(row), strict=True))
        for row, target in zip(rows, targets, strict=True)
    ) / len(rows)


@pytest.mark.parametrize("loss", [bic, ied])
@pytest.mark.parametrize("fake", [[1], [0, 1, 1], [0, 0, 0], [1, 1, 1]])
def test_pair_loss_is_the_formula(loss, fake):
    logits = random(len(fake), 2)
    want = cross_entropy(logits.tolist(), [[1 - f, f] for f in fake])
    assert abs(loss(logits, torch.tensor(fake)).item() - want) <= EXACT


def test_index_one_means_manipulated():
    sure = torch.tensor([[-20.0, 20.0]])
    assert bic(sure, torch.tensor([1])) < 1e-6
    assert bic(sure, torch.tensor([0])) > 30


def test_types_loss_is_the_formula():
    logits, types = random(3, 4), [[0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0]]
    terms = [
        math.log(1 + math.exp(-x if t else x))
        for row, target in zip(logits.tolist(), types, strict=True)
        for x, t in zip(row, target, strict=True)
    ]
    got = mlc(logits, torch.tensor(types, dtype=torch.float32))
    assert abs(got.item() - sum(terms) / 12) <= EXACT


LABELS = torch.tensor([[0, 1, 0, PADDED], [1, PADDED, PADDED, PADDED], [PADDED] * 4])


def valid_rows(logits):
    return [logits[b, n].tolist() for b in range(3) for n in range(4) if LABELS[b, n] != PADDED]


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_token_loss_is_the_formula(alpha):
    logits, logits_m = random(3, 4, 2), random(3, 4, 2, seed=1)
    rows = valid_rows(logits)
    hard = cross_entropy(rows, [[1, 0], [0, 1], [1, 0], [0, 1]])
    soft = cross_entropy(rows, [[math.exp(x) for x in log_softmax(row)] for row in valid_rows(logits_m)])
    assert abs(tmg(logits, LABELS).item() - hard) <= EXACT
    got = tmg(logits, LABELS, logits_m, alpha).item()
    assert abs(got - ((1 - alpha) * hard + alpha * soft)) <= EXACT


def test_padded_tokens_are_not_read():
    logits, logits_m = random(3, 4, 2), random(3, 4, 2, seed=1)
    want = tmg(logits, LABELS, logits_m)
    logits[LABELS == PADDED] = 1e4
    logits_m[LABELS == PADDED] = float("nan")
    assert tmg(logits, LABELS, logits_m) == want


@pytest.mark.parametrize("tokens", [0, 5])
def test_no_valid_token_gives_zero_with_a_zero_gradient(tokens):
    logits = random(2, tokens, 2).requires_grad_()
    loss = tmg(logits, torch.full((2, tokens), PADDED), random(2, tokens, 2, seed=1))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_gradients():
    logits = random(3, 4, 2).requires_grad_()
    logits_m = random(3, 4, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tmg(x, LABELS, logits_m.detach()), logits)
    assert torch.autograd.gradcheck(lambda x: mlc(x, torch.eye(4)[:3]), random(3, 4).requires_grad_())
    assert torch.autograd.gradcheck(lambda x: bic(x, torch.tensor([0, 1])), random(2, 2).requires_grad_())
    tmg(logits, LABELS, logits_m).backward()
    assert logits_m.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    logits, tokens = random(3, 4).to(dtype), random(3, 4, 2).to(dtype)
    for loss, inputs, target in (
        (bic, logits[:, :2], torch.tensor([0, 1, 1])),
        (mlc, logits, torch.eye(4)[:3]),
        (tmg, tokens, LABELS),
    ):
        got = loss(inputs, target)
        assert got.dtype == torch.float32
        assert abs(got.item() - loss(inputs.double(), target).item()) <= 1e-6
