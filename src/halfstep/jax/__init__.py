"""The JAX door: autocast for any function, and loss scaling that is right under ``jit``.

It needs JAX, and optax for :func:`loss_scaled` alone.
"""

from ..core.paint import Explanation as Explanation
from .autocast import autocast as autocast
from .autocast import explain as explain
from .errors import NotTraceableError as NotTraceableError
from .loss_scale import DynamicLossScale as DynamicLossScale
from .loss_scale import FixedLossScale as FixedLossScale
from .loss_scale import NoLossScale as NoLossScale
from .loss_scale import StatefulLossScale as StatefulLossScale
from .loss_scale import all_finite as all_finite
from .loss_scale import check_loss_scale as check_loss_scale
from .loss_scale import scale_loss as scale_loss
from .loss_scale import value_and_grad as value_and_grad
from .optimizer import LossScaledState as LossScaledState
from .optimizer import loss_scaled as loss_scaled
from .scopes import policy_scope as policy_scope
