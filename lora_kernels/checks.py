"""Argument checks of the public functions, made before anything is written."""

import math
from typing import Any

import torch
from torch import Tensor

from lora_kernels.operands.call import AUTOCAST_DTYPES, LinearCall
from lora_kernels.operands.weight import Misfit, QuantizedWeight, Weight

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
_STRIDED = torch.strided
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
SEED_RANGE = (-(1 << 63), (1 << 63) - 1)


def is_dtensor(t: Tensor | None) -> bool:
    """Whether t is a DTensor; their module, a second's import, is not loaded for other tensors."""
    if type(t) in _PLAIN or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(t, DTensor)


def check_call(x: Tensor, call: LinearCall, *, cast: torch.dtype | None) -> None:
    """Check the tensors of a call against each other; `cast` is autocast's dtype, None outside it.

    Raises:
        TypeError: not a tensor, not a supported float dtype or layout, or dtypes that can't be
            combined.
        ValueError: shapes or devices that don't fit.
    """
    if plainly_fit(x, call, cast):
        return
    error = misfit(x, call, cast)
    if error is not None:
        raise error


def plainly_fit(x: Tensor, call: LinearCall, cast: torch.dtype | None) -> bool:
    """Whether the tensors fit as those of most calls do: one dtype, or float32 adapters.

    A look that takes 1 µs where `misfit`, which names what is wrong, takes 3. False is no error; it
    is the answer for meta tensors, too, which nothing computes.
    """
    given, (lora_A, lora_B, _), bias, _ = call
    weight = given.stored
    if isinstance(given, QuantizedWeight) or not (
        type(x) in _PLAIN
        and type(weight) in _PLAIN
        and type(lora_A) in _PLAIN
        and type(lora_B) in _PLAIN
        and x.layout is _STRIDED
        and weight.layout is _STRIDED
        and lora_A.layout is _STRIDED
        and lora_B.layout is _STRIDED
        and not x.is_nested  # whose layout says strided
    ):
        return False
    dtype, adapters = x.dtype, lora_A.dtype
    if not (
        dtype in FLOAT_DTYPES
        and (weight.dtype is dtype or (cast is not None and weight.dtype in AUTOCAST_DTYPES))
        and (adapters is dtype or adapters is torch.float32)
        and lora_B.dtype is adapters
    ):
        return False
    if x.is_cpu:  # a third of the time that comparing devices takes
        if not (weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu):
            return False
    elif x.is_meta or not x.device == weight.device == lora_A.device == lora_B.device:
        return False
    rows, base, a, b = x.shape, weight.shape, lora_A.shape, lora_B.shape
    if not (rows and len(base) == len(a) == 2 and rows[-1] == base[1] == a[1] and a[0] >= 1):
        return False
    return b == (base[0], a[0]) and (
        bias is None
        or (
            type(bias) in _PLAIN
            and bias.layout is _STRIDED
            and bias.dtype is weight.dtype
            and bias.shape == base[:1]
            and bias.device == weight.device
        )
    )


def misfit(x: Any, call: LinearCall, cast: torch.dtype | None) -> TypeError | ValueError | None:
    """Return the error that names what doesn't fit in a call, or None."""
    weight, (lora_A, lora_B, _), bias = call.weight, call.adapter, call.bias
    own = weight if isinstance(weight, QuantizedWeight) else weight.stored
    tensors = (("x", x), ("weight", own), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias))
    for name, t in tensors:
        if t is None and name == "bias":
            continue
        if isinstance(t, QuantizedWeight):
            error = _unfit_codes(t, x)
        else:
            error = not_a_float_tensor(name, t, x)
        if error is not None:
            return error
    if x.ndim < 1:
        return ValueError("x: expected at least one dimension [..., K], got a 0-dim tensor")
    error = _unfit_matrices(x, weight, lora_A, lora_B)
    if error is not None:
        return error
    if bias is not None and bias.shape != weight.shape[:1]:
        return ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    for name, t in (("weight", own), ("bias", bias)):
        if t is None or t.dtype is None or t.dtype == x.dtype:
            continue
        if cast is None:
            return TypeError(
                f"{name}: expected the dtype of x, {x.dtype}, got {t.dtype} "
                "(only lora_A and lora_B may have a dtype of their own)"
            )
        if t.dtype == torch.float64:
            return TypeError(
                f"{name}: expected a dtype that autocast casts, float16, bfloat16 or float32, "
                f"got {t.dtype}"
            )
    return None


