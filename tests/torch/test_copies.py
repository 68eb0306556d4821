"""The 16-bit copies of weights: few launches, never stale, gone when the call is over."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfstep import PolicyError
from halfstep.torch import apply_policy, copies, grouping, weights_unchanged


def test_few_casts_and_two_grouped_copies(make_transformer, tokens, counts):
    """In the compute dtype throughout, a step casts at the edges of the model and nowhere else."""
    model = apply_policy(make_transformer(), "mixed_bfloat16", functional="compute")
    with counts() as seen:
        model(tokens).pow(2).mean().backward()
    low, full = torch.bfloat16, torch.float32
    # the rows of the embedding and the logits, there and back
    assert sorted(seen.casts, key=str) == [(low, full)] * 2 + [(full, low)] * 2
    assert seen.calls["_foreach_copy_"] == 2, "all weights forward, all gradients backward"


def test_a_weight_is_cast_once_a_call_however_often_it_is_used(counts):
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            for _ in range(5):
                x = self.layer(x)
            return x

    model = apply_policy(Repeated(), "mixed_bfloat16", output_dtype=None)
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    with counts() as seen:
        model(x)
    assert len(seen.casts) == 2, "the weight and the bias"


def test_tied_weights_share_one_copy(counts):
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    model = apply_policy(nn.Sequential(first, second), "mixed_bfloat16", output_dtype=None)
    with counts() as seen:
        model(torch.ones(1, 8, dtype=torch.bfloat16))
    assert len(seen.casts) == 1


def _write_in_place(parameter):
    with torch.no_grad():
        parameter.mul_(0)


def _write_data(parameter):
    parameter.data.mul_(0)


def _swap_data(parameter):
    parameter.data = torch.zeros_like(parameter)


def _write_numpy(parameter):
    parameter.detach().numpy()[...] = 0


WRITES = [_write_in_place, _write_data, _swap_data, _write_numpy]


@pytest.mark.parametrize("write", WRITES)
def test_every_kind_of_write_is_seen_by_the_next_call(write, make_transformer, tokens):
    """An EMA that writes through ``.data`` does not raise the version: freshness rests on calls."""
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    assert model(tokens).abs().max() > 0
    write(model.head.weight)
    assert model(tokens).abs().max() == 0


@pytest.mark.parametrize("optimizer", ["AdamW fused", "AdamW", "SGD fused", "SGD"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_loop_in_one_region_trains(optimizer, kept, make_transformer, tokens):
    """Fault 9 of torch.amp: its cache, inside one autocast region, never sees a step."""
    import contextlib

    name, _, fused = optimizer.partition(" ")
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    step = getattr(torch.optim, name)(model.parameters(), lr=1e-2, fused=bool(fused))
    losses = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        weights_unchanged(model) if kept else contextlib.nullcontext(),
    ):
        for _ in range(6):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01


def test_weights_unchanged_casts_once_for_many_micro_batches(make_transformer, tokens, counts):
    plain, model = (
        apply_policy(make_transformer(), "mixed_bfloat16", functional="compute") for _ in range(2)
    )
    for _ in range(3):
        plain(tokens).pow(2).mean().backward()
    with counts() as seen, weights_unchanged(model):
        for _ in range(3):
            model(tokens).pow(2).mean().backward()
    assert seen.calls["_foreach_copy_"] == 1 + 3, "once forward, and each backward"
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_weights_unchanged_ends_with_its_block(make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    with weights_unchanged(model), torch.no_grad():
        model(tokens)
    model.head.weight.data.zero_()
    assert model(tokens).abs().max() == 0


def test_weights_unchanged_sees_what_torch_can_see(make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    with weights_unchanged(model):
        model(tokens)
        _write_in_place(model.head.weight)
        assert model(tokens).abs().max() == 0


def test_copies_made_without_a_graph_do_not_cut_gradients(make_transformer, tokens):
    """What torch.amp's cache did for years (pytorch issues 65766, 112583)."""
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    with weights_unchanged(model):
        with torch.no_grad():
            model(tokens)
        with torch.inference_mode():
            model(tokens)
        model(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_unchanged_wants_a_policy():
    with pytest.raises(PolicyError, match="no policy"), weights_unchanged(nn.Linear(2, 2)):
        pass


def test_a_weight_that_takes_no_part_gets_no_gradient():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            return self.layers[3](self.layers[0](x))

    model = apply_policy(Partly(), "mixed_bfloat16")
    model(torch.ones(1, 4)).sum().backward()
    there = [layer.weight.grad is not None for layer in model.layers]
    assert there == [True, False, False, True]


def test_groups_are_bounded(monkeypatch, make_transformer, tokens, counts):
    monkeypatch.setattr(grouping, "GROUP_BYTES", 16 * 48 * 4 * 2)
    model = apply_policy(make_transformer(), "mixed_bfloat16", functional="compute")
    with counts() as seen:
        model(tokens)
    assert seen.calls["_foreach_copy_"] > 1


def test_copies_are_freed_when_the_call_is_over(make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    with torch.no_grad():
        model(tokens)
    assert copies.calls.copies is None
    gc.collect()
    low = [
        obj for obj in gc.get_objects()
        if type(obj) is torch.Tensor and obj.dtype is torch.bfloat16 and obj.dim() == 2
    ]  # fmt: skip
    assert not any(tensor.shape == model.head.weight.shape for tensor in low)


def test_memory_format_of_a_weight_is_kept():
    convolution = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    model = apply_policy(nn.Sequential(convolution, nn.Conv2d(8, 2, 1)), "mixed_bfloat16")
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        model(torch.ones(1, 4, 5, 5))
    low = [t for t in seen if t.shape == (8, 4, 3, 3) and t.dtype is torch.bfloat16]
    assert low
    assert low[0].is_contiguous(memory_format=torch.channels_last)


def _loaded_anew(model):
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)


def test_replaced_weights_are_freed():
    model = apply_policy(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "mixed_bfloat16")
    seen = []
    for _ in range(3):
        seen.append(weakref.ref(model[0].weight))
        model(torch.ones(1, 4))
        _loaded_anew(model)
    for _ in range(2):  # the first finds them replaced, the second looks at the model anew
        model(torch.ones(1, 4))
    gc.collect()
    assert [there() for there in seen] == [None] * 3


def test_a_model_knows_the_devices_of_parts_that_moved_by_themselves():
    model = apply_policy(nn.Sequential(nn.Linear(4, 4)), "mixed_bfloat16")
    model(torch.ones(1, 4))
    assert copies.entry_of(model).devices == ("cpu",)
    model[0].to("meta")
    assert copies.entry_of(model).devices == ()


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        return self.a(x), self.b(x)


def test_hooks_of_weights_without_a_gradient_are_not_run():
    model = apply_policy(Heads(), "mixed_bfloat16")
    ran = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: ran.append((name, grad is None)))
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: ran.append((name, p.grad is None))
        )
    model(torch.ones(2, 4))[0].sum().backward()
    assert sorted(ran) == sorted([("a.weight", False), ("a.bias", False)] * 2)


def _step_at_once(parameter):
    parameter.data.sub_(parameter.grad, alpha=0.125)


def test_an_optimizer_in_the_backward_updates_each_weight_once():
    model, other = apply_policy(Heads(), "mixed_bfloat16"), Heads()
    other.load_state_dict(model.state_dict())
    for trained in (model, other):
        for parameter in trained.parameters():
            parameter.register_post_accumulate_grad_hook(_step_at_once)
        first, second = trained(torch.ones(2, 4))
        first.sum().backward()
        second.sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
