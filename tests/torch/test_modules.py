"""One table of torch's own modules, and modules that nobody here wrote, under every policy.

Each case runs forward and backward in 16 bits beside a float32 twin with the same weights.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from halfstep.torch import apply_policy, policy_of, policy_summary

# a rounding in float16 is 2**-11, in bfloat16 2**-8: a few of them may add up
LIMIT = {"mixed_float16": 4e-3, "mixed_bfloat16": 3e-2}


def vectors():
    return (torch.randn(4, 8),)


def sequences():
    return (torch.randn(3, 5, 8),)


def images():
    return (torch.randn(2, 4, 6, 6),)


def around(layer):
    """Put a normalisation between two convolutions, as in a real network."""
    return lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), layer(), nn.Conv2d(4, 2, 3))


class Bare(nn.Module):
    """Bare parameters in every kind of place, and arithmetic between them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.several = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
        self.named = nn.ParameterDict({"bias": nn.Parameter(torch.randn(8))})
        self.temperature = nn.Parameter(torch.tensor(0.02))
        self.register_buffer("positions", torch.linspace(0, 1, 8))

    def forward(self, x):
        x = x @ self.weight + self.positions.to(x.dtype)
        for weight in self.several:
            x = (x * self.temperature) @ weight
        return (x + self.named["bias"]).softmax(-1).exp()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


class Repeated(nn.Module):
    """One layer called three times in a forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(3):
            x = self.layer(x).tanh()
        return x


class Factorized(nn.Module):
    """Uses a child's weight without calling the child."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(nn.functional.linear(x, self.child.weight))


def pruned():
    layer = nn.Linear(8, 8)
    prune.random_unstructured(layer, "weight", 0.3)
    return nn.Sequential(layer)


def old_style(wrap):
    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.Sequential(wrap(nn.Linear(8, 8)))

    return make


def lazy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own words on lazy modules
        return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())


def packed():
    return (pack_padded_sequence(torch.randn(3, 5, 8), [5, 3, 2], batch_first=True),)


def tokens():
    return (torch.arange(6) * 3,)


def lengths():
    # one padded row: the last two steps of the second sequence
    return (torch.randn(2, 5, 8),)


# gelu: where a relu flips its sign in 16 bits, a gradient changes as a whole
ENCODER = {"batch_first": True, "dropout": 0.0, "dim_feedforward": 16, "activation": "gelu"}

CASES = {
    "Linear": (lambda: nn.Linear(8, 8), vectors),
    "Bilinear": (lambda: nn.Bilinear(8, 8, 4), lambda: vectors() * 2),
    "PReLU": (lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU()), vectors),
    "Conv1d": (lambda: nn.Conv1d(5, 4, 3), sequences),
    "Conv2d": (lambda: nn.Conv2d(4, 4, 3), images),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 3), lambda: (torch.randn(1, 2, 4, 4, 4),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(5, 4, 3), sequences),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 4, 3), images),
    "ConvTranspose3d": (
        lambda: nn.ConvTranspose3d(2, 4, 3),
        lambda: (torch.randn(1, 2, 3, 3, 3),),
    ),
    "Embedding": (lambda: nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4)), tokens),
    "Embedding sparse": (
        lambda: nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Linear(8, 4)),
        tokens,
    ),
    "EmbeddingBag": (
        lambda: nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 4)),
        lambda: (torch.arange(6).view(2, 3),),
    ),
    "BatchNorm2d": (around(lambda: nn.BatchNorm2d(4)), images),
    "InstanceNorm2d": (around(lambda: nn.InstanceNorm2d(4, affine=True)), images),
    "GroupNorm": (around(lambda: nn.GroupNorm(2, 4)), images),
    "LocalResponseNorm": (around(lambda: nn.LocalResponseNorm(2)), images),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), vectors),
    "RMSNorm": (lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8)), vectors),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: sequences() * 3,
    ),
    "MultiheadAttention with biases": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, kdim=8, vdim=8),
        lambda: sequences() * 3,
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, **ENCODER), sequences),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **ENCODER), 2),
        sequences,
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(8, 2, **ENCODER),
        lambda: sequences() * 2,
    ),
    "Transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, **ENCODER),
        lambda: sequences() * 2,
    ),
    "LSTM": (lambda: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True), sequences),
    "LSTM with a state": (
        lambda: nn.LSTM(8, 6, batch_first=True),
        lambda: (*sequences(), (torch.zeros(1, 3, 6), torch.zeros(1, 3, 6))),
    ),
    "GRU": (lambda: nn.GRU(8, 6, batch_first=True), sequences),
    "RNN": (lambda: nn.RNN(8, 6, batch_first=True), sequences),
    "LSTM packed": (lambda: nn.LSTM(8, 6, batch_first=True), packed),
    "LSTMCell": (lambda: nn.LSTMCell(8, 6), vectors),
    "GRUCell": (lambda: nn.GRUCell(8, 6), vectors),
    "RNNCell": (lambda: nn.RNNCell(8, 6), vectors),
    "bare parameters": (Bare, vectors),
    "tied weights": (Tied, tokens),
    "a layer called three times": (Repeated, vectors),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), vectors),
    "spectral_norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8))),
        vectors,
    ),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8))), vectors),
    "old weight_norm": (old_style(nn.utils.weight_norm), vectors),
    "old spectral_norm": (old_style(nn.utils.spectral_norm), vectors),
    "pruned": (pruned, vectors),
    "lazy": (lazy, vectors),
}


