"""What a compiled training step needs of memory, as XLA plans it before the step runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHOD = "XLA's plan of the compiled step: arguments, results, temporaries"


def planned(plan: Any) -> Mapping[str, Any]:
    """Return a measurement, without its label, from XLA's plan of a compiled step."""
    if plan is None:
        return {"error": "this backend of XLA does not tell its plan", "method": METHOD}
    count = (
        plan.argument_size_in_bytes + plan.output_size_in_bytes
        - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    )  # fmt: skip
    return {"bytes": int(count), "method": METHOD}
