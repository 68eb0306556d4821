"""Policies on models of Hugging Face ``transformers``, built from their configs."""

import functools
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch

from halfstep import PolicyWarning
from halfstep.torch import LossScaleOptimizer, apply_policy, remove_policy

# with labels, some of these models compute a loss in 16 bits under functional="compute", and are
# told so: test_a_loss_inside_of_the_model_is_named
pytestmark = pytest.mark.filterwarnings("ignore:This .* returns a scalar in .*:UserWarning")

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()


def _load_zoo():
    """The list of models is the benchmarks' one, which is no package of the tests."""
    path = Path(__file__).parents[2] / "benchmarks" / "zoo.py"
    spec = importlib.util.spec_from_file_location("halfstep_benchmark_zoo", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = _load_zoo()
POLICIES = ("mixed_float16", "mixed_bfloat16")
FUNCTIONALS = ("autocast", "compute")

# |low - float32| / |float32| over all logits and over all gradients. A rounding to nearest errs by
# 2**-11 (float16) or 2**-8 (bfloat16) at most; measured on these models: at most 1.2e-3 and 9e-3
# of the output, 1e-3 and 8e-3 of the gradients.
OUTPUT = {"mixed_float16": 2e-3, "mixed_bfloat16": 1.5e-2}
GRADIENT = {"mixed_float16": 2e-3, "mixed_bfloat16": 1.5e-2}
# Where a gradient turns on which side of a kink a value lies, or is what two almost equal numbers
# leave, rounding moves it more; torch.autocast errs alike on them (docs/torch-models.md).
GRADIENT_OF = {
    "T5": {"mixed_float16": 2.5e-2, "mixed_bfloat16": 6e-2},  # ReLU between layers
    "CLIP": {
        "mixed_float16": 1e-2,
        "mixed_bfloat16": 8e-2,
    },  # contrasts two almost equal embeddings
    "Gemma2": {"mixed_float16": 3e-3, "mixed_bfloat16": 2.5e-2},  # soft caps and four norms a layer
    "ResNet": {"mixed_float16": 2e-2, "mixed_bfloat16": 0.3},  # max pool
}

MOST_SKIPS = 6
"""Gradients of Gemma2 and CLIP overflow at the first loss scale, 2**15: it finds a lower one."""


def _runs():
    """Every model with every attention under both policies; the two meanings of functional take
    turns, so that each meets each model, each policy and each attention."""
    for case in zoo.ZOO:
        for i, attention in enumerate(case.attentions or (None,)):
            for j, policy in enumerate(POLICIES):
                functional = FUNCTIONALS[(i + j) % 2]
                label = "-".join(filter(None, (case.name, attention, policy, functional)))
                yield pytest.param(case, attention, policy, functional, id=label)


def _gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@functools.cache
def _reference(name, attention):
    """Output and gradients of the model in float32."""
    case = zoo.case_named(name)
    model = case.build(attention)
    result = model(**case.inputs())
    result.loss.backward()
    return result[case.output].detach(), _gradients(model)


def _error(low, exact):
    return ((low - exact).norm() / exact.norm()).item()


def _flat(gradients, names):
    return torch.cat([gradients[name].flatten() for name in names])


@pytest.mark.parametrize(("case", "attention", "policy", "functional"), list(_runs()))
def test_trains_like_float32(case, attention, policy, functional):
    exact, exact_gradients = _reference(case.name, attention)
    model = case.build(attention)
    keys = list(model.state_dict())
    apply_policy(model, policy, functional=functional)
    optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    for _ in range(MOST_SKIPS):
        optimizer.zero_grad()
        result = model(**case.inputs())
        optimizer.backward(result.loss)
        optimizer.unscale_()
        gradients = {name: gradient.clone() for name, gradient in _gradients(model).items()}
        optimizer.step()
        if not optimizer.last_step_skipped:
            break
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())

    output = result[case.output]
    assert output.dtype is torch.float32
    assert result.loss.dtype is torch.float32
    assert 0 < _error(output, exact) < OUTPUT[policy]  # 0 would be float32 all along
    assert gradients.keys() == exact_gradients.keys()
    bound = GRADIENT_OF.get(case.name, GRADIENT)[policy]
    assert _error(_flat(gradients, gradients), _flat(exact_gradients, gradients)) < bound
    assert not optimizer.last_step_skipped
    after = dict(model.named_parameters())
    assert all(p.dtype is torch.float32 for p in after.values())
    assert all(g.dtype is torch.float32 for g in gradients.values())
    assert list(model.state_dict()) == keys
    assert all(t.dtype is not torch.float16 for t in model.state_dict().values())
    unmoved = {name for name in gradients if torch.equal(before[name], after[name])}
    assert unmoved == {name for name in gradients if not gradients[name].any()}


