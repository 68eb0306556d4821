"""GradScaler stands in for ``torch.amp.GradScaler``: same calls, same answers, same errors."""

import copy
import io
import pickle
import warnings

import pytest
import torch

from halfstep.errors import LossScaleError, LossScaleExhausted
from halfstep.torch import GradScaler, LossScaleOptimizer
from halfstep.torch.loss_scaling import host

INF = float("inf")
BOTH = [torch.amp.GradScaler, GradScaler]


def _setup(kind=torch.optim.SGD, **options):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return weight, kind([weight], lr=0.1, **options)


def _run(scaler, weight, optimizer, schedule, unscale=False):
    for times in schedule:
        optimizer.zero_grad()
        scaler.scale((weight * weight).sum() * times).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([weight], 0.5)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"fused": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {}),
        (torch.optim.RMSprop, {}),
    ],
)
def test_a_run_is_upstreams_run(kind, options, unscale):
    ends = []
    for cls in BOTH:
        weight, optimizer = _setup(kind, **options)
        scaler = cls("cpu", init_scale=64.0, growth_interval=2)
        _run(scaler, weight, optimizer, [1, 1, INF, 1, INF, 1, 1, 1], unscale)
        ends.append((weight.detach(), scaler.get_scale(), scaler._get_growth_tracker()))
    torch.testing.assert_close(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_it_is_an_upstream_scaler_with_its_signature_and_defaults():
    assert issubclass(GradScaler, torch.amp.GradScaler)
    theirs, ours = (cls("cpu") for cls in BOTH)
    for name in ("is_enabled", "get_scale", "get_growth_factor", "get_backoff_factor"):
        assert getattr(ours, name)() == getattr(theirs, name)()
    assert ours.get_growth_interval() == theirs.get_growth_interval()
    assert {k: ours.state_dict()[k] for k in theirs.state_dict()} == theirs.state_dict()
    positional = GradScaler("cpu", 4.0, 3.0, 0.25, 7, True)
    assert positional.state_dict()["growth_interval"] == 7
    assert positional.get_scale() == 4.0
    for scaler in (theirs, ours):
        scaler.set_growth_factor(4.0)
        scaler.set_backoff_factor(0.25)
        scaler.set_growth_interval(1)
        weight, optimizer = _setup()
        _run(scaler, weight, optimizer, [1, INF, INF, 1])
        assert scaler.get_scale() == 2.0**16


def test_a_default_scaler_without_cuda_warns_and_is_disabled():
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.warns(UserWarning, match="CUDA is not available"):
        assert not GradScaler().is_enabled()


def test_a_disabled_scaler_passes_everything_through():
    weight, optimizer = _setup()
    scaler = GradScaler("cpu", enabled=False)
    loss = weight.sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.9, 1.9]))
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict() == {}
    scaler.load_state_dict({})


@pytest.mark.parametrize("cls", BOTH)
def test_errors_are_upstreams(cls):
    weight, optimizer = _setup()
    with pytest.raises(AssertionError, match="growth factor must be > 1.0"):
        cls("cpu", growth_factor=1.0)
    with pytest.raises(AssertionError, match="backoff factor must be < 1.0"):
        cls("cpu", backoff_factor=1.0)
    scaler = cls("cpu")
    for name, call in [
        ("unscale_", lambda: scaler.unscale_(optimizer)),
        ("step", lambda: scaler.step(optimizer)),
        ("update", scaler.update),
    ]:
        with pytest.raises(AssertionError, match=f"Attempted {name} but _scale is None"):
            call()
    with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable of Tensors"):
        scaler.scale(3.0)
    with pytest.raises(RuntimeError, match="source state dict is empty"):
        scaler.load_state_dict({})
    scaler.scale(weight.sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scaler.update()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)
    with pytest.raises(AssertionError, match="may only be pickled at the beginning"):
        pickle.dumps(scaler)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)
    with pytest.raises(AssertionError, match="new_scale should be a float or a 1-element"):
        scaler.update(torch.ones(2))
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(torch.optim.LBFGS([weight]), closure=lambda: None)


@pytest.mark.parametrize(
    "options", [{"init_scale": -1.0}, {"growth_interval": 0}, {"backoff_factor": 0.0}]
)
def test_values_that_cannot_work_are_refused(options):
    with pytest.raises(LossScaleError):
        GradScaler("cpu", **options)


def test_a_float16_loss_of_any_shape_does_not_overflow():
    loss = torch.ones(3, dtype=torch.float16, requires_grad=True)
    assert torch.amp.GradScaler("cpu").scale(loss).isinf().all()
    assert GradScaler("cpu").scale({"a": loss})["a"].tolist() == [2.0**16] * 3


def test_limits_and_hysteresis():
    weight, optimizer = _setup()
    scaler = GradScaler("cpu", 16.0, growth_interval=1, min_scale=8.0, max_scale=32.0, hysteresis=2)
    scales = []
    for times in [1, 1, INF, INF, INF, INF, 1]:
        _run(scaler, weight, optimizer, [times])
        scales.append(scaler.get_scale())
    assert scales == [32.0, 32.0, 32.0, 16.0, 8.0, 8.0, 16.0]
    assert [event.step for event in scaler.scale_history] == [1, 3, 4, 5, 6, 7]
    assert scaler.skipped_steps == 4


