"""What users already do with a model goes on working when it has a policy."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from halfstep.torch import apply_policy, policy_of

BOTH = pytest.mark.parametrize("functional", ["autocast", "compute"])


def largest_error(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).detach().norm() / b[name].norm()) for name in a)


def test_state_dict_has_the_same_keys_in_float32(make_transformer):
    plain, model = make_transformer(), apply_policy(make_transformer(), "mixed_float16")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    model.load_state_dict({name: value + 1 for name, value in plain.state_dict().items()})
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain.head.weight, model.head.weight)


def test_deepcopy_is_independent(make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    before = model(tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens), before)
    twin.head.weight.data.zero_()
    assert twin(tokens).abs().max() == 0
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol, make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16", {"head": "float32"})
    twin = pickle.loads(pickle.dumps(model, protocol))
    assert torch.equal(twin(tokens), model(tokens))
    assert policy_of(twin.head) == policy_of(model.head)
    assert isinstance(twin, type(make_transformer()))


def test_torch_save_of_a_whole_model(make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(tokens), model(tokens))


def test_hooks_fire_and_see_what_flows(make_transformer, gradients):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    seen = []
    head = model.head
    head.register_forward_pre_hook(lambda module, args: seen.append(("pre", args[0].dtype)))
    head.register_forward_hook(
        lambda module, args, out: seen.append(("out", out.dtype, module.weight.dtype))
    )
    head.register_full_backward_hook(
        lambda module, grad_in, grad_out: seen.append(("back", grad_out[0].dtype))
    )
    head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(("acc", p.grad.dtype)))
    gradients(model)
    low, full = torch.bfloat16, torch.float32
    assert seen[:2] == [("pre", full), ("out", low, full)] or seen[0] == ("pre", low)
    assert {entry[0] for entry in seen} == {"pre", "out", "back", "acc"}
    assert ("out", low, full) in seen
    assert ("back", low) in seen
    assert ("acc", full) in seen


@BOTH
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_whole(functional, backend, make_transformer, tokens, gradients):
    torch._dynamo.reset()
    model = apply_policy(make_transformer(), "mixed_bfloat16", functional=functional)
    expected, eager = gradients(model), model(tokens)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        found = gradients(model, compiled)
    assert torch.equal(compiled(tokens), eager)
    assert largest_error(found, expected) < 1e-2
    assert counter.frame_count == 1, "one graph, never made again"


def test_compile_sees_an_override(make_transformer, tokens):
    torch._dynamo.reset()
    model = apply_policy(make_transformer(), "mixed_bfloat16", {"blocks.1": "float32"})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens), model(tokens))


def test_compile_with_inductor(make_transformer, tokens, gradients):
    torch._dynamo.reset()
    model = apply_policy(make_transformer(depth=1), "mixed_bfloat16")
    expected = gradients(model)
    compiled = torch.compile(model, fullgraph=True)
    assert largest_error(gradients(model, compiled), expected) < 2e-2
    assert compiled(tokens).dtype is torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from inside Dynamo
def test_compile_by_block(make_transformer, tokens, gradients):
    torch._dynamo.reset()
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    expected = gradients(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        found = gradients(model)
    assert largest_error(found, expected) < 1e-2
    assert counter.frame_count == 1, "three blocks share one graph"


@BOTH
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_activation_checkpointing(functional, kind, make_transformer, gradients):
    plain = apply_policy(make_transformer(), "mixed_bfloat16", functional=functional)
    model = apply_policy(
        make_transformer(checkpointed=kind), "mixed_bfloat16", functional=functional
    )
    assert largest_error(gradients(model), gradients(plain)) == 0


def test_functional_call_and_per_sample_gradients(make_transformer, tokens, gradients):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    weights = dict(model.named_parameters())
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    assert torch.func.functional_call(model, zeros, (tokens,)).abs().max() == 0
    assert model(tokens).abs().max() > 0, "the model's own weights are untouched"

    def loss(values, batch):
        return torch.func.functional_call(model, values, (batch,)).pow(2).mean()

    found = torch.func.grad(loss)(weights, tokens)
    assert largest_error(found, gradients(model)) < 2e-2
    each = torch.func.vmap(lambda row: torch.func.grad(loss)(weights, row[None]))(tokens)
    mean = {name: value.mean(0) for name, value in each.items()}
    assert largest_error(mean, gradients(model)) < 2e-2


def test_second_derivatives(make_transformer, tokens):
    results = []
    for policy in (None, "mixed_float16"):
        model = make_transformer()
        if policy:
            apply_policy(model, policy)
        loss = model(tokens).pow(2).mean()
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        sum(gradient.pow(2).sum() for gradient in first).backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert largest_error(results[1], results[0]) < 1e-2


def test_eval_no_grad_and_inference_mode_leave_nothing_behind(make_transformer, tokens, gradients):
    model, fresh = (apply_policy(make_transformer(), "mixed_bfloat16") for _ in range(2))
    model.eval()
    with torch.no_grad():
        first = model(tokens)
    with torch.inference_mode():
        second = model(tokens)
    model.train()
    assert torch.equal(first, second)
    assert largest_error(gradients(model), gradients(fresh)) == 0


def test_moving_after_applying(make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    before = model(tokens)
    model.to("meta")
    assert model(tokens.to("meta")).dtype is torch.float32
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.load_state_dict(make_transformer().state_dict())
    assert torch.equal(model(tokens), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
def test_moving_to_a_gpu(functional, make_transformer, tokens, gradients):
    model = apply_policy(make_transformer(), "mixed_bfloat16", functional=functional)
    before = model(tokens)
    model.cuda()
    after = model(tokens.cuda())
    assert float((after.cpu() - before).norm() / before.norm()) < 2e-2
    gradients(model, lambda t: model(t.cuda()))
    assert {p.grad.device.type for p in model.parameters()} == {"cuda"}


def test_frozen_parts(make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    model(tokens).sum().backward()
    assert all(p.grad is None for p in model.blocks[0].parameters())
    assert all(p.grad is not None for p in model.blocks[1].parameters())
    model.blocks[0].requires_grad_(True)
    model(tokens).sum().backward()
    assert all(p.grad is not None for p in model.blocks[0].parameters())


def test_threads_share_a_model(make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    expected, failures = model(tokens), []

    def call():
        for _ in range(20):
            if not torch.equal(model(tokens), expected):
                failures.append("output")
            if model.head.weight.dtype is not torch.float32:
                failures.append("weight")

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_an_exception_in_a_forward_leaves_nothing_behind(make_transformer, tokens, gradients):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    expected = gradients(model)
    handle = model.blocks[1].out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens)
    handle.remove()
    assert not torch.is_autocast_enabled("cpu")
    assert model.blocks[1].gain.dtype is torch.float32
    assert largest_error(gradients(model), expected) == 0


@BOTH
def test_inside_of_somebody_elses_autocast(functional, make_transformer, tokens):
    model = apply_policy(
        make_transformer(), "mixed_bfloat16", {"head": "float32"}, functional=functional
    )
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        if functional == "autocast":
            assert torch.equal(model(tokens), expected)
        seen = []
        model.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        model(tokens)
        assert seen == [torch.float32], "a float32 layer computes in float32 all the same"
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()


def test_a_part_of_a_model_called_by_itself(make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    hidden = model.embed(tokens)
    assert hidden.dtype is torch.bfloat16
    for block in model.blocks:
        hidden = block(hidden)
    logits = model.head(hidden)
    assert logits.dtype is torch.bfloat16
    assert torch.allclose(logits.float(), model(tokens), atol=0.05)


def test_replacing_a_layer_afterwards(make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    model(tokens)
    model.blocks[0].out = nn.Linear(16, 16)  # plain: it runs under the model's autocast
    model.head.weight = nn.Parameter(torch.zeros(20, 16))
    model.blocks[1].qkv.weight = nn.Parameter(torch.randn(48, 16) * 0.1)
    assert model(tokens).abs().max() == 0
    model(tokens).sum().backward()
    assert model.blocks[1].qkv.weight.grad is not None


def test_data_parallel_replicas_use_their_own_weights(make_transformer, tokens):
    model = apply_policy(make_transformer(), "mixed_bfloat16")
    replica = model.head._replicate_for_data_parallel()
    replica.weight = torch.zeros(20, 16)  # what DataParallel puts there: plain tensors
    replica.bias = None
    assert replica(torch.ones(1, 16)).abs().max() == 0
    assert model.head(torch.ones(1, 16)).abs().max() > 0
