"""TRL: SFTTrainer, QLoRA too, and DPO whose reference is the same model without its adapters."""

import copy

import pytest
import torch

import lora_kernels as lk
from tests.stacks.models import (
    TRAINER_SETTINGS,
    FusedCalls,
    history,
    llama,
    lora_config,
    randomize,
    texts,
    tokenizer,
)

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LAYERS, STEPS = 14, 8
PASSES = 2 * STEPS  # TRL checkpoints activations by default: forward runs twice a step
SETTINGS = {**TRAINER_SETTINGS, "max_steps": STEPS, "bf16": False, "max_length": 48}


def trained(trainer, patch):
    """Train as a user does who hands the trainer a peft_config, and patches what it made of it."""
    randomize(trainer.model)
    if patch:
        assert not lk.patch_peft(trainer.model).left
    with FusedCalls() as fused:
        trainer.train()
    return trainer, fused.count


def pair(make, base=None):
    """Return an unpatched and a patched trainer, trained from the same weights."""
    base, runs = base or llama(), []
    for patch in (False, True):
        torch.manual_seed(0)
        runs.append(trained(make(copy.deepcopy(base)), patch))
    (theirs, none), (ours, fused) = runs
    assert none == 0
    return theirs, ours, fused


@pytest.mark.parametrize(
    "settings",
    [{}, {"packing": True, "packing_strategy": "wrapped", "gradient_accumulation_steps": 2}],
    ids=["plain", "packing, accumulation"],
)
def test_sft(settings, tmp_path):
    corpus = texts(8)
    rows = datasets.Dataset.from_dict({"text": corpus[:4]})

    def make(model):
        arguments = trl.SFTConfig(output_dir=str(tmp_path), **{**SETTINGS, **settings})
        return trl.SFTTrainer(
            model,
            arguments,
            train_dataset=rows,
            processing_class=tokenizer(corpus),
            peft_config=lora_config(),
        )

    theirs, ours, fused = pair(make)
    assert fused >= PASSES * LAYERS
    expected = history(theirs)
    assert expected[-2:].mean() < expected[:2].mean()
    torch.testing.assert_close(history(ours), expected, rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
def test_sft_of_a_4_bit_model(nested, tmp_path):
    """QLoRA: TRL prepares the quantised model, and evaluates it between steps."""
    bnb = pytest.importorskip("bitsandbytes")
    corpus = texts(8)
    rows = datasets.Dataset.from_dict({"text": corpus[:4]})
    llama(intermediate_size=128).save_pretrained(tmp_path / "base")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=how, device_map="cpu", dtype=torch.float32
    )
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # With AVX512_BF16 an evaluation would convert theirs, which then train wrong.
            module.support_avx512bf16_for_cpu = False

    def make(model):
        # TRL makes the adapters of a 4-bit model bfloat16, PEFT x for them, ours them float32:
        # roundings that large steps would make more of.
        settings = {**SETTINGS, "learning_rate": 2e-3}
        settings |= {"eval_strategy": "steps", "eval_steps": STEPS // 2}
        arguments = trl.SFTConfig(output_dir=str(tmp_path), **settings)
        return trl.SFTTrainer(
            model,
            arguments,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer(corpus),
            peft_config=lora_config(),
        )

    theirs, ours, fused = pair(make, base)
    assert fused >= PASSES * LAYERS
    quantised = [m for m in ours.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(quantised) == LAYERS
    expected = history(theirs)
    assert expected[-2:].mean() < expected[:2].mean()
    torch.testing.assert_close(history(ours), expected, rtol=1e-3, atol=0)
    evaluated = history(theirs, "eval_loss")
    assert len(evaluated) == 2
    torch.testing.assert_close(history(ours, "eval_loss"), evaluated, rtol=1e-3, atol=0)


def preferences(corpus):
    """Pairs of continuations of one beginning; the article's own is the chosen one."""
    prompts, rest = [text[:60] for text in corpus], [text[60:90] for text in corpus]
    return datasets.Dataset.from_dict(
        {"prompt": prompts, "chosen": rest, "rejected": rest[1:] + rest[:1]}
    )


@pytest.mark.parametrize("precompute", [False, True], ids=["each step", "precomputed"])
def test_dpo_with_disabled_adapters_as_reference(precompute, tmp_path):
    corpus = texts(4)

    def make(model):
        arguments = trl.DPOConfig(
            output_dir=str(tmp_path), precompute_ref_log_probs=precompute, **SETTINGS
        )
        trainer = trl.DPOTrainer(
            model,
            args=arguments,
            train_dataset=preferences(corpus),
            processing_class=tokenizer(corpus),
            peft_config=lora_config(),
        )
        assert trainer.ref_model is None
        return trainer

    theirs, ours, fused = pair(make)
    assert fused == PASSES * LAYERS  # never for the reference, whose adapters are disabled
    for key in ("loss", "rewards/margins"):
        expected = history(theirs, key)
        assert expected.std() > 0.01
        torch.testing.assert_close(history(ours, key), expected, rtol=1e-3, atol=1e-4)


def test_dpo_with_a_second_adapter_as_reference(tmp_path):
    """A PEFT model handed over: TRL copies its adapter as "ref" and switches for each pass."""
    import peft

    corpus, base, curves = texts(4), llama(), []
    start = randomize(peft.get_peft_model(base, lora_config()))
    for patch in (False, True):
        model = copy.deepcopy(start)
        if patch:
            lk.patch_peft(model)
        torch.manual_seed(0)
        trainer = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(output_dir=str(tmp_path), **SETTINGS),
            train_dataset=preferences(corpus),
            processing_class=tokenizer(corpus),
        )
        assert "ref" in trainer.model.peft_config
        with FusedCalls() as fused:
            trainer.train()
        curves.append(history(trainer))
    assert fused.count == (PASSES + STEPS) * LAYERS
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=1e-4)
