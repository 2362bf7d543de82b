"""Devices, and the processes that torchrun starts: their group and their random streams."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import BackendError, InputError, quoted

_PATIENCE = timedelta(hours=6)  # the others wait while the first process evaluates on the split "val"


def pick_device(name: str) -> torch.device:
    """Return the device "auto", "cpu", "cuda" (this process's GPU) or "cuda:N".

    Raises InputError for another name, BackendError for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (name == kind or index.isdecimal()):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {quoted(name)}")
    wanted = int(index or os.environ.get("LOCAL_RANK", "0"))
    if wanted >= torch.cuda.device_count():
        raise BackendError(
            f"device: expected cpu or auto, or one of the {torch.cuda.device_count()} GPUs that torch finds "
            f"here, got {name} for process {os.environ.get('LOCAL_RANK', 0)}"
        )
    return torch.device("cuda", wanted)


def join(device: torch.device) -> tuple[int, int]:
    """Rank and number of processes; joins the group that torchrun describes in the environment."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    return dist.get_rank(), dist.get_world_size()


def wait() -> None:
    """Wait until every process is here: what the first one writes is then written."""
    if dist.is_initialized():
        dist.barrier()


def any_process(here: bool, device: torch.device) -> bool:
    """Whether it holds in any process; all of them have to ask."""
    if not dist.is_initialized():
        return here
    count = torch.tensor(int(here), device=device)
    dist.all_reduce(count)
    return bool(count)


def leave() -> None:
    """Leave the group, if there is one, at the end of the program."""
    if dist.is_initialized():
        dist.destroy_process_group()


def random_states(device: torch.device) -> list[dict[str, Any]]:
    """The random streams of every process, by rank; all of them have to call it."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if not dist.is_initialized():
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Take up one process's streams; that of a GPU only where the run had one and still has."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
