"""`dgm4 train` on a sample set: settings, answers on stdout, errors, and two processes by torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dgm4
from dgm4.config import model_config
from dgm4.data.make import make_sample_set
from dgm4.tokenizer import DEMO_VOCABULARY, VOCABULARY, vocabulary_digest
from dgm4.training import trainer as module
from dgm4.training.snapshot import read_snapshot
from dgm4.training.trainer import BEST, LAST, LOG
from export import cli

ROOT = Path(__file__).resolve().parents[3]
SHAPE = {"width": 32, "heads": 2, "vision_depth": 2, "text_depth": 2, "fusion_start": 1, "image_size": 64}
SHAPE |= {"projection": 16}
MEANS = {"bic": 1.0, "mlc": 1.0, "box_l1": 0.1, "box_giou": 0.1, "tmg": 0.0, "mac": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty pairs to train on, two to judge by."""
    make_sample_set(folder := tmp_path_factory.mktemp("data") / "set", 26)
    return folder


@pytest.fixture
def small(monkeypatch):
    """The smallest network in place of the tiny one; changes to its shape may be given."""

    def use(**changes):
        shape = SHAPE | changes
        monkeypatch.setattr(module, "model_config", lambda n, size: replace(model_config(n, "tiny"), **shape))

    use()
    return use


@pytest.fixture
def train(small, data, capsys):
    """Run the verb with settings; return exit code, stdout and stderr."""

    def run(out, *arguments, **settings):
        settings = {"epochs": 1, "batch": 2, "queue": 16, **settings}
        given = [x for name, value in settings.items() for x in ("--set", f"{name}={value}")]
        given += ["--data", str(data), "--out", str(out), "--size", "tiny", "--device", "cpu", *arguments]
        code = cli.main(["train", *given])
        return code, *capsys.readouterr()

    return run


def test_a_run_and_its_answer(train, tmp_path):
    code, out, err = train(tmp_path / "run", "--model", "asap", "-q")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found.keys() == {"finished", "epoch", "update", "seconds", "best", "checkpoints"}
    assert (found["finished"], found["epoch"], found["update"]) == (True, 1, 10)
    assert 0 < found["seconds"] < 100
    assert found["checkpoints"] == [str(tmp_path / "run" / name) for name in (BEST, LAST)]
    config = replace(model_config("asap", "tiny"), **SHAPE)
    assert dgm4.load_checkpoint(found["checkpoints"][0], config=config).config.name == "asap"
    recorded = dgm4.read_checkpoint(found["checkpoints"][0]).vocabulary
    assert recorded == vocabulary_digest(tmp_path / "run" / VOCABULARY)
    line = json.loads((tmp_path / "run" / LOG).read_text())
    assert {"lma", "ied", "mgca", "loss"} < line["train"].keys()


def test_a_run_keeps_its_vocabulary(train, tmp_path):
    """Beside the checkpoints, where an export finds it; it cannot change while the run goes on."""
    out = tmp_path / "run"
    assert train(out, "--stop-after", "2")[0] == 0
    assert (out / VOCABULARY).read_bytes() == DEMO_VOCABULARY.read_bytes()
    pieces = DEMO_VOCABULARY.read_text().splitlines()
    other = tmp_path / "other.txt"
    other.write_text("\n".join([*pieces[:-2], pieces[-1], pieces[-2]]) + "\n")
    code, _, err = train(out, "--resume", "--vocab", str(other))
    assert code == 1
    assert f"{out / VOCABULARY}: the run was begun with it, not with {other}; give the same --vocab" in err
    assert train(out, "--resume")[0] == 0


def test_a_vocabulary_of_no_captions(tmp_path, capsys):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "train.json").write_text("[]")
    code = cli.main(["data", "vocabulary", "--data", str(tmp_path), "--out", str(tmp_path / "v.txt")])
    assert code == 1
    assert "split train: expected annotated pairs, got none of " in capsys.readouterr().err
    assert not (tmp_path / "v.txt").exists()


