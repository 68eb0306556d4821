"""What a policy does to a model: dtypes, overrides, errors, and how to take it away."""

import copy
import gc
import inspect
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

from halfstep import Policy, PolicyError, PolicyMap, PolicyWarning, policy_scope, set_global_policy
from halfstep.torch import (
    LossScaleOptimizer,
    apply_policy,
    policy_of,
    policy_summary,
    remove_policy,
)
from halfstep.torch.plan import plan_of

LOW = {"mixed_float16": torch.float16, "mixed_bfloat16": torch.bfloat16}


class Probe(nn.Module):
    """Remembers the dtypes that its forward saw."""

    def __init__(self, weight=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4)) if weight else None
        self.seen = {}

    def forward(self, x, extra=None, *, flag=None):
        self.seen = {"x": x, "extra": extra, "flag": flag, "weight": self.weight}
        return x if self.weight is None else x * self.weight


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("functional", ["autocast", "compute"])
def test_a_layer_casts_floats_and_reads_its_weight_low(name, functional):
    probe = Probe()
    model = apply_policy(nn.Sequential(probe), name, functional=functional)
    extra = {"a": [torch.ones(4), (torch.ones(4, dtype=torch.float64), 3)], "b": "text"}
    ids, mask = torch.arange(4), torch.ones(4, dtype=torch.bool)
    output = probe(torch.ones(2, 4), extra, flag=(ids, mask))
    low = LOW[name]
    assert probe.seen["x"].dtype is low
    assert probe.seen["weight"].dtype is low
    assert probe.seen["extra"]["a"][0].dtype is low
    assert probe.seen["extra"]["a"][1][0].dtype is low
    assert probe.seen["extra"]["a"][1][1] == 3
    assert probe.seen["extra"]["b"] == "text"
    assert probe.seen["flag"][0] is ids
    assert probe.seen["flag"][1] is mask
    assert extra["a"][0].dtype is torch.float32, "the caller's own structure stays as it was"
    assert output.dtype is low
    assert probe.weight.dtype is torch.float32, "outside of its forward a weight is float32"
    assert model(torch.ones(2, 4)).dtype is torch.float32


def test_weights_are_the_same_parameters_as_before():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    apply_policy(model, "mixed_float16")
    assert all(after is before[name] for name, after in model.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert isinstance(model[0], nn.Linear)
    assert model[0].weight is before["0.weight"]
    assert repr(model[0]) == repr(nn.Linear(3, 3))


def test_functional_operations_between_layers(counts):
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x):
            return (self.first(x) @ torch.ones(4, 4)).softmax(-1)

    x = torch.ones(2, 4)
    with counts() as seen:
        apply_policy(Between(), "mixed_bfloat16")(x)
    products = [dtypes for name, dtypes in seen.seen if name in ("mm", "addmm", "bmm")]
    assert all(set(dtypes) == {torch.bfloat16} for dtypes in products)
    with pytest.raises(RuntimeError, match="same dtype") as error:
        apply_policy(Between(), "mixed_bfloat16", functional="compute")(x)
    assert "functional='autocast'" in error.value.__notes__[0]
    assert "the model" in error.value.__notes__[0]


def test_compute_keeps_what_lies_between_layers_in_the_compute_dtype(make_transformer, tokens):
    seen = {}
    for functional in ("autocast", "compute"):
        model = apply_policy(make_transformer(), "mixed_bfloat16", functional=functional)
        model.blocks[1].norm.register_forward_pre_hook(
            lambda module, args, key=functional: seen.__setitem__(key, args[0].dtype)
        )
        model(tokens)
    assert seen["compute"] is torch.bfloat16


