"""Steps inside ``torch.compile``: no graph breaks, no recompilation once it runs, same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from halfstep import DynamicLossScale
from halfstep.torch import LossScaleOptimizer, apply_policy


def _start(policy, kind, max_norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    apply_policy(model, policy)
    inner = getattr(torch.optim, kind)(model.parameters(), lr=0.05)
    scale = DynamicLossScale(initial_scale=64) if policy == "mixed_float16" else None
    return model, LossScaleOptimizer(inner, scale, max_norm=max_norm)


def _run(policy, kind, max_norm, compiled, steps=5):
    torch._dynamo.reset()
    model, optimizer = _start(policy, kind, max_norm)

    def forward(inputs, size):
        return optimizer.scale(model(inputs).square().sum() * size)

    step = optimizer.step
    counter = CompileCounterWithBackend("eager")
    if compiled:
        forward = torch.compile(forward, fullgraph=True, backend=counter)
    graphs = []
    for number in range(steps):
        optimizer.zero_grad()
        size = torch.tensor(float("inf") if number == 3 else 1.0)
        forward(torch.ones(3, 4), size).backward()
        step()
        if compiled and number == 0:  # the state of the optimizer is made outside
            step = torch.compile(optimizer.step, fullgraph=True, backend=counter)
        graphs.append(counter.frame_count)
    return model, optimizer, graphs


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize(
    ("policy", "kind", "max_norm"),
    [("mixed_float16", "AdamW", 1.0), ("mixed_bfloat16", "SGD", None)],
)
def test_forward_and_step_compile_whole(policy, kind, max_norm):
    model, optimizer, graphs = _run(policy, kind, max_norm, compiled=True)
    assert graphs[-1] == graphs[2] > 0
    plain, theirs, _ = _run(policy, kind, max_norm, compiled=False)
    if policy == "mixed_float16":  # bfloat16 has no scale, and skips nothing
        assert optimizer.skipped_steps == theirs.skipped_steps == 1
        assert optimizer.current_scale == theirs.current_scale == 32
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_whole_step_is_captured_in_a_cuda_graph(policy):
    model, optimizer = _start(policy, "AdamW", 1.0)
    model.cuda()
    inner = torch.optim.AdamW(model.parameters(), lr=0.05, capturable=True)
    optimizer = LossScaleOptimizer(inner, optimizer.loss_scale, max_norm=1.0)
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
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole()
    scaled = policy == "mixed_float16"
    steps = len(optimizer.scale_history), optimizer.state_dict()["loss_scale"]["steps"]
    for size, skipped in ((1.0, False), (float("inf"), scaled), (1.0, False)):
        if not scaled and size != 1:
            continue  # nothing is skipped there: that would be the end of it
        inputs.fill_(size)
        before, scale = model[0].weight.detach().clone(), optimizer.current_scale
        graph.replay()
        assert torch.equal(before, model[0].weight) is skipped
        assert model[0].weight.isfinite().all()
        assert optimizer.last_step_skipped is skipped
        assert optimizer.current_scale == (scale / 2 if skipped else scale)
    if scaled:
        events, taken = optimizer.scale_history, optimizer.state_dict()["loss_scale"]["steps"]
        assert (len(events), taken) == (steps[0] + 1, steps[1] + 3), "capturing is no step"
        assert events[-1] == (steps[1] + 2, optimizer.current_scale, True)
