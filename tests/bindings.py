"""What the real bindings of TensorRT (without a GPU) or TensorRT-RTX offer, as JSON: `bindings.py LIBRARY`.

Each class by its name with its docstring and its members: for a method the names of its parameters, a list
for each overload, else None. A process of its own, since such libraries cannot be unloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

GENUINE = Path(__file__).parent / "export" / "trt" / "plugins" / "genuine.py"


def load_genuine():
    """The module that loads `tensorrt`'s own bindings."""
    spec = importlib.util.spec_from_file_location("genuine", GENUINE)
    genuine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(genuine)
    return genuine


def unavailable(library):
    """Why a library's bindings cannot be had here; None where they can."""
    if library == "tensorrt":
        return load_genuine().unavailable()
    return None if importlib.util.find_spec(library) is not None else f"{library} is not installed"


def parameters(name, member):
    """Names of a method's parameters by its docstring, one list for each overload; None for no method."""
    if not callable(member):
        return None
    found = re.findall(rf"{name}\((self: [^\n]*)\) -> ", member.__doc__ or "")
    return [re.findall(r"(?:^|, )(\w+): ", text)[1:] for text in found]


def describe(trt):
    """Every public class of the bindings."""
    classes = {name: kind for name, kind in vars(trt).items() if inspect.isclass(kind)}
    return {
        name: {
            "doc": kind.__doc__,
            "members": {
                member: parameters(member, getattr(kind, member, None))
                for member in dir(kind)
                if member == "__init__" or not member.startswith("_")
            },
        }
        for name, kind in classes.items()
    }


if __name__ == "__main__":
    wanted = sys.argv[1]
    module = load_genuine().load() if wanted == "tensorrt" else importlib.import_module(wanted)
    json.dump(describe(module), sys.stdout)
