"""Who is compared: ways to compute PEFT's LoRA layers, behind one interface.

A provider takes a module with PEFT's layers, one layer or a whole model, and returns the module
that computes the same its way. What it can't serve it says.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import lora_kernels as lk
from bench.providers.plans import Planner, one_launch
from bench.providers.rivals import addmm_lora, liger_model, lorafusion_lora, unsloth_lora
from bench.quantised import Coded, peft_class
from bench.shapes import DENSE, DTYPES, GROWTH, PLANS, SCALING, Case
from lora_kernels.dispatch import refusal
from lora_kernels.impl.triton.plan.plan import library_plan
from lora_kernels.operands.request import Request
from lora_kernels.prepack import reason_left
from lora_kernels.testing import Inputs

LIBRARY, ONE_LAUNCH = "library", "one-launch"
OURS = (
    "eager", "cpu", "packed", "triton", LIBRARY, ONE_LAUNCH, "cuda", "cpu-codes", "triton-codes"
)  # fmt: skip
# The layer's function: x, W, A, B, scaling, p -> y.
Function = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]


def _never(_: object) -> None:
    """Give no reason against anything."""


@dataclass(frozen=True)
class Provider:
    """One way to compute the layers.

    label: for tables and figures. absence: device -> why this machine can't run it, or None.
    refuse: case -> why it can't serve the case, or None. convert: PEFT's module -> its own.
    adapters_as_x: whether A and B have x's dtype, whatever the case says. adapted: False for what
    leaves the adapter out. single_product: whether x Wᵀ and dy W are all that it computes.
    whole_model: whether it replaces other parts than the layers, so that a layer is nothing to it.
    compiles: whether torch.compile makes it. codes: whether it takes a quantised W as it is kept;
    others take what that decodes to. planner: of the plan that Triton's kernels take, whichever the
    package would.
    """

    name: str
    label: str
    convert: Callable[[Any], nn.Module]
    refuse: Callable[[Case], str | None] = _never
    absence: Callable[[str], str | None] = _never
    adapters_as_x: bool = False
    adapted: bool = True
    single_product: bool = False
    whole_model: bool = False
    compiles: bool = False
    codes: bool = False
    planner: Planner | None = None

    @property
    def ours(self) -> bool:
        """Whether it is this package's."""
        return self.name in OURS


def peft_layer(case: Case, inputs: Inputs, p: float, codes: bool = False) -> LoraLayer:
    """Build PEFT's layer on a frozen weight that others may share, with adapters of its own.

    codes: whether on the quantised layer itself.
    """
    base: nn.Module
    if codes:
        assert isinstance(inputs, Coded)
        base, kind = inputs.layer, peft_class(inputs.layer)
    else:
        base, kind = nn.Linear(case.k, case.n, bias=False, device="meta"), PeftLinear
        base.weight = nn.Parameter(inputs.weight, requires_grad=False)
    config = LoraConfig(r=case.r, lora_alpha=int(SCALING * case.r), lora_dropout=p)
    layer = kind(base, "default", config, r=case.r, lora_alpha=int(SCALING * case.r))
    for modules, tensor in ((layer.lora_A, inputs.lora_A), (layer.lora_B, inputs.lora_B)):
        modules["default"].weight = nn.Parameter(tensor.clone())
    return layer


def replace_forward(function: Function) -> Callable[[nn.Module], nn.Module]:
    """Return a conversion that computes every LoRA layer of a module by a function."""

    class Replaced(PeftLinear):
        """PEFT's layer with another forward."""

        def forward(self, x: Tensor) -> Tensor:
            layer: Any = self
            dropout = layer.lora_dropout["default"]
            p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            return function(x, layer.base_layer.weight, a, b, layer.scaling["default"], p)

    def convert(module: nn.Module) -> nn.Module:
        for layer in module.modules():
            if type(layer) is PeftLinear:
                layer.__class__ = Replaced
        return module

    return convert


def _unchanged(module: nn.Module) -> nn.Module:
    return module


def _frozen_base(module: Any) -> nn.Module:
    return module.base_layer if isinstance(module, PeftLinear) else module.unload()


def _merged(module: Any) -> nn.Module:
    module = copy.deepcopy(module)  # the weight is shared with other providers
    if not isinstance(module, PeftLinear):
        return module.merge_and_unload()
    module.merge()
    return module.base_layer


