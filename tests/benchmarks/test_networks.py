import json

import pytest

from benchmarks.deployment import measure
from benchmarks.machine import describe_machine
from benchmarks.networks import summarise, table
from engine.errors import BackendError


def run(variant, turn, seconds):
    info = {"network": "asap", "batch": 1, "tokens": 50, "variant": variant, "turn": turn}
    return {"extra_info": info, "stats": {"data": seconds}}


def test_medians_over_all_turns_and_ratios_turn_by_turn():
    runs = [
        run("published", 0, [1.0, 1.2, 1.1]),
        run("published", 1, [2.0, 2.2, 2.1]),
        run("torch", 0, [0.5, 0.55, 0.6]),
        run("torch", 1, [1.0, 1.05, 1.1]),
    ]
    rows = {row["variant"]: row for row in summarise(runs)}
    assert rows["published"]["speedup"] == 1
    assert rows["torch"]["median_ms"] == 800
    assert rows["torch"]["speedup"] == 2  # though the machine was twice as slow in the second turn
    assert rows["torch"]["calls"] == 6
    assert "| asap | 1 | 50 | 1600 | 800 | 2.00 |" in table(summarise(runs))


def test_the_machine_is_described():
    record = describe_machine()
    assert json.loads(json.dumps(record)) == record
    assert record["cores"] >= 1
    assert record["packages"]["torch"]


def test_measure_tells_time_memory_and_failure():
    code = "import time; x = bytearray(200_000_000); time.sleep(0.3); print('done')"
    done = measure(["python3", "-c", code])
    assert done["stdout"] == "done\n"
    assert done["seconds"] >= 0.3
    assert 200 <= done["peak_mb"] <= 400
    with pytest.raises(BackendError, match="no such thing"):
        measure(["python3", "-c", "raise SystemExit('no such thing')"])
