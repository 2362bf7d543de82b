"""HAMMER, ASAP and CALS: everything that `engine` exports to serve a bundle, and the networks as trained.

The networks need torch and safetensors (`pip install "dgm4[export]"`) and are imported when first used; the
rest needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import engine
from dgm4.catalogue import ModelEntry, list_models
from dgm4.config import MODEL_NAMES, SIZES, TYPES, ModelConfig, model_config
from engine import *  # noqa: F403
from engine import __version__ as __version__
from engine.packages import lacking

if TYPE_CHECKING:
    from dgm4.checkpoint import Checkpoint, load_checkpoint, load_state, read_checkpoint
    from dgm4.model import Detector, Output, build, create_model
    from dgm4.seeded import seeded_model

_WITH_TORCH = {
    "Checkpoint": "dgm4.checkpoint",
    "Detector": "dgm4.model",
    "Output": "dgm4.model",
    "build": "dgm4.model",
    "create_model": "dgm4.model",
    "load_checkpoint": "dgm4.checkpoint",
    "load_state": "dgm4.checkpoint",
    "read_checkpoint": "dgm4.checkpoint",
    "seeded_model": "dgm4.seeded",
}
__all__ = [
    "MODEL_NAMES",
    "SIZES",
    "TYPES",
    "Checkpoint",
    "Detector",
    "ModelConfig",
    "ModelEntry",
    "Output",
    "build",
    "create_model",
    "list_models",
    "load_checkpoint",
    "load_state",
    "model_config",
    "read_checkpoint",
    "seeded_model",
]
__all__ += engine.__all__


def __getattr__(name: str) -> Any:
    """Import a name that needs torch; raises BackendError with the command to install what is absent."""
    if name not in _WITH_TORCH:
        raise AttributeError(f"module 'dgm4' has no attribute {name!r}")
    try:
        value = getattr(import_module(_WITH_TORCH[name]), name)
    except ModuleNotFoundError as error:
        raise lacking(f"dgm4.{name}", error) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
