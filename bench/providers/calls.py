"""A provider's call on one set of tensors: forward, or forward and backward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.providers.plans import planned
from bench.providers.registry import Provider, peft_layer
from bench.shapes import Case
from lora_kernels.impl.executor import using
from lora_kernels.testing import Inputs


class Call:
    """One provider's layer on an x of its own; x's memory and the frozen weight are shared."""

    def __init__(self, provider: Provider, case: Case, inputs: Inputs, p: float) -> None:
        module = provider.convert(peft_layer(case, inputs, p, provider.codes))
        self.layer: nn.Module = module.train(case.mode == "train")
        self.train, self.dy = case.mode == "train", inputs.dy
        self.x = inputs.x.detach().requires_grad_(self.train)
        self.leaves = [self.x, *(p for p in self.layer.parameters() if p.requires_grad)]
        self._context: Any = nullcontext if self.train else torch.no_grad
        self._kernels = None if provider.planner is None else planned(provider.planner)

    def forward(self) -> Tensor:
        """Return y."""
        with self._context(), self._planning():
            return self.layer(self.x)

    def __call__(self) -> Tensor:
        """Run the call and drop its gradients.

        Kept until the next round they would leave ever other gaps in the heap: a tenth to a fifth
        of PEFT's time on MiniLM's `down` went into pages that the system gave it anew.
        """
        y = self._run()
        self._clear()
        return y

    def results(self) -> dict[str, Tensor]:
        """Run the call and return y and the gradients: dx, and dA and dB where there are."""
        y = self._run()
        gradients = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        self._clear()
        return {"y": y, **dict(zip(("dx", "da", "db"), gradients, strict=False))}

    def _run(self) -> Tensor:
        y = self.forward()
        if self.train:
            with self._planning():
                y.backward(self.dy)
        return y.detach()

    @contextmanager
    def _planning(self) -> Iterator[None]:
        """Have kernels take the provider's plan, if it names one: backward in this thread, too."""
        if self._kernels is None:
            yield
            return
        with using(self._kernels), torch.autograd.set_multithreading_enabled(False):
            yield

    def _clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


def inputs_for(provider: Provider, inputs: Inputs) -> Inputs:
    """Return the tensors with adapters of the dtype that the provider has them in."""
    if not provider.adapters_as_x:
        return inputs
    dtype = inputs.x.dtype
    return replace(inputs, lora_A=inputs.lora_A.to(dtype), lora_B=inputs.lora_B.to(dtype))


def make_slots(
    providers: Sequence[Provider], case: Case, device: str, count: int
) -> list[list[Call]]:
    """Return the calls of all providers on each of several sets of tensors."""
    slots = []
    for _ in range(count):
        inputs = case.inputs(device)
        slots.append([Call(p, case, inputs_for(p, inputs), case.p) for p in providers])
    return slots