def _attended(name, attention, **inputs):
    """Logits of a model in float32 and under every policy, with the gradients' finiteness."""
    case = zoo.case_named(name)
    exact = case.build(attention)(**inputs)
    for policy in POLICIES:
        for functional in FUNCTIONALS:
            model = apply_policy(case.build(attention), policy, functional=functional)
            result = model(**inputs)
            result.logits.square().mean().backward()
            finite = all(g.isfinite().all() for g in _gradients(model).values())
            yield policy, result.logits, exact.logits, finite


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "Mistral", "RoBERTa"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_gives_no_nan(name, attention, left):
    inputs = zoo.padded_text(left)
    there = inputs["attention_mask"].bool()
    for policy, low, exact, finite in _attended(name, attention, **inputs):
        assert low.isfinite().all()
        assert finite
        assert _error(low[there], exact[there]) < OUTPUT[policy]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
def test_padding_alone_gives_no_nan(name, attention):
    inputs = zoo.padded_text()
    inputs["attention_mask"][1] = 0  # nothing in this sequence may be attended to
    for policy, low, exact, finite in _attended(name, attention, **inputs):
        assert exact.isfinite().all()
        assert low.isfinite().all()
        assert finite
        assert _error(low, exact) < OUTPUT[policy]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_masks_of_the_lowest_float32_stay_finite(name, attention):
    tokens = zoo.padded_text()["input_ids"]
    lowest = torch.finfo(torch.float32).min  # every 16-bit format makes -inf of it
    mask = torch.full((2, 1, zoo.LENGTH, zoo.LENGTH), lowest).triu(1)
    mask[1, :, :, :3] = lowest  # left padding: its own rows are masked whole, -inf makes them NaN
    there = torch.ones(2, zoo.LENGTH, dtype=torch.bool)
    there[1, :3] = False
    for policy, low, exact, finite in _attended(
        name, attention, input_ids=tokens, attention_mask=mask
    ):
        assert low.isfinite().all()
        assert finite
        assert _error(low[there], exact[there]) < OUTPUT[policy]


@pytest.mark.parametrize("functional", FUNCTIONALS)
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mistral", "Qwen3"])
def test_generates_the_tokens_of_float32(name, functional):
    case = zoo.case_named(name)
    prompt = zoo.padded_text(left=True)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    exact = case.build("sdpa").eval().generate(**prompt, **options)
    for policy in POLICIES:
        model = apply_policy(case.build("sdpa").eval(), policy, functional=functional)
        low = model.generate(**prompt, **options)
        for step, (logits, wanted) in enumerate(zip(low.logits, exact.logits, strict=True)):
            assert logits.dtype is torch.float32
            assert _error(logits, wanted) < OUTPUT[policy], step
        assert torch.equal(low.sequences, exact.sequences)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_decoding_with_a_cache_is_decoding_without(name, policy):
    case = zoo.case_named(name)
    tokens = zoo.padded_text()["input_ids"]
    model = apply_policy(case.build("sdpa").eval(), policy)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        first = model(input_ids=tokens[:, :-1], use_cache=True)
        last = model(input_ids=tokens[:, -1:], past_key_values=first.past_key_values)
    assert last.past_key_values.get_seq_length() == zoo.LENGTH
    assert _error(last.logits[:, 0], whole[:, -1]) < OUTPUT[policy]


def _enable_checkpointing(model, use_reentrant):
    # its name since transformers 5.21 or so; the older one warns there
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("functional", FUNCTIONALS)
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "T5", "ViT", "Whisper"])
def test_checkpointing_gives_the_same_gradients(name, functional, use_reentrant):
    case = zoo.case_named(name)

    def gradients(checkpointed):
        model = apply_policy(case.build("eager"), "mixed_bfloat16", functional=functional)
        if checkpointed:
            _enable_checkpointing(model, use_reentrant)
        model(**case.inputs(), **({} if name in ("BERT", "ViT") else {"use_cache": False}))[
            "loss"
        ].backward()
        return _gradients(model)

    kept, recomputed = gradients(False), gradients(True)
    assert kept.keys() == recomputed.keys()
    if not use_reentrant:
        assert all(torch.equal(recomputed[key], gradient) for key, gradient in kept.items())
    # a nested backward adds the gradients of what several layers read in another order
    assert _error(_flat(recomputed, kept), _flat(kept, kept)) < 2**-8