def first_tensor(value):
    while isinstance(value, (tuple, list)) and not isinstance(value, PackedSequence):
        value = value[0]
    return value.data if isinstance(value, PackedSequence) else value


def twins(make, inputs, policy, functional):
    """The model under the policy and its float32 twin, built and called alike."""
    pairs = []
    for name in (None, policy):
        torch.manual_seed(0)
        model = make()
        torch.manual_seed(1)
        arguments = inputs()
        if name:
            apply_policy(model, name, functional=functional)
        torch.manual_seed(2)
        output = first_tensor(model(*arguments))
        # weighed at random: the mean square of a normalised output has no gradient to compare
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        (output * weights).sum().backward()
        pairs.append((model, output))
    return pairs


@pytest.mark.parametrize("policy", LIMIT)
@pytest.mark.parametrize("functional", ["autocast", "compute"])
@pytest.mark.parametrize("case", CASES)
def test_module(case, functional, policy, relative_error):
    (plain, expected), (model, output) = twins(*CASES[case], policy, functional)
    assert output.dtype is torch.float32
    assert 0 < relative_error(output, expected) < LIMIT[policy], "it did run in 16 bits, and well"
    for (name, parameter), twin in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert parameter.dtype is torch.float32, name
        assert (parameter.grad is None) == (twin.grad is None), name
        if twin.grad is not None and twin.grad.norm() > 1e-4:
            assert parameter.grad.dtype is torch.float32, name
            error = relative_error(parameter.grad.to_dense(), twin.grad.to_dense())
            assert error < 4 * LIMIT[policy], name


@pytest.mark.parametrize("policy", ["kahan_bfloat16", "master_float16"])
@pytest.mark.parametrize("case", CASES)
def test_module_with_16_bit_variables(case, policy, relative_error):
    (plain, expected), (model, output) = twins(*CASES[case], policy, "autocast")
    limit = LIMIT["mixed_bfloat16" if policy == "kahan_bfloat16" else "mixed_float16"]
    assert output.dtype is torch.float32
    assert 0 < relative_error(output, expected) < limit, "it did run in 16 bits, and well"
    for (name, parameter), twin in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (twin.grad is None), name
        if twin.grad is not None and twin.grad.norm() > 1e-4:
            assert parameter.grad.dtype is parameter.dtype, name
            grad = parameter.grad.to_dense().float()
            assert relative_error(grad, twin.grad.to_dense()) < 4 * limit, name


@pytest.mark.parametrize("case", ["MultiheadAttention", "TransformerEncoderLayer", "LSTM", "lazy"])
@pytest.mark.parametrize("functional", ["autocast", "compute"])
def test_module_in_inference(case, functional, relative_error):
    (plain, _), (model, _) = twins(*CASES[case], "mixed_bfloat16", functional)
    torch.manual_seed(1)
    arguments = CASES[case][1]()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            output, expected = (first_tensor(m.eval()(*arguments)) for m in (model, plain))
        assert relative_error(output, expected) < LIMIT["mixed_bfloat16"]


@pytest.mark.parametrize("functional", ["autocast", "compute"])
def test_encoder_with_padding_in_inference(functional, relative_error):
    torch.manual_seed(0)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **ENCODER), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own fused path: a prototype
        expected = plain(x, src_key_padding_mask=padding)
        output = apply_policy(plain, "mixed_bfloat16", functional=functional)(
            x, src_key_padding_mask=padding
        )
    assert relative_error(output[~padding], expected[~padding]) < LIMIT["mixed_bfloat16"]


