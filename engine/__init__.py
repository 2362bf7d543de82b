"""Production serving of a dgm4 bundle: `Predictor(bundle).predict(image, caption)`.

Importing this package loads neither torch nor a backend's library and touches no GPU. It keeps ONNX Runtime,
OpenVINO and Hugging Face's hub from sending usage data (`engine.startup`).
"""

from engine import errors, startup
from engine.batcher import Batcher
from engine.bundle import Bundle
from engine.errors import (
    BackendError,
    BuildError,
    BundleError,
    CheckpointError,
    DeadlineError,
    Dgm4Error,
    EngineMismatchError,
    InputError,
    NumericalError,
    OverloadedError,
    VerificationError,
)
from engine.inputs.options import ImageOptions
from engine.prediction import Prediction
from engine.predictor import Predictor
from engine.queueing import BatcherStatistics
from engine.result import Word, to_rows

__version__ = "0.1.0"  # the only place that says it; pyproject.toml reads it here
__all__ = [
    "BackendError",
    "Batcher",
    "BatcherStatistics",
    "BuildError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "DeadlineError",
    "Dgm4Error",
    "EngineMismatchError",
    "ImageOptions",
    "InputError",
    "NumericalError",
    "OverloadedError",
    "Prediction",
    "Predictor",
    "VerificationError",
    "Word",
    "errors",
    "to_rows",
]

startup.prepare()
