"""Contrastive losses against loops in plain Python, and the bookkeeping of queues and momentum towers."""

from __future__ import annotations

import math

import pytest
import torch

from dgm4.losses import enqueue, lma, mac, momentum_update

EXACT = 1e-11
TEMPERATURE, ALPHA = 0.2, 0.4


def unit(rows, width, seed, dtype=torch.float64):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x / x.norm(dim=1, keepdim=True)).to(dtype)


def features(count, rows=3, width=4, dtype=torch.float64):
    return [unit(rows, width, seed, dtype) for seed in range(count)]


def queues(count, width=4, size=5, dtype=torch.float64):
    return [unit(size, width, 100 + seed, dtype).T.contiguous() for seed in range(count)]


def log_softmax(row):
    return [x - math.log(sum(math.exp(y) for y in row)) for x in row]


def similarities(row, keys, temperature=TEMPERATURE):
    return [sum(a * b for a, b in zip(row, key, strict=True)) / temperature for key in keys]


def plain_keys(features_m, queue):
    return features_m.tolist() + queue.T.tolist()


def plain_across(query, query_m, keys, matched, alpha=ALPHA):
    total = 0.0
    for i, (row, row_m) in enumerate(zip(query.tolist(), query_m.tolist(), strict=True)):
        soft = [math.exp(x) for x in log_softmax(similarities(row_m, keys))]
        for k, log_p in enumerate(log_softmax(similarities(row, keys))):
            total -= (alpha * soft[k] + (1 - alpha) * (k == i and matched[i])) * log_p
    return total / len(query)


def plain_within(query, keys):
    rows = query.tolist()
    return -sum(log_softmax(similarities(row, keys))[i] for i, row in enumerate(rows)) / len(rows)


def plain_mac(image, text, image_m, text_m, image_queue, text_queue, pristine, alpha=ALPHA):
    images, texts = plain_keys(image_m, image_queue), plain_keys(text_m, text_queue)
    return (
        plain_across(image, image_m, texts, pristine, alpha)
        + plain_across(text, text_m, images, pristine, alpha)
        + plain_within(image, images)
        + plain_within(text, texts)
    ) / 4


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("pristine", [[True, False, True], [True] * 3, [False] * 3, [True], [False]])
def test_mac_is_the_formula(pristine, alpha):
    inputs = [*features(4, rows=len(pristine)), *queues(2)]
    got = mac(*inputs, torch.tensor(pristine), TEMPERATURE, alpha)
    assert abs(got.item() - plain_mac(*inputs, pristine, alpha)) <= EXACT


def test_mac_of_one_pair_by_hand():
    """Orthogonal axes, one column in each queue, temperature 1: the own key has cosine 1, the other 0."""
    axis = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    queue = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    own, other = math.e / (math.e + 1), 1 / (math.e + 1)
    within = -math.log(own)
    for pristine, weight in ((True, 0.6), (False, 0.0)):
        across = -(0.4 * own + weight) * math.log(own) - 0.4 * other * math.log(other)
        got = mac(axis, axis, axis, axis, queue, queue, torch.tensor([pristine]), 1.0, 0.4)
        assert abs(got.item() - (across + within) / 2) <= EXACT


def test_mac_gradient_reaches_the_online_features_and_the_temperature():
    image, text, image_m, text_m = features(4)
    pristine, (image_queue, text_queue) = torch.tensor([True, False, True]), queues(2)
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)

    def loss(image, text):
        return mac(image, text, image_m, text_m, image_queue, text_queue, pristine, TEMPERATURE)

    assert torch.autograd.gradcheck(loss, (image.requires_grad_(), text.requires_grad_()))
    # With alpha 0 the targets do not depend on the temperature, so its gradient is the plain derivative.
    at = [image_m, text_m, image_queue, text_queue, pristine]
    assert torch.autograd.gradcheck(lambda t: mac(image.detach(), text.detach(), *at, t, 0.0), temperature)
    for tensor in at[:4]:
        tensor.requires_grad_()
    mac(image, text, *at, temperature).backward()
    assert temperature.grad is not None
    assert all(tensor.grad is None for tensor in at[:4])


