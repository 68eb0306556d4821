"""Under DistributedDataParallel: all ranks have the same weights, digits and all, or it says so."""

import pytest

POLICIES = ("mixed_bfloat16", "master_bfloat16", "master_float16", "kahan_bfloat16")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", ["a loss each", "checkpointed", "unlike seeds"])
def test_ranks_have_the_same_weights(two, policy, way):
    assert all(found["replicas agree"][policy, way] for found in two)


def test_blocks_that_are_run_again_in_micro_batches_are_told_of_once(two):
    key = "mixed_bfloat16", "checkpointed micro-batches"
    assert all(found["replicas agree"][key] for found in two)


def test_a_dtype_that_changes_behind_its_back_is_refused(two):
    for found in two:
        said = found["replicas refused"]
        assert "heads.0.0.weight got its policy" in said["seen in forward"]
        assert "stops to reduce the gradient" in said["seen around"]
        assert "stops to reduce the gradient" in said["seen within"]
        assert said["float32 variables"] == ""
