"""The census's models: tiny ones of random weights, their inputs, and which layers are adapted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import nn

VOCABULARY, LENGTH = 96, 12
ALL, QV = "all-linear", ["q_proj", "v_proj"]


class Subject(NamedTuple):
    """A model and what is done with it.

    recipes: by name, settings of LoraConfig. generates: whether its greedy generation is compared.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    recipes: dict[str, dict[str, Any]]
    generates: bool = False


def recipes(*lists: list[str], all_linear: bool = True, **settings: Any) -> dict[str, Any]:
    """Return settings for all-linear and for lists of modules, by name."""
    targets = [ALL] * all_linear + list(lists)
    names = (t if isinstance(t, str) else ", ".join(t) for t in targets)
    return {n: {"target_modules": t, **settings} for n, t in zip(names, targets, strict=True)}


def _transformers(config: str, auto: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        built = getattr(transformers, f"{config}Config")(**settings)
        # Larger weights than by default, so that every layer moves the loss.
        built.initializer_range = 0.1
        return getattr(transformers, f"AutoModel{auto}").from_config(built)

    return make


def _text(**more: Any) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    return {"input_ids": ids, "labels": ids, **more}


def _images(**more: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 16, 16), **more}


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "max_position_embeddings": 64}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_PATCHES = {"image_size": 16, "patch_size": 4}
_BLOCKS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


def _causal(config: str, which: dict[str, Any], **more: Any) -> Subject:
    settings = {**_SIZES, **_HEADS, **_TOKENS, **more}
    return Subject(_transformers(config, "ForCausalLM", settings), _text, which, generates=True)


def _encoder(config: str, which: dict[str, Any], **more: Any) -> Subject:
    settings = {**_SIZES, **_HEADS, **_TOKENS, **more}
    return Subject(_transformers(config, "ForMaskedLM", settings), _text, which)


def _vision(config: str, which: dict[str, Any]) -> Subject:
    settings = {**_SIZES, **_PATCHES, "num_attention_heads": 4, "num_labels": 5, "mlp_ratio": 2}
    make = _transformers(config, "ForImageClassification", {**settings, **_NO_DROPOUT})
    return Subject(make, lambda: _images(labels=torch.tensor([1, 3])), which)


def _t5() -> Subject:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    tokens = {"decoder_start_token_id": 0, "dropout_rate": 0.0, **_TOKENS}
    make = _transformers("T5", "ForSeq2SeqLM", {**sizes, **tokens})
    return Subject(make, _text, recipes(["q", "v"]), generates=True)


def _whisper() -> Subject:
    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 12}
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder")
              for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    tokens = {"decoder_start_token_id": 1, "max_target_positions": 64, "dropout": 0.0, **_TOKENS}
    tokens |= {"suppress_tokens": None, "begin_suppress_tokens": None}
    make = _transformers("Whisper", "ForSpeechSeq2Seq", {**sizes, **layers, **tokens})

    def inputs() -> dict[str, Any]:
        labels = torch.randint(3, VOCABULARY, (2, LENGTH))
        return {"input_features": torch.randn(2, 8, 24), "labels": labels}

    return Subject(make, inputs, recipes(QV))


def _clip() -> Subject:
    towers = {
        "text_config": {**_SIZES, **_HEADS, **_TOKENS, "projection_dim": 16},
        "vision_config": {**_SIZES, **_PATCHES, "num_attention_heads": 4, "projection_dim": 16},
    }
    make = _transformers("CLIP", "", {**towers, "projection_dim": 16})

    def inputs() -> dict[str, Any]:
        ids = torch.randint(3, VOCABULARY, (2, LENGTH))
        ids[:, -1] = 2  # where the text's features are read
        return {"input_ids": ids, **_images(return_loss=True)}

    return Subject(make, inputs, recipes(QV))


def _flux() -> Subject:
    def make() -> nn.Module:
        sizes = {"in_channels": 4, "num_single_layers": 2, "axes_dims_rope": (2, 2, 4), **_BLOCKS}
        return diffusers.FluxTransformer2DModel(
            patch_size=1, joint_attention_dim=16, pooled_projection_dim=12, **sizes
        )

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, 4),
            "encoder_hidden_states": torch.randn(1, 6, 16),
            "pooled_projections": torch.randn(1, 12),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.arange(48).view(16, 3) % 4,
            "txt_ids": torch.zeros(6, 3, dtype=torch.int64),
        }

    return Subject(make, inputs, recipes(["to_q", "to_k", "to_v", "to_out.0"]))


