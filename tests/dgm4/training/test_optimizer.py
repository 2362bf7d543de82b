"""Groups, rates and schedule by hand; the order of batches."""

from __future__ import annotations

import math

import pytest
import torch

from dgm4.training.optimizer import make_optimizer, make_schedule
from dgm4.training.options import TrainOptions
from dgm4.training.order import BatchOrder
from dgm4.training.trainee import Trainee


def test_two_rates_and_no_decay_for_vectors(name, config_of):
    trainee = Trainee(config_of(name), queue=8)
    options = TrainOptions(lr=1e-3, lr_vision=2e-3, weight_decay=0.03)
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in make_optimizer(trainee, options).param_groups
        for p in group["params"]
    }
    trained = {k: p for k, p in trainee.named_parameters() if p.requires_grad}
    assert len(found) == len(trained)
    for key, parameter in trained.items():
        vision = key.startswith("network.visual_encoder.")
        decays = 0.03 if parameter.dim() > 1 else 0.0
        assert found[id(parameter)] == (2e-3 if vision else 1e-3, decays), key
    assert found[id(trainee.temp)] == (1e-3, 0.0)
    assert not any(id(p) in found for k, p in trainee.named_parameters() if "encoder_m." in k)


def rates(updates, **options):
    """The rate of every update, and the one after the last."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    recipe = TrainOptions(**options)
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": lr} for p, lr in zip(parameters, (recipe.lr, recipe.lr_vision), strict=True)]
    )
    schedule = make_schedule(optimizer, recipe, updates)
    found = [schedule.get_last_lr()]
    for _ in range(updates):
        optimizer.step()
        schedule.step()
        found.append(schedule.get_last_lr())
    return found


def test_the_schedule_by_hand():
    """Ten updates, four of warm-up: fifths of the way up from min_lr, then half a cosine down to it."""
    found = rates(10, epochs=5, warmup_epochs=2, lr=1.1, lr_vision=2.1, min_lr=0.1)
    for column, top in ((0, 1.0), (1, 2.0)):
        want = [0.1 + top * x for x in (0.2, 0.4, 0.6, 0.8)]
        want += [0.1 + top * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(7)]
        assert [row[column] for row in found] == pytest.approx(want, rel=1e-12)
        assert found[4][column] == pytest.approx(top + 0.1)
        assert found[10][column] == pytest.approx(0.1)


def test_schedules_at_the_edges():
    assert rates(3, epochs=1, warmup_epochs=0, lr=1.0, lr_vision=1.0, min_lr=0.0)[0] == [1.0, 1.0]
    assert rates(4, epochs=2, warmup_epochs=9, lr=1.0, lr_vision=1.0, min_lr=0.0)[:4] == [
        pytest.approx([x, x]) for x in (0.2, 0.4, 0.6, 0.8)
    ]
    assert rates(3, epochs=1, warmup_epochs=0, lr=1e-7, lr_vision=1.0, min_lr=1e-6)[2][0] == 1e-7


# Order


def taken(order, epoch=0, start=0):
    order.seek(epoch, start)
    assert len(list(order)) == len(order)
    return list(order)


def test_an_epoch_takes_every_sample_once():
    batches = taken(BatchOrder(17, 4, 1))
    assert len(batches) == 4
    flat = [i for batch in batches for i in batch]
    assert len(set(flat)) == len(flat) == 16
    assert set(flat) < set(range(17))
    assert flat != sorted(flat)


def test_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = taken(BatchOrder(64, 4, 1))
    torch.manual_seed(2)
    again = BatchOrder(64, 4, 1)
    assert first == taken(again) != taken(again, epoch=1) != taken(BatchOrder(64, 4, 2), epoch=1)
    assert taken(again) == first
    assert taken(again, start=5) == first[5:]
    assert taken(again, start=16) == []


def test_processes_share_the_larger_batch():
    whole = taken(BatchOrder(50, 6, 3), 2)
    parts = [taken(BatchOrder(50, 2, 3, rank=rank, world=3), 2) for rank in range(3)]
    assert [sum(rows, []) for rows in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(("count", "whole"), [(24, 6), (23, 3), (11, 0)])
def test_what_fills_no_update_is_left_out(count, whole):
    order = BatchOrder(count, 2, 1, accumulate=3, world=2)
    assert order.whole == len(taken(order)) == whole
