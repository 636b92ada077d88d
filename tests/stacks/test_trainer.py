"""transformers.Trainer, accelerate and plain loops: a patched model trains as PEFT's own does."""

import copy
import os

import pytest
import torch

import lora_kernels as lk
from tests.stacks.models import (
    TRAINER_SETTINGS,
    FusedCalls,
    adapted_llama,
    adapters,
    history,
    tokens,
)
from tests.support.memory import peak_bytes

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

LAYERS, STEPS = 14, 8
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


class Rows(torch.utils.data.Dataset):
    """Token rows with themselves as labels."""

    def __init__(self, count):
        self.rows = tokens(count)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer_of(model, rows, folder, **settings):
    settings = {**TRAINER_SETTINGS, "max_steps": STEPS, "seed": 3, **settings}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **settings)
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


VARIANTS = {
    "plain": {},
    "accumulation and clipping": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05},
    "bfloat16 autocast": {"bf16": True},
    "reentrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
}


@pytest.mark.many
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_losses_and_adapters_are_those_of_the_unpatched_model(settings, tmp_path):
    plain, rows = adapted_llama(), Rows(4)
    patched = copy.deepcopy(plain)
    lk.patch_peft(patched)
    theirs = trainer_of(plain, rows, tmp_path / "plain", **settings)
    theirs.train()
    ours = trainer_of(patched, rows, tmp_path / "patched", **settings)
    with FusedCalls() as fused:
        ours.train()
    passes = settings.get("gradient_accumulation_steps", 1)
    passes *= 2 if "activation_checkpointing" in settings else 1  # forward runs twice
    assert fused.count == STEPS * LAYERS * passes
    expected = history(theirs)
    assert expected[-2:].mean() < 0.98 * expected[:2].mean()
    tolerance = 2e-2 if settings.get("bf16") else 1e-4
    torch.testing.assert_close(history(ours), expected, rtol=tolerance, atol=0)
    norms = history(ours, "grad_norm"), history(theirs, "grad_norm")
    torch.testing.assert_close(*norms, rtol=10 * tolerance, atol=0)


def test_resuming_and_the_best_model(tmp_path):
    """Stopped at half and resumed, a run ends where one without interruption does."""
    start, rows = adapted_llama(lora_dropout=0.1), Rows(16)
    lk.patch_peft(start)
    settings = {
        "learning_rate": 5e-3,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 4,
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    whole = trainer_of(copy.deepcopy(start), rows, tmp_path, **settings)
    whole.train()
    best = whole.state.best_model_checkpoint
    again = trainer_of(copy.deepcopy(start), rows, tmp_path, **settings)
    with FusedCalls() as fused:
        again.train(resume_from_checkpoint=os.path.join(tmp_path, "checkpoint-4"))
    assert fused.count > 4 * LAYERS
    assert torch.equal(history(again), history(whole))
    assert again.state.best_model_checkpoint == best
    expected = adapters(whole.model)
    for name, parameter in adapters(again.model).items():
        assert torch.equal(parameter, expected[name]), name
    from safetensors.torch import load_file

    saved = load_file(os.path.join(best, "adapter_model.safetensors"))
    assert len(saved) == len(expected)
    for name, parameter in expected.items():
        assert torch.equal(parameter, saved[name.replace(".default", "")]), name


def accelerated(model, batches, mixed_precision):
    """Losses of a loop by accelerate's book: accumulation over two batches, clipping."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed_precision
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for rows in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=rows, labels=rows).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(("mixed_precision", "rtol"), [("no", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
def test_accelerate(mixed_precision, rtol, when):
    accelerate.state.AcceleratorState._reset_state(True)
    plain, batches = adapted_llama(), [tokens()] * 12
    patched = copy.deepcopy(plain)
    expected = accelerated(plain, batches, mixed_precision)
    if when == "after prepare":  # which replaces forward of the whole model on the instance
        patched = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision).prepare(patched)
        accelerate.state.AcceleratorState._reset_state(True)
    lk.patch_peft(patched)
    with FusedCalls() as fused:
        losses = accelerated(patched, batches, mixed_precision)
    assert fused.count == 12 * LAYERS
    assert expected[-1] < expected[0]
    torch.testing.assert_close(losses, expected, rtol=rtol, atol=0)


def scaled_losses(model, batches):
    """Losses of float16 autocast with a GradScaler, which finds its scale by halving."""
    # So small that float16's roundings don't grow from step to step.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    losses = []
    for rows in batches:
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=rows, labels=rows).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses), scaler.get_scale()


def test_grad_scaler_skips_no_more_steps():
    """A fused backward keeps dxa in float32's range, so it overflows at larger scales only."""
    plain, batches = adapted_llama(), [tokens()] * 24
    patched = copy.deepcopy(plain)
    lk.patch_peft(patched)
    expected, scale = scaled_losses(plain, batches)
    with FusedCalls() as fused:
        losses, our_scale = scaled_losses(patched, batches)
    assert fused.count == 24 * LAYERS
    assert scale <= our_scale < 2.0**30  # so steps were skipped
    assert losses[-1] <= 1.01 * expected[-1] < losses[0]
    # Until the first step that only the unpatched model skips.
    torch.testing.assert_close(losses[:8], expected[:8], rtol=1e-2, atol=0)


@pytest.mark.parametrize(("dropout", "dtype"), [(0.1, torch.float32), (0.0, torch.bfloat16)])
def test_a_step_needs_less_memory(dropout, dtype):
    plain, rows = adapted_llama(dtype, lora_dropout=dropout), tokens(4, 96)
    patched = copy.deepcopy(plain)
    lk.patch_peft(patched)

    def step(model):
        model(input_ids=rows, labels=rows).loss.backward()
        model.zero_grad()

    peaks = []
    for model in (plain, patched):
        step(model)
        peaks.append(peak_bytes(lambda model=model: step(model)))
    assert peaks[1] < 0.8 * peaks[0]