def test_the_queue_may_be_filled_before_the_backward_pass():
    image, text, image_m, text_m = features(4)
    image_queue, text_queue = queues(2)
    pristine, grads = torch.tensor([True, False, True]), []
    for early in (False, True):
        leaf = image.clone().requires_grad_()
        queue = image_queue.clone()
        loss = mac(leaf, text, image_m, text_m, queue, text_queue, pristine, TEMPERATURE)
        if early:
            enqueue(queue, 0, image_m)
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mac_is_computed_in_float32_under_autocast(dtype):
    inputs, pristine = [*features(4, dtype=dtype), *queues(2, dtype=dtype)], torch.tensor([True, False, True])
    want = plain_mac(*inputs, pristine.tolist())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mac(*inputs, pristine, TEMPERATURE, ALPHA)
    assert got.dtype == torch.float32
    assert abs(got.item() - want) <= 1e-5


def test_mac_is_finite_at_the_lowest_temperature():
    """Cosines of -1 and 1 over 0.001 are 2000 apart."""
    image, _, _, _ = features(4)
    image = image.float().requires_grad_()
    queue = -image.detach().T
    loss = mac(image, -image, image.detach(), -image.detach(), queue, queue, torch.ones(3).bool(), 0.001)
    loss.backward()
    assert loss.isfinite()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("pristine", [[True, False, True], [False] * 3, [True]])
def test_lma_is_the_formula(pristine):
    image, caption, explanation, image_m, caption_m, explanation_m = inputs = features(6, rows=len(pristine))
    image_queue, cap_queue, prom_queue = keys = queues(3)
    images, captions = plain_keys(image_m, image_queue), plain_keys(caption_m, cap_queue)
    explanations = plain_keys(explanation_m, prom_queue)
    always = [True] * len(pristine)
    want = (
        plain_across(image, image_m, captions, always)
        + plain_across(caption, caption_m, images, always)
        + plain_within(caption, captions)
        + plain_across(image, image_m, explanations, pristine)
        + plain_across(explanation, explanation_m, images, pristine)
        + plain_within(explanation, explanations)
    ) / 6
    got = lma(*inputs, *keys, torch.tensor(pristine), TEMPERATURE, ALPHA)
    assert abs(got.item() - want) <= EXACT


def test_lma_gradient_reaches_the_online_features_alone():
    online, rest = features(6)[:3], [*features(6)[3:], *queues(3)]
    pristine = torch.tensor([True, False, True])
    for tensor in online:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: lma(*x, *rest, pristine, TEMPERATURE), online)
    for tensor in rest:
        tensor.requires_grad_()
    lma(*online, *rest, pristine, TEMPERATURE).backward()
    assert all(tensor.grad is None for tensor in rest)


@pytest.mark.parametrize("size", [4, 5, 7])
@pytest.mark.parametrize("batch", [1, 3, 4, 9])
def test_the_queue_holds_the_latest_features(size, batch):
    """Against a list; sizes that are no multiple of the batch, and a batch longer than the queue."""
    queue, pointer, count = torch.zeros(2, size), 0, 0
    held = [0.0] * size
    for _ in range(6):
        new = torch.arange(count + 1, count + 1 + batch, dtype=torch.float32)
        pointer = enqueue(queue, pointer, torch.stack([new, -new], dim=1))
        for value in new.tolist():
            held[count % size] = value
            count += 1
        assert pointer == count % size
        assert queue.tolist() == [held, [-value for value in held]]


def test_momentum_update_by_hand():
    online = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(4.0, requires_grad=True)]
    average = [torch.tensor([3.0, 2.0]), torch.tensor(0.0)]
    momentum_update(iter(online), iter(average), decay=0.75)
    assert average[0].tolist() == [2.5, 2.0]
    assert average[1].item() == 1.0
    assert not average[0].requires_grad
    assert [p.tolist() for p in online] == [[1.0, 2.0], 4.0]


def test_towers_of_another_depth_are_refused():
    with pytest.raises(ValueError, match="shorter|longer"):
        momentum_update([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)])
