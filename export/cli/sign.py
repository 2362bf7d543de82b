"""`dgm4 sign`: sign a bundle, so that those who have the public key can tell that it is yours."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bundle import Bundle
from engine.errors import InputError, quoted
from engine.files import replacing
from engine.layout import MANIFEST, SIGNATURE
from engine.packages import require
from engine.shipped import locate
from engine.signing import is_public, read_key, why_no_key
from export.cli.arguments import Verbs
from export.writing import writing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "sign",
        help="sign a bundle with your private key",
        description="Verify every file of a bundle and sign its manifest, which holds their hashes, with "
        f"an Ed25519 key. The signature is the bundle's {SIGNATURE}. A Predictor with your public key, and "
        "every one where DGM4_PUBLIC_KEY is its path, refuses other bundles.",
        epilog="A key is made by openssl genpkey -algorithm ed25519 -out key.pem, and its public half by "
        "openssl pkey -in key.pem -pubout -out public.pem. A bundle that is calibrated or rebuilt is "
        "another one: sign it again.\n\n"
        "examples:\n  dgm4 sign my-bundle --key key.pem",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="Ed25519 private key, in PEM")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Sign, and say where the signature is."""
    require("dgm4 sign", "cryptography")
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = _private_key(options.key)
    bundle = Bundle.open(options.bundle)
    if locate(options.bundle) != options.bundle:
        raise InputError(f"{options.bundle}: ships with the package; sign a copy of {bundle.path}")
    bundle.verify_all()
    path = bundle.path / SIGNATURE
    with writing(path, "the signature", "sign a copy of the bundle"), replacing(path) as partial:
        partial.write_bytes(key.sign((bundle.path / MANIFEST).read_bytes()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    Bundle.open(bundle.path, public_key=public)  # what was signed stands there
    sys.stdout.write(f"{path}: signed\n")
    return 0


def _private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content, expected = read_key("--key", path), f"--key {quoted(str(path))}: expected an Ed25519 private key"
    if is_public(content):
        raise InputError(f"{expected}, got a public one; give the private half that it was made of")
    try:
        key = load_pem_private_key(content, None)
    except Exception as error:  # the library raises many kinds; none shows the key
        raise InputError(f"{expected} in PEM, without a password: {why_no_key(error)}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{expected}, got {type(key).__name__}")
    return key
