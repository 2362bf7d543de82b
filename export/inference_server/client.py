"""Ask a Triton Inference Server: `python client.py MODEL photo.jpg "Caption of the photo" [--url HOST:PORT]`.

It stands beside the folders of the models in a repository that `dgm4 repository` wrote, and needs the
package `dgm4` and `tritonclient[http]`. Elsewhere MODEL is a folder with the model's `bundle.json` and
`tokenizer.json`, called as the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import Dgm4Error
from engine.inputs.preprocess import ImageInput, decode_image, normalize_image, resize_image
from engine.inputs.text import CaptionTokenizer
from engine.layout import TOKENIZER
from engine.manifest import Manifest, parse_manifest
from engine.postprocess import read_result
from engine.result import Result

TOKEN_STEP = 16  # requests of one shape share a batch: few lengths, full batches
_PRINTED = ("manipulated", "score", "types", "detected", "box", "words", "heatmap")
_TYPES = {"float32": "FP32", "int64": "INT64"}


class Model:
    """One model of the repository: what its requests are made of and what its answers mean."""

    def __init__(self, folder: Path) -> None:
        """Read bundle.json and tokenizer.json; raises BundleError, OSError where they are not there."""
        self.name = folder.name
        self.manifest: Manifest = parse_manifest((folder / "bundle.json").read_bytes())
        spec = self.manifest.preprocess
        self._tokenizer = CaptionTokenizer(folder / TOKENIZER, spec.max_words, spec.max_tokens)

    def ask(self, triton: Any, server: Any, image: ImageInput, caption: str) -> Result:
        """Send one pair; `triton` is the module tritonclient.http, `server` its client.

        Raises InputError for an image or caption that cannot be used, NumericalError for NaN.
        """
        spec, limits = self.manifest.preprocess, self.manifest.limits
        rgb = decode_image(image).rgb
        pixels = normalize_image(resize_image(rgb, spec.image_size), spec.mean, spec.std)
        _, tokens = self._tokenizer(caption)
        count = len(tokens.ids)
        length = min(-(-max(count, spec.min_tokens) // TOKEN_STEP) * TOKEN_STEP, limits.max_tokens)
        feeds = {
            "image": pixels[None],
            "input_ids": np.pad(tokens.ids, (0, length - count))[None],
            "attention_mask": (np.arange(length) < count).astype(np.int64)[None],
        }
        inputs = []
        for name, array in feeds.items():
            tensor = triton.InferInput(name, list(array.shape), _TYPES[str(array.dtype)])
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        result = server.infer(self.name, inputs)
        outputs = {tensor.name: result.as_numpy(tensor.name) for tensor in self.manifest.outputs}
        return read_result(outputs, 0, tokens, rgb.size, self.manifest, "the pair")


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
    fields = {name: value for name, value in answer.to_dict().items() if name in _PRINTED}
    sys.stdout.write(json.dumps(fields, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
