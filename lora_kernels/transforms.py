"""Whether torch looks into a call in a way that an operator of ours can't answer for itself."""

import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# Asked at every call: finding them costs as much as calling them.
_interpreter = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing
_count_modes = torch._C._len_torch_dispatch_stack
_NOTHING = type(None)
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def needs_plain_torch() -> bool:
    """Whether a call must be made of torch's own operators.

    That is so inside torch.func's transforms and forward-mode differentiation, whose rules an
    operator with an explicit backward doesn't have; while TorchScript traces, whose graphs shall
    run without this package; and while FLOPs are counted, by formulas of torch's operators.
    """
    # By type, since dynamo has an object even for None.
    if forward_ad._current_level >= 0 or type(_interpreter()) is not _NOTHING:
        return True
    if is_dynamo_compiling():
        return False
    return _is_tracing() or counts_flops()


def backward_needs_plain_torch(dy: Tensor | None = None) -> bool:
    """Whether backward is recorded (create_graph), mapped, counted, or dy may have a tangent.

    dy: given where the operator has a list of tensors, which torch can't call for each gradient of
    a batch (is_grads_batched) as it does others.
    """
    if is_dynamo_compiling():
        return False
    return (
        torch.is_grad_enabled()
        or type(_interpreter()) is not _NOTHING
        or forward_ad._current_level >= 0
        or counts_flops()
        or (dy is not None and _is_batched(dy))
    )


def counts_flops() -> bool:
    """Whether a torch.utils.flop_counter.FlopCounterMode is active.

    Formulas for it can't be registered beforehand: its module imports Triton.
    """
    if _count_modes() == 0:
        return False
    modes = _get_current_dispatch_mode_stack()
    return any(type(mode).__name__ == "_FlopCounterMode" for mode in modes)


def compiles_ahead() -> bool:
    """Whether AOTInductor traces an exported program, whose packages keep the fused operators."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and bool(virtualized.V.aot_compilation)
