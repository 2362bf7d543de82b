"""Production serving of a dgm4 bundle: `Predictor(bundle).predict(image, caption)`.

Importing this package loads neither torch nor a backend's library and touches no GPU.
"""

from engine import errors
from engine.bundle import Bundle
from engine.errors import Dgm4Error
from engine.inputs.preprocess import ImageOptions
from engine.prediction import Prediction
from engine.predictor import Predictor
from engine.result import Word

__all__ = ["Bundle", "Dgm4Error", "ImageOptions", "Prediction", "Predictor", "Word", "errors"]
