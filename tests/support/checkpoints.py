"""Checkpoints as the published code lays them out, small and drawn."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import safetensors.torch
import torch

import dgm4
from dgm4.model import build
from dgm4.seeded import draw

UNUSED_CALS = ("CoordConv", "usam_pre", "MHA1", "MHA3", "fl1_mlp", "fl2_mlp")


def shape(name, **changes):
    """The tiny configuration of a network with those of the changes that it has a field for."""
    config = dgm4.model_config(name, "tiny")
    return replace(config, **{k: v for k, v in changes.items() if hasattr(config, k)})


def small(name):
    """The smallest network with every part; its files are read in milliseconds."""
    return shape(
        name,
        width=24,
        vision_depth=3,
        text_depth=2,
        fusion_start=1,
        vocabulary=30,
        positions=16,
        image_size=64,
        guidance_widths=(4, 4, 8),
    )


def live(config):
    """The tensors that inference reads, drawn; BatchNorm's counter is left out."""
    return dict(drawn_once(config))


@functools.cache
def drawn_once(config):
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in build(config).state_dict().items()}
    return {
        k: torch.from_numpy(draw(k, s, 1)) for k, s in shapes.items() if not k.endswith("num_batches_tracked")
    }


def training_copies(state):
    """What the published code keeps beside the live tensors."""
    towers = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.")
    projections = {
        f"{p}.{leaf}": torch.ones(4) for p in ("vision_proj", "text_proj") for leaf in ("weight", "bias")
    }
    state = {**state, **projections, "temp": torch.tensor(0.07)}
    copies = {k.replace(".", "_m.", 1): v + 1 for k, v in state.items() if k.startswith(towers)}
    queues = {
        "image_queue": torch.zeros(8, 16),
        "text_queue": torch.zeros(8, 16),
        "queue_ptr": torch.zeros(1).long(),
    }
    ids = {"text_encoder.bert.embeddings.position_ids": torch.arange(16)[None]}
    return {**state, **copies, **queues, **ids}


def published(name, config):
    """The `model` entry as the code of `name` writes it."""
    state = training_copies(live(config))
    if name == "asap":
        state |= {"patch_head.weight": torch.ones(1, 4), "itm_head_m.0.weight": torch.ones(4, 4)}
    if name == "cals":
        state |= {f"visual_encoder.{module}.weight": torch.ones(3) for module in UNUSED_CALS}
        state["visual_encoder.Conv.bn2.num_batches_tracked"] = torch.tensor(7)
    return state


def renamed_cals(config):
    """The layout of the only released weights of CALS."""
    state = published("cals", config)
    for ours, theirs in (("LIG", "MIG"), ("fch", "CARA")):
        state = {
            theirs + k.removeprefix(ours) if k.startswith(f"{ours}.") else k: v for k, v in state.items()
        }
    extra = (
        "text_encoder_f_1.layer",
        "bbox_head_f.0",
        "bbox_head_c.0",
        "cls_head_A.0",
        "dimd.fc",
        "psil.conv",
    )
    return state | {f"{module}.weight": torch.ones(2) for module in extra}


def albef(config):
    """ALBEF_4M's layout: both encoders, the language head and a Linear itm_head."""
    encoders = ("visual_encoder.", "text_encoder.bert.")
    own = ("visual_encoder.Conv.", "visual_encoder.MHA2.")
    state = {k: v for k, v in live(config).items() if k.startswith(encoders) and not k.startswith(own)}
    state |= {"text_encoder.cls.predictions.bias": torch.ones(30), "itm_head.weight": torch.ones(2, 24)}
    return training_copies(state | {"itm_head.bias": torch.ones(2)})


def whole_file(state):
    """What stands beside the state in the published files."""
    return {
        "model": state,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-5}]},
        "lr_scheduler": {"base_values": [np.float64(1e-5)], "metric": None},
        "config": {"image_res": 256, "optimizer": {"opt": "adamW"}, "schedular": {"epochs": 50}},
        "epoch": 49,
    }


def save(path, content, legacy=False):
    if path.suffix == ".safetensors":
        content = content.get("model", content)
        safetensors.torch.save_file({k: v.contiguous().clone() for k, v in content.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path
