"""A replay changes nothing, stays behind nowhere, and sees through wrappers."""

import copy
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import checkpoint

from halfstep import LossScaleError
from halfstep.torch import GradScaler, LossScaleOptimizer, apply_policy, blame


def squares(model, batch):
    return model(batch).float().pow(2).mean()


def nothing_is_left(model):
    on_modules = [
        hooked
        for module in model.modules()
        for hooked in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._forward_hooks_always_called,
        )
    ]
    everywhere = [hooks._global_forward_hooks, hooks._global_forward_pre_hooks]
    return not any([*on_modules, *everywhere]) and torch._C._len_torch_dispatch_stack() == 0


@pytest.fixture
def norms():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


# ---------------------------------------------------------------------- nothing is changed


@pytest.mark.parametrize("broken", [False, True])
def test_parameters_buffers_gradients_and_batch_stay(norms, broken):
    def loss_fn(model, batch):
        batch.mul_(2)  # in place, on what belongs to the caller
        with torch.no_grad():
            model[0].weight.mul_(0.5)
            model[1].running_var = model[1].running_var + 1  # another tensor in its place
        return squares(model, batch) / (0.0 if broken else 1.0)

    batch = torch.randn(8, 4)
    grad = torch.full((4, 4), 7.0)
    norms[0].weight.grad = grad
    before = copy.deepcopy(norms.state_dict()), batch.clone()
    buffer = norms[1].running_var

    found = blame(norms, loss_fn, batch)

    assert (found is not None) == broken
    assert torch.equal(batch, before[1])
    assert all(torch.equal(value, before[0][key]) for key, value in norms.state_dict().items())
    assert norms[1].running_var is buffer
    assert norms[0].weight.grad is grad
    assert (grad == 7).all()
    assert norms[3].weight.grad is None


def test_gradients_of_tensors_outside_of_the_model_stay(norms):
    prompt = torch.zeros(8, 4, requires_grad=True)

    assert blame(norms, lambda model, x: squares(model, x + prompt), torch.randn(8, 4)) is None
    assert prompt.grad is None


def test_the_generators_stand_where_they_stood(norms):
    def loss_fn(model, batch):
        noise = float(np.random.rand() + random.random() + torch.rand(()))
        return squares(model, batch) * noise

    def draw():
        return torch.rand(3).tolist(), np.random.rand(), random.random()

    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    blame(norms, loss_fn, torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    after = draw()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])

    assert draw() == after


def test_a_seed_gives_the_step_its_random_numbers(norms):
    drawn = []

    def loss_fn(model, batch):
        drawn.append(float(torch.rand(())))
        return squares(model, batch)

    for _ in range(2):
        blame(norms, loss_fn, torch.randn(8, 4), seed=11)

    torch.manual_seed(11)
    assert drawn == [float(torch.rand(()))] * 2


def test_every_replay_in_search_of_a_cure_is_the_same_step(fault_named):
    fault = fault_named("attention-logits")
    drawn = []

    def loss_fn(model, batch):
        drawn.append(float(torch.rand(())))
        return fault.loss_fn(model, batch)

    assert blame(fault.prepare("mixed_float16"), loss_fn, fault.batch(0)).layers
    assert len(drawn) > 2
    assert len(set(drawn)) == 1


def test_nothing_is_left_after_a_fault_or_an_exception(norms, fault_named):
    fault = fault_named("distance-to-itself")
    model = fault.prepare("float32")
    blame(model, fault.loss_fn, fault.batch(0))
    assert nothing_is_left(model)

    before = copy.deepcopy(norms.state_dict())
    for wrong in (torch.randn(8, 5), "no tensor"):
        with pytest.raises((RuntimeError, TypeError)):
            blame(norms, squares, wrong)
    assert nothing_is_left(norms)

    def half_way(model, batch):
        squares(model, batch)  # the batch norm has counted by now
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        blame(norms, half_way, torch.randn(8, 4))
    assert nothing_is_left(norms)
    assert all(torch.equal(value, before[key]) for key, value in norms.state_dict().items())


# ---------------------------------------------------------------------- what it sees through


