"""Loss scaling for torch: an optimizer that brings its own scale, and a drop-in GradScaler."""

from .grad_scaler import GradScaler as GradScaler
from .history import ScaleEvent as ScaleEvent
from .lost import LostUpdates as LostUpdates
from .optimizer import LossScaleOptimizer as LossScaleOptimizer
