"""The graph rewrite: mixed precision painted into the graphs that ``torch.compile`` captures."""

from .autocast import autocast as autocast
from .autocast import (
    enable_mixed_precision_graph_rewrite as enable_mixed_precision_graph_rewrite,
)
from .explain import GraphExplanation as GraphExplanation
from .explain import explain as explain
