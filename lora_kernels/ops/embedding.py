"""`lora_embedding`: what may be passed, what is saved for backward, what comes back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.checks import (
    check_finite,
    check_memory,
    check_scaling,
    check_shape,
    is_dtensor,
    not_a_float_tensor,
)
from lora_kernels.dispatch import IMPLEMENTATIONS, check_impl, choose
from lora_kernels.impl.reference import embedding as reference
from lora_kernels.operands.call import Adapter, Wanted, scaling_for
from lora_kernels.operands.embedding import NO_PADDING, EmbeddingCall, embedding_call_of
from lora_kernels.operands.weight import Dense
from lora_kernels.ops.linear_gradients import none_of, saved_tensors, see_missing_gradients
from lora_kernels.ops.plain_torch import is_plain_torch
from lora_kernels.registration import (
    Direction,
    Operators,
    as_results,
    below_autograd,
    is_recorded,
    operators,
    register,
)
from lora_kernels.transforms import backward_needs_plain_torch

# Of nn.Embedding, which PEFT passes on to torch and `lora_embedding` has not.
UNSERVED_OPTIONS = ("max_norm", "scale_grad_by_freq", "sparse")
_BRANCH = (
    "Tensor lora_embedding_A, Tensor lora_embedding_B, Tensor? scaling_tensor, float scaling, "
    "int padding_idx, Tensor? embed_scale"
)
_FORWARD = f"(Tensor ids, Tensor weight, {_BRANCH}) -> Tensor"
_BACKWARD = f"(Tensor dy, Tensor ids, {_BRANCH}, bool[2] wanted) -> (Tensor da, Tensor db)"


def check(ids: Any, call: EmbeddingCall) -> None:
    """Check the tensors of a call, with its weight or without, against each other."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected int32 or int64, got {ids.dtype}")
    if ids.layout is not torch.strided or ids.is_nested:
        raise TypeError(f"ids: expected a dense tensor, got layout {ids.layout}")
    weight, (a, b, _) = None if call.weight is None else call.weight.decode(), call.adapter
    factors: list[tuple[str, Any]] = [("lora_embedding_A", a), ("lora_embedding_B", b)]
    for name, t in factors if weight is None else [("weight", weight), *factors]:
        error = not_a_float_tensor(name, t, ids, "ids")
        if error is not None:
            raise error
        if is_dtensor(t):
            raise TypeError(f"{name}: expected a plain tensor, got a DTensor")
        if t.ndim != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {list(t.shape)}")
    if a.shape[0] < 1 or b.shape[1] != a.shape[0]:
        raise ValueError(
            "lora_embedding_A, lora_embedding_B: expected shapes [R, V] and [H, R] of one rank R, "
            f"at least 1, got {list(a.shape)} and {list(b.shape)}"
        )
    if weight is not None and weight.shape != (a.shape[1], b.shape[0]):
        raise ValueError(
            f"weight: expected shape {[a.shape[1], b.shape[0]]} beside lora_embedding_A of shape "
            f"{list(a.shape)} and lora_embedding_B of {list(b.shape)}, got {list(weight.shape)}"
        )


def _check_forward(ids: Any, weight: Tensor, *flat: Any) -> None:
    check(ids, embedding_call_of(weight, *flat))


def _check_backward(dy: Tensor, ids: Tensor, *flat: Any) -> None:
    call = embedding_call_of(None, *flat[:-1])
    check(ids, call)
    check_shape("dy", dy, ids, (*ids.shape, call.adapter.b.shape[0]), "ids")


def _fake_forward(impl: str, ids: Tensor, weight: Tensor, *flat: Any) -> Tensor:
    _check_forward(ids, weight, *flat)
    return weight.new_empty(*ids.shape, weight.shape[1])


def _fake_backward(impl: str, dy: Tensor, ids: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    _check_backward(dy, ids, *flat)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else dy.new_empty(0)
        for want, t in zip(flat[-1], flat[:2], strict=True)
    )


def _compute(impl: str, forward: Any, ids: Tensor, weight: Tensor, *flat: Any) -> Tensor:
    _check_forward(ids, weight, *flat)
    return forward(ids, embedding_call_of(weight, *flat)).contiguous()


