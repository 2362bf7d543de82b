"""The layout of checkpoints, and files that are none."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dgm4.config import model_config
from dgm4.state import read_state
from dgm4.training.journal import append_line, keep_lines
from dgm4.training.snapshot import load_released, read_snapshot, released_state, write_snapshot
from dgm4.training.trainee import Trainee
from engine.errors import CheckpointError

CONTENT = {
    "model": {"a": torch.arange(300.0)},
    **dict.fromkeys(("optimizer", "lr_scheduler", "scaler", "config", "progress"), {}),
    "epoch": 3,
    "random": [{"cpu": torch.get_rng_state()}],
}


def test_the_released_keys_and_shapes_at_base_size(name, golden_keys):
    with torch.device("meta"):
        state = released_state(Trainee(model_config(name)))
    assert {k: tuple(v.shape) for k, v in state.items()} == dict(golden_keys(name))
    whole = {k for k, v in state.items() if not v.is_floating_point()}
    assert {k.rpartition(".")[2] for k in whole} <= {"queue_ptr", "position_ids", "num_batches_tracked"}


def test_the_uncalled_modules_of_cals_are_zeros_and_cost_nothing(config_of, tmp_path):
    trainee = Trainee(config_of("cals"), queue=8)
    state = released_state(trainee)
    write_snapshot(path := tmp_path / "run.pth", {"model": state})
    uncalled = {k: v for k, v in state.items() if ".MHA1." in k or ".fl1_mlp." in k or ".usam_pre." in k}
    assert len(uncalled) == 2 * (12 + 4 + 7)
    loaded = read_state(path)
    for key, value in uncalled.items():
        assert loaded[key].shape == value.shape
        assert not loaded[key].any()
    dense = sum(v.nbytes for k, v in state.items() if v.untyped_storage().nbytes() >= v.nbytes)
    assert path.stat().st_size < 1.5 * dense
    # A strict load of another program copies them as any other tensor.
    target = torch.nn.Linear(*uncalled["visual_encoder.fl1_mlp.mlp.0.weight"].shape[::-1], bias=False)
    target.load_state_dict({"weight": loaded["visual_encoder.fl1_mlp.mlp.0.weight"]})
    assert not target.weight.any()


def test_position_ids_are_counted_out(config_of):
    state = released_state(Trainee(config_of("hammer"), queue=8))
    for tower in ("text_encoder", "text_encoder_m"):
        ids = state[f"{tower}.bert.embeddings.position_ids"]
        assert ids.tolist() == [list(range(64))]


def test_what_is_written_is_loaded_back(name, config_of):
    torch.manual_seed(1)
    first, second = (Trainee(config_of(name), queue=8) for _ in range(2))
    load_released(second, released_state(first))
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


def test_a_state_that_does_not_fit_is_named(config_of):
    trainee = Trainee(config_of("hammer"), queue=8)
    state = {k: v for k, v in released_state(trainee).items() if k != "text_encoder_m.classifier.0.bias"}
    with pytest.raises(
        CheckpointError, match=r"hammer .*; 1 are missing .*: text_encoder_m\.classifier\.0\.b"
    ):
        load_released(trainee, state)
    wider = Trainee(replace(config_of("hammer"), vocabulary=2049), queue=8)
    with pytest.raises(CheckpointError, match=r"2 are missing or misshapen: .*word_embeddings"):
        load_released(wider, released_state(trainee))


# Files


def test_a_snapshot_comes_back(tmp_path):
    write_snapshot(path := tmp_path / "run.pth", CONTENT)
    found = read_snapshot(path)
    assert torch.equal(found["model"]["a"], CONTENT["model"]["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["run.pth"]


def test_a_failed_write_leaves_the_old_one(tmp_path):
    write_snapshot(path := tmp_path / "run.pth", CONTENT)
    with pytest.raises(Exception, match="pickle"):
        write_snapshot(path, {"model": lambda: None})
    assert read_snapshot(path)["epoch"] == 3


def test_torn_and_altered_files_are_refused(tmp_path):
    write_snapshot(path := tmp_path / "run.pth", CONTENT)
    whole = path.read_bytes()
    draw = random.Random(0)
    torn = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    torn += [whole[: draw.randrange(len(whole))] for _ in range(20)]
    at = whole.index(CONTENT["model"]["a"].numpy().tobytes()) + 77
    torn += [whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :], b"no checkpoint" * 99]
    for content in torn:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"run\.pth"):
            read_snapshot(path)


@pytest.mark.parametrize(
    "content", [[1], torch.ones(2), {"model": {}}, {**CONTENT, "random": 0} | {}, {}], ids=range(5)
)
def test_foreign_files_are_refused(content, tmp_path):
    path = tmp_path / "run.pth"
    if isinstance(content, dict):
        content = {k: v for k, v in content.items() if k not in ("progress", "random")}
    torch.save(content, path)
    with pytest.raises(
        CheckpointError, match=r"expected a checkpoint of a run of this project, it lacks .*--init"
    ):
        read_snapshot(path)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (__import__("os").mkdir, (str(tmp_path / "made"),))

    torch.save({**CONTENT, "config": Evil()}, tmp_path / "run.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        read_snapshot(tmp_path / "run.pth")
    assert not (tmp_path / "made").exists()


def test_the_log_drops_what_is_trained_again(tmp_path):
    path = tmp_path / "log.jsonl"
    keep_lines(path, 5)
    assert not path.exists()
    for epoch in (1, 2, 3):
        append_line(path, {"epoch": epoch, "val": {"AUC": float("nan"), "mAP": 0.5}})
    with path.open("a") as file:
        file.write('{"epoch": 4, "va')
    keep_lines(path, 2)
    assert path.read_text().splitlines() == [
        '{"epoch": 1, "val": {"AUC": null, "mAP": 0.5}}',
        '{"epoch": 2, "val": {"AUC": null, "mAP": 0.5}}',
    ]