def _sd3() -> Subject:
    def make() -> nn.Module:
        return diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, joint_attention_dim=16,
            caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=8, **_BLOCKS,
        )  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 6, 16),
            "pooled_projections": torch.randn(2, 12),
            "timestep": torch.tensor([3, 400]),
        }

    return Subject(make, inputs, recipes(["to_q", "to_k", "to_v", "to_out.0"]))


def _unet() -> Subject:
    def make() -> nn.Module:
        return diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            cross_attention_dim=24, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip

    def inputs() -> dict[str, Any]:
        latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24)
        times = torch.tensor([3, 400])
        return {"sample": latents, "timestep": times, "encoder_hidden_states": text}

    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    return Subject(make, inputs, recipes(attention, [*attention, "conv1", "conv2"]))


_LLAMA = {
    **recipes(QV),
    "all-linear, DoRA": {"target_modules": ALL, "use_dora": True},
    "all-linear, rsLoRA": {"target_modules": ALL, "use_rslora": True},
    "q_proj, embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
_GPT_OSS = {
    **recipes(QV),
    "q_proj, v_proj, experts": {
        "target_modules": QV,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
}
_ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
           **_EXPERTS}  # fmt: skip
_DEEPSEEK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
             "v_head_dim": 8, **_ROUTED}  # fmt: skip
_FUSED_QKV = recipes(["query_key_value"])
_FUSED_PHI = recipes(["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
_FALCON = {"alibi": False, "new_decoder_architecture": False, "multi_query": True}

SUBJECTS = {
    "Llama": _causal("Llama", _LLAMA, **_GROUPED),
    "Qwen2.5": _causal("Qwen2", recipes(QV), num_key_value_heads=2),
    "Qwen3": _causal("Qwen3", recipes(QV), **_GROUPED),
    "Gemma 3": _causal("Gemma3Text", recipes(QV), **_GROUPED),
    "Mistral": _causal("Mistral", recipes(QV), **_GROUPED),
    "Phi": _causal("Phi", recipes([*QV, "fc1", "fc2"])),
    "Phi-3, Phi-4": _causal("Phi3", _FUSED_PHI, num_key_value_heads=2),
    "OLMo 2": _causal("Olmo2", recipes(QV), num_key_value_heads=2),
    "SmolLM3": _causal("SmolLM3", recipes(QV), num_key_value_heads=2),
    "GLM-4": _causal("Glm4", recipes(QV), **_GROUPED),
    "Cohere 2": _causal("Cohere2", recipes(QV), **_GROUPED),
    "GPT-2": _causal("GPT2", recipes(["c_attn", "c_proj"], fan_in_fan_out=True), **_GPT2),
    "GPT-BigCode": _causal("GPTBigCode", recipes(["c_attn", "c_proj"]), **_GPT2),
    "OPT": _causal("OPT", recipes(QV), ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "StarCoder2": _causal("Starcoder2", recipes(QV), num_key_value_heads=2),
    "Granite": _causal("Granite", recipes(QV), num_key_value_heads=2),
    "Falcon": _causal("Falcon", _FUSED_QKV, **_FALCON),
    "Bloom": _causal("Bloom", _FUSED_QKV, n_head=4, n_layer=2),
    "GPT-NeoX": _causal("GPTNeoX", _FUSED_QKV),
    "Mixtral": _causal("Mixtral", recipes(QV), num_local_experts=4, **_GROUPED),
    "Qwen3-MoE": _causal("Qwen3Moe", recipes(QV), num_experts=4, **_EXPERTS, **_GROUPED),
    "gpt-oss": _causal("GptOss", _GPT_OSS, num_local_experts=4, **_GROUPED),
    "DeepSeek-V3": _causal("DeepseekV3", recipes(["q_b_proj", "kv_b_proj"]), **_DEEPSEEK),
    "GLM-4-MoE": _causal("Glm4Moe", recipes(QV), **_ROUTED, **_GROUPED),
    "BERT": _encoder("Bert", recipes(["query", "value"]), **_NO_DROPOUT),
    "RoBERTa": _encoder("Roberta", recipes(["query", "value"]), **_NO_DROPOUT),
    "DeBERTa-v3": _encoder("DebertaV2", recipes(["query_proj", "value_proj"]), **_NO_DROPOUT),
    "ModernBERT": _encoder("ModernBert", recipes(["Wqkv", "Wo"])),
    "T5": _t5(),
    "Whisper": _whisper(),
    "CLIP": _clip(),
    "ViT": _vision("ViT", recipes(QV)),
    "DINOv2": _vision("Dinov2", recipes(QV)),
    "FLUX.1": _flux(),
    "SD3": _sd3(),
    "SD UNet": _unet(),
}
