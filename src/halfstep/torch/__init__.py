"""The torch door: policies for any ``torch.nn.Module``, loss scaling for any optimizer."""

from .apply import apply_policy as apply_policy
from .apply import policy_of as policy_of
from .apply import remove_policy as remove_policy
from .auditing import audit as audit
from .blaming import blame as blame
from .blaming import blame_on_exhausted as blame_on_exhausted
from .copies import weights_unchanged as weights_unchanged
from .loss_scaling import GradScaler as GradScaler
from .loss_scaling import LossScaleOptimizer as LossScaleOptimizer
from .loss_scaling import LostUpdates as LostUpdates
from .loss_scaling import ScaleEvent as ScaleEvent
from .numerics import NumericsMonitor as NumericsMonitor
from .rewrite import GraphExplanation as GraphExplanation
from .rewrite import autocast as autocast
from .rewrite import (
    enable_mixed_precision_graph_rewrite as enable_mixed_precision_graph_rewrite,
)
from .rewrite import explain as explain
from .summary import PolicySummary as PolicySummary
from .summary import SummaryRow as SummaryRow
from .summary import policy_summary as policy_summary
from .tuning import tune as tune
