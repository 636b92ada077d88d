"""Layers that keep their weight quantised, by the library they are of; none is imported here.

A call reads what a layer keeps and writes nothing to it: no library's forward runs, some of which
convert the weight in place, and nothing is converted ahead.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.bypass import hooks_reason
from lora_kernels.checks import check_call, is_dtensor, lack_of_memory
from lora_kernels.operands.call import Adapter, LinearCall, autocast_dtype
from lora_kernels.operands.codebook import NESTED_BLOCK, CodebookWeight
from lora_kernels.operands.dropout import Dropout
from lora_kernels.operands.request import Request
from lora_kernels.operands.scaled import ScaledWeight
from lora_kernels.operands.weight import QuantizedWeight
from lora_kernels.ops.linear import run
from lora_kernels.serving import request_of
from lora_kernels.wrappers import loaded


class Base(NamedTuple):
    """A quantised layer as a call reads it.

    dtype: in which the layer computes; that of x where None.
    casts_back: whether y has x's dtype, under autocast too.
    option: the argument of `patch_peft` that asks for W in x's dtype, where the layer's own forward
        quantises x besides.
    """

    weight: QuantizedWeight
    bias: Tensor | None
    dtype: torch.dtype | None = None
    casts_back: bool = False
    option: str | None = None


def quantized_weight(owner: nn.Module | Tensor) -> QuantizedWeight:
    """Return the weight of a quantised layer, as `lora_linear` takes it.

    It is made of views of the layer's tensors: nothing is copied, and nothing is ever written.

    Args:
        owner: a `Linear4bit` or `Linear8bitLt` of bitsandbytes, an nn.Linear whose weight torchao
            quantised to int8 or float8 (not its activations), an `FP8Linear` of transformers; an
            adapted layer around one of these; or the weight of one, FP8Linear's apart.

    Returns:
        The weight: `decode(dtype)` makes W of it by the library's own rule, bit for bit; `shape`,
        `format` and `nbytes` say what it is.

    Raises:
        TypeError: `owner` is none of these.
        ValueError: its weight isn't quantised yet, was converted in place for a library's own
            inference, is sharded, or has parts that don't fit together. `owner` is as it was.

    Example:
        >>> from bitsandbytes.nn import Linear4bit
        >>> layer = Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
        >>> weight = lk.quantized_weight(layer)
        >>> weight.format, weight.shape, weight.decode(torch.bfloat16).dtype
        ('nf4', torch.Size([32, 64]), torch.bfloat16)
        >>> lk.lora_linear(torch.ones(3, 64), weight, torch.ones(4, 64), torch.ones(32, 4)).shape
        torch.Size([3, 32])
    """
    base: Any = owner
    while isinstance(base, nn.Module) and isinstance(base._modules.get("base_layer"), nn.Module):
        base = base._modules["base_layer"]
    read: Any = None
    if isinstance(base, nn.Module):
        reader = _reader(base)
        read = None if reader is None else reader(base)
    elif isinstance(base, Tensor):
        read = _read_parameter(base)
    if read is None:
        kind = type(base).__name__
        raise TypeError(f"owner: expected a quantised layer or its weight, got a {kind}")
    if isinstance(read, str):
        what = read if isinstance(base, nn.Module) else f"weight {read}"
        raise ValueError(f"owner: expected one that can be read as it is, but its {what}")
    weight: QuantizedWeight = read.weight if isinstance(read, Base) else read
    return weight


def is_quantized(module: Any) -> bool:
    """Whether a layer is of a class that keeps its weight quantised."""
    return isinstance(module, nn.Module) and _reader(module) is not None


def read_quantized(module: Any) -> Base | str | None:
    """Return what a call reads of a quantised layer, or why it isn't read; None of another."""
    reader = _reader(module)
    if reader is None:
        return None
    return hooks_reason(module) or reader(module)


def settled(module: Any, base: Base, x: Tensor) -> Base:
    """Return a layer as read once the first x has decided in which dtype it computes."""
    if getattr(module, "compute_type_is_set", True):
        return base
    module.set_compute_type(x)
    module.compute_type_is_set = True
    return base._replace(dtype=module.compute_dtype)


