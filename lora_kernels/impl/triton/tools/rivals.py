"""What a layer's plans are measured against: the frozen layer, and PEFT's own operators."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from lora_kernels.impl.triton.plan.config import Problem
from lora_kernels.impl.triton.tools.record import Made


def frozen(problem: Problem, made: Made) -> Callable[[], Any]:
    """Return the frozen layer's own product as a call: x Wᵀ, or dy W."""
    m, n, k = problem[:3]
    normal = partial(made.fill, device=made.memory, dtype=made.dtype)
    weight = normal(n, k)
    if problem.backward:
        return partial(torch.matmul, normal(m, n), weight)
    return partial(linear, normal(m, k), weight)


def peft(problem: Problem, made: Made) -> Callable[[], Any]:
    """Return the operators of PEFT's layer as a call: forward, or backward of one forward."""
    m, n, k, r = problem[:4]
    normal = partial(made.fill, device=made.memory, dtype=made.dtype)
    factor = partial(normal, dtype=made.adapters or made.dtype)
    x, weight = normal(m, k), normal(n, k)
    a, b = factor(r, k), factor(n, r)
    p = 0.1 if problem.dropout else 0.0

    def forward() -> Tensor:
        dropped = dropout(x.to(a.dtype), p) if p else x.to(a.dtype)
        y = linear(x, weight)
        return (y + linear(linear(dropped, a), b) * 1.5).to(y.dtype)

    if not problem.backward:
        return torch.no_grad()(forward)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    y, dy = forward(), normal(m, n)
    return partial(torch.autograd.grad, y, leaves, dy, retain_graph=True)