def test_a_scale_of_ones_own():
    weight, optimizer = _setup()
    scaler = GradScaler("cpu")
    _run(scaler, weight, optimizer, [1])
    scaler.update(1024)
    assert scaler.get_scale() == 1024.0
    scaler.update(torch.tensor([2048.0]))
    assert scaler.get_scale() == 2048.0
    scaler._scale = torch.tensor(128.0)  # what scripts do to keep a floor
    assert scaler.get_scale() == 128.0
    assert scaler._scale.item() == 128.0
    with pytest.raises(LossScaleError, match="min_scale=1.0"):
        scaler.update(0.0)
    scaler.update(torch.tensor(0.0))
    assert scaler.get_scale() == 1.0


def test_exhaustion_names_the_gradients():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([("head.weight", weight)], fused=True)
    scaler = GradScaler("cpu", init_scale=1.0)
    with pytest.raises(LossScaleExhausted, match="AdamW: .*'head.weight'"):
        _run(scaler, weight, optimizer, [INF] * 9)


def test_several_optimizers_share_the_scale_and_each_is_skipped_alone():
    ends = []
    for cls in BOTH:
        (one, first), (two, second) = _setup(fused=True), _setup()
        scaler = cls("cpu", init_scale=8.0)
        scaler.scale(one.sum() * INF).backward()
        scaler.scale(two.sum()).backward()
        scaler.unscale_(second)
        scaler.step(first)
        scaler.step(second)
        scaler.update()
        ends.append((one.tolist(), two.tolist(), scaler.get_scale()))
    assert ends[0] == ends[1]
    assert ends[1][0] == [1.0, 2.0]
    assert ends[1][2] == 4.0


def test_two_devices_worth_of_flags_still_skip():
    """The kernels skip where the flag equals 1; upstream adds the flags of several devices."""
    weight, optimizer = _setup(fused=True)
    scaler = GradScaler("cpu")
    scaler.scale(weight.sum() * INF).backward()
    scaler.unscale_(optimizer)
    assert scaler._found_inf_per_device(optimizer) == {torch.device("cpu"): torch.tensor(1.0)}
    scaler.step(optimizer)
    assert weight.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("fused", "reads"), [(True, 0), (False, 1)])
def test_host_reads_are_upstreams(kit, fused, reads, monkeypatch):
    monkeypatch.setattr(host, "CPU_IS_FREE", False)
    weight, optimizer = _setup(torch.optim.SGD, fused=fused)
    scaler = GradScaler("cpu")
    with kit.reads() as counter:
        _run(scaler, weight, optimizer, [1.0])
    assert counter.reads == reads


def test_hooks_before_the_step_see_unscaled_gradients_of_fused_optimizers_too():
    weight, optimizer = _setup(fused=True)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.tolist()))
    _run(GradScaler("cpu"), weight, optimizer, [1.0])
    assert seen == [[2.0, 4.0]]


def test_a_users_grad_scale_is_a_factor_as_upstream_takes_it():
    ends = []
    for cls in BOTH:
        weight, optimizer = _setup(fused=True)
        optimizer.grad_scale = torch.tensor(2.0)
        _run(cls("cpu"), weight, optimizer, [1.0])
        ends.append(weight.tolist())
    assert ends[0] == ends[1]


def test_an_optimizer_that_skips_by_itself_gets_the_scale_and_the_flag():
    class Own(torch.optim.Optimizer):
        _step_supports_amp_scaling = True

        def step(self, closure=None):
            self.got = (float(self.grad_scale), float(self.found_inf))

    class Old(torch.optim.Optimizer):
        _step_supports_amp_scaling = True

        def step(self, closure=None, *, grad_scaler=None):
            self.got = (grad_scaler, self.param_groups[0]["params"][0].grad.tolist())

    for kind, got in ((Own, (4.0, 0.0)), (Old, (None, [2.0, 4.0]))):
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = kind([weight], {})
        _run(GradScaler("cpu", init_scale=4.0), weight, optimizer, [1.0])
        assert optimizer.got == got


def test_a_wrapped_optimizer_is_refused():
    weight, optimizer = _setup()
    scaler = GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises(LossScaleError, match="unscaled twice"):
        scaler.step(LossScaleOptimizer(optimizer))


