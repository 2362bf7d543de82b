"""Runs: exact resume, what they write, refuse and log, ablations, precisions, and that they learn."""

from __future__ import annotations

import json
import logging
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import dgm4
from dgm4.training import trainer as module
from dgm4.training.snapshot import read_snapshot
from dgm4.training.trainer import BEST, LAST, LOG
from engine.errors import BackendError, CheckpointError, InputError, NumericalError


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(first, second, path=""):
    """Bit-equal, whatever it is made of."""
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, path
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for i, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{path}/{i}")
    else:
        assert first == second, path


def content(out):
    """What a run wrote, without the clock."""
    found = read_snapshot(out / LAST)
    for name in ("seconds", "epoch_seconds"):
        del found["progress"][name]
    return found


def lines(out):
    found = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def scramble():
    """Another process would start from other random streams."""
    torch.manual_seed(987)
    random.seed(5)
    np.random.seed(6)


def test_a_run_taken_up_is_the_same_run(name, make, options, tmp_path):
    """Stopped within an epoch of four updates, and at its end; every tensor, stream and log line."""
    options = replace(options, model=name, clip=0.5)
    make(options, straight := tmp_path / "straight").run()
    for i, stop in enumerate((3, 4)):
        made = make(options, tmp_path / "cut", stop_after=stop, resume=i > 0)
        assert made.run().update == stop
        scramble()
    end = make(options, tmp_path / "cut", resume=True)
    assert end.run().update == 8
    assert_same(content(straight), content(tmp_path / "cut"))
    assert_same(lines(straight), lines(tmp_path / "cut"))
    assert_same(read_snapshot(straight / BEST)["model"], read_snapshot(tmp_path / "cut" / BEST)["model"])


def test_a_killed_run_is_taken_up_at_its_last_save(make, options, tmp_path, monkeypatch):
    """Killed after the log's line and before the checkpoint: the epoch's end is done again, once."""
    make(options, straight := tmp_path / "straight").run()
    killed = make(options, out := tmp_path / "killed", save_every=3)
    save = killed._save

    def die(names, states):
        if names != (LAST,) or killed.progress.batch == 0:
            raise KeyboardInterrupt
        save(names, states)

    monkeypatch.setattr(killed, "_save", die)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert len(lines(out)) == 1
    with (out / LOG).open("a") as file:
        file.write('{"epoch": 1, "upd')
    make(options, out, resume=True, save_every=3).run()
    assert_same(content(straight), content(out))
    assert_same(lines(straight), lines(out))


def test_workers_change_nothing(make, options, tmp_path):
    make(options, tmp_path / "none").run()
    make(options, tmp_path / "one", workers=1).run()
    assert_same(content(tmp_path / "none"), content(tmp_path / "one"))


def test_the_streams_matter(make, options, tmp_path):
    """Dropout, flips and seed do something, so that the equalities above say something."""
    losses = [
        make(replace(options, epochs=1, **change), tmp_path / str(i)).run() and lines(tmp_path / str(i))
        for i, change in enumerate(({}, {"seed": 2}, {"flip": False}))
    ]
    assert len({line[0]["train"]["loss"] for line in losses}) == 3


def test_flips_change_with_the_epoch(make, options, tmp_path, monkeypatch):
    made = make(options, tmp_path)
    forward, seen = made.trainee.forward, {i: [] for i in range(16)}

    def watch(batch, alpha):
        for index, image in zip(batch.indices.tolist(), batch.image, strict=True):
            seen[index].append(image)
        return forward(batch, alpha)

    monkeypatch.setattr(made.trainee, "forward", watch)
    made.run()
    assert {len(images) for images in seen.values()} == {2}
    mirrored = [torch.equal(first, second.flip(2)) for first, second in seen.values()]
    assert {True, False} == set(mirrored)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"lr": 2e-3}, "lr"), ({"seed": 2}, "seed"), ({"model": "asap"}, "model"), ({"batch": 4}, "batch")],
    ids=str,
)
def test_another_recipe_is_refused(change, named, make, options, tmp_path):
    make(options, tmp_path, stop_after=1).run()
    with pytest.raises(InputError, match=rf"another recipe.*\({named}.* differ\)"):
        make(replace(options, **change), tmp_path, resume=True)


