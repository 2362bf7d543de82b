"""Which part of the house may import which: the rules in one place, and that every import keeps to them."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "engine", "dgm4", "export", "benchmarks")
# Rooms and what each may import. A module belongs to the longest of these names that it lies under.
ROOMS = {
    "kernels": "",
    "engine.errors": "",
    "engine.layout": "",
    "engine.packages": "engine.errors",
    "engine.files": "",
    "engine.progress": "",
    "engine.logs": "engine.errors",
    "engine.tracing": "",
    "engine.schema": "engine.errors engine.layout",
    "engine.registry": "engine.errors engine.schema",
    "engine.result": "engine.errors engine.registry engine.schema",
    "engine.network.output": "",
    "engine.scores": "engine.errors engine.registry engine.schema",
    "engine.manifest": "engine.errors engine.layout engine.registry engine.schema engine.scores",
    "engine.shipped": "engine.errors engine.layout engine.registry",
    "engine.signing": "engine.errors engine.files engine.layout engine.packages",
    "engine.bundle": "engine.errors engine.files engine.layout engine.manifest engine.shipped engine.signing",
    "engine._native": "",
    "engine.inputs": "engine._native engine.errors engine.layout engine.manifest engine.registry",
    "engine.cards": "engine.errors engine.inputs engine.logs engine.result",
    "engine.network": "engine.errors engine.registry engine.network.output kernels",
    "engine.backends": "engine.errors engine.files engine.layout engine.packages engine.manifest "
    "engine.bundle engine.inputs engine.network engine.registry engine.network.output engine.schema "
    "kernels",
    "engine": "engine.errors engine.files engine.layout engine.registry engine.schema engine.manifest "
    "engine.bundle engine.cards engine.inputs engine.backends engine.logs engine.result engine.signing "
    "engine.tracing",
    "engine.scoring": "engine engine.bundle engine.errors engine.files engine.inputs engine.layout "
    "engine.logs engine.registry engine.result engine.packages engine.progress engine.schema",
    "engine.serving": "engine engine.cards engine.errors engine.inputs engine.registry engine.schema",
    "dgm4": "engine engine.errors engine.files engine.inputs engine.registry engine.network.output "
    "engine.packages engine.progress engine.shipped",
    "export.flags": "engine.errors",
    "export.writing": "engine.errors",
    "export.output": "engine.errors engine.files engine.layout engine.manifest export.writing",
    "export.bundle": "engine engine.bundle engine.errors engine.files engine.layout engine.manifest "
    "engine.registry engine.scores export.writing",
    "export.graph": "dgm4 engine.backends engine.errors engine.layout engine.manifest engine.network "
    "engine.registry kernels",
    "export.quantization": "dgm4 engine engine.backends engine.bundle engine.errors engine.inputs "
    "engine.layout engine.manifest engine.network engine.registry export.graph kernels",
    "export.trt": "engine.errors engine.files engine.layout engine.manifest engine.packages engine.backends "
    "export.bundle export.flags export.graph kernels",
    "export.evaluation": "engine.cards engine.result dgm4 engine engine.backends engine.bundle "
    "engine.errors engine.files engine.inputs "
    "engine.layout engine.manifest engine.registry engine.progress engine.scores export.bundle "
    "export.output",
    "export.bench": "engine engine.backends engine.bundle engine.errors engine.inputs engine.layout "
    "engine.manifest engine.packages engine.registry export.output",
    "export.inference_server": "engine.result engine engine.backends engine.bundle engine.errors "
    "engine.inputs "
    "engine.layout engine.manifest engine.registry engine.schema export.bundle",
    "export": "dgm4 engine engine.backends engine.bundle engine.errors engine.files engine.inputs "
    "engine.layout engine.manifest engine.network engine.registry engine.packages "
    "export.bundle export.evaluation export.flags export.graph export.quantization export.trt",
    "export.cli": "engine.cards dgm4 engine engine._native engine.backends engine.bundle engine.errors "
    "engine.files "
    "engine.inputs engine.layout engine.logs engine.packages engine.progress engine.scores engine.scoring "
    "engine.registry engine.serving engine.shipped engine.signing export export.bench export.bundle "
    "export.evaluation export.flags export.inference_server export.output export.quantization export.trt "
    "export.writing",
    "export.to_trt": "export.cli",  # the front door
}
ROOMS["benchmarks"] = " ".join(room for room in ROOMS if room not in ("export.cli", "export.to_trt"))


def find_modules():
    """Every module's file by its dotted name."""
    modules = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path
    return modules


MODULES = find_modules()


def imports(node):
    """The names that a tree imports, those inside functions too, but not those for a type checker alone."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        yield from names & MODULES.keys() or {node.module}
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


IMPORTS = {
    name: sorted(set(imports(ast.parse(path.read_text()))) & MODULES.keys()) for name, path in MODULES.items()
}


def room_of(module):
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_may(room):
    allowed = {room, *ROOMS[room].split()}
    arrows = [(name, other) for name, found in IMPORTS.items() if room_of(name) == room for other in found]
    assert [f"{name} imports {other}" for name, other in arrows if room_of(other) not in allowed] == []


def test_there_is_no_circle():
    """Neither among the rooms nor among the modules of one; a package's own file may collect its modules."""
    tuple(TopologicalSorter({room: may.split() for room, may in ROOMS.items()}).static_order())
    tuple(
        TopologicalSorter(
            {name: [x for x in found if not name.startswith(f"{x}.")] for name, found in IMPORTS.items()}
        ).static_order()
    )


def test_every_name_in_the_rules_is_a_room():
    assert {name for may in ROOMS.values() for name in may.split()} <= ROOMS.keys()