def _compiled(module: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(module, dynamic=False)
    return compiled


def _ours(impl: str) -> Callable[[nn.Module], nn.Module]:
    def convert(module: nn.Module) -> nn.Module:
        report = lk.patch_peft(module, impl=impl)
        if report.left:
            raise RuntimeError(f"layers were not fused: {report}")
        return module

    return convert


def _packed(module: nn.Module) -> nn.Module:
    report = lk.prepack_(_ours("cpu")(module))
    if report.left:
        raise RuntimeError(f"weights were not packed: {report}")
    return module


def _our_refusal(impl: str, codes: bool = False) -> Callable[[Case], str | None]:
    def refuse(case: Case) -> str | None:
        if codes and case.base == DENSE:
            return _without_codes(case)
        device = "cuda" if impl in ("triton", "cuda") else "cpu"
        dtype, form = DTYPES[case.dtype], case.base if codes else DENSE
        request = Request(case.spec.op, torch.device(device), dtype, case.r, case.p > 0, form)
        return refusal(impl, request)

    return refuse


def _plan_refusal(case: Case) -> str | None:
    if case.model != PLANS:
        return f"plans are measured apart on the shapes {PLANS!r} alone"
    return _our_refusal("triton")(case)


def _without_codes(case: Case) -> str | None:
    return "W isn't quantised" if case.base == DENSE else None


def _same_as_peft(case: Case) -> str | None:
    return "the same as peft here" if case.adapters == case.dtype else None


def _for_inference(case: Case) -> str | None:
    return None if case.mode == "infer" else "merged weights don't train"


def _no_packing(case: Case) -> str | None:
    return reason_left(torch.empty(1, 1, dtype=DTYPES[case.dtype])) or _our_refusal("cpu")(case)


def _outside_sweeps(case: Case) -> str | None:
    return "would be compiled anew at each point of a sweep" if case.model == GROWTH else None


def _without_dropout(case: Case) -> str | None:
    return "its fast path refuses dropout" if case.p else None


def _needs(device: str | None, package: str | None = None) -> Callable[[str], str | None]:
    def absence(on: str) -> str | None:
        if package is not None and find_spec(package) is None:
            return f"{package} is not installed"
        return None if device in (None, on) else f"needs {device}, got {on}"

    return absence


FLOOR, REFERENCE, BNB = "base", "peft", "bitsandbytes"
PROVIDERS = (
    Provider(FLOOR, "frozen base", _frozen_base, adapted=False, single_product=True),
    Provider(REFERENCE, "PEFT", _unchanged),
    Provider("peft16", "PEFT, 16-bit adapters", _unchanged, _same_as_peft, adapters_as_x=True),
    Provider("addmm", "in-place addmm", replace_forward(addmm_lora)),
    Provider("compile", "torch.compile of PEFT", _compiled, _outside_sweeps, compiles=True),
    Provider("merged", "merged weight", _merged, _for_inference, single_product=True),
    Provider("eager", "ours, ATen calls", _ours("eager")),
    Provider("cpu", "ours, C++", _ours("cpu"), _our_refusal("cpu"), _needs("cpu")),
    Provider("packed", "ours, C++, packed weight", _packed, _no_packing, _needs("cpu")),
    Provider("triton", "ours, Triton", _ours("triton"), _our_refusal("triton"), _needs("cuda")),
    Provider(
        LIBRARY, "ours, library plan", _ours("triton"), _plan_refusal, _needs("cuda"),
        planner=library_plan,
    ),
    Provider(
        ONE_LAUNCH, "ours, one launch", _ours("triton"), _plan_refusal, _needs("cuda"),
        planner=one_launch,
    ),
    Provider("cuda", "ours, CUDA C++", _ours("cuda"), _our_refusal("cuda"), _needs("cuda")),
    Provider(
        "unsloth", "Unsloth", replace_forward(unsloth_lora), _without_dropout,
        _needs("cuda", "unsloth"),
    ),
    Provider(
        "lorafusion", "LoRAFusion", replace_forward(lorafusion_lora),
        absence=_needs("cuda", "lorafusion"), adapters_as_x=True,
    ),
    Provider(BNB, "PEFT + bitsandbytes", _unchanged, _without_codes, _needs(None, BNB), codes=True),
    Provider(
        "cpu-codes", "ours, C++, codes", _ours("cpu"), _our_refusal("cpu", codes=True),
        _needs("cpu", BNB), codes=True,
    ),
    Provider(
        "triton-codes", "ours, Triton, codes", _ours("triton"),
        _our_refusal("triton", codes=True), _needs("cuda", BNB), codes=True,
    ),
    Provider(
        "liger", "PEFT + Liger", liger_model, absence=_needs("cuda", "liger_kernel"),
        whole_model=True,
    ),
)  # fmt: skip
BY_NAME = {provider.name: provider for provider in PROVIDERS}


def label(name: str) -> str:
    """Return a provider's name for a legend or a table; other names stay."""
    return BY_NAME[name].label if name in BY_NAME else name


def chosen(names: list[str], device: str) -> tuple[list[Provider], dict[str, str]]:
    """Return the named providers that this machine can run, and why it can't run the others.

    What ratios are formed with is always among them: the frozen base and PEFT.

    Raises:
        ValueError: a name that no provider has.
    """
    for name in names:
        if name not in BY_NAME:
            raise ValueError(f"providers: expected one of {', '.join(BY_NAME)}, got {name!r}")
    wanted = [p for p in PROVIDERS if p.name in (FLOOR, REFERENCE, *names)]
    absent = {p.name: reason for p in wanted if (reason := p.absence(device)) is not None}
    return [p for p in wanted if p.name not in absent], absent
