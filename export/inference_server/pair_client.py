"""Ask a Triton Inference Server: `python client.py MODEL photo.jpg "Caption of the photo" [--url HOST:PORT]`.

It needs `tritonclient[http]` and nothing else: the server decodes the picture and reads the caption.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException


def ask(
    server: triton.InferenceServerClient, model: str, image: bytes | None, caption: bytes | None
) -> triton.InferResult:
    """Send one pair, either of which may be None; `as_numpy("prediction")[0, 0]` is the answer as JSON.

    Raises InferenceServerException, with status 400 for a picture that cannot be read.
    """
    inputs = []
    for name, value in (("image", image), ("caption", caption)):
        if value is not None:
            tensor = triton.InferInput(name, [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[value]], dtype=object))
            inputs.append(tensor)
    return server.infer(model, inputs)


def main() -> int:
    """Ask once and print the answer as JSON; 1 where there is none."""
    parser = argparse.ArgumentParser(
        description="Ask a Triton Inference Server about a picture and its caption."
    )
    parser.add_argument("model", help="name of the model")
    parser.add_argument("image", type=Path, help="picture file (JPEG, PNG, WebP, BMP, GIF)")
    parser.add_argument("caption")
    parser.add_argument("--url", default="localhost:8000", help="host and port of HTTP (%(default)s)")
    options = parser.parse_args()
    try:
        with triton.InferenceServerClient(options.url) as server:
            answer = ask(server, options.model, options.image.read_bytes(), options.caption.encode())
    except (InferenceServerException, OSError) as error:
        sys.stderr.write(f"client: error: {error}\n")
        return 1
    sys.stdout.write(answer.as_numpy("prediction")[0, 0].decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
