import json

import pytest
import torch

from halfstep import Policy, PolicyError, RecipeError
from halfstep.compare import Settings, compare, parse_policies, summarise
from halfstep.core.record import read_record

QUICK = Settings(memory=False)


def test_the_summary_is_that_of_the_record(recipe, tmp_path):
    path = tmp_path / "run.jsonl"
    summary = compare(recipe(), "float32,mixed_bfloat16", QUICK, record=path, command="the command")
    assert summary["status"] == "finished"
    assert summary["command"] == "the command"
    assert json.loads(json.dumps(summarise(read_record(path)))) == json.loads(json.dumps(summary))
    policies = summary["recipes"][0]["policies"]
    assert [policy["steps"] for policy in policies.values()] == [4, 4]
    assert policies["mixed_bfloat16"]["ratio"]["count"] == 3
    json.dumps(summary, allow_nan=False)


def test_the_default_policies_are_the_three_of_the_design(recipe):
    summary = compare(recipe(), settings=QUICK)
    assert list(summary["policies"]) == ["float32", "mixed_float16", "mixed_bfloat16"]
    assert summary["recipes"][0]["baseline"] == "float32"
    assert [p["computes_in"] for p in summary["policies"].values()] == [
        [], ["float16"], ["bfloat16"],
    ]  # fmt: skip


def test_several_recipes_follow_each_other(recipe):
    summary = compare([recipe(), recipe(name="other")], "float32", Settings(steps=1, memory=False))
    assert [len(r["policies"]["float32"]["losses"]) for r in summary["recipes"]] == [1, 1]


def test_setup_runs_first_and_its_note_is_shown(recipe):
    noted = recipe(
        """
        def setup(seed, device):
            seen.append((seed, device))
            return "Scaled down."
        """
    )
    summary = compare(noted, "float32", Settings(seed=3, memory=False))
    assert noted.module.seen == [(3, "cpu")]
    assert summary["recipes"][0]["note"] == "Scaled down."


@pytest.mark.parametrize("at", ["header", "recipe", "step", "evaluation"])
def test_ctrl_c_leaves_what_there_was(recipe, tmp_path, at):
    def watch(event):
        if event["event"] == at and event.get("step", 2) == 2:
            raise KeyboardInterrupt

    path = tmp_path / "run.jsonl"
    if at == "header":  # nothing has begun: there is nothing to show
        with pytest.raises(KeyboardInterrupt):
            compare(recipe(), "float32", QUICK, record=path, on_event=watch)
        assert read_record(path).header["kind"] == "compare"
        return
    summary = compare(recipe(), "float32", QUICK, record=path, on_event=watch)
    assert summary["status"] == "interrupted"
    assert summary["recipes"][0]["policies"]["float32"]["status"] == "unfinished"
    assert summarise(read_record(path))["status"] == "interrupted"


def test_a_later_recipe_that_fails_does_not_lose_the_first(recipe):
    broken = recipe("def loss(model, batch): return None", name="broken")
    summary = compare([recipe(), broken, recipe(name="never")], "float32", QUICK)
    assert [r["status"] for r in summary["recipes"]] == ["finished", "failed"]
    assert summary["status"] == "failed"
    assert "must return a scalar tensor" in summary["error"]
    assert summary["recipes"][0]["policies"]["float32"]["steps"] == 4


def test_a_policy_that_cannot_be_applied_leaves_the_others_alone(recipe, tmp_path):
    file = tmp_path / "strange.json"
    config = {"default": {"name": "mixed_float16"}, "overrides": {"nowhere": {"name": "float32"}}}
    file.write_text(json.dumps(config))
    summary = compare(recipe(), f"float32,{file}", QUICK)
    policies = summary["recipes"][0]["policies"]
    assert policies["strange"]["status"] == "failed"
    assert "nowhere" in policies["strange"]["reason"]
    assert policies["float32"]["status"] == "finished"


def test_a_model_that_blows_up_is_reported_and_the_baseline_is_not(recipe):
    blowing = recipe(
        """
        def loss(model, batch):
            low = model[0](batch["x"]).dtype == torch.bfloat16
            return model(batch["x"]).square().mean() * (float("nan") if low else 1.0)
        """
    )
    summary = compare(blowing, "float32,mixed_bfloat16", Settings(steps=9, memory=False))
    policies = summary["recipes"][0]["policies"]
    assert policies["mixed_bfloat16"]["status"] == "diverged"
    assert policies["mixed_bfloat16"]["stopped_at"] == 0
    assert policies["float32"]["steps"] == 9
    assert "mixed_bfloat16 diverged at step 0" in summary["recipes"][0]["verdict"]


def test_a_recipe_that_is_not_there_is_an_error_before_anything_is_written(tmp_path):
    path = tmp_path / "run.jsonl"
    with pytest.raises(RecipeError):
        compare(["digits-mlp", "nonsense"], "float32", QUICK, record=path)
    with pytest.raises(PolicyError):
        compare("digits-mlp", "float32,mixed_flaot16", QUICK, record=path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("mixed_flaot16", "Did you mean 'mixed_float16'"),
        ("fp16", r"Did you mean 'mixed_float16'\?$"),
        ("float32,float32", "twice"),
        (" , ", "none given"),
        ("nothing.json", "nothing.json holds no policy"),
    ],
)
def test_policies_that_are_none_are_refused(argument, said):
    with pytest.raises(PolicyError, match=said):
        parse_policies(argument)


@pytest.mark.parametrize("text", ["[]", "{", '{"name": "float33"}', '{"defualt": 1}'])
def test_a_file_that_holds_no_policy_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(PolicyError, match=r"mine\.json holds no policy"):
        parse_policies(str(tmp_path / "mine.json"))


def test_a_file_may_hold_a_policy_with_its_loss_scale(tmp_path):
    policy = Policy("mixed_float16", loss_scale=1024)
    (tmp_path / "fixed.json").write_text(json.dumps(policy.get_config()))
    assert parse_policies(["float32", str(tmp_path / "fixed.json")])["fixed"] == policy


def test_threads_hold_for_the_run_alone(recipe):
    before = torch.get_num_threads()
    seeing = recipe("def setup(seed, device): return f'{torch.get_num_threads()} threads'")
    summary = compare(seeing, "float32", Settings(steps=1, memory=False, threads=before + 1))
    assert summary["recipes"][0]["note"] == f"{before + 1} threads"
    assert summary["machine"]["threads"] == before + 1
    assert torch.get_num_threads() == before
