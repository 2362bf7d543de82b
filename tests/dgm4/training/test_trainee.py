"""Momentum towers, queues and temperature of a trainee, step by step."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dgm4.data.dataset import IGNORED, Batch
from dgm4.training.trainee import Trainee

TOWERS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")


def a_batch(config, pairs=3, tokens=6, sidecars=True):
    random = torch.Generator().manual_seed(3)
    shape = (pairs, 3, config.image_size, config.image_size)
    ids = torch.randint(5, 2000, (pairs, tokens), generator=random)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = torch.randint(0, 2, (pairs, tokens - 1), generator=random)
    texts = (ids.flip(1), mask.flip(0), ids.roll(1, 1), mask) if sidecars else (None,) * 4
    return Batch(
        torch.randn(shape, generator=random),
        ids * mask,
        mask,
        torch.tensor([0, 1, 1]),
        torch.tensor([[0.0] * 4, [1, 0, 0, 1], [0, 0, 1, 0]]),
        torch.tensor([[0.0] * 4, [0.5, 0.4, 0.2, 0.3], [0.0] * 4]),
        labels.masked_fill(mask[:, 1:] == 0, IGNORED),
        torch.arange(pairs),
        *texts,
    )


@pytest.fixture
def trainee(name, config_of):
    torch.manual_seed(0)
    return Trainee(config_of(name), queue=8)


def online(trainee, tower):
    return getattr(trainee.network, tower, None) or getattr(trainee, tower)


def pairs_of(trainee):
    for tower in TOWERS:
        momentum = dict(getattr(trainee, f"{tower}_m").named_parameters())
        for key, parameter in online(trainee, tower).named_parameters():
            yield f"{tower}.{key}", parameter, momentum[key]


def test_momentum_towers_start_equal_and_apart(trainee):
    count = 0
    for key, parameter, momentum in pairs_of(trainee):
        assert torch.equal(parameter, momentum), key
        assert parameter.data_ptr() != momentum.data_ptr(), key
        assert parameter.requires_grad, key
        assert not momentum.requires_grad, key
        count += 1
    assert count == sum(
        1 for key, _ in trainee.named_parameters() if "_m." in key and "itm_head_m" not in key
    )


def test_momentum_follows_before_each_forward_pass(trainee):
    """m <- 0.995 m + 0.005 p, with what p is before the pass; no gradient."""
    with torch.no_grad():
        for _, parameter, _ in pairs_of(trainee):
            parameter.add_(torch.randn_like(parameter))
    want = {key: 0.995 * m.double() + 0.005 * p.detach().double() for key, p, m in pairs_of(trainee)}
    terms = trainee(a_batch(trainee.network.config))
    torch.stack(list(terms.values())).sum().backward()
    for key, _, momentum in pairs_of(trainee):
        assert (momentum.double() - want[key]).abs().max() <= 1e-6, key
        assert momentum.grad is None, key
    assert trainee.vision_proj.weight.grad.abs().max() > 0
    trainee.copy_momentum()
    assert all(torch.equal(p, m) for _, p, m in pairs_of(trainee))


def test_every_live_parameter_has_a_gradient(trainee):
    """But those that nothing reads: the second token type, unused words and positions have zeros."""
    terms = trainee(a_batch(trainee.network.config))
    torch.stack(list(terms.values())).sum().backward()
    without = [k for k, p in trainee.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_queues_take_the_momentum_features(trainee, name):
    """Columns 0-2, then 3-5, then 6, 7 and 0 of eight."""
    trainee.eval()  # without dropout the features can be computed again
    batch = a_batch(trainee.network.config)
    before = {queue: getattr(trainee, queue).clone() for queue in trainee.queues}
    assert len(before) == (4 if name == "asap" else 2)
    for queue in before.values():
        assert torch.allclose(queue.norm(dim=0), torch.ones(8))
    with torch.no_grad():
        trainee(batch)
        assert int(trainee.queue_ptr) == 3
        tokens, _ = trainee.visual_encoder_m(batch.image)
        image = F.normalize(trainee.vision_proj_m(tokens[:, 0]), dim=-1)
        texts = [(batch.input_ids, batch.attention_mask)]
        texts += [(batch.caption_ids, batch.caption_mask), (batch.explanation_ids, batch.explanation_mask)]
        features = [image] + [
            F.normalize(trainee.text_proj_m(trainee.text_encoder_m.bert.encode_text(*t)[0][:, 0]), dim=-1)
            for t in texts
        ]
        for queue, feature in zip(trainee.queues, features, strict=False):
            assert torch.allclose(getattr(trainee, queue)[:, :3], feature.T, atol=1e-6), queue
            assert torch.equal(getattr(trainee, queue)[:, 3:], before[queue][:, 3:]), queue
        trainee(batch)
        trainee(batch)
        assert int(trainee.queue_ptr) == 1


def test_the_side_cars_queues_rest_without_side_cars(config_of):
    trainee = Trainee(config_of("asap"), queue=8)
    before = trainee.cap_queue.clone(), trainee.image_queue.clone()
    terms = trainee(a_batch(trainee.network.config, sidecars=False))
    assert {"lma", "ied"}.isdisjoint(terms)
    assert torch.equal(trainee.cap_queue, before[0])
    assert not torch.equal(trainee.image_queue, before[1])
    assert int(trainee.queue_ptr) == 3


@pytest.mark.parametrize(("given", "want"), [(2.0, 0.5), (1e-6, 0.001), (0.07, 0.07)])
def test_the_temperature_is_clamped(given, want, config_of):
    trainee = Trainee(config_of("hammer"), queue=8)
    with torch.no_grad():
        trainee.temp.fill_(given)
    trainee(a_batch(trainee.network.config))
    assert float(trainee.temp.detach()) == pytest.approx(want)


def test_alpha_mixes_the_momentum_targets(config_of):
    """Linear in alpha: tokens and features; CALS's tokens do not read it."""
    for name, mixed in (("hammer", {"tmg", "mac"}), ("cals", {"csam"})):
        trainee = Trainee(config_of(name), queue=8).eval()
        batch, values = a_batch(trainee.network.config), []
        state = {k: v.clone() for k, v in trainee.state_dict().items()}
        for alpha in (0.0, 0.2, 0.4):
            trainee.load_state_dict(state)
            values.append({k: float(v.detach()) for k, v in trainee(batch, alpha).items()})
        moved = {k for k in values[0] if values[0][k] != values[2][k]}
        assert moved == mixed
        for key in moved:
            assert values[1][key] == pytest.approx((values[0][key] + values[2][key]) / 2, rel=1e-5)
