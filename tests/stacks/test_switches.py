"""Trainers switch the patch on: by a callback, by LORA_KERNELS_AUTO, from a command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lora_kernels as lk
from tests.stacks.models import FusedCalls, llama, texts, tokenizer
from tests.stacks.processes import ROOT

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

LAYERS, STEPS = 14, 4
# How LLaMA-Factory 0.9.5 makes a model with adapters (llamafactory/model/adapter.py), so most
# programs: names bound at import, a new adapter, or one that is loaded to go on with.
BOUND_AT_IMPORT = """
import sys
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
import torch
from torch import nn

def base():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

def kinds(model):
    return [type(module).__name__ for module in model.base_model.model]

made = get_peft_model(base(), LoraConfig(r=2, target_modules=["1"]), autocast_adapter_dtype=False)
assert kinds(made) == ["Linear", "FusedLinear"], kinds(made)
made.save_pretrained(sys.argv[1])
loaded = PeftModel.from_pretrained(base(), sys.argv[1], is_trainable=True)
assert kinds(loaded) == ["Linear", "FusedLinear"], kinds(loaded)
loaded(torch.randn(2, 8)).sum().backward()
other = get_peft_model(base(), IA3Config(target_modules=["1"], feedforward_modules=[]))
assert other(torch.randn(2, 8)).shape == (2, 8)
"""
# What the switch costs where it is off.
OFF = """
import sys, torch
assert "lora_kernels_auto" in sys.modules  # torch did load the entry
assert "lora_kernels" not in sys.modules
assert not any("_AfterPeft" in repr(finder) for finder in sys.meta_path)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and rows to train on."""
    folder, corpus = tmp_path_factory.mktemp("switches"), texts(8)
    llama().save_pretrained(folder / "model")
    tokenizer(corpus).save_pretrained(folder / "model")
    rows = [json.dumps({"text": text}) for text in corpus]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that runs a command where this package is installed, with its entry points."""
    metadata = tmp_path_factory.mktemp("metadata")
    setup = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(metadata)]
    subprocess.run(setup, cwd=ROOT, check=True, capture_output=True)
    paths = [str(metadata), str(ROOT), os.environ.get("PYTHONPATH")]
    common = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}

    def run(*command, **variables):
        environment = {**os.environ, **common, "HF_HUB_OFFLINE": "1", **variables}
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    return run


@pytest.mark.slow
def test_sft_by_hand_by_callback_and_by_environment(folder, run, capsys):
    """The same losses and the same report; PEFT's own losses differ, by its dropout masks."""
    from tests.stacks import user_script

    train, losses, reports = user_script.train, user_script.losses, []
    by_hand = losses(train(folder, change=lambda model: reports.append(lk.patch_peft(model))))
    assert len(by_hand) == STEPS
    assert len(reports[0].patched) == LAYERS
    assert by_hand != pytest.approx(losses(train(folder)), rel=1e-4)

    callback = lk.TrainerCallback()
    capsys.readouterr()
    with FusedCalls() as fused:
        by_callback = losses(train(folder, callbacks=[callback]))
    assert fused.count >= STEPS * LAYERS
    assert by_callback == by_hand
    assert callback.report == reports[0]
    assert capsys.readouterr().err.count(str(reports[0])) == 1

    out = folder / "losses.json"
    done = run(sys.executable, user_script.__file__, folder, out, LORA_KERNELS_AUTO="1")
    assert json.loads(out.read_text()) == pytest.approx(by_hand, rel=1e-5)
    assert done.stderr.count(str(reports[0])) == 1


@pytest.mark.slow
def test_trl_sft_from_the_command_line(folder, run):
    """docs/trainers.md shows this command; its training process is a child of accelerate's."""
    command = f"""sft --model_name_or_path {folder}/model --dataset_name {folder}/data
        --use_peft --lora_r 4 --lora_target_modules all-linear --output_dir {folder}/sft
        --max_steps {STEPS} --max_length 48 --per_device_train_batch_size 2 --learning_rate 1e-2
        --logging_steps 1 --report_to none --use_cpu --bf16 false --save_steps {STEPS}"""
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text((folder / "train.jsonl").read_text())
    trl_command = Path(sys.executable).with_name("trl")
    cache = {"HF_DATASETS_CACHE": str(folder / "cache")}
    done = run(trl_command, *command.split(), LORA_KERNELS_AUTO="1", **cache)
    assert f"lora_kernels: {LAYERS} LoRA layers patched, 0 left" in done.stderr
    state = json.loads((folder / "sft" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert sum("loss" in entry for entry in state["log_history"]) == STEPS
    # Of other batches each: which is larger says nothing. What was trained is in the file.
    saved = load_file(folder / "sft" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert all(t.any() for name, t in saved.items() if "lora_B" in name)
    assert (folder / "sft" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_environment_reaches_programs_that_bind_peft_at_import(run, tmp_path):
    """LLaMA-Factory's way; what has no LoRA layer runs as PEFT made it, and says so."""
    done = run(sys.executable, "-c", BOUND_AT_IMPORT, tmp_path, LORA_KERNELS_AUTO="1")
    assert done.stderr.count("1 LoRA layers patched, 0 left") == 2
    assert "LORA_KERNELS_AUTO: a PeftModel runs unpatched: model: expected" in done.stderr


def test_environment_is_off_by_default(run):
    run(sys.executable, "-c", OFF, LORA_KERNELS_AUTO="")
    run(sys.executable, "-c", OFF, LORA_KERNELS_AUTO="0")
