"""Policies and loss scaling on two and four gloo processes: the same training as on one.

Tolerances, of a loss: each rank rounds the gradients of its own examples to 16 bits before they are
added in float32, where one process rounds their sum: 2e-3 after three steps of AdamW (measured).
"""

import pytest
import torch

TOLERANCE = 1e-2
WAYS = (
    "ddp",
    "fsdp2, policy last",
    "fsdp2, policy first",
    "fsdp2, torch's mp_policy",
    "fsdp2, fsdp_policy",
    "fsdp2, checkpointed",
    "tensor parallel, policy first",
    "tensor parallel, policy last",
)


FOUR_WAYS = (
    "ddp",
    "fsdp2, policy first",
    "fsdp2 x tensor parallel",
    "fsdp2, hybrid",
    "fsdp2, hybrid, policy last",
)


@pytest.mark.parametrize("kind", ["losses", "scaled losses"])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_like_one(two, way, kind):
    for rank in two:
        found = rank[kind]
        assert found[way] == pytest.approx(found["one process"], rel=TOLERANCE)


@pytest.mark.parametrize("way", FOUR_WAYS)
def test_four_processes_train_like_one(four, way):
    for rank in four:
        found = rank["losses"]
        assert found[way] == pytest.approx(found["one process"], rel=TOLERANCE)


def test_the_order_of_fully_shard_and_apply_policy_makes_no_difference(two):
    for kind in ("losses", "scaled losses"):
        found = two[0][kind]
        assert found["fsdp2, policy first"] == found["fsdp2, policy last"]
        assert found["tensor parallel, policy first"] == found["tensor parallel, policy last"]


def test_gradients_are_reduced_in_float32_unless_asked_otherwise(two):
    for name, dtypes in two[0]["reductions"].items():
        low = {"ddp, float16 hook": "torch.float16", "fsdp2, reduce_dtype": "torch.bfloat16"}
        assert dtypes == [low.get(name, "torch.float32")], name


@pytest.mark.parametrize("way", ["ddp, float16 hook", "fsdp2, reduce_dtype"])
def test_reductions_in_16_bits_train_too(two, way):
    found = two[0]["16-bit losses"]
    assert found[way] == pytest.approx(found["one process"], rel=2e-2)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(two, way):
    for rank in two:
        assert rank["overflow"][way] == {
            "kept": True,
            "skipped": True,
            "scale": 2.0**14,
            "goes on": True,
        }


def test_a_rank_that_holds_nothing_takes_part(two):
    assert [rank["empty"]["numbers here"] for rank in two] == [16, 0]
    for rank in two:
        assert (rank["empty"]["skipped"], rank["empty"]["scale"]) == (1, 2.0**14)


def test_micro_batches_without_communication_add_up(two):
    assert all(rank["accumulated"] < 5e-3 for rank in two)


def test_a_sharded_model_can_be_sliced_and_change_its_policy(two):
    for rank in two:
        assert rank["parts"]["dtypes"] == ["torch.bfloat16", "torch.float32", "torch.float16"]
        assert "FSDP" not in rank["parts"]["slice"]


@pytest.mark.parametrize("order", ["policy first", "policy last"])
def test_no_copy_of_a_gathered_weight_waits_for_the_backward(two, order):
    for rank in two:
        kept = rank["bytes"]
        # one process keeps all copies; sharded, what is left are activations
        assert kept["one process"] > kept["weights"]
        assert kept[order] <= kept["one process"] - kept["weights"]
        assert kept[f"{order}, same gradients"]


def test_hooks_on_saved_tensors_compose(two):
    shapes = two[0]["hooks"]["saved"]
    assert (4, 64) in shapes, "an activation reaches the user's hooks"
    assert (64, 32) not in shapes, "a gathered weight does not: nothing is kept of it"
    assert (32, 64) not in shapes


def test_writing_to_a_saved_activation_is_still_an_error(two):
    assert "modified by an inplace operation" in two[0]["hooks"]["said"]


def test_a_checkpoint_of_four_ranks_continues_on_two_bit_for_bit(four, two):
    for rank in two:
        saved, loaded = four[0]["saved"], rank["loaded"]
        for name in ("weights", "moments"):
            assert all(map(torch.equal, saved[name], loaded[name]))
        for name in ("steps", "scale", "skipped", "history"):
            assert loaded[name] == saved[name]
        assert loaded["history"] == [(2, 2.0**14, True)]
        assert loaded["goes on"]
