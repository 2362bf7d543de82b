"""Bundles that ship, by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import Bundle, BundleError, Predictor
from engine.shipped import locate, shipped_bundles


def test_a_name_stands_for_a_bundle_that_ships():
    assert shipped_bundles() == ["demo:asap"]
    for name in ("demo:asap", Path("demo:asap")):
        bundle = Bundle.open(name)
        bundle.verify_all()
        assert bundle.manifest.model.name == "asap"
        assert bundle.manifest.weights.kind == "demo"


def test_other_paths_stay_as_they_are(tmp_path):
    assert locate(tmp_path / "demo:asap") == tmp_path / "demo:asap"
    assert locate("bundle") == "bundle"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("demo:cals", "; make one: dgm4 export --model cals"),
        ("demo:assap", "; did you mean demo:asap?"),
        ("demo:asap-int8", "; did you mean demo:asap?"),
        ("demo:../asap", "; did you mean demo:asap?"),
        ("demo:resnet50", ""),
    ],
)
def test_a_name_whose_bundle_does_not_ship(name, remedy):
    with pytest.raises(BundleError) as caught:
        Predictor(name)
    assert str(caught.value) == f"{name}: expected the name of a ready bundle (demo:asap){remedy}"


@pytest.mark.parametrize(("name", "hint"), [("asap", "; did you mean demo:asap?"), ("my-bundle", "")])
def test_a_name_without_its_prefix(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError) as caught:
        Bundle.open(name)
    assert str(caught.value).endswith(f"that dgm4 export writes, got nothing{hint}")


def test_without_the_package_no_bundle_ships(libraries):
    libraries(dgm4=False)
    assert shipped_bundles() == []
    with pytest.raises(BundleError, match="ready bundle \\(not installed\\)"):
        Bundle.open("demo:asap")