@pytest.mark.parametrize("functional", ["autocast", "compute"])
def test_a_float32_override_really_computes_in_float32(
    functional, counts, make_transformer, tokens
):
    model = apply_policy(
        make_transformer(), "mixed_bfloat16", {"blocks.1": "float32"}, functional=functional
    )
    with counts() as seen:
        model.blocks[1](torch.ones(2, 6, 16, dtype=torch.bfloat16))
    floats = {dtype for name, dtypes in seen.seen if name != "_to_copy" for dtype in dtypes}
    assert floats == {torch.float32}
    with counts() as seen:
        model(tokens)
    products = [dtypes[0] for name, dtypes in seen.seen if name == "bmm"]
    low, full = torch.bfloat16, torch.float32
    assert products == [low, low, full, full, low, low]


def test_a_low_part_of_a_float32_model_gives_float32_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    apply_policy(model, "float32", {"1": "mixed_float16"})
    seen = []
    model[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    assert model(torch.ones(1, 4)).dtype is torch.float32
    assert seen == [torch.float32]
    assert [policy_of(layer).name for layer in model] == ["float32", "mixed_float16", "float32"]


def test_a_low_container_in_a_float32_model_gives_float32_back():
    model = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "e": nn.Embedding(3, 4)}
    )
    apply_policy(model, "float32", {"body": "mixed_float16", "e": "mixed_float16"})
    assert model["body"](torch.ones(1, 4)).dtype is torch.float32
    assert model["body"][0](torch.ones(1, 4)).dtype is torch.float16
    assert model["e"](torch.arange(2)).dtype is torch.float32


@pytest.mark.parametrize("name", ["mixed_bfloat16", "bfloat16", "kahan_bfloat16"])
def test_scripted_modules_are_left_alone(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(4, 4))
    model = apply_policy(nn.Sequential(nn.Linear(4, 4), scripted), name)
    assert {parameter.dtype for parameter in scripted.parameters()} == {torch.float32}
    assert "sealed" in {row.path: row.why for row in policy_summary(model)}["1"]
    assert model(torch.ones(1, 4)).dtype is torch.float32
    remove_policy(model)
    assert policy_of(model[1]) is None


@pytest.mark.parametrize(
    ("output_dtype", "expected"),
    [("float32", torch.float32), (None, torch.bfloat16), ("float64", torch.float64)],
)
def test_output_dtype(output_dtype, expected):
    model = apply_policy(nn.Linear(2, 2), "mixed_bfloat16", output_dtype=output_dtype)
    assert model(torch.ones(1, 2)).dtype is expected


def test_the_root_casts_every_low_float_it_returns():
    import collections
    import dataclasses

    Pair = collections.namedtuple("Pair", "first second")

    @dataclasses.dataclass(frozen=True)
    class Result:
        logits: torch.Tensor
        count: int

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            y = self.layer(x)
            return {
                "pair": Pair(y, [y]),
                "result": Result(y, 3),
                "ids": torch.arange(2),
                "double": torch.ones(1, dtype=torch.float64),
                "none": None,
            }

    out = apply_policy(Many(), "mixed_float16")(torch.ones(1, 2))
    assert isinstance(out["pair"], Pair)
    assert out["pair"].first.dtype is out["pair"].second[0].dtype is torch.float32
    assert isinstance(out["result"], Result)
    assert out["result"].logits.dtype is torch.float32
    assert out["result"].count == 3
    assert out["ids"].dtype is torch.int64
    assert out["double"].dtype is torch.float64


