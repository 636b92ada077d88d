"""Styles for `torch.distributed.tensor.parallel.parallelize_module` that split LoRA layers.

torch's own ColwiseParallel and RowwiseParallel take plain nn.Linear only. Imported by name:
`from lora_kernels.tensor_parallel import ColwiseLoRA, RowwiseLoRA`.
"""

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from lora_kernels.checks import FLOAT_DTYPES, is_dtensor
from lora_kernels.sharding import register_rules


class _LoRAStyle(ParallelStyle):
    """What both styles share; `splits` names the dimension that each parameter is split by."""

    splits: ClassVar[dict[tuple[str, str], int]]
    desired_input: ClassVar[Placement]

    def __init__(
        self, input_layouts: Placement, output_layouts: Placement, use_local_output: bool
    ) -> None:
        super().__init__()
        self.input_layouts, self.output_layouts = input_layouts, output_layouts
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not hasattr(module, "base_layer") or not hasattr(module, "lora_A"):
            raise TypeError(
                "module: expected a LoRALinear or a peft.tuners.lora.Linear, "
                f"got {type(module).__name__}"
            )
        weight: Any = getattr(module.base_layer, "weight", None)
        plain = type(weight) is nn.Parameter or is_dtensor(weight)
        if not plain or weight.dtype not in FLOAT_DTYPES:
            got = f"{type(weight).__name__} of {getattr(weight, 'dtype', 'no dtype')}"
            raise TypeError(f"module: expected a plain float weight to split, got a {got}")
        register_rules()
        take, give = cast(Any, self._take), cast(Any, self._give)
        return distribute_module(module, device_mesh, self._split, take, give)

    def _split(self, path: str, module: nn.Module, mesh: DeviceMesh) -> None:
        """Split the parameters of one of the layer's modules; distribute_module copies the rest."""
        role = path.split(".")[0]
        for name, parameter in module.named_parameters(recurse=False):
            dimension = self.splits.get((role, name))
            if dimension is not None:
                shard = distribute_tensor(
                    parameter, mesh, [Shard(dimension)], src_data_rank=self.src_data_rank
                )
                split = nn.Parameter(shard, requires_grad=parameter.requires_grad)
                module.register_parameter(name, split)

    def _take(self, _module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Tensor:
        x = inputs[0]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [self.input_layouts], run_check=False)
        return x.redistribute(placements=[self.desired_input])

    def _give(self, _module: nn.Module, y: DTensor, _mesh: DeviceMesh) -> Tensor:
        y = y.redistribute(placements=[self.output_layouts])
        return y.to_local() if self.use_local_output else y


class ColwiseLoRA(_LoRAStyle):
    """Split a LoRA layer's out_features: each rank computes its columns of y::

        y_i = x W_iᵀ + bias_i + scaling · D(x) Aᵀ B_iᵀ

    W, bias, lora_B and lora_bias are split along out_features, lora_A is on every rank.

    Args:
        input_layouts: where a plain x lies, replicated by default.
        output_layouts: where y is wanted, split along its last dimension by default.
        use_local_output: return this rank's part of y as a plain tensor, the default, or a DTensor.

    Raises:
        TypeError: at `parallelize_module`, for a module that is no LoRA linear layer, or one around
            a quantised weight.

    With dropout the ranks' torch generators must agree, as for all replicated random numbers.

    Precision: as `lora_linear`; each rank's columns of y are those of the whole layer.

    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.

    Example:
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from lora_kernels.tensor_parallel import ColwiseLoRA
        >>> mesh = torch.distributed.init_device_mesh("cpu", (1,))  # under torchrun
        >>> layer = lk.LoRALinear(8, 4)
        >>> layer = parallelize_module(layer, mesh, ColwiseLoRA())
        >>> layer.lora_B.weight.placements, layer(torch.ones(2, 8)).shape
        ((Shard(dim=0),), torch.Size([2, 4]))
    """

    splits: ClassVar = {
        ("base_layer", "weight"): 0,
        ("base_layer", "bias"): 0,
        ("lora_B", "weight"): 0,
        ("lora_B", "bias"): 0,
    }
    desired_input = Replicate()

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(
            input_layouts or Replicate(), output_layouts or Shard(-1), use_local_output
        )


class RowwiseLoRA(_LoRAStyle):
    """Split a LoRA layer's in_features: each rank adds its columns of x to y::

        y = Σ_i (x_i W_iᵀ + scaling · D(x_i) A_iᵀ Bᵀ) + bias

    W and lora_A are split along in_features, bias, lora_B and lora_bias are on every rank. One
    all-reduce adds y up (a reduce-scatter where y is wanted split); with dropout each rank draws
    the mask of its columns from a key of its own.

    Args:
        input_layouts: where a plain x lies, split along its last dimension by default.
        output_layouts: where y is wanted, replicated by default.
        use_local_output: return this rank's part of y as a plain tensor, the default, or a DTensor.

    Raises:
        TypeError: at `parallelize_module`, for a module that is no LoRA linear layer, or one around
            a quantised weight.

    Precision: as `lora_linear` of each rank's columns; the ranks' parts are added in x's dtype.

    Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.

    Example:
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from lora_kernels.tensor_parallel import RowwiseLoRA
        >>> mesh = torch.distributed.init_device_mesh("cpu", (1,))  # under torchrun
        >>> layer = lk.LoRALinear(8, 4)
        >>> layer = parallelize_module(layer, mesh, RowwiseLoRA())
        >>> layer.lora_A.weight.placements, layer(torch.ones(2, 8)).shape
        ((Shard(dim=1),), torch.Size([2, 4]))
    """

    splits: ClassVar = {("base_layer", "weight"): 1, ("lora_A", "weight"): 1}
    desired_input = Shard(-1)

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(
            input_layouts or Shard(-1), output_layouts or Replicate(), use_local_output
        )
