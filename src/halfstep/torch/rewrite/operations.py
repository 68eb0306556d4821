"""ATen's operations by kind, as data; the reasons are shown by :func:`~halfstep.torch.explain`.

What is on no list is opaque: it stays in float32, and nothing is concluded from it. Names are
those of the operation without its overload: ``"mm"``, ``"native_layer_norm"``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core.paint import OperationLists

_PRODUCT = "matrix units run it in 16 bits and add up in float32"
_EXPONENTIAL = "a rounded argument is a relative error of the result"
_LOGARITHM = "near 1 it is all cancellation"
_SUM = "adding many numbers in 16 bits loses the small ones"
_NORM = "its sums of squares overflow and lose in 16 bits"
_LOSS = "a loss is a sum, and what it loses every gradient loses"
_ANGLE = "a rounded angle is another angle"
_REMAINDER = "a rounded argument is another remainder"
_POINTWISE = "one rounding per element"
_WINDOW = "it averages a few numbers"
_STATISTICS = "its kernel keeps statistics in float32"
_DISCRETE = "rounding first could change the answer"
_MOVES = "it moves numbers"
_SELECTS = "it chooses among its inputs"
_COMPARES = "it compares numbers"
_FILLS = "it makes a constant"
_RANDOM = "its random numbers are those of float32 training"
_DECOMPOSITION = "the decomposition needs float32"
_BITS = "it works on the bits, or the storage, of float32"


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


OPERATIONS = OperationLists(
    allow=_each(
        """mm bmm addmm addbmm baddbmm mv addmv matmul linear convolution convolution_backward
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
        _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_flash_attention_for_cpu_backward
        _scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward
        _scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward
        """,
        _PRODUCT,
    ),
    deny={
        **_each("exp exp2 expm1 pow sinh cosh softplus softplus_backward", _EXPONENTIAL),
        **_each("_softmax _softmax_backward_data", _EXPONENTIAL),
        **_each("_log_softmax _log_softmax_backward_data logsumexp logaddexp", _EXPONENTIAL),
        **_each("log log2 log10 log1p lgamma digamma polygamma atanh acosh logit", _LOGARITHM),
        **_each("log_sigmoid_forward log_sigmoid_backward xlogy", _LOGARITHM),
        **_each("sum mean prod cumsum cumprod logcumsumexp dot vdot nansum", _SUM),
        **_each("scatter_add scatter_reduce index_add index_reduce embedding_dense_backward", _SUM),
        **_each("_embedding_bag _embedding_bag_dense_backward trace", _SUM),
        **_each("var var_mean std std_mean linalg_vector_norm norm renorm _cdist_forward", _NORM),
        **_each("native_layer_norm native_layer_norm_backward", _NORM),
        **_each("native_group_norm native_group_norm_backward", _NORM),
        **_each("_fused_rms_norm _fused_rms_norm_backward _weight_norm_interface", _NORM),
        **_each("nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward", _LOSS),
        **_each("mse_loss mse_loss_backward smooth_l1_loss smooth_l1_loss_backward", _LOSS),
        **_each("huber_loss huber_loss_backward soft_margin_loss soft_margin_loss_backward", _LOSS),
        **_each("binary_cross_entropy binary_cross_entropy_backward", _LOSS),
        **_each("binary_cross_entropy_with_logits _ctc_loss _ctc_loss_backward", _LOSS),
        **_each("tan acos asin atan2", _ANGLE),
        **_each("remainder fmod", _REMAINDER),
        "erfinv": "its tails need float32",
    },
    infer={
        **_each("add sub rsub mul div addcmul addcdiv lerp sqrt rsqrt reciprocal", _POINTWISE),
        **_each("square tanh tanh_backward sigmoid sigmoid_backward erf erfc", _POINTWISE),
        **_each("gelu gelu_backward silu silu_backward mish mish_backward", _POINTWISE),
        **_each("elu elu_backward glu glu_backward leaky_relu leaky_relu_backward", _POINTWISE),
        **_each("hardswish hardswish_backward hardsigmoid hardsigmoid_backward", _POINTWISE),
        **_each("native_dropout native_dropout_backward _prelu_kernel", _POINTWISE),
        **_each("_prelu_kernel_backward celu atan asinh fma", _POINTWISE),
        **_each("floor ceil round trunc frac sign sgn sort topk kthvalue median", _DISCRETE),
        **_each("avg_pool1d avg_pool2d avg_pool2d_backward avg_pool3d", _WINDOW),
        **_each("avg_pool3d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward", _WINDOW),
        **_each("_adaptive_avg_pool3d _adaptive_avg_pool3d_backward", _WINDOW),
        **_each("max_pool2d_with_indices_backward max_pool3d_with_indices_backward", _WINDOW),
        **_each("adaptive_max_pool2d_backward upsample_nearest2d_backward", _WINDOW),
        **_each("upsample_bilinear2d upsample_bilinear2d_backward", _WINDOW),
        **_each("upsample_linear1d upsample_bicubic2d upsample_trilinear3d", _WINDOW),
        **_each("native_batch_norm native_batch_norm_backward", _STATISTICS),
        **_each("_native_batch_norm_legit _native_batch_norm_legit_functional", _STATISTICS),
        **_each("_native_batch_norm_legit_no_training", _STATISTICS),
        **_each("_batch_norm_with_update_functional _batch_norm_no_update", _STATISTICS),
        **_each("batch_norm_backward cudnn_batch_norm cudnn_batch_norm_backward", _STATISTICS),
    },
    clear={
        **_each("view _unsafe_view reshape _reshape_alias t transpose permute expand", _MOVES),
        **_each("slice select squeeze unsqueeze cat stack split split_with_sizes", _MOVES),
        **_each("unsafe_split chunk unbind clone detach alias copy narrow diagonal", _MOVES),
        **_each("index index_select gather embedding take_along_dim flip roll repeat", _MOVES),
        **_each("slice_backward select_backward slice_scatter select_scatter", _MOVES),
        **_each("diagonal_scatter diagonal_backward index_put _unsafe_index scatter", _MOVES),
        **_each("_unsafe_index_put constant_pad_nd reflection_pad1d reflection_pad2d", _MOVES),
        **_each("replication_pad1d replication_pad2d unfold pixel_shuffle", _MOVES),
        **_each("pixel_unshuffle upsample_nearest1d upsample_nearest2d tril triu", _MOVES),
        **_each("lift_fresh_copy _to_copy convert_element_type broadcast_in_dim", _MOVES),
        **_each("view_copy expand_copy permute_copy", _MOVES),
        **_each("where masked_fill masked_scatter maximum minimum clamp clamp_min", _SELECTS),
        **_each("clamp_max max min amax amin relu threshold_backward abs neg", _SELECTS),
        **_each("hardtanh hardtanh_backward cummax cummin fmax fmin", _SELECTS),
        **_each("max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d", _SELECTS),
        **_each("_low_memory_max_pool_with_offsets", _SELECTS),
        **_each("eq ne lt le gt ge isnan isinf isfinite argmax argmin logical_not", _COMPARES),
        **_each("logical_and logical_or argsort", _COMPARES),
        **_each("full full_like zeros zeros_like ones ones_like new_zeros new_ones", _FILLS),
        **_each("new_full empty empty_like new_empty empty_strided new_empty_strided", _FILLS),
        **_each("scalar_tensor arange iota linspace eye", _FILLS),
    },
    opaque={
        **_each("sin cos", "a rounded angle is another angle; the result may be rounded"),
        **_each("rand randn rand_like randn_like bernoulli uniform normal", _RANDOM),
        **_each("normal_functional multinomial exponential randint inductor_random", _RANDOM),
        **_each("linalg_cholesky_ex linalg_lu linalg_lu_factor_ex linalg_qr", _DECOMPOSITION),
        **_each("_linalg_svd", _DECOMPOSITION),
        **_each("linalg_eigh _linalg_eigh linalg_inv_ex linalg_solve_triangular", _DECOMPOSITION),
        **_each("_linalg_solve_ex _linalg_det triangular_solve cholesky_solve", _DECOMPOSITION),
        **_each("_fft_r2c _fft_c2r _fft_c2c", "there is no 16-bit Fourier transform everywhere"),
        **_each("as_strided as_strided_scatter view_as_complex view_as_real nextafter", _BITS),
        "_euclidean_dist": "near numbers are all cancellation in it",
        "copy_": "it writes to a float32 input",
    },
)  # fmt: skip
"""The kind of every operation that this door knows."""

SHAPE_ONLY = _names(
    "full_like zeros_like ones_like empty_like new_zeros new_ones new_full new_empty "
    "new_empty_strided"
)
"""They take a tensor for its shape, and look at none of its numbers."""

MAKES_FROM_NOTHING = SHAPE_ONLY | {
    "full", "zeros", "ones", "empty", "scalar_tensor", "arange", "linspace", "eye",
}  # fmt: skip
"""Their dtype is an argument, and no tensor's."""

