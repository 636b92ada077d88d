"""How far a result may be from the float64 oracle.

The budget is derived, not tuned: an implementation may err twice as much as same-dtype eager
PyTorch, both measured against the float64 oracle, plus one rounding of the largest element. The
root mean square is held to the same rule, which catches broad drift that a maximum hides. Where
torch's switch lets float32 products be TF32's, eager's are.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.impl import gpu

FEW_ELEMENTS, MORE_DRAWS = 1 << 17, 7
# Where xa has so few elements, one rounding of it decides the errors of y and db: against seven
# more draws torch's own results failed in 0.4 % of runs (1-7-129, R = 1). A result that has so few
# itself is as much a matter of luck (736-1-7, R = 1).
FEW_SUMS, MANY_DRAWS = 64, 31


def more_draws(results: Iterable[Tensor], between: int) -> int:
    """Return how many draws more eager's error is the largest of.

    Where a result has few elements, one draw's error may be near zero by luck.

    Args:
        results: what is compared.
        between: the elements of the smallest tensor between two products, as xa.
    """
    fewest = min(t.numel() for t in results)
    if fewest >= FEW_ELEMENTS:
        return 0
    return MANY_DRAWS if min(between, fewest) < FEW_SUMS else MORE_DRAWS


def assert_within_budget(actual: Tensor, oracle: Tensor, eager: list[Tensor], what: str) -> None:
    """Check shape, finiteness and error: at most twice eager's plus one rounding.

    Args:
        actual: the result under test.
        oracle: the same in float64.
        eager: errors of same-dtype eager PyTorch, one tensor a draw.
        what: names the result in the message.

    Raises:
        AssertionError: says the error, the budget and the worst element's coordinate.
    """
    assert actual.shape == oracle.shape, f"{what}: shape {actual.shape}, expected {oracle.shape}"
    assert torch.isfinite(actual).all(), f"{what}: NaN or infinity, not written or overflown"
    if oracle.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - oracle).abs()
    budget = 2 * max(e.abs().max() for e in eager) + eps * oracle.abs().max()
    worst = torch.unravel_index(error.argmax(), error.shape)
    assert error.max() <= budget, (
        f"{what}: error {error.max():.3g} at {tuple(int(i) for i in worst)}, budget {budget:.3g}"
    )
    rms_budget = 2 * max(_rms(e) for e in eager) + eps * _rms(oracle)
    assert _rms(error) <= rms_budget, f"{what}: rms {_rms(error):.3g}, budget {rms_budget:.3g}"


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def products_as_allowed(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context in which torch forms products of a dtype as its switches let a GPU do.

    A CPU has no TF32: there the operands of each product are rounded, as tensor cores do.
    """
    by_tf32 = dtype == torch.float32 and gpu.tf32_allowed()
    return _Tf32Products() if by_tf32 else nullcontext()


class _Tf32Products(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            args = tuple(map(to_tf32, args))
        return func(*args, **(kwargs or {}))


def to_tf32(t: Tensor) -> Tensor:
    """Return float32 rounded to TF32's 10 bits of mantissa; another dtype as it is."""
    if t.dtype != torch.float32:
        return t
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