def not_a_float_tensor(
    name: str, t: Any, x: Any, beside: str = "x"
) -> TypeError | ValueError | None:
    """Return the error of what is no dense float tensor, or not where x, called `beside`, is."""
    if not isinstance(t, Tensor):
        hint = " (scaling is a keyword)" if name == "bias" and isinstance(t, (int, float)) else ""
        return TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}{hint}")
    if t.dtype not in FLOAT_DTYPES:
        return TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {t.dtype}")
    if t.is_nested or t.layout is not _STRIDED:
        kind = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        return TypeError(f"{name}: expected a dense tensor, got {kind}")
    if t.device != x.device:
        return ValueError(f"{name}: expected the device of {beside}, {x.device}, got {t.device}")
    if is_dtensor(t) != is_dtensor(x):
        return TypeError(
            f"{name}: expected a {type(x).__name__} as {beside} is one, got a {type(t).__name__}"
        )
    return None


def _unfit_codes(weight: QuantizedWeight, x: Tensor) -> Misfit:
    error = weight.misfit()
    if error is not None:
        return error
    for t in (weight.stored, *weight.parts):
        if t.device != x.device:
            return ValueError(f"weight: expected the device of x, {x.device}, got {t.device}")
        if is_dtensor(x) or is_dtensor(t):
            return TypeError("weight: expected no DTensor beside or as a quantised weight, got one")
        if t.requires_grad:
            return TypeError("weight: expected frozen codes and scales, got one that requires grad")
    return None


def _unfit_matrices(x: Tensor, weight: Any, lora_A: Tensor, lora_B: Tensor) -> ValueError | None:
    for name, t, dims in (
        ("weight", weight.stored if weight.dtype is not None else None, "[N, K]"),
        ("lora_A", lora_A, "[R, K]"),
        ("lora_B", lora_B, "[N, R]"),
    ):
        if t is not None and t.ndim != 2:
            return ValueError(f"{name}: expected two dimensions {dims}, got shape {list(t.shape)}")
    features, (n, k), rank = x.shape[-1], weight.shape, lora_A.shape[0]
    if features != k:
        hint = "; weight looks transposed" if features == n else ""
        return ValueError(
            f"weight: expected shape [N, {features}] for x of shape {list(x.shape)}, "
            f"got {[n, k]}{hint}"
        )
    if lora_A.shape[1] != k or lora_B.shape[0] != n:
        swapped = lora_B.shape[1] == k and lora_A.shape[0] == n
        hint = "; lora_A and lora_B look swapped" if swapped else ""
        name, t, expected = (
            ("lora_A", lora_A, f"[R, {k}]")
            if lora_A.shape[1] != k
            else ("lora_B", lora_B, f"[{n}, R]")
        )
        return ValueError(f"{name}: expected shape {expected}, got {list(t.shape)}{hint}")
    if rank < 1 and weight.dtype is not None:  # codes' own product is a call of rank 0
        return ValueError(f"lora_A: expected a rank of at least 1, got shape {list(lora_A.shape)}")
    if lora_B.shape[1] != rank:
        return ValueError(f"lora_B: expected shape [{n}, {rank}], got {list(lora_B.shape)}")
    return None


