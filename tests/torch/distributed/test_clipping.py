"""Clipping sharded gradients by their norm together, in one exchange and without a host read.

Tolerances: a norm is that of torch to float32's rounding. That of one process differs by what each
rank rounds to 16 bits for its own examples: 1e-4 (measured, float16), 2e-3 (bfloat16).
"""

import pytest

POLICIES = ("mixed_float16", "mixed_bfloat16")
ROUNDED = {"mixed_float16": 5e-4, "mixed_bfloat16": 1e-2}
WAYS = (
    "ddp",
    "fsdp2, policy last",
    "fsdp2, policy first",
    "fsdp2, fsdp_policy",
    "fsdp2, checkpointed",
    "tensor parallel, policy first",
    "tensor parallel, policy last",
    "sequence parallel",
)
FOUR_WAYS = (
    "ddp",
    "fsdp2, policy first",
    "fsdp2 x tensor parallel",
    "fsdp2, hybrid",
    "fsdp2, hybrid, policy last",
)


def check(ranks, way, policy):
    one = ranks[0]["clipped"][policy, "one process"]
    for rank in ranks:
        found = rank["clipped"][policy, way]
        assert found["norm"] == pytest.approx(found["theirs"], rel=1e-6)
        assert found["norm"] == ranks[0]["clipped"][policy, way]["norm"], "the same on every rank"
        assert found["norm"] == pytest.approx(one["norm"], rel=ROUNDED[policy])
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_clip_like_one_and_like_torch(two, way, policy):
    check(two, way, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", FOUR_WAYS)
def test_four_processes_clip_like_one_and_like_torch(four, way, policy):
    check(four, way, policy)


def test_a_rank_without_gradients_takes_part(two):
    for place in range(2):
        norms = [rank["clipped"]["idle"][place] for rank in two]
        # only rank 0 had any: its norm is the norm, and it alone moves
        assert [norm for norm, _, _ in norms] == pytest.approx([norms[0][1]] * 2, rel=1e-5)
        assert [moved for _, _, moved in norms] == [True, False]


@pytest.mark.parametrize("way", ["fsdp2", "tensor parallel"])
def test_the_grad_scaler_skips_on_all_ranks_too(two, way):
    for rank in two:
        assert rank["clipped"]["scaler"][way] == (2.0**15, True)


def test_a_mesh_of_some_ranks_needs_to_be_told_who_agrees(four):
    one = four[0]["clipped"]["mixed_float16", "one process"]["norm"]
    for rank in four:
        pairs = rank["clipped"]["pairs"]
        assert "holds 2 of the 4 processes: pass process_group=" in pairs["refused"]
        assert pairs["norm"] == pytest.approx(one, rel=5e-4)
        assert pairs["skipped"], "one rank of the other pair overflowed"


def test_a_step_sends_three_numbers_once_and_reads_nothing(two, four):
    found = {**two[0]["traffic"], **four[0]["traffic"]}
    assert len(found) == 21
    for case, seen in found.items():
        fused = case[1] != "undone"  # skip="device", of an optimizer without such kernels
        assert seen == {"sent": 1, "read": 0, "fused": fused, "placed": True}, case
