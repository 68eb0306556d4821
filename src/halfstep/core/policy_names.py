"""The names of policies, and what each one means: data."""

from __future__ import annotations

from typing import Literal, TypeAlias

DTYPES = ("float16", "bfloat16", "float32", "float64")
"""What a policy may compute in and keep variables in."""

MIXED = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}
"""Names of the policies with float32 variables and what they compute in."""

Update: TypeAlias = Literal["plain", "master", "kahan"]
"""How the optimizer writes into variables: see `halfstep.Policy.update`."""

MEMORY: dict[str, tuple[str, Update]] = {
    "master_float16": ("float16", "master"),
    "master_bfloat16": ("bfloat16", "master"),
    "kahan_bfloat16": ("bfloat16", "kahan"),
}
"""Names of the policies whose variables have 16 bits and lose no update: dtype and update."""

SCALED = frozenset(("mixed_float16", "master_float16"))
"""Names of the policies that want a dynamic loss scale: their float32 digits need one to be fed."""

NAMES = (*DTYPES, *MIXED, *MEMORY)
"""Every policy name."""
