"""JAX's primitives by kind, as data; the reasons are shown by :func:`~halfstep.jax.explain`.

What is on no list is opaque: it stays in float32, and nothing is concluded from it.
"""

from __future__ import annotations

from ..core.paint import Kind, OperationLists
from ._internals import Equation

_PRODUCT = "matrix units run it in 16 bits and add up in float32"
_EXPONENTIAL = "a rounded argument is a relative error of the result"
_LOGARITHM = "near 1 it is all cancellation"
_SUM = "adding many numbers in 16 bits loses the small ones"
_ANGLE = "a rounded angle is another angle"
_REMAINDER = "a rounded argument is another remainder"
_POINTWISE = "one rounding per element"
_DISCRETE = "rounding first could change the answer"
_MOVES = "it moves numbers"
_SELECTS = "it chooses among its inputs"
_COMPARES = "it compares numbers"
_DECOMPOSITION = "the decomposition needs float32"
_BITS = "it works on the bits of float32"

OPERATIONS = OperationLists(
    allow={
        "dot_general": _PRODUCT,
        "conv_general_dilated": _PRODUCT,
        "ragged_dot_general": _PRODUCT,
    },
    deny={
        "exp": _EXPONENTIAL,
        "exp2": _EXPONENTIAL,
        "expm1": _EXPONENTIAL,
        "pow": _EXPONENTIAL,
        "sinh": _EXPONENTIAL,
        "cosh": _EXPONENTIAL,
        "log": _LOGARITHM,
        "log1p": _LOGARITHM,
        "lgamma": _LOGARITHM,
        "digamma": _LOGARITHM,
        "atanh": _LOGARITHM,
        "acosh": _LOGARITHM,
        "reduce_sum": _SUM,
        "reduce_prod": _SUM,
        "reduce_window_sum": _SUM,
        "cumsum": _SUM,
        "cumprod": _SUM,
        "cumlogsumexp": _SUM,
        "scatter-add": _SUM,
        "scatter-sub": _SUM,
        "select_and_scatter_add": _SUM,
        "psum": _SUM,
        "psum_invariant": _SUM,
        "reduce_scatter": _SUM,
        "sin": _ANGLE,
        "cos": _ANGLE,
        "tan": _ANGLE,
        "acos": _ANGLE,
        "asin": _ANGLE,
        "rem": _REMAINDER,
        "erf_inv": "its tails need float32",
    },
    infer={
        "add": _POINTWISE,
        "add_any": _POINTWISE,
        "sub": _POINTWISE,
        "mul": _POINTWISE,
        "div": _POINTWISE,
        "square": _POINTWISE,
        "integer_pow": _POINTWISE,
        "sqrt": _POINTWISE,
        "rsqrt": _POINTWISE,
        "cbrt": _POINTWISE,
        "tanh": _POINTWISE,
        "logistic": _POINTWISE,
        "erf": _POINTWISE,
        "erfc": _POINTWISE,
        "atan": _POINTWISE,
        "asinh": _POINTWISE,
        "floor": _DISCRETE,
        "ceil": _DISCRETE,
        "round": _DISCRETE,
        "sign": _DISCRETE,
        "sort": _DISCRETE,
        "top_k": _DISCRETE,
    },
    clear={
        "abs": _MOVES,
        "neg": _MOVES,
        "copy": _MOVES,
        "name": _MOVES,
        "stop_gradient": _MOVES,
        "broadcast_in_dim": _MOVES,
        "reshape": _MOVES,
        "squeeze": _MOVES,
        "transpose": _MOVES,
        "rev": _MOVES,
        "slice": _MOVES,
        "dynamic_slice": _MOVES,
        "dynamic_update_slice": _MOVES,
        "gather": _MOVES,
        "scatter": _MOVES,
        "concatenate": _MOVES,
        "split": _MOVES,
        "pad": _MOVES,
        "iota": _MOVES,
        "convert_element_type": _MOVES,
        "sharding_constraint": _MOVES,
        "reshard": _MOVES,
        "all_gather": _MOVES,
        "all_gather_invariant": _MOVES,
        "all_to_all": _MOVES,
        "ppermute": _MOVES,
        "pvary": _MOVES,
        "select_n": _SELECTS,
        "max": _SELECTS,
        "min": _SELECTS,
        "clamp": _SELECTS,
        "reduce_max": _SELECTS,
        "reduce_min": _SELECTS,
        "reduce_window_max": _SELECTS,
        "reduce_window_min": _SELECTS,
        "cummax": _SELECTS,
        "cummin": _SELECTS,
        "pmax": _SELECTS,
        "pmin": _SELECTS,
        "argmax": _COMPARES,
        "argmin": _COMPARES,
        "eq": _COMPARES,
        "ne": _COMPARES,
        "lt": _COMPARES,
        "le": _COMPARES,
        "gt": _COMPARES,
        "ge": _COMPARES,
        "is_finite": _COMPARES,
    },
    opaque={
        "cholesky": _DECOMPOSITION,
        "lu": _DECOMPOSITION,
        "qr": _DECOMPOSITION,
        "svd": _DECOMPOSITION,
        "eig": _DECOMPOSITION,
        "eigh": _DECOMPOSITION,
        "schur": _DECOMPOSITION,
        "hessenberg": _DECOMPOSITION,
        "householder_product": _DECOMPOSITION,
        "triangular_solve": _DECOMPOSITION,
        "tridiagonal_solve": _DECOMPOSITION,
        "custom_linear_solve": _DECOMPOSITION,
        "fft": "XLA has no 16-bit Fourier transform",
        "bitcast_convert_type": _BITS,
        "reduce_precision": _BITS,
        "nextafter": _BITS,
        "pallas_call": "a kernel's dtypes are part of its code",
        "get": "a reference keeps its dtype",
        "swap": "a reference keeps its dtype",
        "addupdate": "a reference keeps its dtype",
        "new_ref": "a reference keeps its dtype",
        "run_state": "a reference keeps its dtype",
        "pure_callback": "a callback's dtypes are part of its code",
        "io_callback": "a callback's dtypes are part of its code",
        "debug_callback": "a callback sees float32",
        "debug_print": "a callback sees float32",
        "ffi_call": "a foreign function's dtypes are part of its code",
    },
)
"""The kind of every primitive that this door knows."""


STRUCTURE = (
    "jit", "closed_call", "core_call", "call", "scan", "while", "cond", "remat2", "checkpoint",
    "custom_jvp_call", "custom_vjp_call", "shard_map",
)  # fmt: skip
"""Primitives with a body of their own, which is painted; they cannot be put on a list."""

ADDITIONS = ("add", "sub", "add_any")
"""With a loop's carry as one argument they sum over the loop."""

STILL_ARGUMENTS = (
    "reshape", "squeeze", "transpose", "broadcast_in_dim", "slice", "dynamic_slice", "rev", "copy",
    "convert_element_type", "sharding_constraint", "reshard", "all_gather", "pvary",
)  # fmt: skip
"""What these make of an argument of the function is that argument still, for a policy's paths."""


def kind_of(equation: Equation, lists: OperationLists) -> tuple[Kind, str]:
    """The kind of an equation and the reason; one that asks for a precision is left alone."""
    precision = equation.params.get("precision")
    asked = precision if isinstance(precision, tuple) else (precision,)
    for one in asked:
        if one is not None and getattr(one, "name", str(one)) not in ("DEFAULT", "HIGH"):
            return Kind.OPAQUE, f"precision={getattr(one, 'name', one)} asks for float32"
    return lists.kind(equation.primitive.name)
