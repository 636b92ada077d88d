"""Threads, forks, DataLoader workers and the interpreter's end."""

import copy
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import lora_kernels as lk
from lora_kernels.impl.gpu import in_shared_pool
from lora_kernels.impl.triton import workspace
from tests.stacks.models import FusedCalls, adapted_llama, adapters, tokens
from tests.support.closeness import assert_close
from tests.support.paths import ROOT

STEPS = 6


def train(model, rows, losses):
    # AdamW would make a whole step of a gradient near zero, whose sign is a matter of rounding.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())


def test_two_threads_train_two_models():
    models = [adapted_llama(r=rank) for rank in (4, 8)]
    for model in models:
        lk.patch_peft(model, prepack=True)
    alone, rows = copy.deepcopy(models), [tokens(), tokens(3, 17)]
    expected, together = [[], []], [[], []]
    for each in zip(alone, rows, expected, strict=True):
        train(*each)
    work = zip(models, rows, together, strict=True)
    threads = [threading.Thread(target=train, args=each) for each in work]
    with FusedCalls() as fused:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert fused.count > 0
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=0)
    for model, other in zip(models, alone, strict=True):
        for name, value in adapters(other).items():
            assert_close(model.get_parameter(name), value, 1e-3, name)


def test_threads_patch_and_call_one_model():
    """Patching and unpatching in one thread while another computes: each call is either's."""
    model, errors = adapted_llama(), []
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x, done, interval = torch.randn(2, 64), threading.Event(), sys.getswitchinterval()
    expected = layer(x).detach()

    def call():
        with torch.no_grad():
            while not done.is_set():
                try:
                    assert_close(layer(x), expected)
                except Exception as error:
                    errors.append(error)
                    done.set()

    thread = threading.Thread(target=call)
    thread.start()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(3000):
            lk.patch_peft(layer)
            lk.unpatch_peft(layer)
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert not errors, errors


class Device(NamedTuple):
    """What the workspace asks of a device; this machine has no GPU."""

    type: str


def test_streams_and_captured_graphs_have_flags_of_their_own(monkeypatch):
    """Kernels on two streams at once must not share the flags by which their programs meet."""
    current = SimpleNamespace(cuda_stream=1)
    cuda = SimpleNamespace(
        is_current_stream_capturing=lambda: current.cuda_stream == "captured",
        current_stream=lambda device: current,
    )
    stub = SimpleNamespace(cuda=cuda, int32=torch.int32)
    stub.zeros = lambda count, dtype, device: torch.zeros(count, dtype=dtype)
    monkeypatch.setattr(workspace, "torch", stub)
    pool = SimpleNamespace(shared=True)
    monkeypatch.setattr(workspace, "in_shared_pool", lambda block: pool.shared)
    flags, device = workspace.Workspace(), Device("cuda")
    first = flags.zeros(10, device)
    assert flags.zeros(20, device) is first
    current.cuda_stream = 2
    second = flags.zeros(10, device)
    assert second is not first
    current.cuda_stream = "captured"
    graphs = [flags.zeros(10, device) for _ in range(2)]
    assert len({id(block) for block in (first, second, *graphs)}) == 4
    current.cuda_stream = 3
    pool.shared = False  # as where torch.compile warms up what it will capture
    owned = [weakref.ref(flags.zeros(10, device)) for _ in range(2)]
    assert [block() for block in owned] == [None, None]  # the call was the last to have it
    pool.shared = True
    kept = flags.zeros(10, device)
    assert flags.zeros(10, device) is kept
    current.cuda_stream = 1
    assert flags.zeros(10, device) is first


def test_memory_of_a_pool_of_its_own_is_told_by_the_allocator(monkeypatch):
    """Its snapshot is a GPU's; here it is made up."""
    block = SimpleNamespace(device=torch.device("cuda", 1), data_ptr=lambda: 4096 + 512)
    segment = {"segment_pool_id": (0, 0), "device": 1, "address": 4096, "total_size": 1024}
    backend = SimpleNamespace(name="native")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend.name)
    for change, shared in (
        ({}, True),
        ({"segment_pool_id": (0, 1)}, False),
        ({"segment_pool_id": [3, 0]}, False),
        ({"device": 0}, False),
        ({"address": 4096 + 513}, False),
        ({"total_size": 512}, False),
    ):
        monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda c=change: [segment | c])
        assert in_shared_pool(block) == shared
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [segment])
    backend.name = "cudaMallocAsync"
    assert not in_shared_pool(block)
    assert in_shared_pool(torch.zeros(1))


class Outputs(torch.utils.data.Dataset):
    """Items that a patched model computes, as features are where they are drawn."""

    def __init__(self, model, rows):
        self.model, self.rows = model, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(input_ids=self.rows[index : index + 1]).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start):
    model, rows = adapted_llama().eval(), tokens(4)
    lk.patch_peft(model, prepack=True)
    with torch.no_grad():
        expected = model(input_ids=rows).logits
    loader = torch.utils.data.DataLoader(
        Outputs(model, rows),
        batch_size=2,
        num_workers=2 if start == "fork" else 1,  # a spawned one imports everything anew
        multiprocessing_context=start,
    )
    assert_close(torch.cat(list(loader)), expected)


PREAMBLE = """
import os, sys, threading
import torch
import lora_kernels as lk
torch.set_num_threads(2)

def train(steps, dtype, results):
    layer = lk.LoRALinear(512, 512, r=8, lora_dropout=0.1, dtype=dtype)
    x = torch.randn(256, 512, dtype=dtype, requires_grad=True)
    for _ in range(steps):
        layer(x).float().square().mean().backward()
    results.append(x.grad.isfinite().all().item())
"""

# The very first calls, which load the compiled part and fill the caches, in threads at once.
FIRST_CALLS = """
results = []
dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
threads = [threading.Thread(target=train, args=(2, dtype, results)) for dtype in dtypes * 2]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert results == [True] * 8, results
"""

# A child of a process that has used its threads; one thread, as DataLoader gives its workers.
FORK = """
results = []
train(2, torch.float32, results)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    train(2, torch.float32, results)
    train(2, torch.bfloat16, results)
    os._exit(0 if results == [True] * 3 else 1)
assert os.waitpid(child, 0)[1] == 0
train(2, torch.float32, results)
"""

# The interpreter ends with live graphs, packed weights and a thread in the middle of training,
# which it waits for. (A daemon thread inside torch aborts any program: docs/facts/pytorch.md.)
END = """
results = []
layer = lk.LoRALinear(64, 64, r=4, lora_dropout=0.1)
lk.prepack_(layer)
y = layer(torch.randn(8, 64, requires_grad=True))
threading.Thread(target=train, args=(20, torch.float32, results)).start()
train(2, torch.bfloat16, results)
"""


@pytest.mark.parametrize("script", [FIRST_CALLS, FORK, END], ids=["first calls", "fork", "end"])
def test_in_a_process_of_its_own(script):
    """Neither an error nor a word on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PREAMBLE + script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
