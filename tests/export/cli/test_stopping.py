"""SIGTERM ends a command as an exception would, so that files are cleaned up."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from export import cli
from export.cli.stopping import exit_on_sigterm

ROOT = Path(__file__).resolve().parents[3]


def test_sigterm_is_not_lost_in_a_destructor():
    script = """
        import time
        from export.cli.stopping import exit_on_sigterm

        class Slow:
            def __del__(self):
                print("ready", flush=True)
                time.sleep(1)

        with exit_on_sigterm():
            slow = Slow()
            del slow
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=60) == 143
        finally:
            process.kill()


def test_sigterm_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with exit_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupt_while_the_command_is_imported(monkeypatch, capsys):
    class Interrupted:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "export.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "export.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted, *sys.meta_path])
    assert cli.main(["--help"]) == 130
    assert capsys.readouterr().err == "dgm4: error: interrupted\n"


def test_the_entry_point_imports_no_verb():
    code = "import sys; from export.cli import main; sys.exit('argparse' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Python runs it before anything of ours: the interrupt comes when this module is imported.
INTERRUPTING = """
import os, signal, sys

class Interrupt:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == os.environ["WHEN"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
"""
COMMANDS = {
    "module": ["-m", "export.cli", "predict", "demo:asap", str(ROOT / "benchmarks/results/sample.png"), "x"],
    "script": ["-c", "import sys; from export.cli import main; sys.exit(main())", "doctor"],
    "front door": [str(ROOT / "export" / "to_trt.py"), "--out", "out"],
}


@pytest.mark.parametrize(
    ("command", "when"),
    [
        ("script", "export.cli.app"),
        ("module", "argparse"),
        ("script", "numpy"),
        ("module", "numpy.linalg"),  # whose ImportError tells of a bad install
        ("module", "onnxruntime.capi._pybind_state"),  # would be "the backend cannot be imported"
        ("front door", "torch.nn"),
    ],
)
def test_ctrl_c_while_something_is_imported_ends_the_command_quietly(tmp_path, command, when):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *COMMANDS[command]],
        env={**os.environ, "PYTHONPATH": path, "WHEN": when},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.replace("checkpoint ...\n", "") == "dgm4: error: interrupted\n"


def test_ctrl_c_that_is_ignored_stays_so(tmp_path):
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from export.cli import main; main()"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING)
    environment = {**os.environ, "PYTHONPATH": path, "WHEN": "numpy"}
    command = [sys.executable, "-c", code, "list"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "demo:asap" in done.stdout
