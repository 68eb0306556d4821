"""The whole step in one graph: forward, backward, clipping, the optimizer, the next scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from halfstep import DynamicLossScale
from halfstep.torch import GradScaler, LossScaleOptimizer, apply_policy
from halfstep.torch.loss_scaling import traced
from halfstep.torch.loss_scaling.history import GraphLog
from halfstep.torch.masters import kept_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

STEPS, OVERFLOW = 5, 2


@pytest.fixture(autouse=True)
def backward_in_the_graph():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch._dynamo.reset()


def make(policy, inner, functional="autocast", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    apply_policy(model, policy, functional=functional)
    scaled = policy in ("mixed_float16", "master_float16")
    rule = DynamicLossScale(initial_scale=64, growth_interval=2) if scaled else None
    return model, LossScaleOptimizer(inner(model.parameters()), rule, **options)


def loss_of(model, inputs, size):
    return model(inputs).square().sum() * size


def micro_batches(count):
    def whole(model, optimizer, inputs, size):
        optimizer.zero_grad()
        losses = [loss_of(model, part, size) / count for part in inputs.chunk(count)]
        for loss in losses:
            optimizer.backward(loss)
        optimizer.step()
        return sum(loss.detach() for loss in losses)

    return whole


def scaled_by_hand(model, optimizer, inputs, size):
    optimizer.scale(loss_of(model, inputs, size)).backward()
    optimizer.unscale_()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


def functionally(model, optimizer, inputs, size):
    weights = dict(model.named_parameters())
    loss = torch.func.functional_call(model, weights, (inputs,)).square().sum() * size
    scaled = torch.autograd.grad(optimizer.get_scaled_loss(loss), list(weights.values()))
    gradients = optimizer.get_unscaled_gradients(scaled)
    optimizer.apply_gradients(zip(gradients, weights.values(), strict=True))


def train(whole, model, optimizer, backend=None, steps=range(STEPS)):
    """Return what each step did, and how many graphs there were after it."""
    counter = CompileCounterWithBackend(backend or "eager")
    run = torch.compile(whole, fullgraph=True, backend=counter) if backend else whole
    seen = []
    for step in steps:
        inputs = torch.linspace(-1, 1 + step, 16).reshape(4, 4)
        run(model, optimizer, inputs, torch.tensor(torch.inf if step == OVERFLOW else 1.0))
        seen.append((optimizer.last_step_skipped, optimizer.current_scale))
    return seen, counter.frame_count


def assert_alike(ours, theirs, tolerance=1e-5):
    """The same weights, state of the optimizer, loss scale, counts and history."""
    (model, optimizer), (other, reference) = ours, theirs
    close = {"rtol": tolerance, "atol": tolerance}
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, **close)
        assert (one.grad is None) == (two.grad is None)
    saved, expected = optimizer.state_dict(), reference.state_dict()
    torch.testing.assert_close(saved["state"], expected["state"], **close)
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["loss_scale"] == expected["loss_scale"]
    assert optimizer.scale_history == reference.scale_history


ADAMW = lambda params: torch.optim.AdamW(params, lr=0.05)  # noqa: E731
MOMENTUM = lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)  # noqa: E731
ADAGRAD = lambda params: torch.optim.Adagrad(params, lr=0.05, foreach=True)  # noqa: E731
RMSPROP = lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5)  # noqa: E731


@pytest.mark.parametrize(
    ("policy", "inner", "whole", "backend", "options"),
    [
        ("mixed_float16", MOMENTUM, micro_batches(1), "inductor", {"max_norm": 1.0}),
        ("mixed_float16", ADAMW, micro_batches(2), "aot_eager", {"functional": "compute"}),
        ("mixed_float16", RMSPROP, scaled_by_hand, "eager", {}),
        ("mixed_float16", MOMENTUM, functionally, "eager", {"max_norm": 0.5}),
        ("mixed_bfloat16", ADAGRAD, micro_batches(1), "eager", {"max_norm": 0.5}),
        ("master_float16", MOMENTUM, micro_batches(1), "eager", {"max_norm": 0.5}),
        ("master_bfloat16", MOMENTUM, micro_batches(1), "eager", {}),
        ("kahan_bfloat16", ADAMW, micro_batches(1), "eager", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_whole_step_is_one_graph_from_the_first(policy, inner, whole, backend, options):
    ours, theirs = (make(policy, inner, **options) for _ in range(2))
    if ours[1].loss_scale.skips:
        seen, graphs = train(whole, *ours, backend)
        expected, _ = train(whole, *theirs)
        assert [skipped for skipped, _ in seen] == [step == OVERFLOW for step in range(STEPS)]
    else:  # nothing is skipped: an overflow would be the end
        steps = [step for step in range(STEPS) if step != OVERFLOW]
        seen, graphs = train(whole, *ours, backend, steps)
        expected, _ = train(whole, *theirs, steps=steps)
    assert seen == expected
    assert graphs == 2, "the first finds no state, no step after the second is compiled"
    # a rounding to 16 bits may fall to the other side of a difference of 1e-6, or be fused away
    rounds = policy == "master_float16" or backend == "inductor"
    assert_alike(ours, theirs, 2e-3 if rounds else 2e-5)
    if options.get("max_norm"):
        norms = ours[1].last_grad_norm, theirs[1].last_grad_norm
        torch.testing.assert_close(*norms, rtol=1e-3, atol=0)


def test_compiled_and_eager_steps_take_turns(monkeypatch):
    whole = micro_batches(1)
    ours, theirs = (make("mixed_float16", MOMENTUM) for _ in range(2))
    train(whole, *theirs, steps=range(7))
    train(whole, *ours, steps=range(1))
    train(whole, *ours, "eager", steps=range(1, 4))  # the overflow is in a graph
    taken = []
    take = GraphLog.take
    monkeypatch.setattr(GraphLog, "take", lambda log: taken.append(1) or take(log))
    train(whole, *ours, steps=range(4, 7))
    assert len(taken) == 1, "what the graphs counted is read once"
    assert_alike(ours, theirs)
    assert [event.step for event in ours[1].scale_history] == [2, 3, 5, 7]


def test_a_graph_reads_no_value_on_the_host(monkeypatch):
    model, optimizer = make("mixed_float16", MOMENTUM, max_norm=1.0)
    whole = torch.compile(micro_batches(1), fullgraph=True, backend="eager")
    arguments = model, optimizer, torch.ones(4, 4), torch.tensor(1.0)
    for _ in range(2):
        whole(*arguments)

    def read(*_):
        raise AssertionError("a value was read on the host")

    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
            patched.setattr(torch.Tensor, name, read)
        whole(*arguments)
        with pytest.raises(AssertionError, match="read on the host"):
            optimizer.scale_tensor.item()
    assert optimizer.state_dict()["loss_scale"]["steps"] == 3


def test_what_a_cuda_graph_would_capture_reads_nothing_and_is_remembered(kit, monkeypatch):
    """The eager path of a capture, on CPU: its log stands in for the host's."""
    whole = micro_batches(1)
    ours, theirs = (make("mixed_float16", ADAMW, max_norm=1.0) for _ in range(2))
    train(whole, *theirs)
    inputs = [torch.linspace(-1, 1 + step, 16).reshape(4, 4) for step in range(STEPS)]
    sizes = [torch.tensor(torch.inf if step == OVERFLOW else 1.0) for step in range(STEPS)]
    with monkeypatch.context() as patched, kit.reads() as counter:
        patched.setattr("halfstep.torch.loss_scaling.host.CPU_IS_FREE", False)
        patched.setattr(traced, "in_graph", lambda found: True)
        for batch, size in zip(inputs, sizes, strict=True):
            whole(*ours, batch, size)
    assert counter.reads == 0
    assert_alike(ours, theirs)