@pytest.mark.parametrize("name", ["BERT", "Llama", "T5"])
def test_saves_and_loads_float32_under_its_own_name(name, tmp_path):
    case = zoo.case_named(name)
    plain = case.build()
    model = apply_policy(case.build(), "mixed_float16")
    model.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert loaded.config.architectures == [case.model]
    assert type(loaded.config).__name__ == case.config
    assert type(loaded) is type(plain)
    assert loaded.dtype is torch.float32
    for key, value in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("case", zoo.ZOO, ids=lambda case: case.name)
def test_looks_like_itself(case):
    plain = case.build()
    model = apply_policy(case.build(), "mixed_bfloat16")
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert isinstance(model, type(plain))
    assert type(model).__name__ == case.model
    assert model.dtype is torch.float32
    assert model.num_parameters() == plain.num_parameters()
    assert type(remove_policy(model)) is type(plain)


@pytest.mark.parametrize("functional", FUNCTIONALS)
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "T5", "ViT", "Whisper"])
def test_gives_hidden_states_and_attentions(name, functional):
    case = zoo.case_named(name)
    options = {"output_hidden_states": True, "output_attentions": True}
    exact = case.build("eager")(**case.inputs(), **options)
    model = apply_policy(case.build("eager"), "mixed_float16", functional=functional)
    low = model(**case.inputs(), **options)
    assert type(low) is type(exact)
    assert list(low) == list(exact)
    compared = 0
    for key in (key for key in exact if key.endswith(("hidden_states", "attentions"))):
        for got, wanted in zip(low[key], exact[key], strict=True):
            assert got.dtype is torch.float32
            assert _error(got, wanted) < OUTPUT["mixed_float16"]
            compared += 1
    assert compared >= 5  # two layers: three hidden states, two attentions


@pytest.mark.parametrize("functional", FUNCTIONALS)
def test_a_float32_head_over_tied_weights(functional):
    case = zoo.case_named("GPT-2")
    model = apply_policy(
        case.build(), "mixed_float16", {"lm_head": "float32"}, functional=functional
    )
    seen = {}
    model.lm_head.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
    model(**case.inputs()).loss.backward()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert seen["y"].dtype is torch.float32
    rounded = seen["y"].half().float()
    assert not torch.equal(rounded, seen["y"])  # digits that float16 does not have
    assert model.lm_head.weight.grad.isfinite().all()


def test_overrides_by_pattern_reach_every_block():
    case = zoo.case_named("Llama")
    model = apply_policy(case.build(), "mixed_bfloat16", {r".*\.mlp": "float32"})
    dtypes = {}
    for path, module in model.named_modules():
        if path.endswith(("down_proj", "o_proj")):
            module.register_forward_hook(
                lambda module, args, out, path=path: dtypes.__setitem__(path, out.dtype)
            )
    model(**case.inputs())
    assert len(dtypes) == 4
    for path, dtype in dtypes.items():
        assert dtype is (torch.float32 if ".mlp." in path else torch.bfloat16), path


@pytest.mark.parametrize("functional", FUNCTIONALS)
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
def test_the_vocabulary_grows_under_a_policy(name, functional):
    case = zoo.case_named(name)
    model = apply_policy(case.build(), "mixed_bfloat16", functional=functional)
    model.resize_token_embeddings(zoo.VOCABULARY + 5, mean_resizing=False)
    if functional == "compute":  # an untied head is a new module, which has no policy yet
        apply_policy(model, "mixed_bfloat16", functional=functional)
    result = model(**case.inputs())
    result.loss.backward()
    assert result.logits.shape[-1] == zoo.VOCABULARY + 5
    assert all(g.isfinite().all() for g in _gradients(model).values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_learns_a_batch_as_fast_as_float32(name, policy):
    case = zoo.case_named(name)

    def losses(model):
        optimizer = LossScaleOptimizer(torch.optim.AdamW(model.parameters(), 3e-3), max_norm=1.0)
        for _ in range(25):
            optimizer.zero_grad()
            loss = model(**case.inputs()).loss
            optimizer.backward(loss)
            optimizer.step()
            yield loss.item()

    exact = list(losses(case.build()))
    low = list(losses(apply_policy(case.build(), policy, functional="compute")))
    assert exact[-1] < exact[0] / 2
    assert low == pytest.approx(exact, rel=0.02)


def test_a_loss_inside_of_the_model_is_named():
    case = zoo.case_named("BERT")
    model = apply_policy(case.build("sdpa"), "mixed_bfloat16", functional="compute")
    with pytest.warns(PolicyWarning, match="BertFor.*computed in 16 bits.*autocast"):
        model(**case.inputs())
