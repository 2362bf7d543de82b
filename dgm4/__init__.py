"""HAMMER, ASAP and CALS as trained: configs, networks, checkpoints."""

from dgm4.checkpoint import Checkpoint, load_checkpoint, load_state, read_checkpoint
from dgm4.config import MODEL_NAMES, SIZES, TYPES, ModelConfig, model_config
from dgm4.model import Detector, Output, build, create_model
from dgm4.seeded import seeded_model

__all__ = [
    "MODEL_NAMES",
    "SIZES",
    "TYPES",
    "Checkpoint",
    "Detector",
    "ModelConfig",
    "Output",
    "build",
    "create_model",
    "load_checkpoint",
    "load_state",
    "model_config",
    "read_checkpoint",
    "seeded_model",
]
