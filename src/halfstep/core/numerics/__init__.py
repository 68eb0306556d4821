"""What the numbers of a run say: histograms of exponents, and what follows from them."""

from .advice import LossScaleAdvice as LossScaleAdvice
from .advice import advise_loss_scale as advise_loss_scale
from .histogram import ExponentHistogram as ExponentHistogram
from .histogram import FormatFit as FormatFit