def test_scalars_keep_their_digits():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.temperature = nn.Parameter(torch.tensor(2.6592))

        def forward(self, x):
            assert self.temperature.dtype is torch.float32
            return self.layer(x) * self.temperature

    seen = []
    model = nn.Sequential(Scaled(), nn.Identity())
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    apply_policy(model, "mixed_bfloat16")(torch.ones(1, 2)).sum().backward()
    assert seen == [torch.bfloat16], "a scalar does not promote what it multiplies"
    assert model[0].temperature.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_finite_mask_stays_finite_and_infinities_stay(dtype):
    from halfstep.torch.casting import FiniteCast

    lowest = torch.finfo(torch.float32).min
    values = torch.tensor([lowest, -1e9, 0.0, 1.5, float("inf"), float("-inf"), float("nan")])
    cast = FiniteCast(dtype)(values)
    assert cast.dtype is dtype
    assert cast[0] == torch.finfo(dtype).min
    assert torch.isfinite(cast[1])
    assert cast[2:6].tolist() == [0.0, 1.5, float("inf"), float("-inf")]
    assert cast[6].isnan()
    learnt = torch.tensor([1e6], requires_grad=True)
    assert FiniteCast(torch.float16)(learnt).isinf(), "an activation that overflows must show it"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.bfloat16),
    ],
)
def test_a_finite_cast_changes_nothing_but_what_would_overflow(source, target):
    from halfstep.torch.casting import FiniteCast

    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 6e-8, 1e-40], dtype=source)
    scales = 2.0 ** torch.arange(-140, 128, dtype=torch.float64)
    values = torch.cat([torch.randn(64).outer(scales).flatten().to(source), ends])
    cast, plain = FiniteCast(target)(values), values.to(target)
    assert torch.equal(cast.isinf(), values.isinf())
    kept = plain.isfinite() | values.isinf()
    assert torch.equal(cast[kept], plain[kept])
    assert torch.equal(cast.signbit(), values.signbit())
    # a bfloat16 has no 65504; the largest number below it that it has is 65280
    largest = 65280 if source is torch.bfloat16 else torch.finfo(target).max
    assert (cast[~kept].abs() == largest).all()


@pytest.mark.parametrize("functional", ["autocast", "compute"])
def test_a_row_that_is_masked_whole_is_not_nan(functional):
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    mask = torch.zeros(4, 4)
    mask[1] = torch.finfo(torch.float32).min
    x = torch.randn(1, 4, 8)
    model = apply_policy(attention, "mixed_float16", functional=functional)
    output, _ = model(x, x, x, attn_mask=mask)
    assert output.isfinite().all()


def test_pure_16_bit_policies_store_16_bits_and_give_them_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Embedding(3, 4))
    parameter = model[0].weight
    apply_policy(model, "bfloat16")
    assert model[0].weight is parameter
    assert model[0].weight.dtype is torch.bfloat16
    assert model[1].weight.dtype is model[1].running_mean.dtype is torch.float32
    assert model[2].weight.dtype is torch.bfloat16
    assert model[:2](torch.randn(8, 4)).dtype is torch.bfloat16
    remove_policy(model)
    assert parameter.dtype is torch.float32


def test_a_half_model_gets_float32_variables_from_a_mixed_policy():
    model = nn.Linear(4, 4).half()
    apply_policy(model, "mixed_float16")
    assert model.weight.dtype is torch.float32
    model(torch.ones(1, 4)).sum().backward()
    assert model.weight.grad.dtype is torch.float32


def test_the_global_policy_is_the_default():
    with policy_scope("mixed_bfloat16"):
        assert policy_of(apply_policy(nn.Linear(2, 2))) == Policy("mixed_bfloat16")
    set_global_policy("mixed_float16")
    try:
        found = []
        thread = threading.Thread(
            target=lambda: found.append(policy_of(apply_policy(nn.Linear(2, 2))))
        )
        thread.start()
        thread.join()
        assert found == [Policy("mixed_float16")]
    finally:
        set_global_policy("float32")


