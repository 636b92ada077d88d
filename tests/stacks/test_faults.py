"""Faults: whatever is raised in the middle of a call, the model is what it was before."""

import copy
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels import adapter_files, adapter_layout, patching, wrappers
from tests.stacks.models import (
    adapted_llama,
    assert_same_gradients,
    llama,
    patched_copy,
    peft,
    tokens,
)


def loss_of(model, rows):
    return model(input_ids=rows, labels=rows, use_cache=False).loss


class Allocator(TorchDispatchMode):
    """Counts operations, and runs out of memory at the one numbered `last`."""

    lora_kernels_only_looks = True  # else a patched layer would keep PEFT's forward

    def __init__(self, last=None):
        super().__init__()
        self.count, self.last = 0, last

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.last:
            raise torch.OutOfMemoryError("simulated")
        return op(*args, **(kwargs or {}))


def test_running_out_of_memory_anywhere_in_a_step():
    """At a sample of a step's operations; the next step is as if nothing had been."""
    plain = adapted_llama(base=llama(num_hidden_layers=1), lora_dropout=0.2)
    patched, rows = patched_copy(plain), tokens()
    before = {name: value.clone() for name, value in patched.state_dict().items()}

    def step(model, allocator):
        model.zero_grad()
        torch.manual_seed(2)
        with allocator:
            loss = loss_of(model, rows)
            forward = allocator.count
            loss.backward()
        return loss, forward

    counted, expected = Allocator(), copy.deepcopy(patched)
    loss, forward = step(expected, counted)
    assert 100 < forward < counted.count - 50
    for last in range(1, counted.count, 17):
        with pytest.raises(torch.OutOfMemoryError, match="simulated"):
            step(patched, Allocator(last))
    for name, value in patched.state_dict().items():
        assert torch.equal(value, before[name]), name
    again, _ = step(patched, Allocator())
    assert torch.equal(again, loss)
    assert_same_gradients(patched, expected, tolerance=0)


def raising(*args):
    raise RuntimeError("by a hook")


HOOKS = {
    "before the layer": lambda layer: layer.register_forward_pre_hook(raising),
    "after the layer": lambda layer: layer.register_forward_hook(raising),
    "in backward": lambda layer: layer.register_full_backward_hook(raising),
    "at a gradient": lambda layer: layer.lora_A["default"].weight.register_hook(raising),
}


@pytest.mark.parametrize("where", HOOKS)
def test_hooks_that_raise(where):
    plain = adapted_llama()
    patched, rows = patched_copy(plain), tokens()
    handle = HOOKS[where](patched.get_submodule("base_model.model.model.layers.1.mlp.up_proj"))
    with pytest.raises(RuntimeError, match="by a hook"):
        loss_of(patched, rows).backward()
    handle.remove()
    patched.zero_grad()
    for model in (patched, plain):
        loss_of(model, rows).backward()
    assert_same_gradients(patched, plain)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that is run in the modules' files."""

    def __init__(self, modules, last):
        self.files, self.left = {module.__file__ for module in modules}, last

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exception):
        sys.settrace(self.before)

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace


def interrupted_everywhere(modules, call):
    """Interrupt a call at its first line, at its second, ... until it ends; yield after each."""
    last, ended = 0, False
    while not ended:
        last += 1
        try:
            with Interrupt(modules, last):
                call()
            ended = True
        except KeyboardInterrupt:
            yield last
    assert last > 20


def classes(model):
    return [(type(module), sorted(vars(module))) for module in model.modules()]


@pytest.mark.parametrize("patched_before", [False, True])
def test_an_interrupt_at_any_line_of_patching(patched_before):
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0", "1"])
    )
    if patched_before:
        lk.patch_peft(model, impl="eager")
    before, after = classes(model), None
    for _ in interrupted_everywhere([patching], lambda: lk.patch_peft(model, impl="reference")):
        now = classes(model)
        if now != before:  # nothing but the return is left then
            after = after or now
            assert now == after
    assert classes(model)[-1] is not None
    assert lk.unpatch_peft(model) == 2


def values(model):
    settings = [
        (type(m).__name__, getattr(m, "lora_alpha", None), getattr(m, "bias_mode", None))
        for m in model.modules()
    ]
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    return settings, trained, {name: v.clone() for name, v in model.state_dict().items()}


def same(ours, theirs):
    return (
        ours[:2] == theirs[:2]
        and ours[2].keys() == theirs[2].keys()
        and all(torch.equal(value, theirs[2][name]) for name, value in ours[2].items())
    )


@pytest.mark.parametrize("into", ["plain linears", "LoRALinears"])
def test_an_interrupt_at_any_line_of_loading(into, tmp_path):
    def make(**settings):
        layers = [nn.Linear(4, 5), nn.Linear(5, 4)]
        return nn.Sequential(*(lk.LoRALinear.from_linear(m, r=2, **settings) for m in layers))

    saved = make(lora_alpha=3, bias="lora_only")
    for parameter in saved.parameters():
        nn.init.normal_(parameter)
    lk.save_adapter(saved, tmp_path)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    model = plain if into == "plain linears" else make()
    before, undone = values(model), 0
    modules = (adapter_files, adapter_layout, wrappers)
    for _ in interrupted_everywhere(modules, lambda: lk.load_adapter(model, tmp_path)):
        assert torch.is_grad_enabled()
        undone += same(values(model), before)
        if not same(values(model), before):
            # The very last lines: all is written.
            assert values(model)[0] == values(saved)[0]
            break
    assert undone > 60
    lk.load_adapter(model, tmp_path)
    for key, value in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(model.state_dict()[key.removeprefix("base_model.model.")], value), key


def test_memory_that_runs_out_while_loading(tmp_path, monkeypatch):
    saved = nn.Sequential(lk.LoRALinear(4, 5, r=2), lk.LoRALinear(5, 4, r=2))
    lk.save_adapter(saved, tmp_path)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    before, real, calls = values(model), lk.LoRALinear.from_linear, []

    def from_linear(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("simulated")
        return real(*args, **kwargs)

    monkeypatch.setattr(lk.LoRALinear, "from_linear", from_linear)
    with pytest.raises(torch.OutOfMemoryError):
        lk.load_adapter(model, tmp_path)
    assert same(values(model), before)


def test_a_patched_model_refuses_bad_files_as_peft_does(tmp_path):
    """PEFT loads files into its own layers; after its error a patched model is as before."""
    plain = adapted_llama()
    plain.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    patched, rows = patched_copy(plain), tokens()
    expected = loss_of(patched, rows)
    wide = {
        key: torch.ones(9, *t.shape[1:]) if "lora_A" in key else t for key, t in tensors.items()
    }
    for bad in (b"\x80\x02}q\x00.", file.read_bytes()[:1000], wide):
        file.write_bytes(safetensors.torch.save(bad) if isinstance(bad, dict) else bad)
        with pytest.raises((safetensors.SafetensorError, RuntimeError)):
            patched.load_adapter(tmp_path, "default")
        assert torch.equal(loss_of(patched, rows), expected)