def test_a_scheduler_reaches_into_the_graph():
    model, optimizer = make("mixed_float16", MOMENTUM)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.05)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    counter = CompileCounterWithBackend("eager")
    whole = torch.compile(micro_batches(1), fullgraph=True, backend=counter)
    before = []
    for _ in range(4):
        before.append(model[0].weight.detach().clone())
        whole(model, optimizer, torch.ones(4, 4), torch.tensor(1.0))
        scheduler.step()
    assert counter.frame_count == 2
    assert scheduler.get_last_lr()[0].item() == pytest.approx(0.05 * 0.5**4)
    assert not any(map(torch.equal, before[1:], before)), "each step was taken"
    for group in optimizer.param_groups:
        group["lr"].fill_(0.0)
    last = model[0].weight.detach().clone()
    whole(model, optimizer, torch.ones(4, 4), torch.tensor(1.0))
    assert torch.equal(last, model[0].weight), "and with the rate of now"
    assert counter.frame_count == 2


def test_graphs_of_a_grad_scaler():
    def run(compiled):
        torch.manual_seed(0)
        model = apply_policy(nn.Sequential(nn.Linear(4, 2)), "mixed_float16")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = GradScaler("cpu", init_scale=64.0)

        def whole(size):
            scaler.scale(model(torch.ones(1, 4)).sum() * size).backward()
            scaler.step(optimizer)
            scaler.update()
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

        step = torch.compile(whole, fullgraph=True, backend="eager") if compiled else whole
        for size in (1.0, torch.inf, 1.0):
            step(torch.tensor(size))
        return model[0].weight, scaler.get_scale(), scaler.skipped_steps

    ours, theirs = run(True), run(False)
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1:] == theirs[1:] == (32.0, 1)


