"""Pretraining of the visual encoder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dgm4.training import vision
from dgm4.training.initialise import Initialisation, start_from
from dgm4.training.trainee import Trainee
from dgm4.training.vision import PatchTrainee, colour_targets, patch_targets, pretrain, wave_positions
from engine.errors import InputError, NumericalError


@pytest.fixture
def recipe(options):
    return replace(options, epochs=4, accumulate=1, warmup_epochs=1.0, lr_vision=3e-3, clip=1.0)


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch, config_of):
    monkeypatch.setattr(vision, "model_config", lambda name, size: config_of(name, size))


def test_patches_in_the_box_bear_the_type_of_the_face(data, tokenizer):
    """Box (8, 4) to (24, 20) of 64 pixels: patches of 16 in rows 0 and 1, columns 0 and 1."""
    from dgm4.data.annotations import read_split
    from dgm4.data.dataset import PairDataset, collate

    samples = read_split(data, "train").samples
    batch = collate([PairDataset(samples, tokenizer, image_size=64)[i] for i in range(4)])
    swapped = [samples[i].types == ("face_swap",) for i in range(4)]
    changed = ["face_attribute" in samples[i].types for i in range(4)]
    want = np.zeros((4, 4, 4, 2), np.float32)
    want[swapped, :2, :2, 0] = 1
    want[changed, :2, :2, 1] = 1
    assert sum(swapped) == sum(changed) == 1
    assert np.array_equal(patch_targets(batch, 4).numpy(), want.reshape(4, 16, 2))


def test_waves_by_hand():
    """Row 2, column 3 of a grid of 4, width 8: two frequencies, 1 and 0.01."""
    found = wave_positions(4, 8)[0, 2 * 4 + 3].numpy()
    want = [f(p * w) for p in (2, 3) for f in (np.sin, np.cos) for w in (1.0, 0.01)]
    assert np.allclose(found, want, atol=1e-6)
    assert wave_positions(4, 8).shape == (1, 16, 8)


def test_it_learns_repeats_and_starts_a_network(recipe, data, tokenizer, tmp_path, config_of):
    long, out = replace(recipe, epochs=12), tmp_path / "vision.pth"
    first = pretrain(replace(recipe, epochs=1), data, out, tokenizer, progress=False)
    loss = pretrain(long, data, out, tokenizer, progress=False)
    assert loss < 0.7 * first
    again = tmp_path / "again.pth"
    assert pretrain(long, data, again, tokenizer, progress=False) == loss
    state = torch.load(out, weights_only=True)["model"]
    other = torch.load(again, weights_only=True)["model"]
    assert all(torch.equal(state[name], other[name]) for name in state)
    for name in ("hammer", "cals"):
        trainee = Trainee(config_of(name), queue=8)
        start_from(trainee, Initialisation(vision=str(out)))
        encoder = trainee.network.visual_encoder.state_dict()
        assert all(torch.equal(encoder[key], value) for key, value in state.items())


def test_too_few_pairs(recipe, data, tokenizer, tmp_path):
    with pytest.raises(InputError, match="16 training pairs do not fill a batch of 32"):
        pretrain(replace(recipe, batch=32), data, tmp_path / "v.pth", tokenizer, progress=False)


def test_a_folder_that_is_not_there_is_told_before_training(recipe, data, tokenizer, tmp_path):
    with pytest.raises(InputError, match="its folder does not exist; create it"):
        pretrain(recipe, data, tmp_path / "no" / "v.pth", tokenizer, progress=False)


def test_a_loss_that_is_not_finite_writes_nothing(recipe, data, tokenizer, tmp_path):
    with pytest.raises(NumericalError, match="the loss is"):
        pretrain(
            replace(recipe, lr_vision=1e30, clip=0.0),
            data,
            tmp_path / "v.pth",
            tokenizer,
            progress=False,
        )
    assert not (tmp_path / "v.pth").exists()


def test_colours_by_hand():
    image = torch.zeros(1, 3, 8, 8)
    image[0, 0, :4, 4:] = 2.0  # red in the second of four patches
    found = colour_targets(image, 2)
    assert found.shape == (1, 4, 6)
    assert found[0, :, 0].tolist() == [0.0, 2.0, 0.0, 0.0]
    assert found[0, :, 3].tolist() == [0.5] * 4
    assert not found[..., [1, 2, 4, 5]].any()


def test_only_patches_of_a_manipulated_face_tell_its_box(options):
    """All patches tell (0.5, 0.5, 0.5, 0.5): loss 0 where that is the box, 0.25 + 0.5 where w is half."""
    trainee = PatchTrainee(options)
    torch.nn.init.zeros_(trainee.boxes.weight)
    patches = torch.randn(2, 16, trainee.boxes.in_features)
    box = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.25, 0.5]])
    targets = torch.zeros(2, 16, 2)
    assert trainee._locate(patches, box, targets) == 0
    targets[0, 3, 1] = 1
    assert trainee._locate(patches, box, targets).item() == pytest.approx(0, abs=1e-6)
    targets[1, [2, 5, 6], 0] = 1
    assert trainee._locate(patches, box, targets).item() == pytest.approx(3 / 4 * 0.75, abs=1e-6)
