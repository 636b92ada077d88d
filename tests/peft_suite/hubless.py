"""A pytest plugin for PEFT's own test suite: its tiny hub models are made here, of random weights.

`-p hubless` alone gives the baseline; with LORA_KERNELS_PATCH=1 every LoRA model is patched as soon
as PEFT has injected its adapters, so the suite tests the fused layers. Tests of other methods are
deselected. See run.py.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from peft.tuners.lora import LoraModel, layer

import lora_kernels as lk
import lora_kernels._peft.linear as peft_layer

PATCH = os.environ.get("LORA_KERNELS_PATCH") == "1"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
LLAMA = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 1024}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024}
OPT = {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}
ENCODER = {**SMALL, "intermediate_size": 64}
BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"d_model": 32, "vocab_size": 1024}
# What stands in the name of a hub model: its configuration's class and a small model's settings.
MODELS = {
    "opt": ("OPTConfig", OPT),
    "gpt2": ("GPT2Config", GPT),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "llamaforsequence": ("LlamaConfig", {**LLAMA, "pad_token_id": 0}),
    "tiny-random-llama": ("LlamaConfig", LLAMA),
    "qwen2": ("Qwen2Config", LLAMA),
    "gemma3forcausal": ("Gemma3TextConfig", {**LLAMA, "head_dim": 8}),
    "mistral": ("MistralConfig", LLAMA),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024}),
    "t5": ("T5Config", {**T5, "decoder_start_token_id": 0}),
    "bart": ("BartConfig", BART),
    "deberta-v2": ("DebertaV2Config", ENCODER),
    "debertav2": ("DebertaV2Config", ENCODER),
    "deberta": ("DebertaConfig", ENCODER),
    "roberta": ("RobertaConfig", ENCODER),
    "bert": ("BertConfig", ENCODER),
}
FOLDER = tempfile.TemporaryDirectory(prefix="hubless-")
# LoRA itself, not AdaLora, VBLoRA and others whose names end so.
LORA = re.compile(r"(?<![a-z])lora", re.IGNORECASE)
counts = {"fused": 0, "patched": 0}


class EveryModel(dict):
    """Stands for the suite's record of hub models already fetched, so that it asks for none."""

    def __contains__(self, name):
        return True

    def __missing__(self, name):
        return 0


def _configuration(name):
    for part, (kind, settings) in MODELS.items():
        if part in name.lower().split("/")[-1]:
            return getattr(transformers, kind)(**settings)
    return None


def _local(cls, name):
    """Return the folder of a random model that stands for a hub model, or the name itself."""
    if not isinstance(name, str) or os.path.isdir(name) or "lora" in name.lower():
        return name
    config = _configuration(name)
    if config is None:
        return name
    folder = Path(FOLDER.name, f"{cls.__name__}-{name.replace('/', '-')}")
    if not folder.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
        model.save_pretrained(folder)
    return str(folder)


def _redirect(owner):
    real = owner.from_pretrained.__func__  # each Auto class has a copy of its own

    def from_pretrained(cls, name, *args, **kwargs):
        return real(cls, _local(cls, name), *args, **kwargs)

    owner.from_pretrained = classmethod(from_pretrained)


def _patch_after_injection():
    inject, forward = LoraModel.inject_adapter, peft_layer.run

    def inject_adapter(self, model, *args, **kwargs):
        inject(self, model, *args, **kwargs)
        if any(isinstance(module, layer.LoraLayer) for module in model.modules()):
            counts["patched"] += len(lk.patch_peft(model).patched)

    def counting(*args, **kwargs):
        counts["fused"] += 1
        return forward(*args, **kwargs)

    LoraModel.inject_adapter, peft_layer.run = inject_adapter, counting


def pytest_configure(config):
    torch.set_num_threads(1)
    automatic = [name for name in dir(transformers) if name.startswith("AutoModel")]
    for name in ("PreTrainedModel", *automatic):
        _redirect(getattr(transformers, name))
    # PEFT's Seq2Seq wrapper reads it; this transformers has it no more.
    transformers.GenerationMixin._prepare_encoder_decoder_kwargs_for_generation = None
    if PATCH:
        _patch_after_injection()


def pytest_collection_modifyitems(config, items):
    if utilities := sys.modules.get("tests.testing_utils"):
        utilities._HUB_MODEL_ACCESSES = EveryModel()
    others = [item for item in items if not LORA.search(item.nodeid)]
    items[:] = [item for item in items if LORA.search(item.nodeid)]
    config.hook.pytest_deselected(items=others)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(
        f"{counts['patched']} layers patched, {counts['fused']} calls fused"
    )