@pytest.mark.parametrize("policy", ["master_bfloat16", "kahan_bfloat16"])
def test_weights_written_between_compiled_steps_are_what_counts(policy):
    """No version is looked at in a graph; digits of the old weights must not come back."""
    model, optimizer = make(policy, lambda params: torch.optim.SGD(params, lr=2.0**-12))
    compiled = torch.compile(micro_batches(1), fullgraph=True, backend="eager")
    arguments = torch.ones(4, 4), torch.tensor(1.0)
    for _ in range(2):
        compiled(model, optimizer, *arguments)
    kept = kept_of(model[2].weight).rest.clone()
    with torch.no_grad():
        model[2].weight.copy_(torch.full_like(model[2].weight, 2.0**-6))
    compiled(model, optimizer, *arguments)
    expected = 2.0**-6 - 2.0**-12 * model[2].weight.grad.float()
    rest = kept_of(model[2].weight).rest.float()
    found = rest if policy == "master_bfloat16" else model[2].weight.float() + rest
    assert not torch.equal(kept.float(), rest)
    # a digit below half of the last place may be one of the old weight: nobody can tell
    torch.testing.assert_close(found, expected, rtol=0, atol=2.0**-14)


def read_groups(model, optimizer, inputs, size):
    rate = optimizer.param_groups[0]["lr"]
    optimizer.backward(loss_of(model, inputs, size) * rate)
    optimizer.step()


def scaled_twice(model, optimizer, inputs, size):
    optimizer.backward(loss_of(model, inputs, size))
    optimizer.unscale_()
    optimizer.backward(loss_of(model, inputs, size))


DAMPENED = lambda params: torch.optim.SGD(params, 0.1, 0.9, dampening=0.5)  # noqa: E731


@pytest.mark.parametrize(
    ("policy", "inner", "whole", "words"),
    [
        ("mixed_float16", MOMENTUM, read_groups, "no parameter of SGD has a gradient"),
        ("mixed_float16", MOMENTUM, scaled_twice, "after unscale_"),
        ("mixed_float16", DAMPENED, micro_batches(1), "Run one step outside first"),
        ("mixed_float16", "ThirdParty", micro_batches(1), "ThirdParty"),
        ("master_float16", MOMENTUM, scaled_by_hand, "does not trace"),
    ],
)
def test_what_no_graph_can_do_is_said(kit, policy, inner, whole, words):
    made = make(policy, kit.ThirdParty if inner == "ThirdParty" else inner)
    with pytest.raises(Exception, match=words):
        train(whole, *made, "eager")
    if whole is micro_batches(1) and inner is not DAMPENED:
        train(whole, *made)
