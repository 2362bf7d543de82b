"""A bundle that must be signed, by the owner of the key that a caller or the operator gives."""

from __future__ import annotations

import pickle
import subprocess
from shutil import which

import pytest

from engine import Bundle, Predictor
from engine.errors import BackendError, BundleError, InputError
from engine.layout import MANIFEST, SIGNATURE
from export.bundle.copying import stored_fields
from export.bundle.writer import BundleWriter
from export.cli import main

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key  # noqa: E402
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: E402

UNSIGNED, WRONG = "is not signed, and a public key was given", "its signature is not of this manifest.json"


def write_keys(folder, name, key):
    pkcs8, spki = serialization.PrivateFormat.PKCS8, serialization.PublicFormat.SubjectPublicKeyInfo
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, pkcs8, none))
    public.write_bytes(key.public_key().public_bytes(pem, spki))
    return private, public


@pytest.fixture
def keys(tmp_path):
    """(private, public) of ours, and the public one of somebody else."""
    other = write_keys(tmp_path, "other", Ed25519PrivateKey.generate())
    return *write_keys(tmp_path, "ours", Ed25519PrivateKey.generate()), other[1]


@pytest.fixture
def signed(bundle_copy, keys, capsys):
    assert main(["sign", str(bundle_copy), "--key", str(keys[0])]) == 0
    assert capsys.readouterr().out == f"{bundle_copy / SIGNATURE}: signed\n"
    return bundle_copy


def test_a_signed_bundle_is_served_and_another_only_without_a_key(signed, bundle_dir, keys, monkeypatch):
    _, ours, theirs = keys
    Bundle.open(signed).verify_all()
    for key in (ours, str(ours), ours.read_bytes()):
        assert Bundle.open(signed, public_key=key).public_key == ours.read_bytes()
    with Predictor(signed, threads=1, public_key=ours) as predictor:
        assert pickle.loads(pickle.dumps(predictor)).bundle.public_key == ours.read_bytes()
    with pytest.raises(BundleError, match=WRONG):
        Predictor(signed, public_key=theirs)
    for bundle in (bundle_dir, Bundle.open(bundle_dir)):
        with pytest.raises(BundleError, match=UNSIGNED):
            Predictor(bundle, public_key=ours)
        monkeypatch.setenv("DGM4_PUBLIC_KEY", str(ours))
        with pytest.raises(BundleError, match=UNSIGNED):
            Predictor(bundle)
        monkeypatch.delenv("DGM4_PUBLIC_KEY")
        Predictor(bundle, threads=1).close()
    monkeypatch.setenv("DGM4_PUBLIC_KEY", str(ours))
    Predictor(signed, threads=1).close()


@pytest.mark.parametrize("change", ["a byte", "white space", "cut", "long", "empty", "of another"])
def test_a_signature_of_something_else(change, signed, bundle_dir, keys):
    manifest, signature = signed / MANIFEST, signed / SIGNATURE
    content = signature.read_bytes()
    if change == "white space":
        manifest.write_bytes(manifest.read_bytes() + b"\n")  # whose own hash agrees
        Bundle.open(signed)
    elif change == "of another":
        signature.write_bytes(content[32:] + content[:32])
    else:
        changed = {
            "a byte": content[:-1] + bytes([content[-1] ^ 1]),
            "cut": content[:-1],
            "long": content + b"x",
        }
        signature.write_bytes(changed.get(change, b""))
    with pytest.raises(BundleError, match=f"{WRONG} by the owner of the public key; do not load it$"):
        Bundle.open(signed, public_key=keys[1])


def test_what_is_no_key(signed, keys, tmp_path):
    (tmp_path / "none.pem").write_text("no key")
    private, public = write_keys(tmp_path, "ec", generate_private_key(SECP256R1()))
    for key, message in {
        tmp_path / "none.pem": "public_key: expected an Ed25519 public key in PEM: ",
        keys[0]: "public_key: expected an Ed25519 public key, got a private one, .*; give its public half",
        public: "public_key: expected an Ed25519 public key, got ",
        tmp_path / "absent.pem": r"public_key: '.*absent.pem' cannot be read: No such file or directory$",
        tmp_path: "public_key: '.*' cannot be read: Not a file$",
        3: "public_key: expected the path of a PEM file or its bytes, got int$",
        b"": "public_key: expected an Ed25519 public key in PEM: ",
    }.items():
        with pytest.raises(InputError, match=message):
            Bundle.open(signed, public_key=key)


def test_what_ships_is_not_signed(keys, capsys):
    assert main(["sign", "demo:asap", "--key", str(keys[0])]) == 1
    assert "demo:asap: ships with the package; sign a copy of" in capsys.readouterr().err


def test_only_a_whole_bundle_is_signed(bundle_copy, keys, tmp_path, capsys):
    (bundle_copy / "README.md").write_bytes(b"x" * (bundle_copy / "README.md").stat().st_size)
    assert main(["sign", str(bundle_copy), "--key", str(keys[0])]) == 1
    assert "README.md: expected SHA-256" in capsys.readouterr().err
    private, _ = write_keys(tmp_path, "ec", generate_private_key(SECP256R1()))
    for path, got in ((keys[1], "a public one; give the private half"), (private, "")):
        assert main(["sign", str(bundle_copy), "--key", str(path)]) == 1
        assert f"expected an Ed25519 private key, got {got}" in capsys.readouterr().err
    assert not (bundle_copy / SIGNATURE).exists()


def test_another_bundle_takes_the_place_of_a_signed_one(signed, keys):
    """As rebuilding does; it is not signed."""
    fields = stored_fields(Bundle.open(signed))
    contents = {name: (signed / name).read_bytes() for name in fields["files"]}
    with BundleWriter(signed) as writer:
        for name, content in contents.items():
            writer.add_bytes(name, content)
        writer.commit(fields)
    Bundle.open(signed)
    with pytest.raises(BundleError, match=UNSIGNED):
        Bundle.open(signed, public_key=keys[1])
    with pytest.raises(InputError, match="rebuild: changes a bundle that must be signed"):
        Predictor(signed, rebuild=True, public_key=keys[1])


def test_inspect_and_predict_ask_for_it(signed, bundle_dir, keys, photo, tmp_path, capsys):
    photo.save(tmp_path / "photo.png")
    option = ["--public-key", str(keys[1])]
    assert main(["inspect", str(signed), *option]) == 0
    assert capsys.readouterr().out.endswith(f"signed     by the owner of {keys[1]}\n")
    for arguments in (
        ["inspect", str(bundle_dir)],
        ["predict", str(bundle_dir), str(tmp_path / "photo.png"), "x"],
    ):
        assert main([*arguments, *option]) == 1
        assert UNSIGNED in capsys.readouterr().err


@pytest.mark.skipif(which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_it(signed, keys):
    command = f"openssl pkeyutl -verify -pubin -inkey {keys[1]} -rawin -in {MANIFEST} -sigfile {SIGNATURE}"
    done = subprocess.run(command.split(), cwd=signed, capture_output=True, text=True, check=False)
    assert "Signature Verified Successfully" in done.stdout, done.stderr


def test_without_the_library(signed, keys, libraries):
    libraries(cryptography=False)
    with pytest.raises(BackendError, match=r"needs cryptography: pip install .dgm4\[sign\]"):
        Bundle.open(signed, public_key=keys[1])
