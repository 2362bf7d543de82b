"""Images that cannot be read, workers that fail, and a run that is asked to stop: nothing trained is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dgm4.data.annotations import Problem
from dgm4.training import trainer as module
from dgm4.training.outputs import collect
from dgm4.training.reading import Unreadable, _explain
from dgm4.training.snapshot import read_snapshot
from dgm4.training.trainer import LAST, LOG
from engine.errors import BackendError, InputError


@pytest.fixture
def short(options):
    """One epoch of four updates, each of two pairs."""
    return replace(options, epochs=1, accumulate=1, batch=4)


def cut(data, split, numbers):
    """Leave only the header of some images of a split, which is what a look before training reads."""
    records = json.loads((data / "metadata" / f"{split}.json").read_text())
    for number in numbers:
        path = data / records[number]["image"].removeprefix("DGM4/")
        path.write_bytes(path.read_bytes()[:200])


def log_of(out):
    return [json.loads(line)["epoch"] for line in (out / LOG).read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_loses_nothing(workers, make, short, folder_of, tmp_path, caplog):
    """Number 1 is in both splits: in "train" another takes its place, in "val" it is left out."""
    data = folder_of(16)
    cut(data, "train", [1])
    made = make(short, tmp_path, data=data, workers=workers)
    progress = made.run()
    assert (progress.epoch, progress.update, log_of(tmp_path)) == (1, 4, [1])
    named = [record.message for record in caplog.records if "unreadable image 1: sample 11" in record.message]
    assert [message.split(",")[0] for message in named] == ["split train", "split val"]


def test_an_epoch_that_cannot_be_judged_is_kept(make, short, folder_of, tmp_path, monkeypatch):
    """No image to judge on can be read: the run is judged once they are there again."""
    data = folder_of(16)
    kept = {path: path.read_bytes() for path in data.rglob("*.png")}
    made = make(short, tmp_path, data=data)
    close = made._close_epoch

    def cut_then_close():
        cut(data, "val", range(4))
        made.val._pictures.clear()
        close()

    monkeypatch.setattr(made, "_close_epoch", cut_then_close)
    with pytest.raises(InputError, match="expected at least one readable image, got none of 4"):
        made.run()
    saved = read_snapshot(tmp_path / LAST)["progress"]
    assert (saved["epoch"], saved["batch"], saved["update"]) == (0, 4, 4)
    for path, content in kept.items():
        path.write_bytes(content)
    assert make(short, tmp_path, data=data, resume=True).run().epoch == 1
    assert log_of(tmp_path) == [1]


def test_the_limit_is_of_the_split():
    def problems(count):
        return [
            Problem(Path(f"{n}.jpg"), str(n), f"{n}.jpg: cut", "picture_unreadable") for n in range(count)
        ]

    Unreadable("val", 10).add(problems(4) + problems(4))  # the same ones
    with pytest.raises(
        InputError, match="split val: more than 4 of 10 images cannot be read, the last one: 4.jpg"
    ):
        Unreadable("val", 10).add(problems(5))
    Unreadable("train", 2000).add(problems(20))
    with pytest.raises(InputError, match="more than 20 of 2000"):
        Unreadable("train", 2000).add(problems(21))


def test_a_worker_without_shared_memory_ends_the_run(make, short, tmp_path, monkeypatch):
    """As with Docker's /dev/shm of 64 MB; workers are forks, and get what is patched here."""

    def full(self):
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")

    made = make(short, tmp_path, workers=1)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(BackendError, match=r"no shared memory left .*--shm-size=1g.*--workers 0") as caught:
        made.run()
    assert "\n" not in str(caught.value)


def test_other_failures_of_workers_are_one_line():
    said = _explain(
        "Caught X in worker process 0.\nTraceback\n  worker (pid 7) is killed by signal: Killed. \n"
    )
    assert said.endswith(
        "worker (pid 7) is killed by signal: Killed. ; if memory ran out, give fewer --workers"
    )
    assert "\n" not in said


@pytest.mark.parametrize("at", ["step", "judging"])
def test_a_run_that_is_asked_to_stop_is_the_same_run(at, make, options, tmp_path, monkeypatch):
    """In the middle of an update's two steps, and while it is judged."""
    straight = make(options, tmp_path / "straight")
    straight.run()
    made = make(options, tmp_path / "cut")
    if at == "step":
        step = made._step

        def stopping(model, batch):
            made.stop() if made.progress.batch == 2 else None
            return step(model, batch)

        monkeypatch.setattr(made, "_step", stopping)
    else:
        monkeypatch.setattr(module, "collect", lambda predict, data, *_, **__: (made.stop(), predict(None)))
    progress = made.run()
    assert (progress.epoch, progress.update) == ((0, 2) if at == "step" else (0, 4))
    monkeypatch.setattr(module, "collect", collect)
    again = make(options, tmp_path / "cut", resume=True)
    again.run()
    for name, value in straight.trainee.state_dict().items():
        assert torch.equal(value, again.trainee.state_dict()[name]), name
    assert log_of(tmp_path / "cut") == [1, 2]
