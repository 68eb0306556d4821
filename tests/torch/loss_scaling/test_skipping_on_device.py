"""Steps that are skipped on the device, by taking them back: to the bit what a read would give."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import random
import weakref

import pytest
import torch

from halfstep.errors import LossScaleError
from halfstep.torch import LossScaleOptimizer, apply_policy
from halfstep.torch.loss_scaling import choosing, host, undoing, wide

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """Take the way of an accelerator, whose memory the host does not see."""
    monkeypatch.setattr(host, "CPU_IS_FREE", False)


def _wrapped(kit, case, skip, sparse=False, policy=None, variant="without_grad", **options):
    net = kit.net(sparse)
    if policy is not None:
        apply_policy(net, policy)
    inner = case.make(kit.groups(net, "sparse" if sparse else variant))
    if skip == "host" and case.reads == 0 and not sparse:
        for group in inner.param_groups:  # the kernels that the other way turns on
            group.update(fused=True, foreach=False)
    return net, LossScaleOptimizer(inner, 64, skip=skip, **options)


def _train(kit, net, optimizer, steps, overflows):
    for step in steps:
        optimizer.zero_grad()
        optimizer.backward(kit.loss(net, step) * overflows.get(step, 1.0))
        optimizer.step()


def _overflows(seed, steps=9):
    draws = random.Random(seed)
    return {s: draws.choice([INF, -INF, NAN]) for s in range(steps) if draws.random() < 0.4}


def _same_runs(kit, case, overflows, steps=9, **options):
    ends = []
    for skip in ("host", "device"):
        net, optimizer = _wrapped(kit, case, skip, **options)
        _train(kit, net, optimizer, range(steps), overflows)
        ends.append((kit.snapshot(optimizer), optimizer.skipped_steps, optimizer.scale_history))
    assert ends[0][1] == len(overflows)
    kit.same(ends[0], ends[1])


# ---------------------------------------------------------------------- the same, to the bit


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_a_run_with_overflows_is_that_of_a_read_flag(kit, stepping_case, max_norm):
    overflows = {0: INF, **_overflows(1)}
    _same_runs(kit, stepping_case, overflows, max_norm=max_norm)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_so_is_one_with_sparse_gradients(kit, sparse_case):
    _same_runs(kit, sparse_case, {0: INF, 3: NAN, 4: INF}, steps=6, sparse=True)


def test_every_optimizer_of_torch_is_among_them(kit):
    net = kit.net()
    made = {type(case.make([net.table.weight])) for case in kit.cases if case.name != "ThirdParty"}
    known = {
        kind
        for kind in vars(torch.optim).values()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    }
    assert known - {torch.optim.Optimizer} == made


@pytest.mark.parametrize("policy", ["master_float16", "kahan_bfloat16"])
def test_so_is_one_with_16_bit_weights_in_parts(kit, flag_case, policy, monkeypatch):
    monkeypatch.setattr(wide, "PART_BYTES", 100)
    _same_runs(kit, flag_case, {0: INF, 3: NAN}, steps=5, policy=policy, variant="plain")


KERNELS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float64])
@pytest.mark.parametrize("kind", KERNELS)
def test_so_are_parameters_that_no_fused_kernel_takes(kit, kind, dtype):
    ends = []
    for skip in ("host", "device"):
        torch.manual_seed(0)
        # the second stands beside another dtype, so that no group is fused
        weights = [torch.nn.Parameter(torch.randn(3, dtype=d)) for d in (dtype, torch.complex64)]
        optimizer = LossScaleOptimizer(KERNELS[kind](weights), 64, skip=skip)
        for times in (INF, 1.0, 1.0, NAN, 1.0):
            optimizer.zero_grad()
            optimizer.backward(sum((w * w.conj()).real.sum().float() for w in weights) * times)
            optimizer.step()
        ends.append(kit.snapshot(optimizer))
    kit.same(*ends)


def test_sgd_with_dampening_reads_nothing_in_its_first_step_and_can_skip_it(kit):
    def make(skip):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3)) for _ in range(2)]
        inner = torch.optim.SGD(weights, lr=0.1, momentum=0.9, dampening=0.5)
        return weights, LossScaleOptimizer(inner, 64, skip=skip)

    (ours, auto), (theirs, bare) = make("auto"), make("host")
    counts = [1, 1, 2, 2, 2]  # the second weight joins late, in a step that is skipped
    for count, times in zip(counts, [INF, 1.0, INF, 1.0, 1.0], strict=True):
        for weights, optimizer in ((ours, auto), (theirs, bare)):
            optimizer.zero_grad()
            optimizer.backward(sum(w.square().sum() for w in weights[:count]) * times)
            with kit.reads() as counter:
                optimizer.step()
            assert counter.reads == (optimizer is bare)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- what it reads and costs


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_it_reads_nothing_in_any_step(kit, stepping_case, max_norm):
    fused = stepping_case.reads == 0
    counts = []
    for wraps in (False, True):
        net = kit.net()
        optimizer = stepping_case.make(kit.groups(net, "plain"))
        for group in optimizer.param_groups if fused else ():
            group.update(fused=True, foreach=False)
        if wraps:
            optimizer = LossScaleOptimizer(optimizer, max_norm=max_norm, skip="device")
        backward = optimizer.backward if wraps else torch.Tensor.backward
        reads = []
        for step in range(4):
            optimizer.zero_grad()
            backward(kit.loss(net, step))
            with kit.reads() as counter:
                optimizer.step()
            reads.append(counter.reads)
        counts.append(reads)
    bare, ours = counts
    assert ours == bare


def test_host_reads_with_every_optimizer_and_leaves_its_kernels_alone(kit, fused_case):
    net = kit.net()
    inner = fused_case.make(kit.groups(net, "plain"))
    before = copy.deepcopy(inner.state_dict()["param_groups"])
    optimizer = LossScaleOptimizer(inner, skip="host")
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward(kit.loss(net, step))
        with kit.reads() as counter:
            optimizer.step()
        assert counter.reads >= 1
        assert inner.state_dict()["param_groups"] == before


@pytest.mark.parametrize("many", [2, 20])
def test_grouped_calls_however_many_parameters(many, counts):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(many)]
    bare = torch.optim.RMSprop(weights, foreach=True)
    optimizer = LossScaleOptimizer(bare, 64, skip="device", max_norm=1.0)
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward(sum(w.sum() for w in weights))
        if step == 0:
            optimizer.step()
    with counts() as counter:
        optimizer.step()
    assert counter.calls["_foreach_clone"] == 1
    views = {"detach", "view"}
    each = {name for name, times in counter.calls.items() if times >= 20 and name not in views}
    assert not each


def test_the_copies_are_gone_when_the_step_is_over(kit, monkeypatch):
    made = []
    clone = torch._foreach_clone

    def watched(tensors):
        copies = clone(tensors)
        made.extend(map(weakref.ref, copies))
        return copies

    monkeypatch.setattr(torch, "_foreach_clone", watched)
    case = next(case for case in kit.cases if case.name == "NAdam")
    net, optimizer = _wrapped(kit, case, "device")
    gc.disable()  # no cycle may keep them
    try:
        for step in range(2):
            _train(kit, net, optimizer, [step], {})
            assert made
            assert all(reference() is None for reference in made)
    finally:
        gc.enable()


def test_a_cpu_needs_no_copies(kit, monkeypatch):
    monkeypatch.setattr(host, "CPU_IS_FREE", True)
    monkeypatch.setattr(undoing.Undo, "step", None)
    case = next(case for case in kit.cases if case.name == "NAdam")
    net, optimizer = _wrapped(kit, case, "device")
    _train(kit, net, optimizer, range(3), {1: INF})
    assert optimizer.skipped_steps == 1


# ---------------------------------------------------------------------- state made by the step


LOOKS = {
    "state": lambda optimizer: dict(optimizer.state),
    "state_dict": lambda optimizer: optimizer.state_dict()["state"],
    "the inner state_dict": lambda optimizer: optimizer.inner_optimizer.state_dict()["state"],
    "deepcopy": lambda optimizer: copy.deepcopy(optimizer).inner_optimizer.state,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)).inner_optimizer.state,
    "last_step_skipped": lambda optimizer: (
        optimizer.last_step_skipped and optimizer.inner_optimizer.state
    ),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_skipped_first_step_leaves_no_state(kit, flag_case, look):
    net, optimizer = _wrapped(kit, flag_case, "device")
    _train(kit, net, optimizer, [0], {0: INF})
    assert not LOOKS[look](optimizer)
    _train(kit, net, optimizer, [1], {})
    assert LOOKS[look](optimizer) or look == "last_step_skipped"


def test_nor_does_one_in_which_a_parameter_gets_its_first_gradient(kit, flag_case):
    ends = []
    for skip in ("host", "device"):
        torch.manual_seed(0)
        early, late = (torch.nn.Parameter(torch.randn(2, 2)) for _ in range(2))
        optimizer = LossScaleOptimizer(flag_case.make([early, late]), 64, skip=skip)
        for step, times in enumerate([1.0, INF, INF, 1.0]):
            optimizer.zero_grad()
            loss = early.square().sum() + (late.square().sum() if step else 0)
            optimizer.backward(loss * times)
            optimizer.step()
            assert (late in optimizer.state) == (step == 3)
        ends.append(kit.snapshot(optimizer))
    kit.same(*ends)


def test_a_checkpoint_between_two_steps_goes_on_to_the_bit_whatever_skips(kit, stepping_case):
    overflows = {0: INF, 2: INF}
    net, optimizer = _wrapped(kit, stepping_case, "device")
    _train(kit, net, optimizer, range(3), overflows)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    _train(kit, net, optimizer, range(3, 6), {})
    saved = torch.load(file, weights_only=True)
    assert "skip" not in str(sorted(saved["optimizer"]))
    again, resumed = _wrapped(kit, stepping_case, "auto")
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.skip == "auto"
    _train(kit, again, resumed, range(3, 6), {})
    kit.same(kit.snapshot(resumed), kit.snapshot(optimizer))


def test_a_load_between_two_steps_is_not_undone(kit):
    case = next(case for case in kit.cases if case.name == "ThirdParty")
    net, optimizer = _wrapped(kit, case, "device")
    _train(kit, net, optimizer, range(2), {})
    saved = optimizer.state_dict()
    _train(kit, net, optimizer, [2], {2: INF})
    optimizer.load_state_dict(saved)
    before = kit.snapshot(optimizer)
    _train(kit, net, optimizer, [3], {3: INF})
    kit.same(kit.snapshot(optimizer), before)


# ---------------------------------------------------------------------- counters on the host


@pytest.fixture
def counters_on_the_host(monkeypatch):
    """Treat 0-dim tensors as on an accelerator those counters that torch leaves on the CPU."""
    reached = undoing._reached
    monkeypatch.setattr(undoing, "_reached", lambda t, found: t.dim() > 0 and reached(t, found))


@pytest.mark.usefixtures("counters_on_the_host")
def test_counters_in_cpu_tensors_are_put_back_before_the_next_step(kit, flag_case):
    _same_runs(kit, flag_case, {0: INF, 2: NAN, 3: INF, 5: NAN}, steps=7)


def test_a_parameter_out_of_reach_has_the_flag_read(kit, monkeypatch):
    """One on the CPU beside others on a device: the next forward pass would read it too early."""
    case = next(case for case in kit.cases if case.name == "RMSprop")
    net, optimizer = _wrapped(kit, case, "device")
    monkeypatch.setattr(undoing, "_reached", lambda tensor, _: tensor is not net.first.weight)
    for step, times in enumerate([1.0, INF]):
        before = kit.snapshot(optimizer)
        optimizer.zero_grad()
        optimizer.backward(kit.loss(net, step) * times)
        with kit.reads() as counter:
            optimizer.step()
        assert counter.reads == 1
    kit.same(kit.snapshot(optimizer), before)


# ---------------------------------------------------------------------- around the step


@pytest.mark.parametrize("place", ["inner", "outer"])
def test_hooks_see_what_was_chosen(kit, flag_case, place):
    net, optimizer = _wrapped(kit, flag_case, "device")
    seen = []
    on = optimizer if place == "outer" else optimizer.inner_optimizer
    on.register_step_post_hook(lambda *_: seen.append(net.first.weight.detach().clone()))
    _train(kit, net, optimizer, range(3), {1: NAN})
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert seen[2].isfinite().all()


def test_what_a_hook_does_to_the_weights_of_a_skipped_step_is_taken_back(kit, flag_case):
    net, optimizer = _wrapped(kit, flag_case, "device")

    def halve(*_):
        with torch.no_grad():
            net.first.weight.mul_(0.5)

    optimizer.inner_optimizer.register_step_post_hook(halve)
    _train(kit, net, optimizer, [0], {})
    before = kit.snapshot(optimizer)
    _train(kit, net, optimizer, [1], {1: NAN})
    kit.same(kit.snapshot(optimizer), before)


def test_closures(kit, dense_case):
    ends = []
    for skip in ("host", "device"):
        net, optimizer = _wrapped(kit, dense_case, skip)
        for step, times in enumerate([1.0, INF, 1.0]):

            def closure(net=net, optimizer=optimizer, step=step, times=times):
                optimizer.zero_grad()
                loss = kit.loss(net, step) * times
                optimizer.backward(loss)
                return loss

            optimizer.step(closure)
        ends.append(kit.snapshot(optimizer))
    kit.same(*ends)


def test_lost_updates_are_counted_alike(kit):
    found = []
    for skip in ("host", "device"):
        weight = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.bfloat16))
        optimizer = LossScaleOptimizer(torch.optim.RMSprop([weight], lr=0.02), 64, skip=skip)
        with optimizer.lost_updates() as lost:
            for times in (1.0, INF, 1.0):
                optimizer.zero_grad()
                optimizer.backward((weight * torch.tensor([0.001, 0.1])).sum() * times)
                optimizer.step()
        found.append((lost.updates, lost.lost, lost.unseen))
    assert found[0] == found[1]
    assert found[0][0] == 4


def test_a_scheduler_goes_on_over_a_skipped_step(kit, flag_case):
    rates = []
    for skip in ("host", "device"):
        net, optimizer = _wrapped(kit, flag_case, skip)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(3):
            _train(kit, net, optimizer, [step], {1: INF})
            scheduler.step()
        rates.append((optimizer.param_groups[0]["lr"], kit.snapshot(optimizer)))
    kit.same(*rates)


@pytest.fixture
def one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_ranks_agree_before(kit, one_rank):
    case = next(case for case in kit.cases if case.name == "RAdam")
    _same_runs(kit, case, {0: INF, 2: NAN}, steps=4, process_group=one_rank)


@pytest.mark.parametrize("name", ["RMSprop", "NAdam", "AdamW", "SGD-momentum", "SGD-dampening"])
def test_sharded_parameters_are_put_back(kit, one_rank, name):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    case = next(case for case in kit.cases if case.name == name)
    mesh = init_device_mesh("cpu", (1,))
    ends = []
    for skip in ("host", "device"):
        torch.manual_seed(0)
        whole = torch.randn(4, 2)
        weight = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        inner = case.make([weight])
        for group in inner.param_groups if skip == "host" and case.reads == 0 else ():
            group.update(fused=True, foreach=False)
        optimizer = LossScaleOptimizer(inner, 64, skip=skip, process_group=one_rank)
        for times in (INF, 1.0, 1.0, NAN, 1.0):
            optimizer.zero_grad()
            optimizer.backward(weight.square().sum().full_tensor() * times)
            optimizer.step()
        entries = {k: v.full_tensor() if hasattr(v, "full_tensor") else v
                   for k, v in optimizer.state[weight].items()}  # fmt: skip
        ends.append((weight.detach().full_tensor(), entries, optimizer.skipped_steps))
        assert not torch.equal(ends[-1][0], whole)
    kit.same(*ends)


@pytest.mark.parametrize("looks", [True, False])
def test_a_compiled_step_goes_on_from_what_is_settled(looks):
    torch._dynamo.reset()
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = LossScaleOptimizer(torch.optim.RMSprop([weight]), 64, skip="device")
    compiled = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    seen = []
    for step, times in enumerate([1.0, INF, 1.0]):
        optimizer.zero_grad()
        optimizer.backward(weight.square().sum() * times)
        if step == 0:
            optimizer.step()
            assert not looks or not optimizer.last_step_skipped
        elif looks:
            compiled()
        else:
            with pytest.raises(Exception, match="Look at optimizer.last_step_skipped once before"):
                compiled()
            return
        seen.append(weight.detach().clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


# ---------------------------------------------------------------------- the keyword


def test_skip_is_checked_shown_and_copied(kit):
    case = next(case for case in kit.cases if case.name == "RMSprop")
    with pytest.raises(LossScaleError, match=r"skip='gpu'.*'auto', 'device', 'host'"):
        _wrapped(kit, case, "gpu")
    _, optimizer = _wrapped(kit, case, "device")
    assert repr(optimizer).endswith("skip='device')")
    assert copy.deepcopy(optimizer).skip == "device"
    assert pickle.loads(pickle.dumps(optimizer)).skip == "device"
    _, optimizer = _wrapped(kit, case, "auto")
    assert "skip" not in repr(optimizer)


@pytest.mark.parametrize("dtype", [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128),
])  # fmt: skip
def test_any_bits_are_chosen_exactly(dtype):
    raw = torch.arange(1, 129, dtype=torch.uint8).repeat(4)
    old = (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)
    tensors = [old.clone(), old.clone()[3:], old.clone()[0]]
    expected = [tensor.clone() for tensor in tensors]
    for found in (0.0, 1.0):
        copies = choosing.Copies(tensors)
        changed = [tensor.view(torch.uint8).bitwise_not() for tensor in map(_flat, tensors)]
        for tensor, new in zip(map(_flat, tensors), changed, strict=True):
            tensor.view(torch.uint8).copy_(new % 2 if dtype is torch.bool else new)
        now = [tensor.clone() for tensor in tensors]
        copies.choose(torch.tensor(found), again=True)
        copies.choose(torch.tensor(found))
        for tensor, want in zip(tensors, expected if found else now, strict=True):
            assert torch.equal(_flat(tensor).view(torch.uint8), _flat(want).view(torch.uint8))
        if not found:
            expected = now


def _flat(tensor):
    return tensor.reshape(-1) if tensor.dim() else tensor.view(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["RMSprop", "NAdam", "Adamax"])
def test_any_optimizer_is_captured_in_a_cuda_graph_and_waits_for_nothing(kind):
    model = torch.nn.Linear(4, 2).cuda()
    inner = getattr(torch.optim, kind)(model.parameters(), lr=0.05, capturable=True)
    optimizer = LossScaleOptimizer(inner, 64, skip="device")
    inputs = torch.ones(3, 4, device="cuda")

    def whole():
        optimizer.zero_grad()
        optimizer.backward(model(inputs).square().sum())
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            whole()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            whole()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole()
    before = model.weight.detach().clone()
    graph.replay()
    assert not torch.equal(before, model.weight)
    before = model.weight.detach().clone()
    inputs.fill_(INF)
    graph.replay()
    assert torch.equal(before, model.weight)