def test_a_weight_used_without_its_layer_is_cast_by_autocast(counts):
    model = apply_policy(Factorized(), "mixed_bfloat16")
    with counts() as seen:
        model(*vectors())
    products = [dtypes for name, dtypes in seen.seen if name in ("mm", "addmm")]
    assert products
    assert all(set(dtypes) == {torch.bfloat16} for dtypes in products)


@pytest.mark.parametrize("policy", LIMIT)
@pytest.mark.parametrize(
    ("make", "shape", "scale", "shift"),
    [
        (lambda: nn.LayerNorm(64), (8, 64), 3, 100),
        (lambda: nn.RMSNorm(64), (8, 64), 300, 0),
        (lambda: nn.GroupNorm(4, 64), (8, 64, 2), 3, 100),
        (lambda: nn.BatchNorm1d(64), (32, 64), 3, 100),
        (lambda: nn.LocalResponseNorm(4), (2, 8, 6), 1000, 0),
    ],
    ids=["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "LocalResponseNorm"],
)
def test_norms_keep_their_arithmetic_in_float32(make, shape, scale, shift, policy, relative_error):
    """Large means and squares that overflow float16: only float32 inside gets these right."""
    low = {"mixed_float16": torch.float16, "mixed_bfloat16": torch.bfloat16}[policy]
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale + shift).to(low)
    expected = make().double()(x.double())
    model = nn.ModuleList([make(), nn.Linear(1, 1)])  # one of them has no weights of its own
    apply_policy(model, policy)
    output = model[0](x)
    assert output.dtype is low
    assert relative_error(output, expected) < {torch.float16: 5e-4, torch.bfloat16: 4e-3}[low]


def test_layer_norm_keeps_float32_statistics_for_its_backward(counts):
    model = apply_policy(nn.LayerNorm(64), "mixed_bfloat16")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(8, 64))
    statistics = [tensor.dtype for tensor in saved if tensor.shape == (8, 1)]
    assert statistics == [torch.float32, torch.float32]


def test_batch_norm_statistics_follow_float32(relative_error):
    torch.manual_seed(0)
    plain, model = nn.BatchNorm1d(4), apply_policy(nn.BatchNorm1d(4), "mixed_bfloat16")
    for _ in range(20):
        x = torch.randn(64, 4).bfloat16() + 5
        plain(x.float())
        model(x)
    assert model.running_mean.dtype is torch.float32
    assert relative_error(model.running_mean, plain.running_mean) < 1e-5
    assert relative_error(model.running_var, plain.running_var) < 1e-3


def test_an_embedding_does_not_cast_its_table(counts):
    model = apply_policy(nn.Embedding(10_000, 8), "mixed_float16", output_dtype=None)
    with counts() as seen:
        assert model(torch.arange(3)).dtype is torch.float16
    assert seen.calls["_to_copy"] == 1
    assert seen.calls["_foreach_copy_"] == 0


def test_lazy_modules_keep_the_policy_when_they_become_real():
    model = apply_policy(lazy(), "mixed_float16")
    model(torch.ones(4, 3))
    assert isinstance(model[0], nn.Linear)
    assert not isinstance(model[0], nn.LazyLinear)
    rows = {row.path: row for row in policy_summary(model)}
    assert rows["0"].compute_dtype == rows["1"].compute_dtype == "float16"
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    model(torch.ones(4, 3))
    assert seen == [torch.float16]


@pytest.mark.parametrize("functional", ["autocast", "compute"])
def test_a_loss_that_owns_layers_computes_in_float32(functional):
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.loss = nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10], div_value=2)

        def forward(self, x, labels):
            return self.loss(self.layer(x), labels).loss

    model = apply_policy(WithLoss(), "mixed_float16", functional=functional)
    rows = {row.path: row for row in policy_summary(model)}
    assert rows["layer"].compute_dtype == "float16"
    assert rows["loss.tail.0.0"].compute_dtype == "float32"
    assert "part of a loss" in rows["loss.tail.0.0"].why
    model(torch.randn(6, 8), torch.arange(6) * 3).backward()
    assert model.layer.weight.grad.isfinite().all()
    apply_policy(model, "mixed_float16", {"loss": "mixed_float16"}, functional="compute")
    assert policy_of(model.loss.head).name == "mixed_float16"
