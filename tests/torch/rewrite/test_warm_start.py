"""A second process takes painted graphs out of Inductor's caches, and never the wrong ones."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from halfstep import PolicyMap
from halfstep.torch import autocast


def compiled(kept):
    """Compile a model with one of its layers in float32; say what the caches knew of it."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    with torch.no_grad():
        out = autocast(model, PolicyMap("mixed_bfloat16", {kept: "float32"}))(x)
        for name, layer in model.named_children():
            low = copy.deepcopy(layer).bfloat16()
            x = layer(x) if name == kept else low(x.bfloat16()).float()
    return {
        "right": torch.allclose(out, x, rtol=1e-3, atol=1e-3),
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"],
        "painted anew": counters["aot_autograd"]["autograd_cache_miss"],
    }


def in_a_process(folder, *kept):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *kept],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_second_process_starts_warm_and_with_the_right_graph(tmp_path):
    cold = {"right": True, "hits": 0, "misses": 1, "painted anew": 1}
    assert in_a_process(tmp_path, "0") == [cold]
    warm, other = in_a_process(tmp_path, "0", "1")
    assert warm == {"right": True, "hits": 1, "misses": 0, "painted anew": 0}
    # the graphs of Dynamo are the same, only the names of the modules in them tell which is which
    assert other == cold


@pytest.fixture
def key_of(monkeypatch):
    """Return the key that Inductor's caches are given for a graph, without compiling it."""
    from torch._inductor import compile_fx

    keys = []

    def record(graph, inputs, config_patches):
        pass_ = config_patches["joint_custom_pre_pass"]
        keys.append(pass_.uuid())
        pass_.low_operations = 1
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", record)

    def key(policy="mixed_bfloat16", **keywords):
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        settled = autocast(model, policy, **keywords)
        with pytest.raises(Exception, match="nothing runs"):
            settled(torch.randn(2, 8))  # nothing was painted, for nothing was compiled
        return keys[-1]

    return key


def test_the_key_holds_all_that_a_painting_depends_on(key_of):
    kept = {name: PolicyMap("mixed_bfloat16", {name: "float32"}) for name in ("0", "1")}
    made = [
        key_of(), key_of("mixed_float16"), key_of(kept["0"]), key_of(kept["1"]),
        key_of(deny=["gelu"]), key_of(deny=["relu"]), key_of(allow=["pow"]),
        key_of(level="matrix_products"),
    ]  # fmt: skip
    assert len(set(made)) == len(made)
    assert made[0] == key_of()
    assert made[2] == key_of(PolicyMap("mixed_bfloat16", {"0": "float32"}))


if __name__ == "__main__":
    for kept in sys.argv[1:]:
        print(json.dumps(compiled(kept)))
