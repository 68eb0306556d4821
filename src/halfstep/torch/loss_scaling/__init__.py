"""Loss scaling for torch: an optimizer that brings its own scale, and a drop-in GradScaler."""

from .history import ScaleEvent as ScaleEvent
from .optimizer import LossScaleOptimizer as LossScaleOptimizer