TAKES_INTEGERS = _names(
    "index index_select gather embedding take_along_dim index_put _unsafe_index where scatter "
    "_unsafe_index_put masked_fill masked_scatter max_pool2d_with_indices_backward "
    "max_pool3d_with_indices_backward adaptive_max_pool2d_backward full_like zeros_like ones_like "
    "empty_like new_zeros new_ones new_full new_empty native_dropout_backward"
)
"""Their integers are places or flags. Elsewhere an integer may be too large for 16 bits."""

SUMS_IF = {"index_put": "accumulate", "_unsafe_index_put": "accumulate"}
"""They move numbers, unless this argument is true: then they add."""

ACCUMULATES_IN = _names("sum mean prod cumsum cumprod nansum")
"""They take 16 bits and add up in the float32 of their ``dtype=``, so that no cast is needed."""

NO_KERNEL_ON_CPU = _names("avg_pool3d avg_pool3d_backward")
"""They are written for float32 and float64 there."""

ADDITIONS = _names("add sub rsub addcmul addcdiv lerp fma")
"""What they add to a float32 stream is not rounded with it."""

PROMOTES = _names("add sub mul div")
"""Beside a float32 tensor they read a 16-bit one as float32 by themselves."""


@dataclass(frozen=True)
class Ports:
    """What is float32 whatever dtype an operation runs in.

    Attributes:
        args: names of arguments.
        results: numbers of results.
    """

    args: frozenset[str] = frozenset()
    results: frozenset[int] = frozenset()


_BATCH_NORM = "weight bias running_mean running_var save_mean save_invstd save_var"


def _ports(args: str = "", results: str = "") -> Ports:
    return Ports(_names(args), frozenset(map(int, results.split())))


PORTS: dict[str, Ports] = {
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_functional",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_with_update_functional",
            "_batch_norm_no_update",
            "native_batch_norm_backward",
            "batch_norm_backward",
            "cudnn_batch_norm",
            "cudnn_batch_norm_backward",
        ),
        _ports(_BATCH_NORM, "1 2 3 4 5"),
    ),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
        ),
        _ports("", "1"),
    ),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_backward",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "_scaled_dot_product_efficient_attention_backward",
            "_scaled_dot_product_cudnn_attention_backward",
        ),
        _ports("logsumexp"),
    ),
}
"""Statistics and log-sum-exps, as the operations' kernels keep them."""

MASKS = frozenset({"attn_mask", "attn_bias"})
"""Arguments whose finite numbers stay finite in 16 bits: a row masked with float32's lowest number
would be NaN."""
