"""Who made a bundle: an Ed25519 signature over its manifest, which holds the SHA-256 of every other file.

A bundle is checked where a public key is given: to `Bundle.open`, to a Predictor, or by the operator for
every Predictor in $DGM4_PUBLIC_KEY, the path of a PEM file. `dgm4 sign` writes the signature, as openssl can:
64 bytes over the bytes of the manifest.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from engine.errors import BundleError, InputError, quoted
from engine.files import open_file
from engine.layout import MANIFEST, SIGNATURE
from engine.packages import require

PublicKey = str | os.PathLike[str] | bytes
VARIABLE = "DGM4_PUBLIC_KEY"

_BYTES = 64
_MOST = 16_384  # bytes of a key's file


def key_in_use(public_key: PublicKey | None) -> bytes | None:
    """The PEM text of the key that a Predictor is given, else of the operator's; None without either.

    Raises InputError where it cannot be read.
    """
    if public_key is not None:
        return read_public_key(public_key)
    path = os.environ.get(VARIABLE)
    return read_key(VARIABLE, path) if path else None


def read_public_key(public_key: PublicKey) -> bytes:
    """The PEM text of a key given as that text or as a file's path; raises InputError."""
    return public_key if isinstance(public_key, bytes) else read_key("public_key", public_key)


def check_signature(root: Path, manifest: bytes, public_key: bytes) -> None:
    """Raise BundleError unless the owner of the key signed these bytes of the manifest of the bundle `root`.

    `public_key` is PEM text. Raises InputError where it is no Ed25519 key, BackendError without the library.
    """
    require("the signature of a bundle", "cryptography")
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(public_key)
    except Exception as error:  # the library raises many kinds, some of its own
        if _is_key(public_key, "PRIVATE"):
            raise InputError(
                "public_key: expected an Ed25519 public key, got a private one, which none but its owner may "
                "have; give its public half, which openssl pkey -in FILE -pubout prints"
            ) from None
        raise InputError(f"public_key: expected an Ed25519 public key in PEM: {why_no_key(error)}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"public_key: expected an Ed25519 public key, got {type(key).__name__}")
    try:
        with open_file(root / SIGNATURE) as file:
            signature = file.read(_BYTES + 1)
    except FileNotFoundError:
        raise BundleError(
            f"{root}: is not signed, and a public key was given; sign it with dgm4 sign, or leave out the key"
        ) from None
    except OSError as error:
        raise BundleError(f"{root / SIGNATURE}: cannot be read: {error.strerror}") from error
    try:
        key.verify(signature, manifest)
    except InvalidSignature:
        raise BundleError(
            f"{root}: its signature is not of this {MANIFEST} by the owner of the public key; do not load it"
        ) from None


def read_key(name: str, path: str | os.PathLike[str]) -> bytes:
    """The content of a key's file, which messages call `name`; raises InputError."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{name}: expected the path of a PEM file or its bytes, got {type(path).__name__}")
    try:
        with open_file(Path(path)) as file:
            return file.read(_MOST)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: {quoted(os.fspath(path))} cannot be read: {reason}") from error


def _is_key(content: bytes, kind: str) -> bool:
    return re.search(rb"-----BEGIN [A-Z ]*%s KEY-----" % kind.encode(), content) is not None


def is_public(content: bytes) -> bool:
    """Whether the content of a key's file is a public key in PEM."""
    return _is_key(content, "PUBLIC")


def why_no_key(error: Exception) -> str:
    """What the library says of a key that it refused, in a line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:120]