def test_a_compiled_model_and_a_compiled_layer_are_replayed_eagerly(fault_named):
    fault = fault_named("attention-logits")
    model = fault.prepare("mixed_float16")
    model.blocks[1].attn = torch.compile(model.blocks[1].attn, backend="eager")

    found = blame(torch.compile(model, backend="eager"), fault.loss_fn, fault.batch(0))

    assert (found.path, found.operation) == ("blocks.1.attn", "bmm")
    assert found.layers == ("blocks.1.attn",)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_fault_in_a_checkpointed_layer_has_its_path(reentrant):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return (self.linear(x) * 0).abs().sqrt()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.root = nn.Linear(4, 4), Root()

        def forward(self, x):
            return checkpoint(self.root, self.stem(x), use_reentrant=reentrant)

    found = blame(Model(), lambda model, x: model(x).sum(), torch.randn(2, 4))

    assert (found.path, found.direction) == ("root", "backward")
    assert "SqrtBackward" in found.operation
    assert "abs().sqrt()" in found.source


def test_plain_autocast_needs_no_policy(fault_named):
    fault = fault_named("attention-logits")

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.float16):
            return fault.loss_fn(model, batch)

    found = blame(fault.make_model(), loss_fn, fault.batch(0))

    assert (found.path, found.operation, found.dtype) == ("blocks.1.attn", "bmm", "float16")
    assert found.layers == ("blocks.1.attn",)
    assert "torch.autocast(device, enabled=False)" in found.cure


def test_a_model_of_16_bit_weights_needs_no_autocast(fault_named):
    fault = fault_named("attention-logits")

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0].half()).float().flatten(0, 1), batch[1].flatten())

    found = blame(fault.make_model().half(), loss_fn, fault.batch(0))

    assert (found.path, found.operation) == ("blocks.1.attn", "bmm")
    assert ".float() on it" in found.cure


def test_any_structure_of_outputs_and_losses():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return {"deep": [(None, self.linear(x)), {"log": (self.linear(x) * 0).log()}]}

    def scalars(model, x):
        deep = model(x)["deep"]
        return {"a": deep[0][1].mean(), "b": deep[1]["log"].mean()}

    def as_loss(model, x):
        return {"loss": scalars(model, x)["b"], "other": torch.ones(3)}

    for loss_fn in (scalars, as_loss):
        assert blame(Nested(), loss_fn, torch.ones(1, 2)).operation == "log"
    assert blame(Nested(), lambda model, x: {"loss": scalars(model, x)["a"]}, torch.ones(1, 2)) is (
        None
    )


def test_an_infinity_on_purpose_is_named_if_it_is_all_there_is():
    embedding = nn.Embedding(5, 3, sparse=True)

    found = blame(embedding, lambda model, x: model(x).sum() * float("inf"), torch.tensor([1, 2]))

    assert (found.path, found.operation) == ("", "mul")
    assert "on purpose" in found.cause
    assert "The loss function made an infinity" in str(found)


def test_a_scripted_layer_counts_as_what_is_around_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scripted = torch.jit.script(nn.Linear(2, 2))
            self.last = nn.Linear(2, 2)

        def forward(self, x):
            return self.last((self.scripted(x) * 0).log())

    found = blame(Model(), lambda model, x: model(x).sum(), torch.ones(1, 2))

    assert (found.path, found.operation) == ("", "log")
    assert "The model (Model)" in str(found)


def test_a_tensor_from_a_closure_can_be_what_is_broken(norms):
    constant = torch.tensor([1.0, float("nan")])

    found = blame(norms, lambda model, x: squares(model, x) * constant.sum(), torch.randn(8, 4))

    assert found.operation == "parameter"
    assert "tensor from outside of the model" in str(found)


def test_one_rank_replays_a_data_parallel_model(tmp_path, norms):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(norms)
        found = blame(parallel, lambda model, x: (model(x) * 0).log().sum(), torch.randn(8, 4))
        assert found.operation == "log"
        squares(parallel, torch.randn(8, 4)).backward()
        assert norms[0].weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_buffers_are_part_of_the_step(norms):
    def loss_fn(model, batch):
        return model[:2](batch * 1e25).sigmoid().mean()

    found = blame(norms, loss_fn, torch.randn(8, 4))

    assert found.path == "1"
    assert "the buffer 1.running_var" in found.reached


