"""The public names of each door: adding or losing one is a decision, not an accident."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

PUBLIC = {
    "halfstep": {
        "AdviceError",
        "Compatibility",
        "Device",
        "DynamicLossScale",
        "Fault",
        "ExponentHistogram",
        "FORMATS",
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
        "compatibility_check",
        "devices",
        "format_of",
        "global_policy",
        "policy_scope",
        "set_global_policy",
        "advise_loss_scale",
    },
    "halfstep.torch.distributed": {"TrainingState", "float32_allreduce_hook", "fsdp_policy"},
    "halfstep.jax": {
        "DynamicLossScale",
        "Explanation",
        "FixedLossScale",
        "LossScaledState",
        "NoLossScale",
        "NotTraceableError",
        "StatefulLossScale",
        "all_finite",
        "autocast",
        "check_loss_scale",
        "explain",
        "loss_scaled",
        "policy_scope",
        "scale_loss",
        "value_and_grad",
    },
    "halfstep.keras": {
        "DynamicLossScale",
        "FixedLossScale",
        "LossScale",
        "LossScaleHistory",
        "LossScaleOptimizer",
        "Policy",
        "PolicyMap",
        "check_model",
        "disable_mixed_precision_graph_rewrite",
        "enable_mixed_precision_graph_rewrite",
        "global_policy",
        "policy_scope",
        "set_global_policy",
    },
    "halfstep.keras.experimental": {
        "DynamicLossScale",
        "FixedLossScale",
        "LossScale",
        "LossScaleOptimizer",
        "Policy",
        "get_layer_policy",
        "global_policy",
        "set_policy",
    },
    "halfstep.torch": {
        "GradScaler",
        "GraphExplanation",
        "LossScaleOptimizer",
        "LostUpdates",
        "NumericsMonitor",
        "PolicySummary",
        "ScaleEvent",
        "SummaryRow",
        "apply_policy",
        "audit",
        "autocast",
        "blame",
        "blame_on_exhausted",
        "enable_mixed_precision_graph_rewrite",
        "explain",
        "policy_of",
        "policy_summary",
        "remove_policy",
        "tune",
        "weights_unchanged",
    },
    "halfstep.report": {"load", "page", "read_run", "render", "render_run"},
}
"""Every public name by package; a new door is a new key."""


def public_names(package: ModuleType) -> set[str]:
    """What a package offers: no private name, no submodule, nothing from ``__future__``."""
    return {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    assert public_names(importlib.import_module(name)) == PUBLIC[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    package = importlib.import_module(name)
    for public in PUBLIC[name] - {"FORMATS"}:
        assert getattr(package, public).__doc__, public


def test_the_version_is_one_of_pep_440():
    import halfstep

    assert [part.isdigit() for part in halfstep.__version__.split(".")[:2]] == [True, True]
