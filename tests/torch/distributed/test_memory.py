"""16-bit weights on two and four processes: the same training, and no digit lost on the way.

Tolerance of a loss: bfloat16 gradients are rounded by each rank, and again by their sum.
"""

import pytest
import torch

POLICIES = ("master_bfloat16", "master_float16", "kahan_bfloat16")
WAYS = (
    "ddp",
    "ddp, float32 hook",
    "fsdp2, policy last",
    "fsdp2, policy first",
    "fsdp2, fsdp_policy",
    "tensor parallel, policy first",
    "tensor parallel, policy last",
)


def check(ranks, way, policy):
    for rank in ranks:
        found = rank["memory losses"][policy, way]
        one = rank["memory losses"][policy, "one process"]
        assert found["losses"] == pytest.approx(one, rel=3e-2)
        assert found["same digits"], "every shard has its part of what one process keeps"
        assert found["placed"], "what is kept of a DTensor is one"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_like_one(two, way, policy):
    check(two, way, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "way",
    [
        "ddp",
        "fsdp2, policy first",
        "fsdp2 x tensor parallel",
        "fsdp2 x tensor parallel, policy first",
        "fsdp2, hybrid",
        "fsdp2, hybrid, policy last",
    ],
)
def test_four_processes_train_like_one(four, way, policy):
    check(four, way, policy)


@pytest.mark.parametrize("policy", ["master_float16", "kahan_bfloat16"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "tensor parallel"])
def test_an_overflow_on_one_rank_leaves_masters_and_rests_in_step(two, way, policy):
    for rank in two:
        found = rank["memory overflow"][policy, way]
        assert found == {"kept": True, "skipped": True, "goes on": True, "in step": True}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_checkpoint_of_four_ranks_restores_every_digit_on_two(four, two, policy):
    saved = four[0]["memory saved"][policy]
    for rank in two:
        found = rank["memory loaded"][policy]
        assert [t.dtype for t in saved] == [t.dtype for t in found["loaded"]]
        assert all(map(torch.equal, saved, found["loaded"]))
        assert found["state"] == {"torch.float32"}
        assert (found["skipped"], found["goes on"]) == (1, True)


def test_16_bit_gradients_are_summed_in_float32_where_asked(two):
    assert two[0]["memory reductions"] == {
        "ddp": ["torch.bfloat16", "torch.float32"],  # the head is in float32
        "ddp, float32 hook": ["torch.float32"],
        "fsdp2, policy first": ["torch.bfloat16", "torch.float32"],
        "fsdp2, fsdp_policy": ["torch.float32"],
    }


def test_a_model_may_get_its_memory_after_it_was_sharded(two):
    for rank in two:
        found = rank["deferred"]
        assert found["policy first"] == found["policy last"]
        scale, weight, wide = found["policy first"]
        assert scale > 1, "the loss scale that the policy wants"
        assert wide
        assert 0.06 < weight < 0.14, "at most three steps of 0.01 from 0.1"


def test_a_policy_says_its_loss_scale_through_shards(two):
    for (policy, _), kind in two[0]["wanted"].items():
        assert kind == ("DynamicLossScale" if policy == "mixed_float16" else "NoLossScale")


def test_what_cannot_be_is_said(two):
    found = two[0]["memory refused"]
    assert "Step with halfstep.torch.LossScaleOptimizer(AdamW(...))" in found["bare"]
    assert "fully_shard fixes it at the first forward pass" in found["removed"]
    assert found["digits come back"]
