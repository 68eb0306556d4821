"""The names of policies, and what each one means: data."""

from __future__ import annotations

from typing import Literal, TypeAlias

from ..errors import nearest

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

_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "mixed_float16": (
        *("float16", "fp16", "f16", "half", "16"),
        *("float16_mixed", "fp16_mixed", "16_mixed", "mixed_fp16"),
    ),
    "mixed_bfloat16": ("bfloat16", "bf16", "bf16_mixed", "bfloat16_mixed", "mixed_bf16"),
    "float32": ("float32", "fp32", "f32", "float", "32", "32_true"),
    "float64": ("float64", "fp64", "f64", "double", "64", "64_true"),
}
_MEANT = {word: name for name, words in _ELSEWHERE.items() for word in words}
"""What other libraries, and dtypes, call the policies; "_" stands for "-" too."""


def suggestion(given: object) -> str:
    """Return `` Did you mean 'mixed_float16'?`` for what is no policy's name, or an empty string.

    A 16-bit dtype, or another library's word for one, means mixed precision: by spelling the
    nearest would be the policy ``float16``, in which training loses updates.

    >>> suggestion("bf16-mixed"), suggestion("mixed_flaot16")[:29]
    (" Did you mean 'mixed_bfloat16'?", " Did you mean 'mixed_float16'")
    """
    # NumPy's dtypes and TensorFlow's have a name, JAX's are classes, torch's have neither
    spelled = getattr(given, "name", None) or getattr(given, "__name__", None) or given
    word = str(spelled).lower().replace("-", "_").removeprefix("torch.")
    return f" Did you mean {_MEANT[word]!r}?" if word in _MEANT else nearest(str(spelled), NAMES)
