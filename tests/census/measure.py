"""One row of the census: a model and a recipe, patched against unpatched."""

import copy
from statistics import median
from typing import Any, NamedTuple

import peft
import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from tests.census.models import SUBJECTS

SEEDS = (1, 2, 3)


class Row(NamedTuple):
    """What a model's census found.

    fused, layers: LoRA layers, and of those that are linear how many there are: `linear`.
    left: reasons, with how many layers have each. parameters, flops: shares that PEFT computes.
    loss, gradient: largest differences of float32, relative; of gradients to the largest element.
    ratio: how far bfloat16's gradients lie from float32's, patched over unpatched, median of seeds.
    tokens: whether greedy generation is the same; None where nothing is generated.
    """

    model: str
    recipe: str
    fused: int
    layers: int
    linear: int
    left: dict[str, int]
    parameters: float
    flops: float
    loss: float
    gradient: float
    ratio: float | None
    tokens: bool | None


def measured(name: str, recipe: str, seeds: tuple[int, ...] = SEEDS) -> Row:
    """Measure one model with one recipe; `seeds` are those of the bfloat16 comparison."""
    subject, settings = SUBJECTS[name], SUBJECTS[name].recipes[recipe]
    torch.manual_seed(0)
    sixteen = _adapted(subject.make().bfloat16(), settings).eval()
    plain = copy.deepcopy(sixteen).float()
    patched = copy.deepcopy(plain)
    report = lk.patch_peft(patched)
    lora = {path: m for path, m in plain.named_modules() if isinstance(m, LoraLayer)}
    reasons = list(report.left.values())

    inputs = _rounded(subject.inputs())
    ours, theirs = _step(patched, inputs), _step(plain, inputs)
    parameters = {path: sum(p.numel() for p in _own(layer)) for path, layer in lora.items()}
    flops = _flops(plain, inputs, lora)
    return Row(
        model=name,
        recipe=recipe,
        fused=len(report.patched),
        layers=len(lora),
        linear=sum(type(layer) is Linear for layer in lora.values()),
        left={reason: reasons.count(reason) for reason in reasons},
        parameters=_share(parameters, report.left),
        flops=_share(flops, report.left),
        loss=abs(ours[0] - theirs[0]) / abs(theirs[0]),
        gradient=max(_difference(g, theirs[1][n]) for n, g in ours[1].items()),
        ratio=_ratio(sixteen, subject.inputs, seeds) if report.patched and seeds else None,
        tokens=_same_tokens(patched, plain, inputs) if subject.generates else None,
    )


def _adapted(base: nn.Module, settings: dict[str, Any]) -> nn.Module:
    config = peft.LoraConfig(r=8, lora_alpha=16, init_lora_weights=False, **settings)
    model = peft.get_peft_model(base, config)
    for path, p in model.named_parameters():
        if "lora_" in path and "magnitude" not in path:
            nn.init.normal_(p, std=0.05)
    return model


def _rounded(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return inputs with numbers that bfloat16 has, so that both precisions read the same."""
    return {k: v.bfloat16().float() if _is_float(v) else v for k, v in inputs.items()}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _step(model: nn.Module, inputs: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of the adapters."""
    dtype = next(p.dtype for n, p in model.named_parameters() if "lora_" not in n)
    model.zero_grad()
    out = model(**{k: v.to(dtype) if _is_float(v) else v for k, v in inputs.items()})
    loss = getattr(out, "loss", None)
    if loss is None:
        loss = next(v for v in out.values() if _is_float(v)).float().square().mean()
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = {n: p.grad.float() for n, p in trained.items() if p.grad is not None}
    return loss.item(), grads


def _own(layer: nn.Module) -> list[nn.Parameter]:
    """Return the adapter's parameters of a layer, not those of a layer that it wraps."""
    return [p for n, p in layer.named_parameters() if not n.startswith("base_layer")]


def _share(amounts: dict[str, int], left: dict[str, str]) -> float:
    total = sum(amounts.values())
    return sum(amount for path, amount in amounts.items() if path in left) / max(total, 1)


def _flops(model: nn.Module, inputs: dict[str, Any], lora: dict[str, LoraLayer]) -> dict[str, int]:
    """Return the FLOPs of a forward pass in each adapted layer, by itself."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counts = {
        path.partition(".")[2]: sum(by_operator.values())
        for path, by_operator in counter.get_flop_counts().items()
    }
    # A wrapper of a parameter may wrap another one, whose FLOPs are counted in its own, too.
    wrapped = {path: [p for p in lora if p == f"{path}.base_layer"] for path in lora}
    return {
        path: counts.get(path, 0) - sum(counts.get(p, 0) for p in wrapped[path]) for path in lora
    }


def _difference(ours: Tensor, theirs: Tensor) -> float:
    largest = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / largest if largest else ours.abs().max().item()


def _ratio(sixteen: nn.Module, inputs: Any, seeds: tuple[int, ...]) -> float:
    patched, whole = copy.deepcopy(sixteen), copy.deepcopy(sixteen).float()
    lk.patch_peft(patched)
    ratios = []
    for seed in seeds:
        torch.manual_seed(seed)
        given = _rounded(inputs())
        exact, theirs, ours = (_step(m, given)[1] for m in (whole, sixteen, patched))
        ratios.append(distance(ours, exact) / distance(theirs, exact))
    return median(ratios)


def distance(grads: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Return how far gradients are apart: the Euclidean distance of all as one vector."""
    assert grads.keys() == others.keys()
    return sum((g - others[n]).square().sum().item() for n, g in grads.items()) ** 0.5


def _same_tokens(patched: nn.Module, plain: nn.Module, inputs: dict[str, Any]) -> bool:
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    ids = inputs["input_ids"]
    return torch.equal(*(m.generate(input_ids=ids, **settings) for m in (patched, plain)))