def test_the_line_of_the_users_own_code_is_shown(fault_named):
    fault = fault_named("rms-norm-pow")

    found = blame(fault.prepare("mixed_float16"), fault.loss_fn, fault.batch(0), prove=False)

    assert "fault_zoo.py" in found.source
    assert "in _pow_rms: return loud * torch.rsqrt(loud.pow(2)" in found.source
    assert found.reached == ()
    assert "nothing: a later operation" in str(found)


def test_torch_dynamo_is_not_imported_for_it():
    # importing it takes seconds; whoever compiled something has imported it already
    code = (
        "import sys, torch; from halfstep.torch import blame; "
        "print(blame(torch.nn.Linear(1, 1), lambda m, x: m(x).sum(), torch.ones(1, 1)), "
        "'torch._dynamo' in sys.modules)"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "False"]


# ---------------------------------------------------------------------- loss scales


def test_the_loss_scale_is_the_optimizers(fault_named):
    fault = fault_named("loss-scale")
    model = fault.prepare("mixed_float16")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    for optimizer in (LossScaleOptimizer(sgd, 2.0**26), GradScaler("cpu", init_scale=2.0**26)):
        found = blame(model, fault.loss_fn, fault.batch(0), optimizer=optimizer)
        assert "the loss scale, not the model" in found.cause
    assert blame(model, fault.loss_fn, fault.batch(0), optimizer=sgd) is None


def test_the_largest_loss_scale_that_works_is_found_by_replay(fault_named):
    fault = fault_named("loss-scale")
    model = fault.prepare("mixed_float16")

    found = blame(model, fault.loss_fn, fault.batch(0), loss_scale=2.0**26)
    largest = 2.0 ** int(found.cure.split("2**")[1].split()[0])

    assert blame(model, fault.loss_fn, fault.batch(0), loss_scale=largest) is None
    assert blame(model, fault.loss_fn, fault.batch(0), loss_scale=2 * largest) is not None


def test_between_unscaling_and_the_step_it_may_be_asked(norms):
    optimizer = LossScaleOptimizer(torch.optim.SGD(norms.parameters(), lr=0.1), 8.0)
    batch = torch.randn(8, 4)
    optimizer.backward(squares(norms, batch))
    optimizer.unscale_()
    before = [parameter.grad.clone() for parameter in norms.parameters()]

    assert blame(norms, squares, batch, optimizer=optimizer) is None
    assert all(torch.equal(p.grad, g) for p, g in zip(norms.parameters(), before, strict=True))
    with pytest.raises(LossScaleError, match="after unscale_"):  # its guard is there again
        squares(norms, batch).backward()


def test_an_optimizer_that_lives_in_the_backward_pass_takes_no_step(norms):
    sgd = torch.optim.SGD(norms.parameters(), lr=1.0, momentum=0.9)
    norms[0].weight.register_post_accumulate_grad_hook(lambda _: sgd.step())
    before = norms[0].weight.clone()

    assert blame(norms, squares, torch.randn(8, 4)) is None
    assert torch.equal(norms[0].weight, before)
    assert not sgd.state
    squares(norms, torch.randn(8, 4)).backward()
    assert not torch.equal(norms[0].weight, before)


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan")])
def test_a_loss_scale_must_be_positive_and_finite(norms, scale):
    with pytest.raises(LossScaleError, match="positive and finite"):
        blame(norms, squares, torch.ones(2, 4), loss_scale=scale)


def test_a_loss_function_without_a_loss_is_refused(norms):
    with pytest.raises(LossScaleError, match="must return the loss"):
        blame(norms, lambda model, x: "nothing", torch.ones(2, 4))
    assert nothing_is_left(norms)


def test_gradients_that_are_zero_in_every_format_vanished_nowhere():
    model = apply_policy(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), "mixed_float16")
    nn.init.zeros_(model[1].weight)

    assert blame(model, squares, torch.randn(3, 4)) is None