def as_computed(
    x: Tensor, base: Base, adapter: Adapter | None, dropout: Dropout | None
) -> tuple[Tensor, LinearCall, torch.dtype | None]:
    """Return x and the call in the dtype that the layer computes in, and autocast's.

    Without an adapter it is one of rank 0.
    """
    cast, x = autocast_dtype(x), x if base.dtype is None else x.to(base.dtype)
    bias, (n, k) = base.bias, base.weight.shape
    if adapter is None:
        adapter = Adapter(x.new_empty(0, k), x.new_empty(n, 0), 1.0)
    if bias is not None and bias.dtype != x.dtype and cast is None:
        bias = bias.to(x.dtype)
    return x, LinearCall(base.weight, adapter, bias, dropout), cast


def apply(
    x: Tensor, base: Base, adapter: Adapter | None, dropout: Dropout | None, impl: str
) -> Tensor:
    """Return y of a layer, with its adapter or without one, in the dtypes that it asks for."""
    given, call, cast = as_computed(x, base, adapter, dropout)
    check_call(given, call, cast=cast)
    y = run(given, call, impl, cast)
    return y.to(x.dtype) if base.casts_back else y


def request_of_base(base: Any, rank: int, dropout: bool, op: str) -> Request | None:
    """Return what calls of a layer around `base` ask, as `request_of` does, quantised or not."""
    read = read_quantized(base)
    if not isinstance(read, Base):
        return request_of(base, rank, dropout, op) if read is None else None
    codes = read.weight.stored
    dtype = autocast_dtype(codes) or read.dtype or torch.float32
    return Request(op, codes.device, dtype, rank, dropout, read.weight.format)


@contextmanager
def unconverted(module: Any) -> Iterator[None]:
    """Keep bitsandbytes' layer from converting its weight in place for inference on a CPU."""
    name = "support_avx512bf16_for_cpu"
    own = module.__dict__
    given = own.get(name)
    if not given:
        yield
        return
    own[name] = False
    try:
        yield
    finally:
        own[name] = given


def _bitsandbytes(name: str) -> Any:
    return loaded("bitsandbytes.nn", name)


def _torchao() -> tuple[Any, ...]:
    names = ("Int8Tensor", "Float8Tensor")
    return tuple(kind for name in names if (kind := loaded("torchao.quantization", name)))


def _reader(module: nn.Module) -> Callable[[Any], Base | str] | None:
    """Return what reads a layer of this class, or None: a class with a forward of its own."""
    forward = getattr(type(module), "forward", None)
    if forward is nn.Linear.forward:
        kinds = _torchao()
        return _torchao_linear if kinds and isinstance(module.weight, kinds) else None
    for name, reader in (("Linear4bit", _linear4bit), ("Linear8bitLt", _linear8bit)):
        kind = _bitsandbytes(name)
        if isinstance(module, kind):
            return reader if forward is kind.forward else None
    kind = loaded("transformers.integrations.finegrained_fp8", "FP8Linear")
    return _fp8_linear if isinstance(module, kind) and forward is kind.forward else None


def _read_parameter(weight: Tensor) -> QuantizedWeight | str | None:
    if isinstance(weight, _bitsandbytes("Params4bit")):
        return _read_4bit(weight, None)
    if isinstance(weight, _bitsandbytes("Int8Params")):
        return _read_8bit(weight, None)
    kinds = _torchao()
    return _read_torchao(weight) if kinds and isinstance(weight, kinds) else None


def _as_base(module: Any, read: QuantizedWeight | str, *others: Any) -> Base | str:
    if isinstance(read, str):
        return f"weight {read}"
    n, k = read.shape
    if (n, k) != (module.out_features, module.in_features):
        return f"weight is [{n}, {k}], not [{module.out_features}, {module.in_features}]"
    return Base(read, module.__dict__["_parameters"].get("bias"), *others)


def _linear4bit(module: Any) -> Base | str:
    own = module.__dict__
    read = _read_4bit(own["_parameters"].get("weight"), own.get("quant_state"))
    return _as_base(module, read, own["compute_dtype"], True)


def _linear8bit(module: Any) -> Base | str:
    weight, state = module.__dict__["_parameters"].get("weight"), module.state
    if state.has_fp16_weights:
        return "weight is kept in 16 bits (has_fp16_weights)"
    read = _read_8bit(weight, state.SCB)
    if isinstance(read, str):
        return f"weight {read}"
    return _as_base(module, read, None, False, "int8" if weight.is_cuda else None)