def check_backward(
    dy: Tensor, x: Tensor | None, xa: Tensor | None, call: LinearCall, *, wide_xa: bool = False
) -> None:
    """Check an operator's backward arguments; parameters may have changed since forward.

    wide_xa: whether xa is float32 beside a float16 dy.

    Raises:
        TypeError, ValueError: an argument doesn't fit the others.
    """
    if x is not None and not wide_xa and _plainly_fit_backward(dy, x, xa, call):
        return
    weight, (lora_A, lora_B, _) = call.weight, call.adapter
    if isinstance(weight, QuantizedWeight) and (unfit := _unfit_codes(weight, dy)) is not None:
        raise unfit
    (n, k), r = _matrix_shape("weight", weight), _matrix_shape("lora_A", lora_A)[0]
    for name, t, shape in (
        ("lora_A", lora_A, (r, k)),
        ("lora_B", lora_B, (n, r)),
        ("dy", dy, (*dy.shape[:-1], n)),
        ("x", x, (*dy.shape[:-1], k)),
        ("xa", xa, (math.prod(dy.shape[:-1]), r)),
    ):
        check_shape(name, t, dy, shape)
    given = (("weight", None if weight.dtype is None else weight.stored), ("x", x), ("xa", xa))
    for name, t in given:
        expected = torch.float32 if name == "xa" and wide_xa else dy.dtype
        if t is not None and t.dtype != expected:
            whose = "" if expected != dy.dtype else "the dtype of dy, "
            raise TypeError(f"{name}: expected {whose}{expected}, got {t.dtype}")


def check_shape(name: str, t: Any, like: Tensor, shape: tuple[int, ...], of: str = "x") -> None:
    """Raise unless t, where given, is a float tensor of a shape where `like`, called `of`, is."""
    error = None if t is None else not_a_float_tensor(name, t, like, of)
    if error is not None:
        raise error
    if t is not None and tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")


def _plainly_fit_backward(dy: Tensor, x: Tensor, xa: Tensor | None, call: LinearCall) -> bool:
    """Whether `plainly_fit`, dy and xa too: in half the time of a look that names what is wrong."""
    if not plainly_fit(x, call, None):
        return False
    rows, n, r = x.shape[:-1], call.weight.shape[0], call.adapter.a.shape[0]
    return _is_like(dy, x, (*rows, n)) and (xa is None or _is_like(xa, x, (rows.numel(), r)))


def _is_like(t: Tensor, x: Tensor, shape: tuple[int, ...]) -> bool:
    if type(t) not in _PLAIN or t.is_nested:
        return False
    return (t.layout, t.dtype, t.device, t.shape) == (_STRIDED, x.dtype, x.device, shape)


def check_magnitude(magnitude: Any, x: Tensor, n: int) -> None:
    """Check that DoRA's magnitude is a float tensor [n] beside x (or dy), which is no DTensor.

    Raises:
        TypeError, ValueError: it isn't.
    """
    if is_dtensor(x):
        raise TypeError(f"x: expected a plain tensor beside a magnitude, got a {type(x).__name__}")
    if magnitude is None:
        raise TypeError("magnitude: expected a torch.Tensor, got NoneType")
    check_shape("magnitude", magnitude, x, (n,))


def check_norm(norm: Any, u: Tensor | None, dy: Tensor, wide_u: bool) -> None:
    """Check what DoRA's backward reads besides `check_backward`'s: row norms [N] and u [M, N].

    wide_u: whether u may be float32 beside another dy.

    Raises:
        TypeError, ValueError: they don't fit dy.
    """
    n = dy.shape[-1]
    wide = torch.promote_types(dy.dtype, torch.float32)
    rows = math.prod(dy.shape[:-1])
    for name, t, shape, dtype in (("norm", norm, (n,), wide), ("u", u, (rows, n), dy.dtype)):
        check_shape(name, t, dy, shape)
        if (
            t is not None
            and t.dtype != dtype
            and not (wide_u and name == "u" and t.dtype == torch.float32)
        ):
            raise TypeError(f"{name}: expected {dtype}, got {t.dtype}")


