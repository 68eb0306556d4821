"""What autocast returns, in the hands of those who copy it, save it and compile around it."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from halfstep import PolicyError, PolicyMap
from halfstep.torch import apply_policy, autocast, explain

# Dynamo looks at tensors, and what they say when looked at is not the model's business
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

KEPT = PolicyMap("mixed_bfloat16", {"second": "float32"})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x))


def eager(model, policy="mixed_bfloat16"):
    return autocast(model, policy, backend="aot_eager")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"]
)
def test_a_copy_is_compiled_for_its_own_module_under_the_same_policies(copied):
    model, x = Net(), torch.randn(2, 8)
    compiled = eager(model, KEPT)
    out = compiled(x)
    other = copied(compiled)
    assert other.first.weight is not model.first.weight
    torch.testing.assert_close(other(x), out, rtol=0, atol=0)
    with torch.no_grad():
        other.first.weight.zero_()
    assert not torch.equal(other(x), out)
    torch.testing.assert_close(compiled(x), out, rtol=0, atol=0)
    rows = explain(other)(x).rows
    assert {(row.path, row.dtype) for row in rows if row.flops} == {
        ("first", "bfloat16"), ("second", "float32"),
    }  # fmt: skip


def test_a_model_can_be_pickled_where_fabric_notes_how_it_was_compiled():
    """Importing Fabric replaces torch.compile, for good: so here it is done in another process."""
    pytest.importorskip("lightning_fabric")
    program = """
import pickle, torch
import lightning_fabric.wrappers
from halfstep.torch import autocast

model = torch.nn.Linear(8, 8)
compiled = autocast(model, backend="aot_eager")
out = compiled(torch.ones(1, 8))
assert compiled._compile_kwargs["backend"] is not None
assert not hasattr(pickle.loads(pickle.dumps(model)), "_compile_kwargs")
assert torch.equal(pickle.loads(pickle.dumps(compiled))(torch.ones(1, 8)), out)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("wrapped", [lambda model: model, lambda model: lambda x: model(x)])
def test_other_compiled_code_does_not_make_it_float32(wrapped):
    model, x = Net(), torch.randn(2, 8)
    compiled = eager(wrapped(model))
    alone = compiled(x)
    step = torch.compile(lambda x: compiled(x) * 2, backend="aot_eager")
    torch.testing.assert_close(step(x), alone * 2, rtol=0, atol=0)
    assert not torch.equal(step(x), model(x) * 2)
    whole = torch.compile(lambda x: compiled(x) * 2, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"halfstep\.torch\.autocast paints graphs of its own"):
        whole(x)


def test_nothing_keeps_the_model_alive():
    model = Net()
    compiled = eager(model, KEPT)
    compiled(torch.randn(2, 8)).sum().backward()
    there = weakref.ref(model)
    del model, compiled
    gc.collect()
    assert there() is None


def test_a_replaced_layer_keeps_the_policy_of_its_name():
    model, x = Net(), torch.randn(2, 8)
    compiled = eager(model, KEPT)
    compiled(x)
    model.second = nn.Linear(8, 4)
    first = model.first
    low = nn.functional.linear(x.bfloat16(), first.weight.bfloat16(), first.bias.bfloat16())
    torch.testing.assert_close(compiled(x), model.second(low.float()), rtol=0, atol=0)


def test_who_else_casts_is_named():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(PolicyError, match="is on around it"):
        eager(Net(), "mixed_float16")(torch.randn(2, 8))
    model = apply_policy(Net(), "mixed_bfloat16")
    with pytest.raises(PolicyError, match="use one of the two"):
        eager(model)(torch.randn(2, 8))


def test_modes_change_between_calls():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
    compiled, x = eager(model), torch.randn(16, 8)
    for _ in range(2):
        compiled.train()
        compiled(x).sum().backward()
        compiled.eval()
        with torch.no_grad():
            out = compiled(x)
        with torch.inference_mode():
            again = compiled(x)
            assert again.is_inference()
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, again, rtol=0, atol=0)
        torch.testing.assert_close(out, model(x).detach(), rtol=0.05, atol=0.05)
