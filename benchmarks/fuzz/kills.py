"""Commands that are killed: an export over an old bundle, answers to a list, and a sample set.

A server imports the project once and forks a process for each command, which is sent SIGTERM or SIGKILL after
a random time. What stands there afterwards is the old or the new whole thing; answers can be gone on with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from benchmarks.fuzz.pictures import photo
from engine.bundle import Bundle
from engine.errors import Dgm4Error

COMMANDS = ("export", "predict", "data")
_PAIRS = 60
_SERVER = """
import json, os, sys, time
import dgm4, torch, onnxscript, onnxruntime, export.cli.app, export.pipeline, dgm4.data.make
from export import cli
from export.cli import leaving
torch.set_num_threads(1)
for line in sys.stdin:
    arguments, number, after = json.loads(line)
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1), os.dup2(0, 2)
        leaving._PID = os.getpid()  # as if it had been started, not forked
        code = 99
        try:
            code = cli.main(arguments)
        except SystemExit as error:
            code = error.code
        finally:
            os._exit(code or 0)
    if number:
        time.sleep(after)
        os.kill(process, number)  # until it is waited for, the number is no other process's
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Killed(NamedTuple):
    """One command that was killed.

    status: its exit status, negative for a signal. wrong: what was found broken afterwards, or "". strays:
    temporary files that it left.
    """

    command: str
    signal: str
    after: float
    status: int
    wrong: str
    strays: int


class Server:
    """Context manager: runs commands of `dgm4`, each in a process forked from one that has imported all."""

    def __enter__(self) -> Self:
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-P", "-c", _SERVER], env=environment, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, arguments: list[str], number: signal.Signals | None = None, after: float = 0.0) -> int:
        """Run a command, and send it a signal after so many seconds; return its exit status."""
        orders, replies = self._process.stdin, self._process.stdout
        if orders is None or replies is None:
            raise RuntimeError("the server has no pipes")
        orders.write(json.dumps([arguments, int(number or 0), after]) + "\n")
        orders.flush()
        return int(replies.readline())


class Case(NamedTuple):
    """A command, how long it takes undisturbed, and a check that returns what is wrong afterwards, or ""."""

    arguments: list[str]
    seconds: float
    check: Callable[[], str]


def prepare(server: Server, folder: Path) -> dict[str, Case]:
    """Run each command once undisturbed in `folder`, and say what has to hold of it from then on."""
    listed = folder / "pairs.jsonl"
    photo().save(folder / "photo.png")
    pairs = ({"image": "photo.png", "caption": f"the president smiles {i}"} for i in range(_PAIRS))
    listed.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    answers, made, bundle = folder / "answers.jsonl", folder / "made", folder / "bundle"
    commands = {
        "export": [
            "export",
            "--drawn",
            "--size",
            "tiny",
            "--target",
            "none",
            "--out",
            str(bundle),
            "--quiet",
        ],
        "predict": [
            "predict",
            "demo:asap",
            "--list",
            str(listed),
            "--out",
            str(answers),
            "--resume",
            "--quiet",
        ],
        "data": ["data", "make", "--out", str(made), "--pairs", "40", "--quiet"],
    }
    checks = {
        "export": lambda: _check_bundle(bundle),
        "predict": lambda: _check_answers(answers),
        "data": lambda: _check_set(made),
    }
    cases = {}
    for name, arguments in commands.items():
        begun = time.perf_counter()
        if (status := server.run(arguments)) != 0:
            raise RuntimeError(f"{name}: ended with status {status}, undisturbed")
        cases[name] = Case(arguments, time.perf_counter() - begun, checks[name])
    return cases


def try_kill(seed: int, server: Server, cases: dict[str, Case], folder: Path) -> Killed:
    """Kill the command of a seed at a random time and look at what it left."""
    random = np.random.default_rng([5, seed])
    name = COMMANDS[seed % len(COMMANDS)]
    number = (signal.SIGTERM, signal.SIGKILL)[seed // len(COMMANDS) % 2]
    case = cases[name]
    for path in (folder / "answers.jsonl", folder / "answers.jsonl.partial"):
        path.unlink(missing_ok=True)
    after = float(random.uniform(0, 1.1 * case.seconds))
    before = _temporary(folder)
    status = server.run(case.arguments, number, after)
    wrong = case.check()
    if status not in (0, 128 + number, -number):
        wrong = wrong or f"status {status}"
    strays = sorted(_temporary(folder) - before)
    if strays and number == signal.SIGTERM and status != -number:
        wrong = wrong or f"SIGTERM left {strays[0].name}"
    return Killed(name, number.name, round(after, 3), status, wrong, len(strays))


def _temporary(folder: Path) -> set[Path]:
    return {path for path in folder.glob(".*") if path.name.endswith((".partial", ".old"))}


def sweep(server: Server, cases: dict[str, Case], folder: Path) -> str:
    """Run the export once more: what is wrong with the folder then, or ""."""
    status = server.run(cases["export"].arguments)
    left = [path.name for path in folder.glob(".bundle*")]
    return _check_bundle(folder / "bundle") or (f"status {status}, left {left}" if status or left else "")


def _check_bundle(path: Path) -> str:
    try:
        Bundle.open(path).verify_all()
    except Dgm4Error as error:
        return str(error)
    return ""


def _check_answers(path: Path) -> str:
    """The answers, or those so far: each line but a torn last one is whole, and in order."""
    kept = path if path.exists() else path.with_name(path.name + ".partial")
    if not kept.exists():
        return ""
    lines = kept.read_text().split("\n")
    numbers = [json.loads(line)["line"] for line in lines[:-1]]
    if path.exists() and len(numbers) != _PAIRS:
        return f"{len(numbers)} answers to {_PAIRS} pairs"
    return "" if numbers == list(range(1, len(numbers) + 1)) else "answers are lost"


def _check_set(path: Path) -> str:
    """The whole sample set."""
    records = [
        json.loads((path / "metadata" / f"{split}.json").read_text()) for split in ("train", "val", "test")
    ]
    images = [path / record["image"].removeprefix("DGM4/") for split in records for record in split]
    return "" if len(images) == 40 and all(image.is_file() for image in images) else "the set is not whole"