def test_another_data_folder_or_vocabulary_is_refused(make, small, options, folder_of, tmp_path):
    make(options, tmp_path, stop_after=1).run()
    with pytest.raises(InputError, match=r"\(pairs differ\)"):
        make(options, tmp_path, resume=True, data=folder_of(12))
    small(dropout=0.5)
    with pytest.raises(InputError, match=r"\(network differ\)"):
        make(options, tmp_path, resume=True)


def test_there_is_nothing_to_resume(make, options, tmp_path):
    with pytest.raises(CheckpointError, match="no such file, so there is no run to go on with; start one"):
        make(options, tmp_path, resume=True)


def test_a_run_is_not_written_over(make, options, tmp_path):
    make(options, tmp_path, stop_after=1).run()
    with pytest.raises(InputError, match="a run is there; resume it, or choose another folder"):
        make(options, tmp_path)


def test_a_finished_run_stays_as_it_is(make, options, tmp_path):
    make(replace(options, epochs=1), tmp_path).run()
    before = content(tmp_path)
    made = make(replace(options, epochs=1), tmp_path, resume=True)
    assert made.run().epoch == 1
    assert_same(before, content(tmp_path))
    assert len(lines(tmp_path)) == 1


# What a run writes


def test_the_log_has_the_means_of_the_epoch(make, options, tmp_path, monkeypatch):
    made = make(replace(options, epochs=1), tmp_path)
    step, seen = made._step, []
    monkeypatch.setattr(made, "_step", lambda *given: seen.append(step(*given)) or seen[-1])
    made.run()
    (line,) = lines(tmp_path)
    assert (len(seen), line["epoch"], line["update"]) == (8, 1, 4)
    for name, value in line["train"].items():
        assert value == pytest.approx(np.mean([values[name] for values in seen]), rel=1e-9)
    weighted = sum(module.WEIGHTS["hammer"][k] * v for k, v in line["train"].items() if k != "loss")
    assert line["train"]["loss"] == pytest.approx(weighted, rel=1e-5)
    assert {"AUC", "mAP", "IoUmean", "text_F1"} <= line["val"].keys()


