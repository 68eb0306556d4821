"""Mixed precision training: a policy per layer, loss scaling that is right, and instruments.

This package is the core: it knows no framework. The doors to the frameworks, ``halfstep.torch``
among them, are packages of their own inside of it; each needs only its own framework.
"""

from .core.compatibility import Compatibility as Compatibility
from .core.compatibility import compatibility_check as compatibility_check
from .core.device import Device as Device
from .core.fault import Fault as Fault
from .core.fault import TensorFacts as TensorFacts
from .core.formats import FORMATS as FORMATS
from .core.formats import Format as Format
from .core.formats import format_of as format_of
from .core.global_policy import global_policy as global_policy
from .core.global_policy import policy_scope as policy_scope
from .core.global_policy import set_global_policy as set_global_policy
from .core.hardware import devices as devices
from .core.loss_scale import DynamicLossScale as DynamicLossScale
from .core.loss_scale import FixedLossScale as FixedLossScale
from .core.loss_scale import LossScale as LossScale
from .core.loss_scale import LossScaleState as LossScaleState
from .core.loss_scale import NoLossScale as NoLossScale
from .core.numerics import ExponentHistogram as ExponentHistogram
from .core.numerics import FormatFit as FormatFit
from .core.numerics import LossScaleAdvice as LossScaleAdvice
from .core.numerics import advise_loss_scale as advise_loss_scale
from .core.policy import Policy as Policy
from .core.policy import PolicyMap as PolicyMap
from .errors import AdviceError as AdviceError
from .errors import HalfstepError as HalfstepError
from .errors import LossScaleError as LossScaleError
from .errors import LossScaleExhausted as LossScaleExhausted
from .errors import LossScaleWarning as LossScaleWarning
from .errors import PolicyError as PolicyError
from .errors import PolicyWarning as PolicyWarning
from .errors import RecipeError as RecipeError
from .errors import RecordError as RecordError

__version__ = "0.1.0"

# spelt out, so that a star import does not bring a door under its framework's own name
__all__ = [
    "FORMATS",
    "AdviceError",
    "Compatibility",
    "Device",
    "DynamicLossScale",
    "ExponentHistogram",
    "Fault",
    "FixedLossScale",
    "Format",
    "FormatFit",
    "HalfstepError",
    "LossScale",
    "LossScaleAdvice",
    "LossScaleError",
    "LossScaleExhausted",
    "LossScaleState",
    "LossScaleWarning",
    "NoLossScale",
    "Policy",
    "PolicyError",
    "PolicyMap",
    "PolicyWarning",
    "RecipeError",
    "RecordError",
    "TensorFacts",
    "advise_loss_scale",
    "compatibility_check",
    "devices",
    "format_of",
    "global_policy",
    "policy_scope",
    "set_global_policy",
]
