"""Taking a run up from its snapshot: how far it is, and the state of what trains it, checked before use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from dgm4.training.snapshot import read_snapshot
from engine.errors import CheckpointError, InputError


@dataclass
class Progress:
    """How far a run is: epochs done, batches of the epoch under way, updates in all, the best score.

    `seconds` of training in all; `epoch_seconds` and the `sums` of the losses over the epoch under way.
    """

    epoch: int = 0
    batch: int = 0
    update: int = 0
    best: float = float("-inf")
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def count(self, losses: dict[str, float], seconds: float) -> None:
        """Add what one batch gave and took."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.seconds += seconds
        self.epoch_seconds += seconds

    def close_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch, self.batch, self.epoch_seconds, self.sums = self.epoch + 1, 0, 0.0, {}


@contextmanager
def taking_up(path: Path, other: Path) -> Iterator[None]:
    """Turn whatever a snapshot of wrong content raises into a CheckpointError that offers the `other` one."""
    try:
        yield
    except InputError:  # another recipe
        raise
    except Exception as error:  # any object may stand in a file in place of any other
        reason = str(error)
        if not isinstance(error, CheckpointError):
            reason = (
                f"expected a checkpoint of this run, but it does not fit ({type(error).__name__}: {error})"
            )
        if not reason.startswith(str(path)):
            reason = f"{path}: {reason}"
        raise CheckpointError(f"{reason}{_offer(path, other)}") from error


def _offer(path: Path, other: Path) -> str:
    """What to do instead: go on from the run's other snapshot, if that can be read."""
    with suppress(Exception):
        update = read_snapshot(other)["progress"]["update"]
        return f"; {other.name} is whole: copy it over {path.name} to go on after its update {update}"
    return ""


def restore(
    content: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Load the state of a snapshot and return its progress; raises CheckpointError for one of another run."""
    progress = _read_progress(content["progress"])
    _check_schedule(content["lr_scheduler"], schedule, progress.update)
    _check_optimizer(content["optimizer"], optimizer, content["lr_scheduler"]["_last_lr"], progress.update)
    _check_plain("scaler", content["scaler"], scaler.state_dict())
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["lr_scheduler"])
    scaler.load_state_dict(content["scaler"])
    return progress


def _refuse(name: str, expected: object, got: object) -> CheckpointError:
    return CheckpointError(f"the snapshot's {name}: expected {expected}, got {got!r:.80}")


def _read_progress(raw: Mapping[str, Any]) -> Progress:
    progress = Progress(**raw)
    for name, default in vars(Progress()).items():
        value = getattr(progress, name)
        if type(value) is not type(default):
            raise _refuse(f"progress.{name}", f"a value of type {type(default).__name__}", value)
        if name != "best" and not isinstance(value, dict) and not 0 <= value < math.inf:
            raise _refuse(f"progress.{name}", "a number from 0", value)
    if math.isnan(progress.best) or not all(type(value) is float for value in progress.sums.values()):
        raise _refuse("progress", "numbers", raw)
    return progress


def _check_schedule(state: Mapping[str, Any], schedule: LambdaLR, update: int) -> None:
    """The rates are those that the schedule has after so many updates."""
    rates = [base * rate(update) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    expected = {"last_epoch": update, "base_lrs": schedule.base_lrs, "_last_lr": rates}
    _check_plain("lr_scheduler", state, {**schedule.state_dict(), "_step_count": update + 1, **expected})


def _check_plain(name: str, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The fields are the expected ones, with values of the same type; those that never change are equal."""
    if state.keys() != expected.keys():
        raise _refuse(name, f"the fields {sorted(expected)}", sorted(state))
    for field_name, value in expected.items():
        given = state[field_name]
        moving = name == "scaler" and field_name in ("scale", "_growth_tracker")
        if type(given) is not type(value) or (given != value and not moving):
            raise _refuse(f"{name}.{field_name}", value, given)


def _check_optimizer(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, rates: list[float], update: int
) -> None:
    """The same groups with the same settings, and moments of each parameter's shape."""
    ours = optimizer.state_dict()["param_groups"]
    groups = [{**group, "lr": rate} for group, rate in zip(ours, rates, strict=True)]
    if state["param_groups"] != groups:
        raise _refuse("optimizer.param_groups", groups, state["param_groups"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in state["state"].items():
        shape = parameters[number].shape
        for name, value in moments.items():
            wanted = torch.Size() if name == "step" else shape
            if not isinstance(value, torch.Tensor) or value.shape != wanted or not value.isfinite().all():
                raise _refuse(f"optimizer.state.{number}.{name}", f"finite numbers [{list(wanted)}]", value)
        if not 0 <= float(moments["step"]) <= update or moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise _refuse(
                f"optimizer.state.{number}", f"the moments of at most {update} steps", list(moments)
            )
