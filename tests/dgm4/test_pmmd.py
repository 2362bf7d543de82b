"""PMMD's two stages against the numbers that its published code gives, and their rewritten forms."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dgm4
from dgm4.models.pmmd import Locate
from dgm4.models.pmmd_refine import Published as Refine
from dgm4.seeded import draw
from engine.network.model import InferenceModel
from engine.network.models.pmmd import Locate as InferenceLocate
from engine.network.models.pmmd import fold_locate
from engine.network.released import Released
