"""Tiny configurations of Hugging Face transformers: text, vision, audio, encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import Architecture, check, need

pytestmark = [pytest.mark.slow, pytest.mark.zoo]

Inputs = Callable[[int], dict[str, Tensor]]
VOCABULARY = 48  # small, so that what can't be pruned of it doesn't hide the rest


class Only(nn.Module):
    """The outputs that the model is for; other returned states would have to keep their width."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)[self.output]


def model(
    name: str, inputs: Inputs, only: str = "", config: str = "", below: str = "", **options: Any
) -> Architecture:
    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, name)
        settings = getattr(transformers, config) if config else made.config_class
        result: nn.Module = made(settings(**options))
        return Only(result, only) if only else result

    return Architecture(build, inputs, below)


def tokens(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, 9))}


def pairs(batch: int) -> dict[str, Tensor]:
    return {**tokens(batch), "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, 5))}


def pixels(size: int) -> Inputs:
    return lambda batch: {"pixel_values": torch.rand(batch, 3, size, size)}


SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
ENCODER = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, **SIZES, **SPECIAL}
DECODER = {**ENCODER, "use_cache": False}
GROUPED = {**DECODER, "num_key_value_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "use_cache": False,
    "decoder_start_token_id": 1,
    **SPECIAL,
}

ARCHITECTURES = {
    "bert": model("BertForSequenceClassification", tokens, **ENCODER),
    "roberta": model("RobertaForTokenClassification", tokens, **ENCODER),
    "distilbert": model(
        "DistilBertForSequenceClassification",
        tokens,
        vocab_size=VOCABULARY,
        dim=48,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=40,
    ),
    "albert": model("AlbertForSequenceClassification", tokens, embedding_size=24, **ENCODER),
    "electra": model("ElectraForSequenceClassification", tokens, embedding_size=24, **ENCODER),
    "gpt2": model(
        "GPT2LMHeadModel",
        tokens,
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=40,
        use_cache=False,
        **SPECIAL,
    ),
    "gpt_neox": model("GPTNeoXForCausalLM", tokens, **DECODER),
    "opt": model(
        "OPTForCausalLM",
        tokens,
        vocab_size=VOCABULARY,
        hidden_size=48,
        word_embed_proj_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=40,
        use_cache=False,
        **SPECIAL,
    ),
    "llama": model("LlamaForCausalLM", tokens, **GROUPED),
    "mistral": model("MistralForCausalLM", tokens, **GROUPED),
    "qwen2": model("Qwen2ForCausalLM", tokens, **GROUPED),
    "gemma2": model("Gemma2ForCausalLM", tokens, head_dim=12, **GROUPED),
    "phi": model("PhiForCausalLM", tokens, **GROUPED),
    "phi3": model("Phi3ForCausalLM", tokens, **GROUPED),
    "bloom": model(
        "BloomForCausalLM",
        tokens,
        vocab_size=VOCABULARY,
        hidden_size=48,
        n_layer=2,
        n_head=4,
        use_cache=False,
        **SPECIAL,
    ),
    "deberta_v2": model("DebertaV2ForSequenceClassification", tokens, **ENCODER),
    "modernbert": model("ModernBertForSequenceClassification", tokens, **ENCODER),
    "t5": model(
        "T5ForConditionalGeneration",
        pairs,
        "logits",
        vocab_size=VOCABULARY,
        d_model=48,
        d_kv=12,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        use_cache=False,
        decoder_start_token_id=0,
    ),
    "bart": model(
        "BartForConditionalGeneration", pairs, "logits", max_position_embeddings=40, **BART
    ),
    "whisper": model(
        "WhisperForConditionalGeneration",
        lambda b: {
            "input_features": torch.rand(b, 8, 40),
            "decoder_input_ids": torch.randint(3, VOCABULARY, (b, 5)),
        },
        "logits",
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        **BART,
    ),
    "vit": model("ViTForImageClassification", pixels(32), **VISION),
    "clip_vision": model(
        "CLIPVisionModelWithProjection", pixels(32), "image_embeds", projection_dim=16, **VISION
    ),
    "swin": model(
        "SwinForImageClassification",
        pixels(64),
        image_size=64,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "segformer": model(
        "SegformerForSemanticSegmentation",
        pixels(64),
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=32,
        num_labels=5,
    ),
    "convnext": model(
        "ConvNextForImageClassification",
        pixels(64),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        image_size=64,
    ),
    "mobilevit": model(
        "MobileViTForImageClassification",
        pixels(64),
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 40],
        num_attention_heads=4,
    ),
    "resnet": model(
        "ResNetForImageClassification",
        pixels(64),
        embedding_size=8,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers(name: str, record_property: Any) -> None:
    need("transformers", "torchvision")  # which it imports where it is there
    check(f"transformers {name}", ARCHITECTURES[name], record_property)
