"""Who computes adapted layers that aren't plain linear ones, and a call of each."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_kernels as lk
from bench.measure.beside_peft import FROZEN, OURS, PEFT
from bench.shapes import DTYPES, SCALING

LABELS = {FROZEN: "frozen layer", PEFT: "PEFT", OURS: "ours"}


@dataclass(frozen=True)
class KindCase:
    """A layer of a kind, "dora", "embedding" or "conv".

    m: rows, ids, or images of size x size. n, k: features out and in, of an embedding K and the
    table's rows, of a convolution channels. limit: what the project allows ours, of PEFT's time.
    """

    name: str
    kind: str
    m: int
    n: int
    k: int
    dtype: str = "fp32"
    p: float = 0.0
    size: int = 1
    kernel: int = 1
    limit: float | None = None
    r: int = 16

    def __str__(self) -> str:
        where = f" of {self.size}x{self.size}" if self.kind == "conv" else ""
        size = f"{self.m}{where}, {self.n} x {self.k}"
        return f"{self.name}: {size}, p={self.p:g} r={self.r} {self.dtype}"


class Call:
    """One provider's forward and backward; all providers' have the same numbers.

    PEFT's adapters are float32, as it makes them. With dropout masks differ: what both compute
    without it is compared.
    """

    def __init__(self, case: KindCase, provider: str) -> None:
        torch.manual_seed(0)
        base = _base(case).to(DTYPES[case.dtype]).requires_grad_(False)
        self.x, self.dropout = _input(case), case.p > 0
        self.layer: Any = nn.Sequential(base)
        if provider != FROZEN:
            config = LoraConfig(
                r=case.r, lora_alpha=int(SCALING * case.r), lora_dropout=case.p,
                init_lora_weights=False, target_modules=["0"], use_dora=case.kind == "dora",
            )  # fmt: skip
            self.layer = get_peft_model(self.layer, config)
        if provider == OURS and (left := lk.patch_peft(self.layer).left):
            raise RuntimeError(f"not patched: {left}")
        self.trained = [p for p in self.layer.parameters() if p.requires_grad]
        y = self.layer(self.x)
        torch.manual_seed(1)
        self.dy = torch.randn_like(y)

    def results(self) -> list[Tensor]:
        """Return y and the gradients of x and of the factors, without dropout."""
        self.layer.eval()
        return self._step()

    def __call__(self) -> None:
        """Run the call and drop what it returns."""
        self.layer.train(self.dropout)
        self._step()

    def _step(self) -> list[Tensor]:
        x = self.x.detach()
        wanted = [*self.trained]
        if x.is_floating_point():
            wanted.append(x.requires_grad_())
        y = self.layer(x)
        grads = torch.autograd.grad(y, wanted, self.dy) if wanted else ()
        return [y.detach(), *grads]


def _base(case: KindCase) -> nn.Module:
    if case.kind == "dora":
        return nn.Linear(case.k, case.n)
    if case.kind == "embedding":
        return nn.Embedding(case.k, case.n)
    return nn.Conv2d(case.k, case.n, case.kernel, padding=case.kernel // 2)


def _input(case: KindCase) -> Tensor:
    if case.kind == "embedding":
        return torch.randint(case.k, (case.m,))
    shape = (case.m, case.k) if case.kind == "dora" else (case.m, case.k, case.size, case.size)
    return torch.randn(shape, dtype=DTYPES[case.dtype])
