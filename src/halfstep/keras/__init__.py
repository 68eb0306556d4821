"""The Keras door: the mixed precision guide, on Keras 3 and all its backends.

Importing it lets Keras ask halfstep for its global policy and keep policies when it loads a model,
and lets ``compile`` and ``fit`` scale the loss and say what is wrong with a model's policies.
"""

from . import cast_cache as _cast_cache
from . import compiling as _compiling
from . import fit as _fit
from . import global_policy as _global_policy
from . import loading as _loading
from .checks import check_model as check_model
from .global_policy import global_policy as global_policy
from .global_policy import policy_scope as policy_scope
from .global_policy import set_global_policy as set_global_policy
from .graph_rewrite import (
    disable_mixed_precision_graph_rewrite as disable_mixed_precision_graph_rewrite,
)
from .graph_rewrite import (
    enable_mixed_precision_graph_rewrite as enable_mixed_precision_graph_rewrite,
)
from .history import LossScaleHistory as LossScaleHistory
from .loss_scale import DynamicLossScale as DynamicLossScale
from .loss_scale import FixedLossScale as FixedLossScale
from .loss_scale import LossScale as LossScale
from .optimizer import LossScaleOptimizer as LossScaleOptimizer
from .policy import Policy as Policy
from .policy import PolicyMap as PolicyMap

_global_policy.follow()
_loading.install()
_fit.install()
_compiling.install()
_cast_cache.install()
