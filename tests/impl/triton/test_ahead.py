"""Which calls are tuned or compiled ahead, what they are measured against, and what is refused."""

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.__main__ import main

pytest.importorskip("triton")

from lora_kernels.impl.triton.plan.config import Problem, library_config
from lora_kernels.impl.triton.plan.device import known
from lora_kernels.impl.triton.tools import ahead, layers, rivals
from lora_kernels.impl.triton.tools.record import Made

H100 = "NVIDIA H100 80GB HBM3"
SIZES = {"m": 24, "n": 32, "k": 48, "r": 4}


@pytest.mark.parametrize("adapters", [None, torch.float32])
@pytest.mark.parametrize("dropout", [False, True])
def test_rivals_compute_the_layer(adapters, dropout):
    made = Made(torch.bfloat16, adapters)
    forward = Problem(**SIZES, bits=16, dropout=dropout)
    backward = forward._replace(backward=True)
    assert rivals.frozen(forward, made)().shape == rivals.peft(forward, made)().shape == (24, 32)
    assert rivals.frozen(backward, made)().shape == (24, 48)
    call = rivals.peft(backward, made)
    for _ in range(2):
        dx, da, db = call()
        assert (dx.shape, da.shape, db.shape) == ((24, 48), (4, 48), (32, 4))
        assert da.dtype == (adapters or torch.bfloat16)


def test_shapes_are_those_of_adapted_layers():
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(
        nn.Linear(48, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 8)
    ).bfloat16()
    config = peft.LoraConfig(r=4, target_modules=["0", "1"])
    model = peft.get_peft_model(plain, config)
    assert layers.shapes_of_model(model, 64) == {}
    lk.patch_peft(model)
    kinds = (torch.bfloat16, torch.float32)
    assert layers.shapes_of_model(model, 64) == {kinds: ["64x32x32x4", "64x32x48x4"]}
    ours = nn.Sequential(
        lk.LoRALinear(8, 16, r=2), lk.LoRALinear(8, 16, r=2), lk.LoRALinear(8, 16, r=300),
        nn.Linear(16, 4),
    )  # fmt: skip
    kinds = (torch.float32, torch.float32)
    assert layers.shapes_of_model(ours, 100) == {kinds: ["100x16x8x2"]}


@pytest.fixture
def folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 16}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    return tmp_path


def test_shapes_of_a_config(folder):
    names = ["q_proj", "k_proj", "mlp.down_proj"]
    found = layers.shapes_of_config(folder, names, 16, 64)
    assert found == ["64x16x32x16", "64x32x32x16", "64x32x48x16"]
    with pytest.raises(ValueError, match="target-modules: expected names of linear layers"):
        layers.shapes_of_config(folder, ["proj"], 16, 64)


def test_the_command_compiles_the_calls_of_a_config(folder, monkeypatch, capsys):
    """What fails is named, and the exit status says so."""
    jobs = []

    def compile_all(found, processes, done):
        jobs.extend(found)
        assert processes == 2
        for index, job in enumerate(jobs):
            done(job, "RuntimeError: out of memory" if index == failing else None)

    monkeypatch.setattr(ahead, "compile_all", compile_all)
    given = ["--model", str(folder), "--target-modules", "q_proj", "--rows", "64"]
    given = ["compile", "--gpu", H100, *given, "--processes", "2", "--adapters", "float32"]
    failing = -1
    assert main(given) == 0
    assert "4 of 4 calls compiled for NVIDIA H100" in capsys.readouterr().out
    assert {job.made.adapters for job in jobs} == {torch.float32}
    assert {job.problem.m for job in jobs} == {64}
    jobs.clear()
    failing = 1
    assert main(given) == 1
    printed = capsys.readouterr().out
    assert "forward 64x32x32x16 16-bit dropout aligned: RuntimeError: out of memory" in printed
    assert "3 of 4 calls" in printed


def test_a_job_that_fails_is_told_and_others_go_on():
    """Here in its process: a configuration without programs."""
    problem, device = Problem(**SIZES, bits=16), known(H100)
    good = ahead.Job(problem, library_config(problem), device, Made())
    bad, told = good._replace(problem=problem._replace(k=-1)), {}
    ahead.compile_all([bad], 1, told.__setitem__)
    assert "RuntimeError" in told[bad]
    ahead.compile_all([], 1, told.__setitem__)
    assert len(told) == 1


WRONG = {
    "an unknown GPU": (["--gpu", "H1", "--shapes", "1x1x1x1"], "--gpu: expected"),
    "a shape": (["--gpu", H100, "--shapes", "8x8"], "shapes: expected MxNxKxR"),
    "a rank": (
        ["--gpu", H100, "--shapes", "8x8x8x300"],
        "shapes: expected ranks up to 256, got '8x",
    ),
    "no model": (["--gpu", H100, "--model", "/nowhere"], "--model: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_command_cannot_read_is_named(case, capsys):
    given, message = WRONG[case]
    assert main(["compile", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tuning_a_model_says_what_it_needs():
    model = nn.Sequential(lk.LoRALinear(8, 16, r=2))
    with pytest.raises(RuntimeError, match="needs a CUDA GPU"):
        lk.tune(model)
    with pytest.raises(ValueError, match="model: expected adapted linear layers, got none"):
        lk.tune(nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got NoneType"):
        lk.tune(None)
    for name in ("rows", "most", "processes"):
        with pytest.raises(ValueError, match=f"{name}: expected an int of at least 1"):
            lk.tune(model, **{name: 0})
