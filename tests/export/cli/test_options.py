"""The options of every verb, pinned, and that the verb reads each of them."""

from __future__ import annotations

import argparse

import pytest

from export.cli import app

ENGINE = (
    "--plugins --profiles --timing-cache --build-limit --workspace --strip-weights --version-compatible "
    "--hardware-compatible"
)
OPTIONS = {
    "export": "--model --checkpoint --size --drawn --precision --max-batch --max-tokens --target --vocab --data "
    "--split --out --calibration --calibration-pairs --calibration-method --smooth --keep-layers "
    f"--triton-repository --json {ENGINE}",
    "rebuild": f"bundle {ENGINE}",
    "predict": "bundle image caption --list --out --html --plot --heatmap --batch --backend --device --threads "
    "--rebuild --threshold",
    "evaluate": "bundle --data --split --limit --backend --device --threads --batch --reference --checkpoint "
    "--gate --on-bad --json --out --html",
    "train": "--data --out --recipe --model --size --set --init --init-vision --resume --device --workers --cache "
    "--save-every --stop-after --vocab",
    "pretrain": "--data --out --size --recipe --set --device --cache",
    "bench": "bundle --backend --batch --tokens --seconds --threads --device --json --out --plot",
    "repository": "bundle --out --name --plan --kind --instances --queue-delay --preferred --threads --accelerate",
    "inspect": "bundle --layers --data --split --json",
    "doctor": "--json",
    "data make": "--out --pairs --seed",
    "data describe": "--data --captioner --instructor --split --batch --limit --device --redo",
    "data vocabulary": "--data --size --out --vocab",
}


def parsers_of(parser, name=""):
    """The parsers of verbs by name; of `dgm4 data` those of its own verbs."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        return {name.strip(): parser}
    (verbs,) = below
    return {
        k: p for verb, under in verbs.choices.items() for k, p in parsers_of(under, f"{name} {verb}").items()
    }


PARSERS = parsers_of(app._parser())


def test_the_verbs():
    assert list(PARSERS) == list(OPTIONS)


@pytest.mark.parametrize("verb", OPTIONS)
def test_the_options_of_a_verb(verb):
    """No more and no fewer: `dgm4 train` once offered eight options that nothing read."""
    actions = [action for action in PARSERS[verb]._actions if action.dest != "help"]
    assert {(action.option_strings or [action.dest])[0] for action in actions} == set(OPTIONS[verb].split())
