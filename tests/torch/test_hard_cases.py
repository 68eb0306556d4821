"""Code that exists in the wild and that a policy, applied carelessly, would break in silence."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from halfstep import Policy, PolicyError
from halfstep.torch import (
    LossScaleOptimizer,
    apply_policy,
    policy_of,
    policy_summary,
    remove_policy,
    weights_unchanged,
)

BOTH = pytest.mark.parametrize("functional", ["autocast", "compute"])


def two_layers():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def x(*shape):
    return torch.randn(*(shape or (3, 4)), generator=torch.Generator().manual_seed(0))


@BOTH
def test_two_16_bit_dtypes_in_one_model(functional):
    model = apply_policy(
        two_layers(),
        "mixed_bfloat16",
        {"1": "mixed_float16"},
        output_dtype=None,
        functional=functional,
    )
    assert model[0](x()).dtype is torch.bfloat16
    assert model(x()).dtype is torch.float16


@BOTH
def test_somebody_elses_autocast_of_another_dtype(functional):
    model = apply_policy(two_layers(), "mixed_bfloat16", output_dtype=None, functional=functional)
    with torch.autocast("cpu", torch.float16):
        assert model(x()).dtype is torch.bfloat16


@BOTH
def test_float32_for_a_part_of_a_model_that_has_a_policy(functional):
    model = apply_policy(two_layers(), "mixed_bfloat16", functional=functional)
    seen = []
    model[1].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    for _ in range(2):  # once more: it is a part of a model still
        apply_policy(model[1], "float32")
        model(x())
        assert policy_of(model[1]) == Policy("float32")
    assert seen == [torch.float32] * 2
    remove_policy(model)
    assert type(model[1]) is nn.Linear


def _through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _assigned(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def _replaced(model):
    for layer in model:
        layer.weight = nn.Parameter(torch.ones(4, 4))
        layer.bias = nn.Parameter(torch.ones(4))
    return model


def _converted(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


NEW_PARAMETERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _through_a_file,
    "assign": _assigned,
    "replace": _replaced,
    "convert": _converted,
}


@pytest.mark.parametrize("way", NEW_PARAMETERS)
@pytest.mark.parametrize(
    ("policy", "kind", "scale"),
    [(Policy("mixed_float16", loss_scale=1024), "fixed", 1024), ("mixed_bfloat16", "none", 1)],
)
def test_loss_scaling_knows_the_policy_of_new_parameters(way, policy, kind, scale):
    model = NEW_PARAMETERS[way](apply_policy(two_layers(), policy))
    optimizer = LossScaleOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert optimizer.loss_scale.kind == kind
    assert optimizer.current_scale == scale


def test_weights_unchanged_promises_nothing_about_other_models():
    teacher, student = (apply_policy(two_layers(), "mixed_bfloat16") for _ in range(2))
    with weights_unchanged(teacher):
        before = student(x())
        for parameter in student.parameters():
            parameter.data.zero_()
        assert before.abs().max() > 0
        assert student(x()).abs().max() == 0
        with weights_unchanged(student):
            assert student(x()).abs().max() == 0
        teacher(x())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_unchanged_does_not_keep_what_is_computed_anew():
    from halfstep.torch.copies import calls

    model = apply_policy(nn.utils.weight_norm(nn.Linear(4, 4)), "mixed_bfloat16")
    with weights_unchanged(model), torch.no_grad():
        for _ in range(20):
            model(x())
        ((_, copies),) = calls.kept
        assert len(copies._copies) == 1, "the bias"


@pytest.mark.parametrize("frozen", [True, False])
def test_a_momentum_encoder_updated_in_forward(frozen):
    """MoCo: the second encoder follows the first, in the forward, through ``.data``."""

    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = two_layers()
            self.key = copy.deepcopy(self.query).requires_grad_(not frozen)

        def forward(self, x):
            query = self.query(x)
            with torch.no_grad():
                for key, own in zip(self.key.parameters(), self.query.parameters(), strict=True):
                    if frozen:
                        key.data.mul_(0).add_(own.data)
                    else:
                        key.data = key.data * 0 + own.data
                return query, self.key(x)

    model = apply_policy(Momentum(), "mixed_bfloat16")
    for _ in range(2):
        for parameter in model.query.parameters():
            parameter.data.add_(1)
        query, key = model(x())
        assert torch.equal(query, key)


def test_every_write_to_a_copy_in_forward_is_noticed():
    class Clipped(nn.Linear):
        def forward(self, x):
            self.weight.data.clamp_(-0.1, 0.1)  # .data has a version of its own
            return super().forward(x)

    model = apply_policy(nn.Sequential(Clipped(4, 4)), "mixed_bfloat16")
    with pytest.raises(PolicyError, match=r"changes 0\.weight"):
        model(x())


def test_a_fresh_model_under_torch_func():
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        return apply_policy(net, "mixed_bfloat16")

    model, points = make(), x(3, 2)
    each = torch.func.vmap(torch.func.grad(lambda z: model(z).sum()))(points)
    assert each.shape == (3, 2)
    model = make()
    value, slope = torch.func.jvp(model, (points,), (torch.ones_like(points),))
    assert torch.allclose(value, model(points))
    assert torch.allclose(slope[:, 0], each.sum(1), atol=0.02)


class Scaled(nn.Module):
    """A block as in ConvNeXt or DiT, whose checkpointed body reads a parameter of its own."""

    def __init__(self, kind):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(4), nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.rand(4))
        self.weight = nn.Parameter(torch.rand(4, 4))
        self.kind = kind

    def body(self, x):
        return F.linear(x + self.gamma * self.layer(self.norm(x)), self.weight)

    def forward(self, x):
        if self.kind is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.kind == "reentrant")


@BOTH
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_a_checkpointed_body_reads_what_it_read_before(kind, functional):
    results = []
    for each in (None, kind):
        torch.manual_seed(0)
        model = nn.Sequential(Scaled(each), Scaled(each))
        apply_policy(model, "mixed_bfloat16", functional=functional)
        model(x().requires_grad_()).sum().backward()
        results.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@BOTH
def test_compile_with_checkpointing(functional):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(Scaled("non-reentrant"), Scaled("non-reentrant"))
    apply_policy(model, "mixed_bfloat16", functional=functional)
    model(x()).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x()).sum().backward()
    for found, p in zip(expected, model.parameters(), strict=True):
        assert torch.allclose(found, p.grad, atol=1e-2 * float(found.abs().max()))


def test_selective_checkpointing():
    def context():
        saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        return create_selective_checkpoint_contexts(saved)

    class Selective(nn.Module):
        def __init__(self, selective):
            super().__init__()
            self.blocks = nn.ModuleList(Scaled(None) for _ in range(3))
            self.selective = selective

        def forward(self, x):
            for block in self.blocks:
                x = (
                    checkpoint(block, x, use_reentrant=False, context_fn=context)
                    if self.selective
                    else block(x)
                )
            return x

    results = []
    for selective in (False, True):
        torch.manual_seed(0)
        model = apply_policy(Selective(selective), "mixed_bfloat16")
        model(x()).sum().backward()
        results.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_sparse_adjacency_matrix():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 4))

        def forward(self, x, adjacency):
            return torch.sparse.mm(adjacency.float(), (x @ self.weight).float())

    with torch.no_grad():  # torch.autocast itself has no backward for it
        apply_policy(Graph(), "mixed_bfloat16")(x(3, 4), torch.eye(3).to_sparse())
    model = apply_policy(Graph(), "mixed_bfloat16", functional="compute")
    model(x(3, 4), torch.eye(3).to_sparse()).sum().backward()
    assert model.weight.grad.dtype is torch.float32


def test_autocast_switched_off_inside_of_a_forward():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 4))

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                full = F.linear(x.float(), self.weight)
            assert full.dtype is torch.float32
            return F.linear(x, self.weight)

    model = apply_policy(Router(), "mixed_bfloat16", output_dtype=None)
    assert model(x()).dtype is torch.bfloat16


def test_a_class_that_refuses_subclasses_leaves_the_model_as_it_was():
    class Registered(nn.Linear):
        def __init_subclass__(cls, *, name, **kwargs):
            super().__init_subclass__(**kwargs)

    model = nn.Sequential(nn.Linear(4, 4), Registered(4, 4))
    with pytest.raises(TypeError, match="name"):
        apply_policy(model, "mixed_bfloat16")
    assert type(model[0]) is nn.Linear
    assert policy_of(model) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_tracing():
    model = apply_policy(two_layers(), "mixed_bfloat16")
    traced = torch.jit.trace(model, x())
    assert torch.equal(traced(x()), model(x()))
    torch.jit.save(traced, io.BytesIO())


def test_what_an_attention_reads_by_itself_cannot_have_another_policy():
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    with pytest.raises(PolicyError, match=r"'0.out_proj'.*MultiheadAttention.*Name '0'"):
        apply_policy(model, "mixed_bfloat16", {"0.out_proj": "float32"})
    apply_policy(model, "mixed_bfloat16", {"0": "float32"})


def test_a_class_that_copies_itself_in_its_own_way():
    class Own(nn.Module):
        def __init__(self, width=4):
            super().__init__()
            self.layer = nn.Linear(width, width)

        def __reduce__(self):
            return type(self).__mro__[1], (4,)

        def forward(self, x):
            return self.layer(x)

    assert copy.deepcopy(apply_policy(Own(), "mixed_bfloat16"))(x()).dtype is torch.float32


def test_the_summary_of_a_model_with_a_policy_in_a_part_of_it():
    model = two_layers()
    apply_policy(model[0], "mixed_bfloat16")
    assert str(policy_summary(model)).endswith("2 without a policy, 1 in bfloat16")


def test_classes_of_dropped_models_are_forgotten():
    import gc

    from halfstep.torch.layer import _classes

    gc.collect()
    before = len(_classes)
    for _ in range(5):
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        apply_policy(nn.Sequential(layer), "mixed_bfloat16")(x())
    del layer
    gc.collect()
    assert len(_classes) <= before + 1
