"""From released names to the inference network's: every tensor is read, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch

from engine.errors import CheckpointError
from engine.network.model import InferenceModel, build_model
from engine.network.released import fold_network
from engine.registry.config import NetworkConfig


@pytest.fixture
def parts(name, tiny):
    """Released tensors of a tiny network and its configuration."""
    model = tiny(name)
    return dict(model.state_dict()), NetworkConfig.from_fields(model.config.to_dict())


@pytest.mark.parametrize("stacked", [True, False])
def test_names_and_shapes_are_the_networks(parts, stacked):
    state, config = parts
    with torch.device("meta"):
        want = {key: value.shape for key, value in build_model(config, stacked).state_dict().items()}
    assert {key: value.shape for key, value in fold_network(state, config, stacked).items()} == want


def test_every_tensor_counts(parts):
    """Without any one of them nothing is built; only BatchNorm's counter is nobody's."""
    state, config = parts
    for key in state:
        rest = {other: value for other, value in state.items() if other != key}
        if key.endswith("num_batches_tracked"):
            fold_network(rest, config)
        else:
            with pytest.raises(CheckpointError, match=f"expected the tensor '{key}'"):
                fold_network(rest, config)


def test_a_foreign_tensor_is_refused(parts):
    state, config = parts
    with pytest.raises(CheckpointError, match=f"1 tensors are none of {config.name}'s, the first is 'queue'"):
        fold_network({**state, "queue": torch.zeros(1)}, config)


def test_another_networks_tensors_are_refused(tiny):
    """HAMMER's names are all among CALS's."""
    config = NetworkConfig.from_fields(tiny("hammer").config.to_dict())
    with pytest.raises(CheckpointError, match="tensors are none of hammer's"):
        fold_network(tiny("cals").state_dict(), config)


def test_a_misshapen_tensor_is_named(parts):
    state, config = parts
    state["itm_head.6.weight"] = torch.zeros(3, 256)
    with pytest.raises(CheckpointError, match=r"(?s)tensors do not fit .*branch\.itm_head\.6\.weight"):
        InferenceModel.from_released(state, config)


def test_a_tensor_that_no_fold_can_take_is_an_error_of_ours(parts):
    state, config = parts
    state["aggregator.in_proj_weight"] = torch.zeros(7)
    with pytest.raises(CheckpointError, match="tensors do not fit"):
        InferenceModel.from_released(state, config)


def test_only_what_a_rewrite_changes_is_new(parts):
    state, config = parts
    own = {value.untyped_storage().data_ptr() for value in state.values()}
    folded = fold_network(state, config)
    fresh = {key for key, value in folded.items() if value.untyped_storage().data_ptr() not in own}
    pool = ("pool.query", "pool.value", "pool.bias")
    changed = ("places", "cls", "qkv", "key_value", "fusion.", "gate", *pool)
    assert all(any(part in key for part in changed) for key in fresh)
    assert "vision.blocks.0.attention.qkv.weight" not in fresh
    assert "vision.positions" not in fresh
