"""Whether the model itself casts its floating arguments: ``apply_policy(cast_forward_inputs=)``."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from halfstep import PolicyError, PolicyMap
from halfstep.torch import apply_policy, audit, policy_summary, remove_policy, tune
from halfstep.torch.blaming import trials

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BOTH = pytest.mark.parametrize("functional", ["autocast", "compute"])


class Spy(nn.Module):
    """Code without weights around one layer; keeps what its forward was given."""

    def __init__(self, layer=None):
        super().__init__()
        self.layer = nn.Linear(4, 4) if layer is None else layer

    def forward(self, x, **others):
        self.given = (x, others)
        return x + self.layer(x)


class Owner(Spy):
    """Code with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return super().forward(x) + self.shift


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.layer(self.norm(x))


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(3)))


def given(model, x=None, **others):
    model(torch.ones(2, 4) if x is None else x, **others)
    return model.given[0].dtype


@pytest.mark.parametrize(
    ("make", "functional", "option", "expected"),
    [
        (Spy, "autocast", None, F32),
        (Spy, "autocast", True, BF16),
        (Spy, "autocast", False, F32),
        (Spy, "compute", None, BF16),
        (Spy, "compute", True, BF16),
        (Spy, "compute", False, F32),
        (Owner, "autocast", None, BF16),
        (Owner, "autocast", True, BF16),
        (Owner, "autocast", False, F32),
        (Owner, "compute", None, BF16),
        (Owner, "compute", False, F32),
    ],
)
def test_the_model_casts_its_arguments_or_leaves_them(make, functional, option, expected):
    model = apply_policy(
        make(), "mixed_bfloat16", functional=functional, cast_forward_inputs=option
    )
    assert given(model) is expected
    assert model.layer(torch.ones(1, 4)).dtype is BF16, "a layer computes as before"


@BOTH
def test_only_the_model_itself_and_not_the_modules_in_it(functional):
    for option in (True, False):
        model = apply_policy(
            Spy(Spy()), "mixed_bfloat16", functional=functional, cast_forward_inputs=option
        )
        assert given(model) is (BF16 if option else F32)
        low_below = option or functional == "compute"
        assert model.layer.given[0].dtype is (BF16 if low_below else F32)


def test_nested_arguments_and_masks():
    lowest = torch.finfo(F32).min
    model = apply_policy(Spy(), "mixed_float16", cast_forward_inputs=True)
    given(
        model,
        mask=torch.tensor([0.0, lowest, -torch.inf]),
        pair=[torch.ones(1, dtype=torch.float64), {"deep": torch.ones(1)}],
        ids=torch.tensor([2**20]),
        kept=torch.tensor([True]),
        phase=torch.ones(1, dtype=torch.complex64),
        word="x",
    )
    _, others = model.given
    assert others["mask"].tolist() == [0, torch.finfo(F16).min, -torch.inf]
    assert (others["pair"][0].dtype, others["pair"][1]["deep"].dtype) == (F16, F16)
    assert others["ids"].tolist() == [2**20]
    assert (others["kept"].dtype, others["phase"].dtype) == (torch.bool, torch.complex64)
    assert others["word"] == "x"


def test_gradients_of_the_arguments_have_their_dtype():
    x = torch.ones(2, 4, requires_grad=True)
    model = apply_policy(Spy(), "mixed_bfloat16", cast_forward_inputs=True)
    model(x).sum().backward()
    assert x.grad.dtype is F32
    assert torch.allclose(x.grad, 1 + model.layer.weight.sum(0).detach(), atol=2e-2)


def test_a_residual_stream_has_16_bits_and_each_norm_one_cast_less(counts):
    casts = {}
    for option in (None, True):
        model = apply_policy(blocks(), "mixed_bfloat16", cast_forward_inputs=option)
        with counts() as counted:
            output = model(torch.randn(2, 8))
        casts[option] = len(counted.casts)
        assert output.dtype is F32
    assert casts == {None: 3, True: 2}, "one a norm; or one in and one out"


def test_what_the_model_returns_is_not_its_matter():
    for output_dtype, expected in ((None, BF16), ("float32", F32), ("float16", F16)):
        model = apply_policy(
            blocks(), "mixed_bfloat16", output_dtype=output_dtype, cast_forward_inputs=True
        )
        assert model(torch.randn(2, 8)).dtype is expected


def test_it_trains_like_float32(relative_error):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    exact, model = blocks(), blocks()
    apply_policy(model, "mixed_bfloat16", cast_forward_inputs=True)
    for each in (exact, model):
        each(x).square().mean().backward()
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert one.grad.dtype is F32
        assert relative_error(one.grad, other.grad) < 3e-2


@pytest.mark.parametrize(("functional", "option"), [("autocast", True), ("compute", False)])
def test_compiled_whole(functional, option):
    model = blocks()
    apply_policy(model, "mixed_bfloat16", functional=functional, cast_forward_inputs=option)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8)
    assert torch.equal(compiled(x), model(x))
    assert compiled(x).dtype is F32


# ------------------------------------------------------------------ policies in parts


def test_a_part_to_which_a_policy_is_applied_by_itself():
    model = apply_policy(nn.Sequential(Spy(), Spy()), "mixed_bfloat16")
    apply_policy(model[1], "mixed_float16", output_dtype=None, cast_forward_inputs=True)
    model(torch.ones(2, 4))
    assert (model[0].given[0].dtype, model[1].given[0].dtype) == (F32, F16)