def test_overrides_take_paths_and_expressions_and_the_deepest_wins(make_transformer):
    policies = PolicyMap(
        "mixed_float16",
        {r"blocks\.\d+": "mixed_bfloat16", r".*\.norm": "float32", "head": "float32"},
    )
    model = apply_policy(make_transformer(), policies, {"blocks.0.qkv": "float32"})
    names = {path: policy_of(module).name for path, module in model.named_modules()}
    assert names["embed"] == "mixed_float16"
    assert names["blocks.1"] == names["blocks.1.qkv"] == "mixed_bfloat16"
    assert names["blocks.1.norm"] == names["head"] == names["blocks.0.qkv"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixed_flaot16",), "mixed_float16"),
        (("fp16",), "Did you mean 'mixed_float16'"),
        ((torch.bfloat16,), "Did you mean 'mixed_bfloat16'"),
        (("mixed_float16", {"haed": "float32"}), "Did you mean 'head'"),
        (("mixed_float16", {"(": "float32"}), "no regular expression"),
        (("mixed_float16", {"head": "flaot32"}), "float32"),
        (("mixed_float16", {r"blocks.*": "float32", r".*\.0": "mixed_bfloat16"}), "disagree"),
    ],
)
def test_a_failed_call_says_what_and_leaves_the_model_as_it_was(
    arguments, message, make_transformer, tokens
):
    model = make_transformer()
    before = model(tokens)
    with pytest.raises(PolicyError, match=message):
        apply_policy(model, *arguments)
    assert type(model.head) is nn.Linear
    assert torch.equal(model(tokens), before)
    low = apply_policy(model, "mixed_bfloat16")(tokens)
    with pytest.raises(PolicyError, match=message):
        apply_policy(model, *arguments)
    assert policy_of(model.head) == Policy("mixed_bfloat16")
    assert torch.equal(model(tokens), low)


@pytest.mark.parametrize(
    "options", [{"output_dtype": "flaot32"}, {"output_dtype": "int8"}, {"functional": "amp"}]
)
def test_bad_options(options):
    with pytest.raises(PolicyError, match=r"allowed are"):
        apply_policy(nn.Linear(2, 2), "mixed_float16", **options)


def test_a_loss_computed_in_16_bits_inside_of_the_model_is_named():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, labels=None):
            logits = self.layer(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    batch = torch.ones(2, 4), torch.tensor([0, 2])
    model = apply_policy(WithLoss(), "mixed_bfloat16", functional="compute")
    with pytest.warns(PolicyWarning, match="WithLoss.*loss, computed in 16 bits.*autocast"):
        model(*batch)
    model(*batch)  # once is enough
    assert apply_policy(WithLoss(), "mixed_bfloat16")(*batch)["loss"].dtype is torch.float32


def test_what_is_no_module_is_refused():
    with pytest.raises(PolicyError, match="nn.Module"):
        apply_policy([nn.Linear(2, 2)], "mixed_float16")


def test_a_policy_that_changes_nothing_says_so():
    with pytest.warns(PolicyWarning, match="changes nothing.*computes in float32 already"):
        apply_policy(nn.Linear(2, 2), "float32")
    with pytest.warns(PolicyWarning, match="set_global_policy"):
        apply_policy(nn.Linear(2, 2))
    with pytest.raises(PolicyError, match="no layer of this Sequential can follow it"):
        apply_policy(nn.Sequential(nn.ReLU(), nn.Flatten()), "mixed_float16")
    with pytest.raises(PolicyError, match="no layer"):
        apply_policy(nn.Linear(2, 2).double(), "mixed_float16")


def test_float32_costs_nothing():
    model = nn.Linear(2, 2)
    with pytest.warns(PolicyWarning):
        apply_policy(model, "float32")
    assert type(model) is nn.Linear
    assert plan_of(model) is None


def test_applying_twice_replaces():
    model = apply_policy(nn.Sequential(nn.Linear(2, 2)), "mixed_bfloat16")
    apply_policy(model, "mixed_float16")
    assert policy_of(model[0]) == Policy("mixed_float16")
    assert type(model[0]).__mro__[1] is nn.Linear, "one subclass, not two on top of each other"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it did change something: it took the policy away
        apply_policy(model, "float32")
    assert type(model[0]) is nn.Linear


def test_remove_policy_gives_the_plain_model_back(make_transformer, tokens):
    model, plain = make_transformer(), make_transformer()
    keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    apply_policy(model, "mixed_float16", {"head": "float32"})
    assert remove_policy(model) is model
    for name, module in model.named_modules():
        assert type(module) is type(plain.get_submodule(name))
        assert set(module.__dict__) == keys[name]
        assert policy_of(module) is None
    assert torch.equal(model(tokens), plain(tokens))


def test_a_module_in_two_places_must_get_one_policy():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(2, 2)})
    with pytest.raises(PolicyError, match="same module.*two policies"):
        apply_policy(model, "mixed_float16", {"b": "float32"})
    apply_policy(model, "mixed_float16", {"a": "float32", "b": "float32"})
    assert policy_of(shared).name == "float32"


