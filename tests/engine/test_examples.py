"""The examples in the docstrings of everything public, run where "my-bundle" and "photo.jpg" are."""

from __future__ import annotations

import doctest
import inspect

import pytest

import engine

KINDS = [getattr(engine, name) for name in engine.__all__ if name != "errors"]


def public():
    """What `engine` exports, and its methods; of the errors the base class speaks for all."""
    for kind in KINDS:
        if isinstance(kind, type) and issubclass(kind, engine.Dgm4Error) and kind is not engine.Dgm4Error:
            continue
        yield kind.__name__, kind
        if not isinstance(kind, type):
            continue
        for name in dir(kind):
            method = inspect.getattr_static(kind, name)
            method = getattr(method, "__func__", method)
            if not name.startswith("_") and inspect.isfunction(method):
                yield f"{kind.__name__}.{name}", method


# What the schema and Record give a public class besides is for those who write records.
NO_EXAMPLE = {"Word.from_dict", "Word.to_dict", "Word.upgrade", "Word.problems"}
NO_EXAMPLE |= {"Prediction.upgrade", "Prediction.problems"}
PUBLIC = {name: found for name, found in public() if name not in NO_EXAMPLE}


@pytest.fixture
def here(bundle_dir, photo, tmp_path, monkeypatch):
    (tmp_path / "my-bundle").symlink_to(bundle_dir)
    photo.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", PUBLIC)
def test_an_example_says_what_is_true(here, name):
    found = [test for test in doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name) if test.examples]
    assert found, "it has no example"
    report: list[str] = []
    for test in found:
        failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
        assert not failed, "".join(report)