def check_memory(**tensors: Tensor | None) -> None:
    """Check that tensors which torch's own operators will read have the memory they span.

    Torch takes that on trust, and ZeRO-3 and FSDP empty storages. The compiled parts look for
    themselves; a look takes 0.6 µs a tensor.

    Raises:
        ValueError: a tensor whose storage was emptied or shrunk, or never allocated.
    """
    if torch.compiler.is_compiling():
        return
    for name, t in tensors.items():
        lack = None if t is None else lack_of_memory(t)
        if lack is not None:
            raise ValueError(f"{name}: expected {lack}")


def lack_of_memory(t: Tensor) -> str | None:
    """Return what memory a tensor spans and what it has, where that is less; else None."""
    if type(t) not in _PLAIN or t.layout is not _STRIDED or _is_wrapped(t):
        return None
    span = t.numel()
    if not t.is_contiguous():  # else in a third of the time
        span = 1 + sum((size - 1) * by for size, by in zip(t.shape, t.stride(), strict=True))
    # A wrapper's data that replaced a parameter's says a size and has no memory.
    nbytes = t.untyped_storage().nbytes() if t.data_ptr() else 0
    if nbytes >= (t.storage_offset() + span) * t.itemsize:
        return None
    if t.is_meta or t.numel() == 0 or t._is_zerotensor():
        return None
    return f"memory for shape {list(t.shape)}, got a storage of {nbytes} bytes"


def _matrix_shape(name: str, t: Tensor | Weight) -> tuple[int, int]:
    if len(t.shape) != 2:
        raise ValueError(f"{name}: expected two dimensions, got shape {list(t.shape)}")
    return t.shape[0], t.shape[1]


def check_scaling(scaling: Any) -> None:
    """Check that scaling is a finite number or a 0-dim float tensor without gradient."""
    if isinstance(scaling, Tensor):
        if scaling.ndim != 0 or not scaling.is_floating_point() or scaling.requires_grad:
            raise ValueError(
                "scaling: expected a 0-dim float tensor that doesn't require grad, got "
                f"shape {list(scaling.shape)}, {scaling.dtype}, "
                f"requires_grad={scaling.requires_grad}"
            )
        return
    check_finite(scaling, name="scaling")


def check_keyword(name: str, misplaced: tuple[Any, ...]) -> None:
    """Check that nothing came by position where keywords follow, the first of them `name`."""
    if misplaced:
        got = misplaced[0]
        got = repr(got) if isinstance(got, (int, float)) else f"a {type(got).__name__}"
        raise TypeError(f"{name}: expected as a keyword, {name}=..., got {got} by position")


def is_finite(number: Any) -> bool:
    """Whether a number is finite; one that torch.compile leaves open stays so."""
    if type(number) is float:  # as an open one is, too; numpy would warn of the difference
        return number - number == 0.0
    return math.isfinite(number)


def check_finite(value: Any, *, name: str) -> None:
    """Check that value is a finite number, no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not is_finite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_dropout_p(dropout_p: Any, *, name: str = "dropout_p") -> None:
    """Check that dropout_p is a number in [0, 1)."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:  # false for NaN as well
        raise ValueError(f"{name}: expected a probability in [0, 1), got {dropout_p}")


def check_seed(seed: Any, device: torch.device) -> None:
    """Check that seed is None, a 64-bit signed int, or a 0-dim int64 tensor on `device`."""
    if seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.ndim != 0 or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(
                f"seed: expected a 0-dim int64 tensor on {device}, got shape {list(seed.shape)}, "
                f"{seed.dtype}, on {seed.device}"
            )
    elif isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed: expected None, an int or a tensor, got {type(seed).__name__}")
    elif not SEED_RANGE[0] <= seed <= SEED_RANGE[1]:
        raise ValueError(f"seed: expected a signed 64-bit integer, got {seed}")


def check_rank(r: Any) -> None:
    """Check that r is a positive int."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r: expected an int, got {type(r).__name__}")
    if r < 1:
        raise ValueError(f"r: expected a rank of at least 1, got {r}")