def test_a_forward_on_the_instance_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].forward = lambda x: x
    with pytest.raises(PolicyError, match="'0'.*forward of its own"):
        apply_policy(model, "mixed_float16")


def test_a_layer_that_writes_to_its_weight_in_forward_is_told():
    class MaxNorm(nn.Linear):
        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
            return super().forward(x)

    model = apply_policy(nn.Sequential(MaxNorm(4, 4), nn.Linear(4, 4)), "mixed_bfloat16")
    with pytest.raises(PolicyError, match=r"changes 0.weight.*'float32'"):
        model(torch.ones(1, 4))
    apply_policy(model, "mixed_bfloat16", {"0": "float32"})
    model(torch.ones(1, 4))
    assert model[0].weight.norm(dim=1).max() <= 0.1001


def test_complex_and_float64_are_left_alone_with_a_reason():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter = nn.Parameter(torch.ones(3, dtype=torch.cfloat))

        def forward(self, x):
            assert x.dtype is torch.float32, "no FFT takes 16 bits on every device"
            return torch.fft.irfft(torch.fft.rfft(x) * self.filter)

    model = nn.Sequential(nn.Linear(4, 4), Spectral(), nn.Linear(4, 4).double())
    apply_policy(model, "mixed_bfloat16")
    rows = {row.path: row for row in policy_summary(model)}
    assert "complex" in rows["1"].why
    assert rows["1"].compute_dtype == "as it is"
    assert "float64" in rows["2"].why
    model[:2](torch.ones(1, 4)).sum().backward()
    assert model[2].weight.dtype is torch.float64


def test_the_summary_says_which_and_why(make_transformer):
    model = apply_policy(make_transformer(), "mixed_float16", {"head": "float32"})
    summary = policy_summary(model)
    assert len(summary) == len(list(model.modules()))
    rows = {row.path: row for row in summary}
    assert rows["head"].compute_dtype == "float32"
    assert "override 'head'" in rows["head"].why
    assert "float32 statistics" in rows["blocks.0.norm"].why
    assert "gathers float32 rows" in rows["embed"].why
    text = str(summary)
    assert "blocks.0.qkv" in text
    assert "float16" in text.splitlines()[2]
    with pytest.raises(PolicyError, match="no policy"):
        policy_summary(nn.Linear(2, 2))


def test_the_signature_of_forward_stays():
    class Named(nn.Linear):
        def forward(self, x, scale: float = 2.0, *, shift=0):
            return super().forward(x) * scale + shift

    model = apply_policy(Named(2, 2), "mixed_float16")
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale", "shift"]
    assert type(model).__name__ == "Named"


def test_another_module_made_from_the_class_is_a_plain_one():
    model = apply_policy(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "mixed_float16")
    assert type(model[:1]) is nn.Sequential
    assert type(type(model[0])(2, 3)) is nn.Linear


def test_a_dropped_model_is_collected():
    model = apply_policy(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "mixed_bfloat16")
    model(torch.ones(1, 2))
    alive = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert alive() is None


def test_loss_scaling_follows_the_policy():
    for name, expected in (("mixed_float16", "dynamic"), ("mixed_bfloat16", "none")):
        model = apply_policy(nn.Linear(2, 2), name)
        optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        assert optimizer.loss_scale.kind == expected
    fixed = apply_policy(nn.Linear(2, 2), Policy("mixed_float16", loss_scale=1024))
    optimizer = LossScaleOptimizer(torch.optim.SGD(fixed.parameters(), lr=0.1))
    assert optimizer.current_scale == 1024


def test_a_copy_has_the_policy_too(make_transformer):
    model = copy.deepcopy(apply_policy(make_transformer(), "mixed_float16", {"head": "float32"}))
    assert policy_of(model.head) == Policy("float32")
    assert policy_of(model.embed) == Policy("mixed_float16")
