"""What a command refuses before it imports torch or scikit-learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NO_DATA = "nope: expected the data folder"
CASES = {
    "export --checkpoint nope.pth --out b": "nope.pth: no such file",
    "export --out full": "is not empty and not a bundle",
    "export --out none/b": "none/b: expected a directory in one that exists",
    "export --out b --data nope": NO_DATA,
    "export --out b --precision int8 --calibration nope": NO_DATA,
    "export --out b --target 3.5": "3.5",
    "export --out b --vocab nope.txt": "nope.txt: expected a vocabulary",
    "evaluate demo:asap --data nope": NO_DATA,
    "evaluate nope --data full": "nope: not a bundle",
    "evaluate demo:asap --data full --checkpoint nope.pth": "nope.pth: no such file",
    "calibrate demo:asap --data nope --false-alarms 0.1": NO_DATA,
    "calibrate nope --data full --false-alarms 0.1": "nope: not a bundle",
    "convert nope.pth a.safetensors": "nope.pth: no such file",
    "convert full/file none/a.safetensors": "OUT none/a.safetensors: expected the name of a file",
    "train --data nope --out run": NO_DATA,
    "train --data full --out run --init nope.pth": "nope.pth: no such file",
    "train --data full --out run --vocab nope.txt": "nope.txt: expected a vocabulary",
    "train --data full --out run --recipe nope.toml": "nope.toml",
    "pretrain --data nope --out a.pth": NO_DATA,
    "data describe --data nope --captioner full": NO_DATA,
    "inspect demo:asap --layers --data nope": NO_DATA,
    "rebuild nope": "nope: not a bundle",
    "bench nope": "nope: not a bundle",
}
CODE = """
import contextlib, io, json, sys
from export import cli

told = {}
for line in sys.argv[1:]:
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            code = cli.main(line.split())
        except SystemExit as error:
            code = error.code
    told[line] = code, stderr.getvalue(), [name for name in ("torch", "sklearn") if name in sys.modules]
print(json.dumps(told))
"""


def test_paths_and_values_are_checked_before_the_heavy_imports(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("something else")
    command = [sys.executable, "-P", "-c", CODE, *CASES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    for line, expected in CASES.items():
        code, error, imported = told[line]
        assert code in (1, 2, 4), line
        assert expected in error.splitlines()[-1], line
        assert not imported, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
