"""Traces that the tests share: a network that was traced before is not traced again, its graph is copied."""

from __future__ import annotations

import functools
import hashlib
import shutil
from types import SimpleNamespace

import torch

_SETTINGS = (bool, int, float, str, tuple, torch.dtype)  # attributes of a module that may steer its forward


def digest_of(model, **arguments):
    """SHA-256 of all that a trace depends on: modules, their settings, their tensors, and the arguments."""
    digest = hashlib.sha256(repr((model, sorted(arguments.items()))).encode())
    for name, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if isinstance(value, _SETTINGS)}
        digest.update(repr((name, type(module).__qualname__, sorted(settings.items()))).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_copy(traced, path, external_data):
    """Stand in for `ONNXProgram.save`, all that the export asks of a trace."""
    import onnx

    from export.graph.trace import data_of

    assert external_data
    proto = onnx.load_model(traced, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data_of(path).name
    path.write_bytes(proto.SerializeToString())
    shutil.copyfile(data_of(traced), data_of(path))


def sharing(export, once):
    """Let `export`, which is torch.onnx.export, trace each network once; `once` is the fixture made_once."""

    @functools.wraps(export)
    def shared(model, *inputs, **arguments):
        config = getattr(model, "config", None)
        if config is None or config.size == "base":  # no network; a gigabyte, traced by one test
            return export(model, *inputs, **arguments)
        asked = {key: arguments[key] for key in ("opset_version", "output_names")}

        def trace(folder):
            path = folder / "traced.onnx"
            export(model, **arguments).save(path, external_data=True)
            return path

        traced = once(f"trace-{digest_of(model, config=model.config, **asked)}", trace)
        return SimpleNamespace(save=functools.partial(save_copy, traced))

    return shared