def _compute_gradients(
    impl: str, backward: Any, dy: Tensor, ids: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    _check_backward(dy, ids, *flat)
    *given, (da, db) = flat
    gradients = backward(dy, ids, embedding_call_of(None, *given), Wanted(False, da, db, False))
    return as_results(dy, gradients[1:3])


def _as_it_is(impl: str, dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
    """Be what autocast makes of a look-up: nothing, as of torch's own."""
    return args


def _recorded_forward(both: Operators, ids: Tensor, weight: Tensor, *flat: Any) -> Tensor:
    return _differentiable(both, ids, embedding_call_of(weight, *flat))


def _recorded_backward(both: Operators, dy: Tensor, ids: Tensor, *flat: Any) -> Any:
    """Be the backward operator's autograd kernel: torch's operators where it is recorded."""
    if not is_recorded(dy, *flat[:2]):
        return below_autograd(both.backward, dy, ids, *flat)
    *given, (da, db) = flat
    call, wanted = embedding_call_of(None, *given), Wanted(False, da, db, False)
    return as_results(dy, reference.backward(dy, ids, call, wanted)[1:3])


register(
    "lora_embedding",
    "embedding",
    Direction(
        "forward", _FORWARD, _fake_forward, _compute, _check_forward, _as_it_is, _recorded_forward
    ),
    Direction(
        "backward", _BACKWARD, _fake_backward, _compute_gradients, _check_backward, _as_it_is,
        _recorded_backward,
    ),
)  # fmt: skip
_OPERATORS = {i.name: operators("lora_embedding", i.name) for i in IMPLEMENTATIONS}


class _Params(NamedTuple):
    """The other arguments of a call, one object so that backward returns one None for them."""

    operators: Operators
    scaling: float
    padding_idx: int


class LoraEmbedding(torch.autograd.Function):
    """The adapted embedding with gradients of W, A and B.

    Saves ids and the parameters; what A's columns are is gathered again.
    """

    @staticmethod
    def forward(ctx, ids, weight, a, b, scaling_tensor, embed_scale, params):
        both, scaling, padding_idx = params
        ctx.save_for_backward(ids, a, b, scaling_tensor, embed_scale)
        ctx.params = params
        see_missing_gradients(ctx)
        return below_autograd(
            both.forward, ids, weight, a, b, scaling_tensor, scaling, padding_idx, embed_scale
        )

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return none_of(ctx)
        _, need_weight, need_a, need_b = ctx.needs_input_grad[:4]
        ids, a, b, scaling_tensor, embed_scale = saved_tensors(ctx, "", "lora_embedding")
        both, scaling, padding_idx = ctx.params
        flat = (a, b, scaling_tensor, scaling, padding_idx, embed_scale)
        if backward_needs_plain_torch():
            wanted = Wanted(False, need_a, need_b, False)
            _, da, db, _ = reference.backward(dy, ids, embedding_call_of(None, *flat), wanted)
        elif need_a or need_b:
            da, db = below_autograd(both.backward, dy, ids, *flat, (need_a, need_b))
        else:
            da = db = None
        dw = (
            _weight_gradient(dy, ids, a.shape[1], padding_idx, embed_scale) if need_weight else None
        )
        return None, dw, da if need_a else None, db if need_b else None, None, None, None


def _weight_gradient(
    dy: Tensor, ids: Tensor, rows: int, padding_idx: int, embed_scale: Tensor | None
) -> Tensor:
    """Return dW as torch's embedding has it, for the rare table that is not frozen."""
    dy = dy if embed_scale is None else dy * embed_scale.to(dy.dtype)
    return torch.ops.aten.embedding_dense_backward(dy, ids, rows, padding_idx, False)


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_embedding_A: Tensor,
    lora_embedding_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    padding_idx: int | None = None,
    embed_scale: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Look up the rows of an embedding table with a LoRA adapter::

        y = (W[ids] + scaling · Aᵀ[ids] Bᵀ) · embed_scale

    There is no dropout: PEFT's embedding ignores lora_dropout.

    Args:
        ids: [...], int32 or int64, each in [0, V).
        weight: [V, H], float16, bfloat16, float32 or float64. Frozen by convention; if it requires
            grad, its gradient is torch's, dense.
        lora_embedding_A: [R, V], R >= 1, any of the float dtypes.
        lora_embedding_B: [H, R], likewise.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA; a float or a 0-dim tensor
            that doesn't require grad.
        padding_idx: an id, from the end if negative, whose row of W and column of A get no
            gradient; its row of y is computed as any other.
        embed_scale: a factor on rows and branch, as Gemma's embeddings have; a float, a 0-dim
            tensor that doesn't require grad, or None.
        impl: "auto", "cpu", "eager" or "reference". A named implementation serves the call or
            raises.

    Returns:
        y, [..., H], in weight's dtype, under autocast too.

    Precision: A's rows and B are rounded to weight's dtype, products accumulate as torch's matmul
    does, y is rounded after the look-up and after the sum; float16's branch is formed in float32.
    lora_embedding_A's gradient is summed in float32, in an order that depends on ids alone: two
    runs give the same bits. Gradients come back in the parameters' own dtypes.

    Inside torch.func's transforms, forward-mode differentiation, traces and exports the call is
    made of torch's own operators, by the formulas of "reference".

    Raises:
        TypeError: ids are no integers, a parameter is no dense float tensor, or a scale no number.
        ValueError: shapes, devices, ranges, or an `impl` that can't serve the call.
        IndexError: an id outside [0, V), on a CPU; a GPU asserts, as for torch's embedding.

    Source: Hu et al., LoRA, arXiv:2106.09685; loralib and PEFT for embeddings.

    Example:
        >>> weight, a, b = torch.eye(3), torch.tensor([[0.0, 1.0, 2.0]]), torch.ones(3, 1)
        >>> lk.lora_embedding(torch.tensor([2, 0]), weight, a, b, scaling=0.5)
        tensor([[1., 1., 2.],
                [1., 0., 0.]])
    """
    check_impl(impl)
    # A graph that is compiled for any number has none to ask about.
    if type(scaling) is not float or scaling - scaling != 0.0:
        check_scaling(scaling)
    adapter = Adapter(lora_embedding_A, lora_embedding_B, scaling)
    call = EmbeddingCall(Dense(weight), adapter, NO_PADDING, None)
    check(ids, call)
    adapter = adapter._replace(scaling=scaling_for(scaling, ids.device))
    padding_idx = row_of(padding_idx, weight.shape[0])
    scale = None if embed_scale is None else scale_tensor(embed_scale, weight)
    call = EmbeddingCall(Dense(weight), adapter, padding_idx, scale)
    if is_plain_torch(impl):
        return reference.forward(ids, call)
    asked = ("lora_embedding", ids.device, weight.dtype, len(lora_embedding_A), False, "dense")
    return _differentiable(_OPERATORS[choose(impl, asked).name], ids, call)


def _differentiable(both: Operators, ids: Tensor, call: EmbeddingCall) -> Tensor:
    assert call.weight is not None
    weight, (a, b, tensor, number, padding_idx, embed_scale) = call.weight.decode(), call.flat()
    if both is _OPERATORS["cpu"] and not torch.compiler.is_compiling():
        check_memory(ids=ids, weight=weight, lora_embedding_A=a, lora_embedding_B=b)
        _check_range(ids, weight.shape[0])
    if not is_recorded(weight, a, b):
        flat = (a, b, tensor, number, padding_idx, embed_scale)
        return below_autograd(both.forward, ids, weight, *flat)
    params = _Params(both, number, padding_idx)
    return LoraEmbedding.apply(ids, weight, a, b, tensor, embed_scale, params)


def _check_range(ids: Tensor, rows: int) -> None:
    """Raise IndexError as torch's own look-up does; the compiled part would raise RuntimeError.

    It does where a mode looks at operators, which may have no numbers to give.
    """
    if type(ids) is not Tensor or not ids.numel() or torch._C._len_torch_dispatch_stack():
        return
    least, most = (int(t) for t in ids.aminmax())
    if least < 0 or most >= rows:
        wrong = least if least < 0 else most
        raise IndexError(f"ids: index out of range, expected 0 to {rows - 1}, got {wrong}")


def row_of(padding_idx: int | None, rows: int) -> int:
    """Return a row's number from the start, NO_PADDING for none."""
    if padding_idx is None:
        return NO_PADDING
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
        raise TypeError(f"padding_idx: expected an int or None, got {type(padding_idx).__name__}")
    if not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx: expected a row of {rows}, got {padding_idx}")
    return padding_idx % rows


def scale_tensor(embed_scale: Any, weight: Tensor) -> Tensor:
    """Return embed_scale as operators take it: 0-dim, where the weight is, float32 or float64."""
    if isinstance(embed_scale, Tensor):
        if (
            embed_scale.ndim != 0
            or not embed_scale.is_floating_point()
            or embed_scale.requires_grad
        ):
            raise ValueError(
                "embed_scale: expected a 0-dim float tensor that doesn't require grad, got shape "
                f"{list(embed_scale.shape)}, {embed_scale.dtype}"
            )
    elif type(embed_scale) is not float or embed_scale - embed_scale != 0.0:
        check_finite(embed_scale, name="embed_scale")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(embed_scale, Tensor):
        return embed_scale.to(weight.device, dtype)
    return torch.full((), embed_scale, dtype=dtype, device=weight.device)
