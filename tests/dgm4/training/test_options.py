"""Recipes: fields, types, ranges."""

from __future__ import annotations

import re

import pytest

from dgm4.shipped import RECIPES
from dgm4.training.options import TrainOptions, read_recipe
from engine.errors import InputError


def written(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_recipe_is_read(tmp_path):
    path = written(tmp_path, 'model = "cals"\nepochs = 3\nlr = 1\nflip = false\nprecision = "bf16"\n')
    values = read_recipe(path)
    assert values == {"model": "cals", "epochs": 3, "lr": 1.0, "flip": False, "precision": "bf16"}
    assert type(values["lr"]) is float
    assert TrainOptions(**values).to_dict()["warmup_epochs"] == 10


@pytest.mark.parametrize("name", ["hammer", "asap", "cals"])
def test_shipped_recipes_are_recipes(name):
    options = TrainOptions(**read_recipe(RECIPES / f"{name}.toml"))
    assert (options.model, options.size) == (name, "tiny")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1.0", "unknown field 'learning_rate'; expected some of model, size, epochs"),
        ("[optimizer]\nlr = 1.0", "unknown field 'optimizer'"),
        ("epochs = 1.5", "epochs: expected int, got 1.5"),
        ("epochs = true", "epochs: expected int, got True"),
        ("flip = 1", "flip: expected bool, got 1"),
        ("lr = '1e-4'", "lr: expected float, got '1e-4'"),
        ("model = 3", "model: expected str, got 3"),
        ("lr = ", "expected a recipe in TOML"),
        (b"\xff\xfe", "expected a recipe in TOML"),
    ],
    ids=range(9),
)
def test_a_bad_recipe_is_named(text, message, tmp_path):
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=re.escape(f"{path}: {message}")):
        read_recipe(path)
    with pytest.raises(InputError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "values",
    [
        *({"model": "resnet"}, {"size": "huge"}, {"precision": "fp8"}),
        *({name: 0} for name in ("epochs", "batch", "accumulate", "queue", "lr", "lr_vision")),
        *({name: -1} for name in ("min_lr", "weight_decay", "warmup_epochs", "clip", "seed")),
        *({name: value} for name in ("lr", "clip") for value in (float("nan"), float("inf"))),
        {"seed": 2**60},
    ],
    ids=str,
)
def test_values_out_of_range(values):
    with pytest.raises(InputError, match=rf"^{next(iter(values))}: expected .*, got"):
        TrainOptions(**values)
