"""The options of every verb, pinned, and that the verb reads each of them."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
from dataclasses import fields, is_dataclass

import pytest

from export.cli import app

ENGINE = (
    "--plugins --profiles --timing-cache --build-limit --workspace --strip-weights --version-compatible "
    "--hardware-compatible"
)
COMMON = ("help", "verbose", "quiet")  # of every verb; export/cli/app.py reads them
OPTIONS = {
    "export": "--model --checkpoint --size --drawn --precision --max-batch --max-tokens --target --vocab "
    "--sha256 --licence --data --split --out --calibration --calibration-pairs --keep-layers "
    f"--triton-repository --plot --json {ENGINE}",
    "convert": "checkpoint out --state --join",
    "rebuild": f"bundle --force {ENGINE}",
    "predict": "bundle image caption --box --list --out --resume --json --html --plot --heatmap --batch "
    "--decode --backend --device --threads --rebuild --threshold --public-key",
    "calibrate": "bundle --data --false-alarms --split --out --backend --device --threads --batch --seed "
    "--on-bad --json",
    "evaluate": "bundle --data --split --limit --backend --device --threads --batch --decode --reference "
    "--threshold --checkpoint --gate --on-bad --json --out --html",
    "train": "--data --out --recipe --model --size --set --init --init-vision --resume --device --workers "
    "--cache --save-every --stop-after --vocab",
    "pretrain": "--data --out --size --recipe --set --device --cache",
    "bench": "bundle --backend --batch --tokens --seconds --threads --device --json --out --choose",
    "repository": "bundle --out --name --with --plan --kind --instances --queue-delay --queue-size "
    "--preferred --threads --accelerate",
    "inspect": "bundle --layers --data --split --json --public-key",
    "sign": "bundle --key",
    "score": "bundle source --out --format --heatmap --shard --batch --max-failed --backend --device "
    "--threads --threshold --public-key --ray --workers",
    "serve": "bundle --host --port --token-file --name --batch --max-wait-ms --max-pending --max-pairs "
    "--max-body --max-buffered --connections --timeout --read-timeout --rate --burst --trust-proxy --drain "
    "--backend --device --threads --rebuild --public-key --threshold",
    "demo": "--out",
    "list": "--json",
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


PARSERS = parsers_of(app.make_parser())


def test_the_verbs():
    assert sorted(PARSERS) == sorted(OPTIONS)


@pytest.mark.parametrize("verb", OPTIONS)
def test_the_options_of_a_verb(verb):
    """No more and no fewer: `dgm4 train` once offered eight options that nothing read."""
    actions = [action for action in PARSERS[verb]._actions if action.dest not in COMMON]
    assert {(action.option_strings or [action.dest])[0] for action in actions} == set(OPTIONS[verb].split())


def read_by(module):
    """The options that a verb's module reads: by name, or as the fields of a dataclass it makes of them."""
    tree = ast.parse(inspect.getsource(module))
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "options"
    }
    homes = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "read_options":
                made = node.args[0].id
                names |= fields_of(getattr(importlib.import_module(homes[made]), made))
            elif homes.get(node.func.id, "").startswith("export.cli."):  # a helper that takes the options
                names |= (
                    read_by(importlib.import_module(homes[node.func.id])) if passes_options(node) else set()
                )
    return names


def passes_options(call):
    return any(isinstance(argument, ast.Name) and argument.id == "options" for argument in call.args)


def fields_of(options):
    names = {item.name for item in fields(options)}
    inner = [type(item.default) for item in fields(options) if is_dataclass(item.default)]
    return names.union(*map(fields_of, inner))


@pytest.mark.parametrize("verb", OPTIONS)
def test_a_verb_reads_all_its_options(verb):
    module = inspect.getmodule(PARSERS[verb].get_default("run"))
    offered = {action.dest for action in PARSERS[verb]._actions if action.dest not in COMMON}
    assert module.__name__.startswith("export.cli.")
    assert offered <= read_by(module)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["predict", "b", "i.jpg", "c", "--box", "-5,0,50,50"], "box", [[-5, 0, 50, 50]]),
        (["predict", "b", "i.jpg", "c", "--box", "-.5 0 50 50"], "box", [[-0.5, 0, 50, 50]]),
        (["predict", "b", "i.jpg", "-5° in Paris"], "caption", "-5° in Paris"),
        (["predict", "b", "i.jpg", "-5°"], "caption", "-5°"),
    ],
)
def test_a_value_that_begins_with_a_minus_is_none_the_less_a_value(arguments, name, value):
    options, unknown = app.make_parser().parse_known_args(arguments)
    assert unknown == [] and getattr(options, name) == value


@pytest.mark.parametrize("value", ["-0.5", "words=-1"])
def test_a_negative_threshold_is_told_as_such(value, capsys):
    with pytest.raises(SystemExit) as left:
        app.run(["predict", "b", "i.jpg", "c", "--threshold", value])
    assert left.value.code == 2
    assert "with P from 0 to 1 and NAME one of" in (told := capsys.readouterr().err) and repr(value) in told