def test_the_best_checkpoint_is_that_of_the_best_epoch(make, options, tmp_path, monkeypatch):
    made = make(replace(options, epochs=3, accumulate=4), tmp_path)
    scores = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(made, "validate", lambda: dict.fromkeys(module._SCORE, next(scores)))
    assert made.run().best == pytest.approx(3.6)
    assert (read_snapshot(tmp_path / BEST)["epoch"], read_snapshot(tmp_path / LAST)["epoch"]) == (2, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [BEST, LAST, LOG]


def test_val_of_one_class_still_chooses(make, options, folder_of, tmp_path):
    """AUC and mAP are then unknown: null in the log, and no part of the score."""
    folder = folder_of(8)
    records = json.loads((folder / "metadata" / "val.json").read_text())
    (folder / "metadata" / "val.json").write_text(json.dumps(records[2:3]))
    assert math.isfinite(make(replace(options, epochs=1), tmp_path, data=folder).run().best)
    assert (tmp_path / BEST).is_file()
    assert json.loads((tmp_path / LOG).read_text())["val"]["AUC"] is None


def test_checkpoints_load_into_a_network_with_the_same_answers(
    name, make, options, config_of, tmp_path, monkeypatch
):
    made = make(replace(options, model=name, epochs=1), tmp_path)
    made.run()
    network = dgm4.load_checkpoint(tmp_path / LAST, config=config_of(name))
    assert dgm4.read_checkpoint(tmp_path / LAST).layout == name
    made.trainee.eval()
    batch = next(iter(made._loader())).batch
    with torch.no_grad():
        ours = network(batch.image, batch.input_ids, batch.attention_mask)
        theirs = made.trainee.predict(batch)
    close = 1e-5 if name == "cals" else 0.0  # trained on four pixels a patch, served at full resolution
    for field in ("logits_real_fake", "logits_multicls", "box", "logits_tok"):
        assert (getattr(ours, field) - getattr(theirs, field)).abs().max() <= close, field


# Schedules of a run


def test_alpha_rises_over_the_first_epoch(make, options, tmp_path, monkeypatch):
    made = make(options, tmp_path)
    forward, seen = made.trainee.forward, []
    monkeypatch.setattr(made.trainee, "forward", lambda b, alpha: seen.append(alpha) or forward(b, alpha))
    made.run()
    assert seen == pytest.approx([0.4 * i / 8 for i in range(8)] + [0.4] * 8)


def test_accumulated_gradients_are_those_of_the_larger_batch(make, small, options, tmp_path, monkeypatch):
    """Losses that are means over pairs; in AdamW's first moment, which is a tenth of the first gradient."""
    small(dropout=0.0)
    kept = {**module.WEIGHTS["hammer"], "mac": 0.0}  # its negatives are those of the batch
    monkeypatch.setattr(module, "WEIGHTS", {"hammer": kept})
    moments = []
    for i, (batch, accumulate) in enumerate(((4, 1), (2, 2), (1, 4))):
        recipe = replace(options, batch=batch, accumulate=accumulate, flip=False)
        made = make(recipe, tmp_path / str(i), stop_after=1)
        # Alpha would differ within the update: it rises batch by batch.
        forward = made.trainee.forward
        monkeypatch.setattr(made.trainee, "forward", lambda batch, _, f=forward: f(batch, 0.0))
        made.run()
        moments.append([state["exp_avg"] for state in made.optimizer.state.values()])
    for other in moments[1:]:
        for a, b in zip(moments[0], other, strict=True):
            assert (a - b).abs().max() <= 1e-7 + 1e-4 * float(a.abs().max())
    assert max(float(m.abs().max()) for m in moments[0]) > 1e-3


# Ablations


def terms_of(made):
    made.trainee.train()
    return made.trainee(next(iter(made._loader())).batch, 0.4)


def test_guidance_is_the_mgca_term(make, options, tmp_path):
    asap = replace(options, model="asap")
    full, without = terms_of(make(asap, tmp_path)), terms_of(make(replace(asap, guidance=False), tmp_path))
    assert full.keys() - without.keys() == {"mgca"}
    assert set(full) == set(module.WEIGHTS["asap"])
    for key in without:
        assert torch.equal(full[key], without[key]), key


def test_without_refinement_the_coarse_box_is_trained_and_answered(make, options, tmp_path):
    cals = replace(options, model="cals")
    full, without = make(cals, tmp_path), make(replace(cals, refinement=False), tmp_path)
    batch = next(iter(full._loader())).batch
    for made in (full, without):
        made.trainee.eval()
    trace = full.trainee.network.trace(batch.image, batch.input_ids, batch.attention_mask)
    assert torch.equal(without.trainee.predict(batch).box, trace.branch.coarse)
    assert torch.equal(full.trainee.predict(batch).box, trace.branch.box)
    assert not torch.allclose(trace.branch.coarse, trace.branch.box, atol=1e-6)
    one, both = without.trainee(batch)["box_l1"], full.trainee(batch)["box_l1"]
    refined = (trace.branch.box - batch.box).abs().sum(-1).mean()
    assert float((both - one).detach()) == pytest.approx(float(refined.detach()), rel=1e-5)
    one.backward()
    assert without.trainee.network.cls_token_local_e.grad is None


@pytest.mark.parametrize("sampled", [True, False])
def test_sampled_reaches_both_towers(sampled, make, options, tmp_path):
    made = make(replace(options, model="cals", sampled=sampled, epochs=1, accumulate=4), tmp_path)
    towers = made.trainee.network.visual_encoder, made.trainee.visual_encoder_m
    assert [tower.sampled for tower in towers] == [sampled] * 2
    assert made.run().update == 2


# Precisions, failures


def test_bf16_runs_on_a_cpu(name, make, options, tmp_path):
    made = make(replace(options, model=name, epochs=1, precision="bf16"), tmp_path)
    assert made.run().update == 4
    assert {p.dtype for p in made.trainee.parameters()} == {torch.float32}
    assert all(math.isfinite(v) for v in lines(tmp_path)[0]["train"].values())


def test_fp16_needs_a_gpu(make, options, tmp_path):
    with pytest.raises(BackendError, match="training in fp16 needs a GPU; bf16 and fp32 run on a CPU too"):
        make(replace(options, precision="fp16"), tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cpu0", "cuda:x", "mps", ""])
def test_unknown_devices(device, make, options, tmp_path):
    with pytest.raises(InputError, match="device: expected auto, cpu, cuda or cuda:N, got"):
        make(options, tmp_path, device=device)


def test_a_gpu_that_is_not_there(make, options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BackendError, match="one of the 0 GPUs"):
        make(options, tmp_path, device="cuda")


def test_a_loss_that_is_no_number_ends_the_run(make, options, tmp_path):
    made = make(options, tmp_path, stop_after=2)
    made.run()
    made = make(options, tmp_path, resume=True)
    before = content(tmp_path)
    with torch.no_grad():
        made.trainee.network.itm_head[6].bias.fill_(float("nan"))
    with pytest.raises(
        NumericalError, match=r"epoch 0, update 2: a loss is not finite .*'bic': nan.*; lower"
    ):
        made.run()
    assert_same(before, content(tmp_path))


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_no_number_reaches_no_weight(clip, make, options, tmp_path):
    made = make(replace(options, clip=clip), tmp_path)
    weight = made.trainee.network.itm_head[0].weight
    weight.register_hook(lambda grad: grad * float("inf"))
    before = weight.detach().clone()
    with pytest.raises(NumericalError, match="epoch 0, update 0: the gradient is not finite"):
        made.run()
    assert torch.equal(weight.detach(), before)


def test_too_few_pairs(make, options, tmp_path):
    with pytest.raises(InputError, match=r"16 training pairs do not fill one update of 9 x 2 x 1 processes"):
        make(replace(options, batch=9), tmp_path)


def test_nothing_to_judge_on(make, options, folder_of, tmp_path):
    folder = folder_of(8)
    (folder / "metadata" / "val.json").write_text("[]")
    with pytest.raises(InputError, match="split val: expected annotated pairs"):
        make(options, tmp_path, data=folder)


@pytest.mark.parametrize("missing", [("captions",), ("captions", "explanations")])
def test_asap_without_side_cars(missing, make, options, folder_of, tmp_path, caplog):
    folder = folder_of(8)
    for name in missing:
        (folder / "metadata" / f"{name}.json").unlink()
    with caplog.at_level(logging.WARNING):
        made = make(replace(options, model="asap", epochs=1), tmp_path, data=folder)
    (message,) = [record.message for record in caplog.records]
    assert "not there, so ASAP trains without LMA and IED" in message
    made.run()
    assert lines(tmp_path)[0]["train"].keys() == {"loss", *module.WEIGHTS["asap"]} - {"lma", "ied"}


def test_a_small_network_learns_eight_pairs(name, make, options, folder_of, tmp_path):
    """The losses of labels and boxes fall; dropout and flips are off."""
    recipe = replace(
        options, model=name, epochs=15, batch=4, accumulate=1, lr=3e-3, lr_vision=3e-3, flip=False, clip=1.0
    )
    make(recipe, tmp_path, data=folder_of(8)).run()
    first, last = lines(tmp_path)[0]["train"], lines(tmp_path)[-1]["train"]
    fitted = ("bic", "mlc", "tmg", "box_l1")
    assert sum(last[key] for key in fitted) < 0.6 * sum(first[key] for key in fitted)
    assert last["loss"] < first["loss"]
