"""Models of Hugging Face ``transformers``, tiny, built from their configs: nothing is downloaded.

One list for the tests (``tests/torch/test_transformers.py``) and for the table in
``docs/torch-models.md``. Dropout is off everywhere, so that a model under a policy can be compared
with the same model in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf

VOCABULARY = 99
LENGTH = 12
SEED = 0

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT: dict[str, Any] = _SIZES | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DECODER: dict[str, Any] = _TEXT | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model of the zoo.

    Attributes:
        name: what people call it.
        model: the name of its class in ``transformers``.
        config: the name of its config's class.
        options: what the config gets.
        inputs: makes the arguments of one call that returns a loss.
        output: which field of the result is the model's output.
        attentions: the implementations of attention that it has; none where it has no attention.
    """

    name: str
    model: str
    config: str
    options: Mapping[str, Any]
    inputs: Callable[[], Inputs]
    output: str = "logits"
    attentions: tuple[str, ...] = field(default=("eager", "sdpa"))

    def build(self, attention: str | None = None, seed: int = SEED) -> Any:
        """Return the model with the same weights at every call, in training mode."""
        torch.manual_seed(seed)
        model = getattr(hf, self.model)(getattr(hf, self.config)(**self.options))
        if attention is not None:
            model.set_attn_implementation(attention)
        return model.train()


def padded_text(left: bool = False) -> Inputs:
    """Two sequences of tokens, the second a third shorter, with the mask that says so."""
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=_generator())
    mask = torch.ones_like(tokens)
    mask[1, : LENGTH // 3] = 0 if left else 1
    mask[1, LENGTH - LENGTH // 3 :] = 1 if left else 0
    return {"input_ids": tokens, "attention_mask": mask}


def labelled_text() -> Inputs:
    """The same, each token its own label; what is padding has none."""
    text = padded_text()
    return text | {"labels": text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)}


def labelled_images() -> Inputs:
    """Two images with a class each."""
    images = torch.randn(2, 3, 32, 32, generator=_generator())
    return {"pixel_values": images, "labels": torch.tensor([1, 2])}


def _spectrogram_with_text() -> Inputs:
    sound = torch.randn(2, 8, 32, generator=_generator())
    return {"input_features": sound, "labels": padded_text()["input_ids"]}


def _sound_with_text() -> Inputs:
    labels = torch.randint(3, 30, (2, 4), generator=_generator())
    return {"input_values": torch.randn(2, 400, generator=_generator()), "labels": labels}


def _text_with_images() -> Inputs:
    return padded_text() | {
        "pixel_values": labelled_images()["pixel_values"],
        "return_loss": True,
    }


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _causal(name: str, attentions: tuple[str, ...] = ("eager", "sdpa"), **more: Any) -> Case:
    options = _DECODER | more
    model, config = f"{name}ForCausalLM", f"{name}Config"
    return Case(name, model, config, options, labelled_text, attentions=attentions)


ZOO: tuple[Case, ...] = (
    Case("BERT", "BertForMaskedLM", "BertConfig", _TEXT | _NO_DROPOUT, labelled_text),
    Case(
        "RoBERTa",
        "RobertaForMaskedLM",
        "RobertaConfig",
        _TEXT | _NO_DROPOUT | {"pad_token_id": 1},
        labelled_text,
    ),
    Case(
        "DistilBERT",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "vocab_size": VOCABULARY,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        labelled_text,
    ),
    Case(
        "DeBERTa-v2",
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        _TEXT | _NO_DROPOUT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        labelled_text,
        attentions=("eager",),
    ),
    Case(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": VOCABULARY,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        labelled_text,
    ),
    _causal("Llama"),
    _causal("Mistral"),
    _causal("Qwen3"),
    _causal("Gemma2", attentions=("eager",), query_pre_attn_scalar=8, sliding_window=8),
    _causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    Case(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        labelled_text,
    ),
    Case(
        "ViT",
        "ViTForImageClassification",
        "ViTConfig",
        _SIZES | _IMAGE | _NO_DROPOUT | {"num_labels": 5},
        labelled_images,
    ),
    Case(
        "ConvNeXt",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 5},
        labelled_images,
        attentions=(),
    ),
    Case(
        "ResNet",
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
            "num_labels": 5,
        },
        labelled_images,
        attentions=(),
    ),
    Case(
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "vocab_size": VOCABULARY,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "dropout": 0.0,
        },
        _spectrogram_with_text,
    ),
    Case(
        "Wav2Vec2",
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        _SIZES
        | {
            "vocab_size": 32,
            "conv_dim": (16, 16),
            "conv_stride": (5, 4),
            "conv_kernel": (10, 5),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "hidden_dropout": 0.0,
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
            "feat_proj_dropout": 0.0,
            "final_dropout": 0.0,
            "layerdrop": 0.0,
            "mask_time_prob": 0.0,
            "ctc_loss_reduction": "mean",
        },
        _sound_with_text,
    ),
    Case(
        "CLIP",
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": _TEXT | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
            "vision_config": _SIZES | _IMAGE,
            "projection_dim": 16,
        },
        _text_with_images,
        output="logits_per_image",
    ),
)
"""The models, in the order of the table."""


def case_named(name: str) -> Case:
    """Return one model of the zoo."""
    return next(case for case in ZOO if case.name == name)