def _fp8_linear(module: Any) -> Base | str:
    parameters, size = module.__dict__["_parameters"], module.block_size
    weight, scales = parameters.get("weight"), parameters.get("weight_scale_inv")
    reason = _tensor_reason(weight) or _tensor_reason(scales)
    if reason is not None:
        return f"weight {reason}"
    block = weight.shape if size is None else (size[0], size[1])
    read = _fitting(ScaledWeight("float8", (block[0], block[1]), weight, scales))
    return _as_base(module, read, None, True, "fp8")


def _torchao_linear(module: Any) -> Base | str:
    read = _read_torchao(module.__dict__["_parameters"].get("weight"))
    # Its int8 product is rounded to x's dtype in the end, its float8 one follows autocast.
    return _as_base(module, read, None, getattr(read, "format", None) == "int8")


def _read_4bit(weight: Any, kept: Any) -> QuantizedWeight | str:
    """Return the weight of Params4bit, or why it isn't read; `kept`: the module's quant_state."""
    reason = _tensor_reason(weight)
    if reason is not None:
        return reason
    state = getattr(weight, "quant_state", None)
    state = kept if state is None else state  # FSDP and casts lose the parameter's own
    if state is None:
        return "is not quantised yet: move the layer to its device first"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "was converted in place for inference on a CPU, as bitsandbytes' own forward does in "
            "eval mode; state_dict() converts it back, with other roundings"
        )
    if state.quant_type not in ("nf4", "fp4") or len(state.shape) != 2:
        return f"is {state.quant_type} of shape {list(state.shape)}, not nf4 or fp4 of [N, K]"
    two = state.state2
    parts: tuple[Tensor, ...] = (state.absmax, state.code)
    if state.nested:
        if two.blocksize != NESTED_BLOCK:
            return f"has nested blocks of {two.blocksize} scales, not {NESTED_BLOCK}"
        parts += (two.code, two.absmax, state.offset)
    codes = weight if weight.dtype == torch.uint8 else weight.view(torch.uint8)
    (n, k), size = state.shape, state.blocksize
    return _fitting(CodebookWeight(state.quant_type, (n, k), size, codes.view(-1), parts))


def _read_8bit(weight: Any, kept: Any) -> QuantizedWeight | str:
    """Return the weight of Int8Params, or why it isn't read; `kept`: the scales in its module."""
    reason = _tensor_reason(weight)
    if reason is not None:
        return reason
    scales = getattr(weight, "SCB", None)
    scales = kept if scales is None else scales  # the first forward moves them to the module
    if weight.dtype != torch.int8 or scales is None:
        return "is not quantised yet: move the layer to its device first"
    # dynamo has no as_subclass to a Tensor, make_fx no detach of another class.
    compiling = torch.compiler.is_compiling()
    codes = weight.detach() if compiling else weight.as_subclass(Tensor)
    return _fitting(ScaledWeight("int8", (1, codes.shape[-1]), codes, scales, 127))


def _read_torchao(weight: Any) -> QuantizedWeight | str:
    """Return a weight of torchao's, whose zero points are zeros that its product doesn't read."""
    kind = type(weight).__name__
    reason = _tensor_reason(weight)
    if reason is not None:
        return reason
    if getattr(weight, "act_quant_kwargs", None) is not None:
        return f"is a {kind} whose product quantises activations too"
    if getattr(weight, "act_pre_scale", None) is not None:
        return f"is a {kind} that scales activations first"
    word = "int8" if kind == "Int8Tensor" else "float8"
    block = tuple(weight.block_size)
    if len(block) != 2:
        return f"is a {kind} in blocks of {list(block)}"
    return _fitting(ScaledWeight(word, (block[0], block[1]), weight.qdata, weight.scale))


def _tensor_reason(weight: Any) -> str | None:
    if not isinstance(weight, Tensor):
        return f"is a {type(weight).__name__}"
    if is_dtensor(weight):
        return "is a DTensor: its shards are no rows or columns of W"
    if weight.requires_grad:
        return "requires grad, which codes have none of: freeze it"
    if weight.is_meta:
        return "is on meta"
    return None


def _fitting(weight: QuantizedWeight) -> QuantizedWeight | str:
    """Return a weight whose tensors fit each other and lie together, or what doesn't."""
    error = weight.misfit()
    if error is not None:
        return f"doesn't fit: {str(error).removeprefix('weight: ')}"
    device = weight.stored.device
    for t in (weight.stored, *weight.parts):
        if t.device != device:
            return f"is on {device}, its scales on {t.device}"
        lack = None if torch.compiler.is_compiling() else lack_of_memory(t)
        if lack is not None:
            return f"lacks its {lack}"
    return weight