def test_a_part_with_an_override():
    model = nn.Sequential(Spy(), Spy())
    apply_policy(model, "mixed_bfloat16", {"1": "float32"}, cast_forward_inputs=True)
    assert model(torch.ones(2, 4)).dtype is F32
    assert (model[0].given[0].dtype, model[1].given[0].dtype) == (BF16, F32)


@pytest.mark.parametrize(("option", "expected"), [(None, F32), (True, F32), (False, BF16)])
def test_a_model_in_float32_with_a_part_in_16_bits(option, expected):
    model = Spy(nn.Sequential(nn.Linear(4, 4)))
    apply_policy(model, "float32", {"layer": "mixed_bfloat16"}, cast_forward_inputs=option)
    assert given(model, torch.ones(2, 4, dtype=BF16)) is expected


@pytest.mark.parametrize("option", [True, False])
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(4, 4), torch.ones(1, 4)),
        (lambda: nn.LayerNorm(4), torch.ones(1, 4)),
        (lambda: nn.GroupNorm(2, 4), torch.ones(1, 4)),
        (lambda: nn.MultiheadAttention(4, 2), torch.ones(1, 1, 4)),
        (lambda: nn.Embedding(4, 4), torch.ones(1, dtype=torch.long)),
        (lambda: nn.LSTM(4, 4), torch.ones(1, 1, 4)),
    ],
    ids=["linear", "layer norm", "group norm", "attention", "embedding", "lstm"],
)
def test_what_one_kernel_computes_takes_what_the_kernel_wants(make, x, option):
    results = []
    for chosen in (None, option):
        torch.manual_seed(0)
        model = apply_policy(make(), "mixed_bfloat16", cast_forward_inputs=chosen)
        result = model(x, x, x) if isinstance(model, nn.MultiheadAttention) else model(x)
        results.append(result[0] if isinstance(result, tuple) else result)
    assert torch.equal(*results)


# ------------------------------------------------------------------ asked for, shown, kept


@pytest.mark.parametrize("wrong", ["True", 1, 0, F16])
def test_a_wrong_value_is_told(wrong):
    model = Spy()
    with pytest.raises(PolicyError, match="cast_forward_inputs=.*allowed are True, False and None"):
        apply_policy(model, "mixed_bfloat16", cast_forward_inputs=wrong)
    assert type(model) is Spy


def test_what_is_never_called_casts_nothing():
    layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(
        PolicyError, match=r"this ModuleList cannot .* \(holds modules and is never"
    ):
        apply_policy(layers, "mixed_bfloat16", cast_forward_inputs=True)
    assert type(layers) is nn.ModuleList
    apply_policy(layers, "mixed_bfloat16", cast_forward_inputs=False)
    assert layers[0](torch.ones(1, 2)).dtype is BF16


def test_the_summary_shows_it_where_it_was_asked():
    for option, words in ((None, ""), (True, ", cast_forward_inputs=True")):
        model = apply_policy(Spy(Spy()), "mixed_bfloat16", cast_forward_inputs=option)
        root, below, _ = policy_summary(model)
        plain = "default; no weights: functional='autocast'"
        assert (root.why, below.why) == (plain + words, plain)


def test_copies_pickles_and_a_policy_applied_again():
    model = apply_policy(Spy(), "mixed_bfloat16", cast_forward_inputs=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert given(twin) is BF16
    assert given(apply_policy(model, "mixed_bfloat16")) is F32
    assert given(remove_policy(model)) is F32


def test_an_audit_looks_at_the_model_as_it_will_run():
    class Large(Spy):
        def forward(self, x):
            return super().forward(x * 300.0 / 300.0)

    batch = (torch.full((2, 4), 300.0),)
    for option, rules in ((None, []), (True, ["overflow"])):
        report = audit(
            Large(), "mixed_float16", batch, silence=["hardware"], cast_forward_inputs=option
        )
        assert [found.rule for found in report if found.rule == "overflow"] == rules


def test_blame_runs_a_model_again_with_its_own():
    model = apply_policy(Spy(), "mixed_bfloat16", cast_forward_inputs=True)
    assert given(trials._applied(copy.deepcopy(model), PolicyMap("mixed_bfloat16"))) is BF16


@pytest.mark.parametrize(("option", "kept"), [(None, []), (True, [""])])
def test_tune_searches_with_it(option, kept):
    class Squares(Spy):
        def forward(self, x):
            return self.layer((x * 300) ** 2 / 9e4)  # 9e4 is beyond float16

    class Fit:
        make_model = staticmethod(Squares)

        @staticmethod
        def make_optimizer(model):
            return torch.optim.SGD(model.parameters(), 1e-2)

        @staticmethod
        def batches(epoch, seed):
            return torch.randn(8, 16, 4, generator=torch.Generator().manual_seed(seed))

        @staticmethod
        def loss(model, x):
            return (model(x) - x.sum(1, True)).square().mean()

    found = tune(Fit, steps=6, cast_forward_inputs=option)
    assert [layer.path for layer in found.layers] == kept


# ------------------------------------------------------------------ FSDP2 has the same words


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("theirs", [True, False])
@pytest.mark.parametrize("ours", [True, False])
def test_next_to_fsdps_own(one_process, ours, theirs):
    x = torch.randn(2, 8)
    expected = apply_policy(blocks(), "mixed_bfloat16", cast_forward_inputs=ours or theirs)(x)
    mp = MixedPrecisionPolicy(BF16, F32, cast_forward_inputs=theirs)
    model = fully_shard(blocks(), mp_policy=mp)
    apply_policy(model, "mixed_bfloat16", cast_forward_inputs=ours)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {F32}