def _disk(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_saved_and_restored_it_continues(way):
    weight, optimizer = _setup(torch.optim.AdamW)
    scaler = GradScaler("cpu", 64.0, growth_interval=3, hysteresis=2)
    _run(scaler, weight, optimizer, [1, INF, INF, 1, 1, INF])
    if way == "state_dict":
        other = GradScaler("cpu")
        other.load_state_dict(_disk(scaler.state_dict()))
    else:
        other = copy.deepcopy(scaler) if way == "deepcopy" else pickle.loads(pickle.dumps(scaler))
    twin = torch.nn.Parameter(weight.detach().clone())
    twins = torch.optim.AdamW([twin], lr=0.1)
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run in ((scaler, weight, optimizer), (other, twin, twins)):
        _run(*run, [INF, 1, 1, 1, 1])
    assert torch.equal(weight, twin)
    assert scaler.state_dict() == other.state_dict()


def test_upstreams_own_state_is_taken_and_ours_is_taken_by_upstream():
    weight, optimizer = _setup()
    theirs = torch.amp.GradScaler("cpu", 64.0, growth_interval=5)
    _run(theirs, weight, optimizer, [1, INF, 1])
    ours = GradScaler("cpu", min_scale=2.0)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict()["min_scale"] == 2.0
    assert {k: ours.state_dict()[k] for k in theirs.state_dict()} == theirs.state_dict()
    back = torch.amp.GradScaler("cpu")
    back.load_state_dict(ours.state_dict())
    assert back.state_dict() == theirs.state_dict()
    ours.load_state_dict({**theirs.state_dict(), "scale": 0.0})
    assert ours.get_scale() == 2.0
    with pytest.raises(LossScaleError, match="nan"):
        ours.load_state_dict({**theirs.state_dict(), "scale": float("nan")})
    assert ours.get_scale() == 2.0


# ---------------------------------------------------------------------- torch.compile


def _scale(scaler, optimizer, weight):
    return scaler.scale((weight * weight).sum())


def _unscale(scaler, optimizer, weight):
    scaler.unscale_(optimizer)


def _step(scaler, optimizer, weight):
    scaler.step(optimizer)


def _step_and_update(scaler, optimizer, weight):
    scaler.step(optimizer)
    scaler.update()


def _prepared(cls, kind, options, times):
    """A scaler with one eager step behind it, and scaled gradients."""
    weight, optimizer = _setup(kind, **options)
    scaler = cls("cpu", init_scale=64.0)
    _run(scaler, weight, optimizer, [1.0])
    optimizer.zero_grad()
    scaler.scale((weight * weight).sum() * times).backward()
    return scaler, optimizer, weight


@pytest.fixture
def compiled():
    def compile_(function, backend="eager"):
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend=backend)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own
        yield compile_
    torch._dynamo.reset()


@pytest.mark.parametrize("times", [1.0, INF])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
        (torch.optim.SGD, {}),
        (torch.optim.AdamW, {}),
    ],
)
def test_a_step_compiles_into_one_graph_and_skips_there(compiled, kind, options, times):
    eager = _prepared(GradScaler, kind, options, times)
    traced = _prepared(GradScaler, kind, options, times)
    _step_and_update(*eager)
    compiled(_step_and_update, "aot_eager")(*traced)
    torch.testing.assert_close(traced[2], eager[2])
    assert traced[0].get_scale() == eager[0].get_scale() == (64.0 if times == 1 else 32.0)
    assert traced[0].last_step_skipped is (times == INF)
    assert traced[0].skipped_steps == int(times == INF)


@pytest.mark.parametrize("function", [_scale, _unscale, _step])
def test_every_part_compiles_into_one_graph(compiled, function):
    eager = _prepared(GradScaler, torch.optim.SGD, {}, 1.0)
    traced = _prepared(GradScaler, torch.optim.SGD, {}, 1.0)
    expected = function(*eager)
    result = compiled(function)(*traced)
    if expected is not None:
        torch.testing.assert_close(result, expected)
    torch.testing.assert_close(traced[2].grad, eager[2].grad)
    torch.testing.assert_close(traced[2], eager[2])


@pytest.mark.parametrize("function", [_scale, _unscale, _step])
def test_upstream_does_not_compile(compiled, function):
    """Should this fail, torch has learnt it, and the claim in the docs can go."""
    upstream = _prepared(torch.amp.GradScaler, torch.optim.SGD, {}, 1.0)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="marked as skipped"):
        compiled(function)(*upstream)


def test_state_that_cannot_be_taken_back_in_a_graph_is_an_error(compiled):
    weight, optimizer = _setup(torch.optim.SGD, momentum=0.9, dampening=0.5)
    scaler = GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises(Exception, match="Run one step outside"):
        compiled(_step)(scaler, optimizer, weight)


# ---------------------------------------------------------------------- Lightning Fabric


def test_it_is_the_scaler_of_fabrics_mixed_precision():
    fabric_package = pytest.importorskip("lightning_fabric")
    from lightning_fabric.plugins.precision import MixedPrecision

    scaler = GradScaler("cpu", init_scale=256.0)
    fabric = fabric_package.Fabric(
        accelerator="cpu",
        devices=1,
        plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)],
    )
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 2)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    losses = []
    for times in (1.0, INF, 1.0, 1.0):
        optimizer.zero_grad()
        output = model(torch.ones(3, 4))
        loss = (output - 1).square().mean()
        before = module.weight.detach().clone()
        fabric.backward(loss * times)
        if times == 1.0:
            norm = fabric.clip_gradients(model, optimizer, max_norm=0.5)
            assert float(norm) < 10  # of the unscaled ones
        optimizer.step()
        assert torch.equal(module.weight, before) is (times == INF)
        assert scaler.last_step_skipped is (times == INF)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert scaler.get_scale() == 128.0
    assert scaler.skipped_steps == 1
