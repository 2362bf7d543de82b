"""What the tests of the networks, the kernels and the export share: networks, inputs, golden numbers."""

from __future__ import annotations

import functools
import gc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from traces import sharing

from engine import logs  # `engine` switches off what ONNX Runtime sends, before any test imports that

# Each worker keeps to its own cores, and so do the children of its tests: with a thread for every core in
# every worker a third of the CPU's time went into threads that spin while they wait for one another.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # "gw0"
if WORKER is not None and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    share = cores[int(WORKER.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, share or cores)
    torch.set_num_threads(len(share or cores))

# A shell's background ignores it, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes millions of short-lived objects; looking for cycles among them takes a tenth of its time.
gc.set_threshold(50_000, 20, 20)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined, so before any import


def mend_interpreter():
    """Let Triton 3.6 interpret with NumPy 2.4 and later, as 3.7 does: triton-lang/triton#9171.

    It takes int() of arrays of one element, which those refuse, wherever a loop ends at a loaded value.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if importlib.util.find_spec("triton") and importlib.metadata.version("triton").startswith("3.6."):
    mend_interpreter()

BINDINGS = Path(__file__).with_name("bindings.py")
GOLDEN = Path(__file__).parent / "golden"
NAMES = ("hammer", "asap", "cals")
BASE_FILES = (
    "tests/dgm4/test_parity.py",
    "tests/engine/backends/test_torch.py",
    "tests/export/test_base.py",
    "tests/export/test_cscl_base.py",
    "tests/export/test_pmmd_base.py",
    "tests/export/test_sharp.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give a worker whole files, and those with base networks to one worker.

    So what a module's fixtures make is made once, and a network of 800 MB is drawn once. By groups, --dist
    loadgroup, it cannot be done: xdist 3.8 writes them where pytest 9.2 does not read.
    """
    from xdist.scheduler import LoadFileScheduling

    class WholeFiles(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "base networks" if file in BASE_FILES else file

    return WholeFiles(config, log)


def published_inputs(seed, batch, tokens, lengths, first=101):
    """The formula the golden numbers were made with: pictures, ids and mask (no [SEP]) as NumPy arrays.

    `first` is the id of [CLS].
    """
    random = np.random.Generator(np.random.PCG64([seed, 7]))
    low = random.standard_normal((batch, 3, 16, 16), dtype=np.float32).repeat(16, 2).repeat(16, 3)
    image = low + 0.3 * random.standard_normal((batch, 3, 256, 256), dtype=np.float32)
    ids = random.integers(1000, 30000, (batch, tokens))
    ids[:, 0] = first
    mask = (np.arange(tokens)[None] < np.asarray(lengths)[:, None]).astype(np.int64)
    return {"image": image, "input_ids": ids * mask, "attention_mask": mask}


def load_golden(name):
    """Inputs and outputs of the published network `name`, by the names of our outputs."""
    with np.load(GOLDEN / f"golden_{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    inputs = published_inputs(*(meta[key] for key in ("seed", "batch", "tokens", "lengths")))
    renamed = {"output_coord": "box", "cross_attention_scores": "attention_map"}
    arrays = {renamed.get(key, key): array for key, array in arrays.items()}
    return SimpleNamespace(inputs=inputs, arrays=arrays, residual=meta.get("residual"))


def worst_outputs(answers, golden):
    """Largest difference of every named output from the golden one, over valid tokens only."""
    valid = golden.inputs["attention_mask"] == 1
    worst = {}
    for name in ("logits_real_fake", "logits_multicls", "box", "logits_tok", "attention_map"):
        if name not in golden.arrays:
            continue
        difference = np.abs(np.asarray(answers[name], np.float64) - golden.arrays[name])
        assert difference.shape == golden.arrays[name].shape
        rows = {"logits_tok": valid[:, 1:], "attention_map": valid}.get(name)
        worst[name] = float(difference.max() if rows is None else difference[rows].max())
    return worst


@pytest.fixture
def libraries(monkeypatch):
    """Say which libraries are found: `libraries(triton=True, onnx=False)`.

    Of all others the machine is asked. A fixture that this test is the first to need asks too, and what it
    makes is shared.
    """
    find = importlib.util.find_spec

    def say(**installed):
        def answer(name, package=None):
            if name not in installed:
                return find(name, package)
            return importlib.machinery.ModuleSpec(name, None) if installed[name] else None

        monkeypatch.setattr(importlib.util, "find_spec", answer)

    return say


@pytest.fixture(scope="session")
def golden_inputs():
    return published_inputs


@pytest.fixture(scope="session")
def outputs_apart():
    return worst_outputs


@pytest.fixture(scope="session")
def golden_keys():
    """Names and shapes of a released checkpoint, training copies included."""
    return lambda name: [(k, tuple(s)) for k, s in json.loads((GOLDEN / f"keys_{name}.json").read_text())]


@pytest.fixture(scope="module", autouse=True)
def settled():
    """Keep what earlier modules left, some million objects, out of the collector's walks: seconds each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", params=NAMES)
def base(request):
    """One base network at a time, drawn weights: .name, .model and .golden. Tests leave it as it is."""
    import dgm4

    network = SimpleNamespace(
        name=request.param,
        model=dgm4.seeded_model(request.param).requires_grad_(False),
        golden=load_golden(request.param),
    )
    yield network
    del network.model
    gc.unfreeze()
    gc.collect()


@pytest.fixture
def sharp(base):
    """`base` with weights under which words answer apart: the matrices that end residual branches redrawn."""
    from dgm4.seeded import RESIDUAL, draw

    golden = load_golden(f"{base.name}_sharp")
    kept = {name: p.data for name, p in base.model.named_parameters() if name.endswith(RESIDUAL)}
    for name, weight in kept.items():
        redrawn = draw(name, tuple(weight.shape), 1, golden.residual)
        base.model.get_parameter(name).data = torch.from_numpy(redrawn)
    yield SimpleNamespace(name=base.name, model=base.model, golden=golden)
    for name, weight in kept.items():
        base.model.get_parameter(name).data = weight


@pytest.fixture(scope="session")
def tiny():
    """Make a fresh tiny network with drawn weights; dtype float32 unless given."""
    import dgm4

    return lambda name, dtype=None, seed=1: dgm4.seeded_model(name, "tiny", seed).to(dtype or None)


@pytest.fixture(scope="session")
def network_input():
    """A function from any image, with the options of `decode_image`, to the network's input [3, 256, 256]."""
    from engine.inputs.preprocess import decode_image, normalize_image, resize_image

    return lambda image, **options: normalize_image(resize_image(decode_image(image, **options).rgb, 256))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Make a folder once for all workers: `make(folder)` fills it, and what it returns (pickled) is returned.

    Tests leave the folder as it is.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if WORKER is not None else base) / "made-once"
    shared.mkdir(exist_ok=True)

    def once(name, make):
        folder, record = shared / name, shared / f"{name}.pickle"
        with FileLock(shared / f"{name}.lock"):
            if not record.exists():
                folder.mkdir(exist_ok=True)  # of a try that failed
                record.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(record.read_bytes())

    return once


@pytest.fixture(scope="session", autouse=True)
def trace(made_once):
    """torch.onnx.export itself; in its place stands one that traces a network once a run."""
    export = torch.onnx.export
    torch.onnx.export = sharing(export, made_once)
    yield export
    torch.onnx.export = export


@pytest.fixture(scope="session")
def bundle(made_once):
    """Export a tiny bundle by name and precision, without an engine: .path, .manifest and .stages."""

    @functools.cache
    def export(name, precision):
        def make(folder):
            from export.options import ExportOptions
            from export.pipeline import export_bundle

            out, stages = folder / f"{name}-{precision}", []
            options = ExportOptions(out=out, model=name, size="tiny", precision=precision, engine=False)
            return SimpleNamespace(path=out, manifest=export_bundle(options, stages.append), stages=stages)

        return made_once(f"bundle-{name}-{precision}", make)

    return export


WORDS = ["a", "man", "president", "smiles", "with", "the", "new", "house", "in", "front", "of", "senate"]


@pytest.fixture(scope="session")
def annotated(tmp_path_factory):
    """Make a folder in DGM4's layout, by number of pairs and seed; `records` replaces or adds to its own."""

    def make(count=12, seed=0, records=()):
        data = tmp_path_factory.mktemp("data")
        random = np.random.default_rng(seed)
        for name in ("metadata", "origin", "manipulation"):
            (data / name).mkdir()
        own = [write_pair(data, i, random) for i in range(count)]
        (data / "metadata" / "test.json").write_text(json.dumps([*own, *records]))
        return data

    return make


def write_pair(data, number, random):
    """Write a noisy picture and return its record; the classes take turns."""
    kinds = ("orig", "face_swap", "text_swap", "face_attribute&text_attribute", "text_attribute")
    kind = kinds[number % len(kinds)]
    width, height = (int(side) for side in random.integers(60, 120, 2))
    image = f"{'origin' if kind == 'orig' else 'manipulation'}/{number}.jpg"
    blocks = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).save(data / image)
    text = " ".join(random.choice(WORDS, random.integers(2, 12))).capitalize() + "."
    return {
        "id": number,
        "image": f"DGM4/{image}",
        "text": text,
        "fake_cls": kind,
        "fake_image_box": [10, 12, 40, 50] if "face" in kind else [],
        "fake_text_pos": [0, 1] if "text" in kind else [],
        "mtcnn_boxes": [],
    }


@pytest.fixture(scope="session")
def count_calls():
    """Run a function: what it returns, and how many functions of Python and C were called meanwhile.

    Stands in for a clock, which a busy machine makes wrong.
    """

    def count(function):
        calls = Counter()
        sys.setprofile(lambda frame, event, argument: calls.update([event]))
        try:
            returned = function()
        finally:
            sys.setprofile(None)
        return returned, calls["call"] + calls["c_call"]

    return count


@pytest.fixture(scope="session")
def bindings():
    """What the real bindings of a library offer, by class: tests/bindings.py. Skips where there are none."""
    spec = importlib.util.spec_from_file_location("bindings", BINDINGS)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    @functools.cache
    def read(library):
        if (reason := program.unavailable(library)) is not None:
            pytest.skip(reason)
        command = [sys.executable, BINDINGS, library]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return read


@pytest.fixture(autouse=True)
def warned_anew():
    """Each test hears the warnings that a process gives once."""
    logs._told.clear()


@pytest.fixture(params=NAMES)
def name(request):
    """Each of the three networks."""
    return request.param
