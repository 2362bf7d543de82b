"""A snapshot that was altered is a CheckpointError, whatever stands in it, and the other one is offered."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from dgm4.training.snapshot import read_snapshot
from dgm4.training.trainer import BEST, LAST
from engine.errors import CheckpointError, InputError

ABSURD = (None, -1, 10**30, 0.5, float("nan"), "a", "", [], {}, [1, "a"], {"a": 1}, True, torch.zeros(3))


@pytest.fixture
def stopped(make, options, tmp_path):
    """A trainer of a run that was stopped within its second epoch."""
    make(replace(options, epochs=2), tmp_path, stop_after=5).run()
    return make(replace(options, epochs=2), tmp_path, resume=True)


def places(value, path=()):
    """The path of every value but the tensors' own, which torch's archive has checksums of."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def altered(content, path, value):
    """A copy with another value at a path, or without it."""
    first, *rest = path
    changed = copy.copy(content)
    if rest:
        changed[first] = altered(content[first], rest, value)
    elif isinstance(value, str) and value == "removed":
        del changed[first]
    else:
        changed[first] = value
    return changed


def test_any_altered_value_is_refused(stopped, tmp_path):
    content, random = read_snapshot(tmp_path / LAST), np.random.default_rng(0)
    (tmp_path / "other").mkdir()  # the content is mapped from the first file
    path = tmp_path / "other" / LAST
    known = [place for place in places(content) if place[0] != "model"]
    known += [("model",), ("model", next(iter(content["model"])))]
    taken = []
    for place in [known[i] for i in random.permutation(len(known))[:40]]:
        choices = (*ABSURD, "removed")
        value = choices[int(random.integers(len(choices)))]
        torch.save(altered(content, place, value), path)
        try:
            stopped._resume(path)
            taken.append((place, value))
        except CheckpointError as error:
            assert LAST in str(error)
        except InputError as error:
            assert "was made with another recipe" in str(error)
    assert [(place, value) for place, value in taken if not harmless(place, value)] == []


def harmless(place, value):
    """Not read when a run goes on; of the log alone; or moments that a parameter without gradients lacks."""
    log = place[0] == "progress" and place[1] in ("seconds", "epoch_seconds", "best", "sums")
    return (
        place in (("vocabulary",), ("epoch",))
        or log
        or (place[:2] == ("optimizer", "state") and value == "removed")
    )


def test_the_other_snapshot_is_offered(stopped, make, options, tmp_path):
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:-500])
    offer = f"{BEST} is whole: copy it over {LAST} to go on after its update 4"
    with pytest.raises(CheckpointError, match=rf"{LAST}: expected .* damaged .*{offer}"):
        stopped._resume(tmp_path / LAST)
    (tmp_path / LAST).write_bytes((tmp_path / BEST).read_bytes())
    assert make(options, tmp_path, resume=True).run().epoch == 2
    (tmp_path / BEST).write_bytes(b"")
    (tmp_path / LAST).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        stopped._resume(tmp_path / LAST)
    assert BEST not in str(caught.value)
