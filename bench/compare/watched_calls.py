"""What is watched from revision to revision: a few layers and a training step, by ours.

    python -m bench.compare.watched_calls

Reads names from standard input, one a line, and answers each with the milliseconds of a call, or
NaN where there is no such call here: for `revisions`, which asks two of them in turn. Of the
package it takes public names alone, which other revisions have.
"""

import sys
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk

NAMES = ("cpu", "packed", "eager")
R = 16
SECONDS = 0.01  # of calls in one answer
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest element
F32, BF16 = torch.float32, torch.bfloat16


class Layer(NamedTuple):
    """A layer x [M, K] -> [M, N], its dtype and its adapters', and its dropout."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    adapters: torch.dtype
    p: float = 0.0


CASES: dict[str, Layer | None] = {
    "tiny": Layer(1, 64, 64, F32, F32),
    "dropout": Layer(256, 768, 768, BF16, F32, 0.05),
    "fp32": Layer(256, 768, 768, F32, F32),
    "few rows": Layer(16, 2048, 2048, BF16, BF16),
    "step": None,  # of a small Llama in bfloat16
}


class AbsentError(RuntimeError):
    """A revision can't make a call on this machine."""


def adapted(base: nn.Module, targets: list[str], adapters: torch.dtype, p: float) -> Any:
    """Return PEFT's model of a frozen one, with a B that isn't zero."""
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=p, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what peft 0.21 asks of transformers 5
        model: Any = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def patch(model: nn.Module, name: str, forward: Callable[[], Tensor]) -> None:
    """Have a model's layers computed by ours, so that in evaluation it gives what PEFT's do.

    Raises:
        AbsentError: a layer can't be.
        RuntimeError: it is wrong.
    """
    model.eval()
    expected = forward()
    report: Any = lk.patch_peft(model, impl="cpu" if name == "packed" else name)
    if name == "packed" and not report.left:
        report = lk.prepack_(model)
    if report.left:
        raise AbsentError(f"{name}: {report}")
    error, most = (forward() - expected).abs().max(), expected.abs().max()
    if not error <= TOLERANCES[expected.dtype] * most:
        raise RuntimeError(f"{name}: {error:.3g} away from PEFT's of up to {most:.3g}")
    model.train()


def layer_call(case: Layer, name: str) -> Callable[[], None]:
    """Return a layer's forward and backward by ours."""
    base = nn.Sequential(nn.Linear(case.k, case.n)).to(case.dtype)
    model = adapted(base, ["0"], case.adapters, case.p)
    x = torch.randn(case.m, case.k, dtype=case.dtype, requires_grad=True)
    dy = torch.randn(case.m, case.n, dtype=case.dtype)
    patch(model, name, lambda: model(x))
    layer = model.base_model.model[0]
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def call() -> None:
        layer(x).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return call


def step_call(name: str) -> Callable[[], None]:
    """Return a step of a small Llama: forward, backward, AdamW."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=2048,
    )  # fmt: skip
    base: Any = LlamaForCausalLM(config)
    linears = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
    model = adapted(base.to(BF16), linears, BF16, 0.05)
    ids = torch.randint(2048, (2, 256))
    patch(model, name, lambda: model(input_ids=ids, use_cache=False).logits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def call() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def call_of(what: str, name: str) -> Callable[[], None]:
    """Return a case's call by one of `NAMES`, the same numbers each time.

    Raises:
        AbsentError: it can't be made here.
        RuntimeError: it is wrong.
    """
    torch.manual_seed(0)
    case = CASES[what]
    return step_call(name) if case is None else layer_call(case, name)


@lru_cache(maxsize=1)
def _ready(what: str, name: str) -> tuple[Callable[[], None], int]:
    """Return a warm call, and how often it is made for one answer."""
    call = call_of(what, name)
    call()
    return call, max(1, int(SECONDS / (_seconds(call, 1) + 1e-9)))


def _seconds(call: Callable[[], None], count: int) -> float:
    call()  # the other revision has used the cache meanwhile
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count


def main() -> None:
    """Answer until standard input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        what, name = line.strip().split("/")
        try:
            print(1e3 * _seconds(*_ready(what, name)), flush=True)
        except AbsentError as error:
            print(f"left out: {error}", file=sys.stderr)
            print("nan", flush=True)


if __name__ == "__main__":
    main()
