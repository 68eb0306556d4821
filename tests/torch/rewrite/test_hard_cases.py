"""What a rewrite must get right in code that was not written for it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from halfstep import PolicyError, PolicyMap
from halfstep.torch import (
    LossScaleOptimizer,
    autocast,
    enable_mixed_precision_graph_rewrite,
    explain,
)

# Dynamo looks at users' objects, and what they say when looked at is not the model's business
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def eager(model, policy="mixed_bfloat16", **keywords):
    return autocast(model, policy, backend="aot_eager", **keywords)


def rows_of(explanation, operation):
    return [row for row in explanation.rows if row.operation == operation]


class Cube(torch.autograd.Function):
    """Written without custom_fwd: torch.autocast's backward meets two dtypes in it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.T @ grad


class WithFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        return Cube.apply(self.before(x), self.weight)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.up(x)
        left = y[:, :8]
        left.mul_(2).add_(1)  # a view of what is written to
        y[:, 8:].relu_()
        return self.down(y) + left


class Overwritten(nn.Module):
    """A number written into a part of a tensor is a tensor that the graph holds in itself."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = torch.tanh(self.up(x)) + 0
        y[:, 0] = 1.0
        return self.down(y)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 8))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.inner = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.tokens(x))))


CASES = {
    "autograd.Function": (WithFunction, lambda: torch.randn(4, 8)),
    "in place": (InPlace, lambda: torch.randn(4, 8)),
    "number written in": (Overwritten, lambda: torch.randn(4, 8)),
    "checkpoint": (Checkpointed, lambda: torch.randn(4, 8)),
    "multi-head attention": (SelfAttention, lambda: torch.randn(2, 4, 8)),
    "tied weights": (Tied, lambda: torch.randint(0, 50, (2, 4))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_right_and_low(name, policy, gradients_of, far):
    build, batch = CASES[name]
    model, x = build(), batch()

    def run(wrap):
        return lambda mine: wrap(mine)(x).square().mean().backward()

    exact = gradients_of(model, run(lambda mine: mine))
    ours = gradients_of(model, run(lambda mine: eager(mine, policy)))
    assert ours.dtype == torch.float32
    assert 0 < far(ours, exact) < (0.03 if policy == "mixed_bfloat16" else 0.004)
    low, products = explain(model, policy, backend="aot_eager")(x).low_products
    assert low == products > 0


def test_inputs_written_to_and_outputs_that_are_views(far):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x, *, kept):
            x.add_(1)
            y = self.inner(x.clone())
            kept["last"].copy_(y.detach())
            return {"all": y, "row": y[0], "same": x, "more": [x.t(), None, 3]}

    model, start = Writes(), torch.randn(4, 8)
    x, last = start.clone(), torch.zeros(4, 8)
    out = eager(model)(x, kept={"last": last})
    torch.testing.assert_close(x, start + 1, rtol=0, atol=0)
    assert out["all"].dtype == last.dtype == torch.float32
    torch.testing.assert_close(last, out["all"].detach(), rtol=0, atol=0)
    assert out["same"] is x
    assert out["more"][0].data_ptr() == x.data_ptr()
    assert out["row"].data_ptr() == out["all"].data_ptr()
    assert out["more"][1:] == [None, 3]
    assert 0 < far(out["all"].detach(), model.inner(start + 1).detach()) < 0.02


def test_batch_norm_keeps_its_statistics_in_float32(far):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    exact, x = copy.deepcopy(model), torch.randn(4, 3, 8, 8) + 1
    compiled = eager(model)
    compiled(x).sum().backward()
    exact(x).sum().backward()
    mean, var = model[1].running_mean, model[1].running_var
    assert mean.dtype == var.dtype == torch.float32
    # what is averaged is 16-bit, the average is not rounded to it
    assert not torch.equal(mean, mean.bfloat16().float())
    assert far(mean, exact[1].running_mean) < 0.01
    assert far(var, exact[1].running_var) < 0.01
    assert int(model[1].num_batches_tracked) == 1
    (row,) = rows_of(explain(model, backend="aot_eager")(x), "_native_batch_norm_legit_functional")
    assert row.dtype == "bfloat16"


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_row_masked_with_the_lowest_float32_is_no_nan(policy):
    masked = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x):
            scores = self.q(x) @ x.T
            return scores.masked_fill(masked, torch.finfo(scores.dtype).min).softmax(-1) @ x

    model, x = Masked(), torch.randn(3, 8)
    out = eager(model, policy)(x)
    assert out.isfinite().all()
    torch.testing.assert_close(out, model(x), rtol=0.05, atol=0.05)
    row = rows_of(explain(model, policy, backend="aot_eager")(x), "masked_fill")[0]
    assert "a constant does not fit" in row.why


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_float32_mask_of_fused_attention_stays_finite(policy):
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), torch.finfo().min)
    mask[0] = torch.finfo().min  # a row with nothing to look at
    mask[1, 3] = float("-inf")

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x, mask):
            return F.scaled_dot_product_attention(self.q(x), x, x, attn_mask=mask)

    model, x = Fused(), torch.randn(1, 1, 4, 8)
    out = eager(model, policy)(x, mask)
    assert out.isfinite().all()
    # the row that sees nothing may look anywhere
    torch.testing.assert_close(out[..., 1:, :], model(x, mask)[..., 1:, :], rtol=0.05, atol=0.05)


def test_an_epsilon_that_is_no_float16_stays():
    model = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(model.weight)

    def normalised(x):
        y = model(x)
        return model(y / (y.abs() + 1e-8))

    assert eager(normalised, "mixed_float16")(torch.zeros(2, 4)).isfinite().all()


def test_large_integers_do_not_overflow():
    model = nn.Linear(4, 4)

    def counted(x, counts):
        return model(model(x) * counts * 1e-5)

    x, counts = torch.randn(2, 4), torch.full((2, 4), 100_000)
    out = eager(counted, "mixed_float16")(x, counts)
    torch.testing.assert_close(out, counted(x, counts), rtol=0.02, atol=2e-3)


def test_dropout_draws_and_scales():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64))
    model[0].weight.data.zero_(), model[0].bias.data.fill_(1.0)
    model[2].weight.data.copy_(torch.eye(64)), model[2].bias.data.zero_()
    out = eager(model)(torch.zeros(64, 64))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (out == 0).float().mean() < 0.6


def test_evaluation_and_no_grad_are_painted_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    compiled, x = eager(model.eval()), torch.randn(2, 8)
    with torch.no_grad():
        out = compiled(x)
    assert out.dtype == torch.float32
    assert 0 < float((out - model(x)).detach().abs().max()) < 0.05


def test_sizes_may_change():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    compiled = eager(model, dynamic=True)
    compiled(torch.randn(2, 8)).sum().backward()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (3, 5, 9):
        compiled(torch.randn(length, 8)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


class Leaf(nn.Module):
    def __init__(self, broken=True):
        super().__init__()
        self.kept, self.low, self.broken = nn.Linear(8, 8), nn.Linear(8, 8), broken

    def forward(self, x):
        x = self.kept(x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.low(x)


class Broken(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.first, self.second = Leaf(inside), Leaf(inside)
        self.inside = inside

    def forward(self, x):
        x = self.first(x)
        if not self.inside:
            torch._dynamo.graph_break()
        return self.second(x)


def test_policies_hold_across_graph_breaks():
    model, x = Broken(inside=False), torch.randn(4, 8)
    policies = PolicyMap("mixed_bfloat16", {"first.kept": "float32", "second.low": "float32"})
    explanation = explain(model, policies, backend="aot_eager")(x)
    assert explanation.graphs > 1
    assert explanation.breaks
    assert "graph break" in str(explanation)
    dtypes = {(row.path, row.dtype) for row in explanation.rows if row.flops}
    assert dtypes == {
        ("first.kept", "float32"), ("first.low", "bfloat16"),
        ("second.kept", "bfloat16"), ("second.low", "float32"),
    }  # fmt: skip


def test_what_a_policy_map_keeps_is_exact():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    kept = eager(model, PolicyMap("mixed_bfloat16", {"0": "float32", "1": "float32"}))
    with pytest.raises(PolicyError, match="nothing runs in bfloat16"):
        kept(x)
    one = eager(model, PolicyMap("mixed_bfloat16", {"0": "float32"}))
    out = one(x)
    low = F.linear(model[0](x).bfloat16(), model[1].weight.bfloat16(), model[1].bias.bfloat16())
    torch.testing.assert_close(out, low.float(), rtol=0, atol=0)


def test_operations_can_be_allowed_and_denied():
    model = nn.Linear(8, 8)

    def powers(x):
        return model(model(x) ** 2)

    x = torch.randn(2, 8)
    row = rows_of(explain(powers, backend="aot_eager", allow=["pow"])(x), "pow")[0]
    assert row.dtype == "bfloat16"
    row = rows_of(explain(powers, backend="aot_eager")(x), "pow")[0]
    assert row.dtype == "float32"
    denied = explain(powers, backend="aot_eager", deny=["addmm", "mm"], allow=["pow"])(x)
    assert denied.low_products[0] == 0
    bare = explain(powers, backend="aot_eager", level="matrix_products")(x)
    assert {row.operation for row in bare.rows if row.dtype == "bfloat16"} <= {"addmm", "mm"}


def test_explaining_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    explain(eager(model))(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_one_liner_trains_and_skips():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    x, y = torch.randn(64, 8), torch.randn(64, 1) / 4
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    compiled, optimizer = enable_mixed_precision_graph_rewrite(
        model, optimizer, loss_scale=2.0**23, backend="aot_eager"
    )
    assert isinstance(optimizer, LossScaleOptimizer)
    before = copy.deepcopy(model.state_dict())
    optimizer.backward(F.mse_loss(compiled(x), y))
    optimizer.step()
    assert optimizer.last_step_skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    compiled, optimizer = enable_mixed_precision_graph_rewrite(
        model, optimizer.inner_optimizer, backend="aot_eager"
    )
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(compiled(x), y)
        optimizer.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_models_own_state_is_untouched():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    keys = list(model.state_dict())
    compiled = eager(model)
    compiled(torch.randn(2, 4))
    assert list(model.state_dict()) == keys
    assert {id(p) for p in compiled.parameters()} == {id(p) for p in model.parameters()}
    assert all(type(module) is nn.Linear for module in model)


def test_it_stands_inside_of_ddp(tmp_path):
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model, x = Leaf(broken=False), torch.randn(4, 8)
        alone = copy.deepcopy(model)
        eager(alone)(x).sum().backward()
        inside = eager(nn.parallel.DistributedDataParallel(model))
        inside(x).sum().backward()
        for one, other in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=0.02, atol=0.02)
    finally:
        dist.destroy_process_group()