def test_stop_and_resume(train, tmp_path):
    code, out, _ = train(tmp_path, "--stop-after", "2", "--cache")
    stopped = json.loads(out)
    assert (code, stopped["finished"], stopped["epoch"], stopped["update"]) == (0, False, 0, 2)
    assert (stopped["best"], stopped["checkpoints"]) == (None, [str(tmp_path / LAST)])
    code, _, err = train(tmp_path)
    assert (code, "a run is there; resume it" in err) == (1, True)
    code, _, err = train(tmp_path, "--resume", lr=1.0)
    assert (code, "(lr differ)" in err) == (1, True)
    code, out, _ = train(tmp_path, "--resume", "--workers", "1")
    assert (code, json.loads(out)["finished"]) == (0, True)
    assert json.loads(out)["seconds"] > stopped["seconds"]


def test_what_is_set_goes_over_the_recipe(train, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "hammer"\nlr = 1e-3\nflip = true\nclip = 1\nepochs = 9\n')
    settings = {"lr": "2e-3", "flip": "false", "warmup_epochs": "0.5", "precision": "bf16"}
    code, _, _ = train(tmp_path / "run", "--recipe", str(recipe), "--model", "cals", **settings)
    assert code == 0
    config = read_snapshot(tmp_path / "run" / LAST)["config"]
    want = {"model": "cals", "lr": 2e-3, "flip": False, "clip": 1.0, "epochs": 1, "warmup_epochs": 0.5}
    assert {name: config[name] for name in want} == want
    assert config["precision"] == "bf16"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "--set lr: expected NAME=VALUE with one of model, size"),
        ("speed=1", "--set speed=1: expected NAME=VALUE"),
        ("lr=fast", "--set lr: expected float, got 'fast'"),
        ("batch=2.5", "--set batch: expected int, got '2.5'"),
        ("flip=1", "--set flip: expected true or false, got '1'"),
        ("lr=nan", "lr: expected a value above 0, got nan"),
        ("model=resnet", "model: expected one of hammer, asap, cals, got 'resnet'"),
        ("lrr=1", "one of model, size, .*; did you mean lr?"),
    ],
)
def test_bad_settings_are_usage_errors(setting, message, train, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "run", "--set", setting)
    assert caught.value.code == 2
    assert re.search(message.replace("?", r"\?"), capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_data_does_not_fill(train, tmp_path):
    code, out, err = train(tmp_path / "run", "--set", "batch=99")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "20 training pairs do not fill one update of 99 x 1 x 1 processes" in err
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_cannot_be_used_is_bad_input(train, tmp_path):
    (tmp_path / "recipe.toml").write_text("lr = -1.0\n")
    code, _, err = train(tmp_path / "run", "--recipe", str(tmp_path / "recipe.toml"))
    assert (code, "lr: expected a value above 0, got -1.0" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--resume",), 1, "no such file, so there is no run to go on with"),
        (("--set", "precision=fp16"), 4, "fp16 needs a GPU"),
        (("--init", "none.pth"), 1, "none.pth: no such file"),
        (("--recipe", "none.toml"), 1, "cannot read the recipe"),
        (("--data", "none"), 1, "none: expected the data folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_one_line(arguments, code, message, train, tmp_path):
    got, out, err = train(tmp_path / "run", *arguments)
    assert (got, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--workers", "--save-every", "--stop-after"])
def test_counts_are_whole(option, train, tmp_path):
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, option, "-1")
    assert caught.value.code == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_run_to_resume(number, code, train, tmp_path, monkeypatch):
    """The answer, where it stopped, and the command that goes on."""
    step = module.Trainer._step

    def struck(self, *arguments):
        if self.progress.batch == 2:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(module.Trainer, "_step", struck)
    got, out, err = train(tmp_path, "-q")
    assert (got, json.loads(out)["update"]) == (code, 3)
    assert (
        f"stopped after update 3, which {tmp_path / LAST} holds; go on with: dgm4 train --set epochs=1 "
        in err
    )
    assert err.endswith("-q --resume\n")
    monkeypatch.setattr(module.Trainer, "_step", step)
    got, out, _ = train(tmp_path, "--resume")
    assert (got, json.loads(out)["update"]) == (0, 10)


# Two processes. What the driver changes is what `small` changes, and MEANS; it keeps every rank's state.

DRIVER = """
import os, sys, torch
from dataclasses import replace
from pathlib import Path
from dgm4.config import model_config
from dgm4.training import processes, trainer
from export import cli

torch.set_num_threads(1)
out, data, rank, shape = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"], {shape}
leave, processes.leave = processes.leave, lambda: None  # the runs share a group
made = []

class Kept(trainer.Trainer):
    def run(self):
        made.append(self)
        return super().run()

trainer.Trainer = Kept
published = trainer.WEIGHTS

def run(name, keep, dropout, weights, *arguments):
    changed = shape | {{"dropout": dropout}}
    trainer.model_config = lambda model, size: replace(model_config(model, "tiny"), **changed)
    trainer.WEIGHTS = weights
    common = ["train", "--data", data, "--out", str(out / name), "--size", "tiny", "--device", "cpu"]
    for setting in ("epochs=1", "batch=2", "queue=16"):
        common += ["--set", setting]
    assert cli.main([*common, *arguments]) == 0
    states = {{"trainee": made[-1].trainee.state_dict(), "random": torch.get_rng_state()}}
    torch.save(states, out / f"{{keep}}-{{rank}}.pt")

run("straight", "straight", 0.1, published)
run("cut", "cut", 0.1, published, "--stop-after", "1")
torch.manual_seed(77)
run("cut", "resumed", 0.1, published, "--resume")
run("one", "one", 0.0, {{"hammer": {means}}}, "--stop-after", "1", "--set", "flip=false",
    "--set", "batch=1", "--set", "accumulate=2")
leave()
"""


@pytest.fixture(scope="module")
def processes(data, tmp_path_factory):
    """Folder of the runs of two processes, beside it each rank's last state by run, and their stdout."""
    folder = tmp_path_factory.mktemp("processes")
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(shape=SHAPE, means=MEANS))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(driver), str(folder), str(data)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def states(folder, run):
    return [torch.load(folder / f"{run}-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("run", ["straight", "cut", "resumed", "one"])
def test_processes_hold_the_same_weights_and_queues(run, processes):
    first, second = states(processes[0], run)
    for key, value in first["trainee"].items():
        assert torch.equal(value, second["trainee"][key]), key
    if run != "one":  # where nothing is drawn
        assert not torch.equal(first["random"], second["random"])


def test_processes_resume_exactly(processes):
    for straight, resumed in zip(
        *(states(processes[0], run) for run in ("straight", "resumed")), strict=True
    ):
        assert torch.equal(straight["random"], resumed["random"])
        for key, value in straight["trainee"].items():
            assert torch.equal(value, resumed["trainee"][key]), key


def test_one_process_writes_and_answers(processes):
    folder, stdout = processes
    answers = [json.loads(line) for line in stdout.splitlines()]
    assert [answer["update"] for answer in answers] == [5, 1, 5, 1]
    assert len((folder / "cut" / LOG).read_text().splitlines()) == 1
    content = read_snapshot(folder / "straight" / LAST)
    assert content["config"]["processes"] == len(content["random"]) == 2


def test_two_processes_with_two_steps_are_one_with_the_whole_batch(
    processes, train, small, tmp_path, monkeypatch
):
    """First moments of AdamW (a tenth of the gradient), weights' motion, and queues of both processes."""
    small(dropout=0.0)
    monkeypatch.setattr(module, "WEIGHTS", {"hammer": MEANS})
    code, _, _ = train(tmp_path / "run", "--stop-after", "1", batch=4, flip="false")
    assert code == 0
    ours, theirs = read_snapshot(tmp_path / "run" / LAST), read_snapshot(processes[0] / "one" / LAST)
    moments = [content["optimizer"]["state"] for content in (ours, theirs)]
    shared = moments[0].keys() & moments[1].keys()
    assert len(shared) > 60
    largest = 0.0
    for key in shared:
        a, b = moments[0][key]["exp_avg"], moments[1][key]["exp_avg"]
        assert (a - b).abs().max() <= 1e-7 + 1e-4 * float(a.abs().max())
        largest = max(largest, float(a.abs().max()))
    assert largest > 1e-3
    for queue in ("image_queue", "text_queue"):
        a, b = ours["model"][queue], theirs["model"][queue]
        assert (a - b).abs().max() <= 1e-5
        assert torch.equal(a[:, 4:], b[:, 4:])
    assert int(ours["model"]["queue_ptr"]) == int(theirs["model"]["queue_ptr"]) == 4
