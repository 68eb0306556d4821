"""What models do less often: writing into arguments, calling parts, unusual classes and dtypes."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from halfstep.errors import PolicyError
from halfstep.torch import apply_policy
from halfstep.torch.copies import entry_of

X = torch.linspace(-1, 1, 40).reshape(5, 8)


class Writes(nn.Module):
    """Calls ``write`` with its weight times its input, and what it was handed to write to."""

    def __init__(self, write):
        super().__init__()
        self.weight, self.write = nn.Parameter(torch.eye(8)), write

    def forward(self, x, target):
        return self.write(x @ self.weight, target)


@dataclass
class State:
    hidden: torch.Tensor
    last: torch.Tensor | None = None


def _set(y, state):
    state["h"] = state["h"] + y
    del state["old"]
    return state["h"]


def _attribute(y, state):
    state.last, state.hidden = y, state.hidden + y
    return y


def _both(y, cache):
    first = cache.pop()
    cache.append(y)
    cache.append(first)
    return y


CASES = {
    "dict": (lambda: {"h": torch.zeros(5, 8), "old": torch.zeros(1)}, _set, lambda s: [s["h"]]),
    "list": (lambda: [torch.zeros(1), torch.ones(1)], _both, list),
    "deque": (lambda: deque([torch.zeros(1)], maxlen=3), _both, list),
    "tensor": (lambda: torch.zeros(5, 8), lambda y, memory: memory.add_(y), lambda s: [s]),
    "dataclass": (lambda: State(torch.zeros(5, 8)), _attribute, lambda s: [s.hidden, s.last]),
    "nested": (lambda: ({"in": [torch.zeros(1)]},), lambda y, s: _both(y, s[0]["in"]),
               lambda s: s[0]["in"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_layer_writes_into_its_arguments_arrives(name):
    make, write, read = CASES[name]
    plain, policied = Writes(write), apply_policy(nn.Sequential(Writes(write)), "mixed_bfloat16")
    ours, theirs = make(), make()
    kept = read(ours)[0] if name == "list" else None
    plain(X, theirs)
    policied[0](X, ours)
    for one, two in zip(read(ours), read(theirs), strict=True):
        torch.testing.assert_close(one.float(), two, rtol=1e-2, atol=1e-2)
    if isinstance(ours, dict):
        assert set(ours) == set(theirs)
    if kept is not None:
        assert any(item is kept for item in ours), "the caller's tensor, and no cast of it"


def test_a_part_without_weights_that_is_called_by_itself_has_its_autocast():
    class Product(nn.Module):
        def forward(self, q, k):
            return q @ k.transpose(-1, -2)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.product, self.layer = Product(), nn.Linear(8, 8)

        def encode(self, x):
            return self.product(self.layer(x), x)

    model = apply_policy(Model(), "mixed_bfloat16")
    assert model.encode(X).dtype is torch.bfloat16


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.LayerNorm(8), nn.LSTM(8, 8)], ids=repr)
def test_float64_layers_are_left_alone_where_they_are_called(layer):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), layer.double()

        def forward(self, x):
            result = self.last(self.first(x).double())
            return result[0] if isinstance(result, tuple) else result

    for overrides in (None, {"last": "float32"}):
        assert apply_policy(Model(), "mixed_bfloat16", overrides)(X).dtype is torch.float64


class Two(nn.ModuleList):
    """A list of modules that is called."""

    def __init__(self):
        super().__init__([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        hidden = self[0](x)
        return (hidden @ x.t()) @ self[1](x)


def test_a_list_of_modules_with_a_forward_is_called_like_any_other():
    assert apply_policy(Two(), "mixed_bfloat16")(X).dtype is torch.float32
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.last = Two(), nn.Linear(8, 8)

        def forward(self, x):
            seen.append(self.two(x).dtype)
            return self.last(self.two(x))

    apply_policy(Model(), "mixed_bfloat16", {"two": "float32"})(X)
    assert seen == [torch.float32]


@pytest.mark.parametrize("functional", ["autocast", "compute"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "master_bfloat16"])
def test_bags_take_weights_for_their_examples(policy, functional):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.last = nn.EmbeddingBag(20, 8, mode="sum"), nn.Linear(8, 3)

        def forward(self, ids, shares):
            return self.last(self.bag(ids, per_sample_weights=shares))

    model = apply_policy(Model(), policy, functional=functional)
    assert model(torch.arange(20).reshape(4, 5), torch.ones(4, 5)).shape == (4, 3)


class Pair(tuple):
    def __new__(cls, first, second):
        return tuple.__new__(cls, (first, second))


RESULTS = {
    "dict": lambda y: {"y": y},
    "defaultdict": lambda y: defaultdict(list, y=y),
    "torch.return_types": lambda y: torch.max(y, -1),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_that_torch_compile_traces(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return RESULTS[name](self.layer(x))

    model = apply_policy(Model(), "mixed_bfloat16")
    eager = model(X)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(X)
    assert type(compiled) is type(eager)
    first = next(iter(eager.values())) if isinstance(eager, dict) else eager[0]
    assert first.dtype is torch.float32


def test_a_tuple_that_is_made_in_its_own_way_keeps_its_class():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            result = Pair(self.layer(x), 1)
            result.note = "kept"
            return result

    result = apply_policy(Model(), "mixed_bfloat16")(X)
    assert type(result) is Pair
    assert (result[0].dtype, result[1], result.note) == (torch.float32, 1, "kept")


def test_weights_that_were_taken_out_are_freed():
    model = apply_policy(nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), "mixed_bfloat16")
    model(X)
    gone = [weakref.ref(layer.weight) for layer in model[2:]]
    del model[2:]
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4
    model(X).sum().backward()
    kept = entry_of(model).groups.find(model[0].weight, torch.bfloat16)
    assert {id(weight) for weight in kept} == {id(weight) for weight in model.parameters()}


def test_a_write_to_a_weight_in_a_later_call_is_an_error_too():
    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes, self.calls = nn.Parameter(torch.zeros(4, 8), requires_grad=False), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 3:
                self.codes.copy_(x[:4])
            return x @ self.codes.t()

    model = apply_policy(nn.Sequential(nn.Linear(8, 8), Codes()), "mixed_bfloat16")
    with torch.no_grad():
        for _ in range(2):
            model(X)
        with pytest.raises(PolicyError, match=r"changes 1\.codes"):
            model(X)
