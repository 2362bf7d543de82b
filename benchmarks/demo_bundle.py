"""The ready bundle of the package: `python -m benchmarks.demo_bundle` makes it of the demo's ASAP.

It is int8 with dynamic scales, for ONNX Runtime alone: the weights that torch reads are left out, since the
package has them once already, as asap.safetensors.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from dgm4.shipped import DEMO, demo_checkpoint
from engine.bundle import Bundle
from engine.layout import WEIGHTS
from export.bundle.writer import BundleWriter
from export.options import ExportOptions
from export.pipeline import export_bundle

NETWORK, PRECISION = "asap", "int8"
BUNDLE = DEMO / f"{NETWORK}-{PRECISION}"


def make_bundle(out: Path) -> dict[str, Any]:
    """Export the demo's network and write what ONNX Runtime needs of it to `out`; return the manifest."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        checkpoint = demo_checkpoint(NETWORK)
        options = ExportOptions(whole, checkpoint=checkpoint, precision=PRECISION, engine=False)
        export_bundle(options, lambda stage: None)
        manifest = Bundle.open(whole).manifest
        with BundleWriter(out) as writer:
            for name in manifest.files:
                if name != WEIGHTS:
                    shutil.copyfile(whole / name, writer.path(name))
            return writer.commit(manifest.to_dict())


def main() -> int:
    """Make the bundle and say how large it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=BUNDLE, help="the package's own place by default")
    options = parser.parse_args()
    files = make_bundle(options.out)["files"]
    print(f"{options.out}: {sum(entry['bytes'] for entry in files.values()) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
