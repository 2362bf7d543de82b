"""Ask a Triton Inference Server: `python client.py MODEL photo.jpg "Caption of the photo" [--url HOST:PORT]`.

It stands beside the folders of the models in a repository that `dgm4 repository` wrote, and needs the
package `dgm4` and `tritonclient[http]`. Elsewhere MODEL is a folder with the model's `bundle.json` and
`tokenizer.json`, called as the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from engine import Prediction
from engine.errors import Dgm4Error
from engine.inputs.sources import ImageInput
from export.inference_server.ends import NetworkEnds

_TYPES = {"float32": "FP32", "int64": "INT64"}


class Model:
    """One model of the repository: what its requests are made of and what its answers mean."""

    def __init__(self, folder: Path) -> None:
        """Read bundle.json and tokenizer.json; raises BundleError, OSError where they are not there."""
        self.name = folder.name
        self._ends = NetworkEnds(folder)

    def ask(self, triton: Any, server: Any, image: ImageInput | None, caption: str | None) -> Prediction:
        """Send one pair; `triton` is the module tritonclient.http, `server` its client.

        Raises InputError for an image or caption that cannot be used, NumericalError for NaN.
        """
        item = self._ends.prepare("", image, caption)
        inputs = []
        for name, array in self._ends.feeds([item]).items():
            tensor = triton.InferInput(name, list(array.shape), _TYPES[str(array.dtype)])
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        started = perf_counter()
        result = server.infer(self.name, inputs)
        waited = 1000 * (perf_counter() - started)
        outputs = {tensor.name: result.as_numpy(tensor.name) for tensor in self._ends.manifest.outputs}
        return next(self._ends.answers([item], outputs, waited))


def main() -> int:
    """Ask once and print the answer as JSON; 1 for bad input."""
    parser = argparse.ArgumentParser(
        description="Ask a Triton Inference Server about a picture and its caption."
    )
    parser.add_argument("model", help="name of the model, or its folder")
    parser.add_argument("image", help="picture file (JPEG, PNG, WebP, BMP, GIF)")
    parser.add_argument("caption")
    parser.add_argument("--url", default="localhost:8000", help="host and port of HTTP (%(default)s)")
    options = parser.parse_args()
    import tritonclient.http as triton

    folder = Path(options.model)
    try:
        model = Model(folder if folder.is_dir() else Path(__file__).resolve().parent / options.model)
        answer = model.ask(triton, triton.InferenceServerClient(options.url), options.image, options.caption)
    except (Dgm4Error, OSError) as error:
        sys.stderr.write(f"client: error: {error}\n")
        return 1
    sys.stdout.write(answer.to_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
