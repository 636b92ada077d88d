"""Time an adapted layer against PEFT's on the CPU: forward + backward, calls, masks, saved bytes.

Ratios are medians of those formed within each round of interleaved calls, with their quartiles;
timing.py says what a round is and when it counts. The floor is the frozen base layer alone.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from timing import MIN_ROUNDS, Meter, Ratio, describe_run
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels._native import absence

R, ALPHA = 16, 32
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Largest accepted |ours - PEFT| / |PEFT|, Frobenius norms; bf16 rounds several times at 2^-9.
TOLERANCES = {"bf16": 2e-2, "fp32": 1e-5}
# Layers and inputs are rotated, as a model's are: with one set they would stay in cache.
SLOTS = 3
OVERHEAD_CALLS = 100


@dataclass(frozen=True)
class Case:
    """A layer to measure, and the limit that the project has set to its figure."""

    m: int  # rows of x [m, k]; the weight is [n, k]
    n: int
    k: int
    dtype: str
    p: float
    target: float | None = None  # of ours / PEFT
    packed_target: float | None = None
    adapters: str | None = None  # dtype of lora_A and lora_B where it isn't the base layer's

    @property
    def name(self) -> str:
        kind = f"{self.dtype}, {self.adapters} adapters" if self.adapters else self.dtype
        return f"{kind} {self.m}x{self.n}x{self.k} p={self.p:g}"


CASES = [
    Case(2048, 768, 768, "bf16", 0.05, 0.60, 0.58),
    Case(2048, 768, 768, "bf16", 0.0, 1.0),
    Case(512, 2048, 2048, "bf16", 0.05, 0.78, 0.75),
    Case(512, 2048, 2048, "bf16", 0.0, 0.97, 0.93),
    Case(16, 2048, 2048, "bf16", 0.0, 0.88, 0.75),
    Case(1, 2048, 2048, "bf16", 0.0),
    Case(512, 2048, 2048, "fp32", 0.05, 0.83, 0.68),
    Case(512, 2048, 2048, "fp32", 0.0, 1.0),
    Case(16, 2048, 2048, "fp32", 0.0, 0.94, 0.57),
    Case(1, 2048, 2048, "fp32", 0.0),
    # PEFT's default: get_peft_model makes fp32 adapters on a bf16 model.
    Case(2048, 768, 768, "bf16", 0.05, 0.70, adapters="fp32"),
    Case(2048, 768, 768, "bf16", 0.0, 0.98, adapters="fp32"),
    Case(512, 2048, 2048, "bf16", 0.05, 0.70, adapters="fp32"),
    Case(512, 2048, 2048, "bf16", 0.0, 0.98, adapters="fp32"),
    Case(128, 2048, 2048, "bf16", 0.0, 0.98, adapters="fp32"),
    Case(16, 2048, 2048, "bf16", 0.0, 0.95, adapters="fp32"),
]
OVERHEAD_CASE = Case(1, 64, 64, "fp32", 0.0)
# 15 and 20 µs where PEFT takes 35.
OVERHEAD_TARGETS = {"lora_linear": 15 / 35, "patched": 20 / 35}
SAVED_CASES = [Case(512, 2048, 2048, dtype, p, 0.02) for dtype in DTYPES for p in (0.0, 0.05)]


def peft_layer(case: Case) -> PeftLinear:
    """Build PEFT's layer on a frozen base, with a B that isn't zero."""
    base = nn.Linear(case.k, case.n, bias=False, dtype=DTYPES[case.dtype]).requires_grad_(False)
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=case.p)
    layer = PeftLinear(base, "default", config, r=R, lora_alpha=ALPHA)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    for adapter in (layer.lora_A, layer.lora_B):
        adapter.to(DTYPES[case.adapters or case.dtype])
    return layer


def patched_layer(case: Case) -> PeftLinear:
    """Build the same layer, patched."""
    layer = peft_layer(case)
    report = lk.patch_peft(layer)
    if report.left:
        raise RuntimeError(f"{case.name}: the layer was not fused\n{report}")
    return layer


def packed_layer(case: Case) -> PeftLinear:
    """Build the same layer, patched and with packed weights."""
    layer = patched_layer(case)
    if lk.prepack_(layer).left:
        raise RuntimeError(f"{case.name}: the weight was not packed")
    return layer


def frozen_layer(case: Case) -> nn.Module:
    """Build the base layer of the same layer: what no adapter can do without."""
    return peft_layer(case).base_layer


# PEFT is first: the others' times are divided by its.
PROVIDERS: list[Callable[[Case], nn.Module]] = [
    peft_layer,
    patched_layer,
    packed_layer,
    frozen_layer,
]


class Step:
    """Forward and backward of one provider's layer on an input and a gradient of its own."""

    def __init__(self, provider: Callable[[Case], nn.Module], case: Case, slot: int) -> None:
        torch.manual_seed(slot)
        self.layer = provider(case)
        self.x = torch.randn(case.m, case.k, dtype=DTYPES[case.dtype], requires_grad=True)
        self.dy = torch.randn(case.m, case.n, dtype=DTYPES[case.dtype])
        self.leaves = [self.x, *(p for p in self.layer.parameters() if p.requires_grad)]

    def __call__(self) -> Tensor:
        for leaf in self.leaves:
            leaf.grad = None
        y = self.layer(self.x)
        y.backward(self.dy)
        return y.detach()


def check(case: Case) -> None:
    """Raise unless our layers' outputs and gradients are PEFT's, dropout aside."""
    results = []
    for provider in PROVIDERS[:3]:
        step = Step(provider, case, slot=0)
        step.layer.eval()
        results.append([step(), *(leaf.grad for leaf in step.leaves)])
    for name, theirs, *ours in zip(("y", "dx", "dA", "dB"), *results, strict=True):
        for result in ours:
            error = ((result - theirs).float().norm() / theirs.float().norm()).item()
            if not error <= TOLERANCES[case.dtype]:
                raise RuntimeError(f"{case.name}: {name} differs from PEFT's by {error:.1e}")


def limit(*targets: float | None) -> str:
    """Write a row's targets."""
    return "/".join("-" if target is None else f"<={target:.2f}" for target in targets)


@dataclass(frozen=True)
class LayerRow:
    """A case's times; None where the machine was never quiet for long enough."""

    case: str
    rounds: int  # accepted
    rejected: int
    target: float | None
    packed_target: float | None
    peft_ms: float | None = None
    ours: Ratio | None = None
    packed: Ratio | None = None
    floor: Ratio | None = None

    LINE = "{:<42}{:>9}{:>18}{:>18}{:>18}{:>16}{:>10}"
    HEADER = LINE.format(
        "case", "PEFT ms", "ours/PEFT", "packed/PEFT", "floor/PEFT", "targets", "rejected"
    )

    def __str__(self) -> str:
        times = ("-", "gave up:", "machine is", "busy")
        if self.ours is not None:
            times = (f"{self.peft_ms:.2f}", str(self.ours), str(self.packed), str(self.floor))
        rejected = f"{self.rejected}/{self.rounds + self.rejected}"
        return self.LINE.format(self.case, *times, limit(self.target, self.packed_target), rejected)


def measure_layer(case: Case, meter: Meter) -> LayerRow:
    """Check a case, then time its forward + backward."""
    check(case)
    slots = [[Step(provider, case, slot) for provider in PROVIDERS] for slot in range(SLOTS)]
    times, rejected = meter.rounds(slots)
    row = case.name, len(times), rejected, case.target, case.packed_target
    if len(times) < MIN_ROUNDS:
        return LayerRow(*row)
    peft, *others = zip(*times, strict=True)
    return LayerRow(*row, statistics.median(peft), *(Ratio.of(other, peft) for other in others))


@dataclass(frozen=True)
class OverheadRow:
    """A tiny forward by one way of calling it."""

    call: str
    mode: str
    us: float
    over_peft: Ratio
    target: float | None

    LINE = "{:<18}{:<10}{:>8}{:>18}{:>9}"
    HEADER = LINE.format("forward 1x64x64", "mode", "µs", "/PEFT", "target")

    def __str__(self) -> str:
        us, over_peft = f"{self.us:.1f}", str(self.over_peft)
        return self.LINE.format(self.call, self.mode, us, over_peft, limit(self.target))


def measure_overhead(meter: Meter) -> list[OverheadRow]:
    """Time a forward too small to take time: what is left is the cost of the call."""
    peft, patched = peft_layer(OVERHEAD_CASE), patched_layer(OVERHEAD_CASE)
    modules = (peft.base_layer, peft.lora_A["default"], peft.lora_B["default"])
    x = torch.randn(OVERHEAD_CASE.m, OVERHEAD_CASE.k, requires_grad=True)
    calls: dict[str, Callable[[], Tensor]] = {
        "PEFT": partial(peft, x),
        "nn.Linear": partial(peft.base_layer, x),
        "patched": partial(patched, x),
        "lora_linear": partial(lk.lora_linear, x, *(m.weight for m in modules), scaling=ALPHA / R),
    }

    def repeat(call: Callable[[], Tensor]) -> None:
        for _ in range(OVERHEAD_CALLS):
            call()

    rows = []
    for mode, context in (("no grad", torch.no_grad), ("grad", torch.enable_grad)):
        with context():
            times, _ = meter.rounds([[partial(repeat, call) for call in calls.values()]])
        columns = dict(zip(calls, zip(*times, strict=True), strict=True))
        for name, column in columns.items():
            us = 1e3 * statistics.median(column) / OVERHEAD_CALLS
            ratio, target = Ratio.of(column, columns["PEFT"]), OVERHEAD_TARGETS.get(name)
            rows.append(OverheadRow(name, mode, us, ratio, target))
    return rows


@dataclass(frozen=True)
class MaskRow:
    """The keep mask of a 2048 x 2048 activation, by the compiled generator, beside F.dropout."""

    threads: int
    ns: float  # an element
    over_dropout: Ratio
    target: float

    LINE = "{:<18}{:>14}{:>18}{:>9}"
    HEADER = LINE.format("mask 2048x2048", "ns an element", "/F.dropout", "target")

    def __str__(self) -> str:
        threads = f"{self.threads} threads"
        return self.LINE.format(
            threads, f"{self.ns:.3f}", str(self.over_dropout), limit(self.target)
        )


def measure_mask(threads: int, seconds: float) -> MaskRow:
    """Time the compiled mask and torch's own dropout."""
    torch.set_num_threads(threads)
    x = torch.randn(2048, 2048)
    lanes = torch.empty(x.numel() // 8, 8, dtype=torch.int16)
    ours = partial(torch.ops.lora_kernels.keep_lanes_.default, lanes, 0, 5, 3277)
    times, _ = Meter(seconds).rounds([[partial(nn.functional.dropout, x, 0.05), ours]])
    dropout, mask = zip(*times, strict=True)
    ns = 1e6 * statistics.median(mask) / x.numel()
    return MaskRow(threads, ns, Ratio.of(mask, dropout), 0.1)


@dataclass(frozen=True)
class SavedRow:
    """Bytes saved for backward beyond parameters and x, in units of x's bytes."""

    case: str
    peft: float
    ours: float
    target: float | None

    LINE = "{:<42}{:>9}{:>9}{:>9}"
    HEADER = LINE.format("saved beyond x, in units of x", "PEFT", "ours", "target")

    def __str__(self) -> str:
        figures = f"{self.peft:.4f}", f"{self.ours:.4f}"
        return self.LINE.format(self.case, *figures, limit(self.target))


def saved_share(provider: Callable[[Case], nn.Module], case: Case) -> float:
    """Return the bytes that a forward keeps for backward beyond parameters and x, over x's."""
    step = Step(provider, case, slot=0)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Views share a storage; the graph keeps it alive, so no address comes up twice.
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.layer(step.x)
    for tensor in (step.x, *step.layer.parameters()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values()) / step.x.nbytes


def measure_saved(case: Case) -> SavedRow:
    """Measure what PEFT's layer and the patched one save for backward."""
    shares = [saved_share(provider, case) for provider in PROVIDERS[:2]]
    return SavedRow(case.name, *shares, case.target)


def report(rows: Iterable[LayerRow | OverheadRow | MaskRow | SavedRow]) -> list[dict[str, object]]:
    """Print a table, each row as soon as it is measured, and return it for the JSON file."""
    table: list[dict[str, object]] = []
    for row in rows:
        if not table:
            print(f"\n{row.HEADER}")
        print(row, flush=True)
        table.append(asdict(row))
    return table


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, choices=[1, 2], default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row that is timed")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    cases_help = "part of the names to run; the other tables are called overhead, mask and saved"
    parser.add_argument("--cases", default="", metavar="SUBSTRING", help=cases_help)
    return parser.parse_args()


def main() -> None:
    """Measure what the command line asks for, print it and write it."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    run = describe_run()
    print(*run["implementations"], run["machine"], run["revision"], run["date"], sep="\n")
    results, meter = {**run, "seconds": args.seconds}, Meter(args.seconds)
    cases = [case for case in CASES if args.cases in case.name]
    results["layers"] = report(measure_layer(case, meter) for case in cases)
    torch.set_num_threads(1)  # a call's own cost is that of the thread that makes it
    overhead = measure_overhead(Meter(args.seconds)) if args.cases in "overhead" else []
    results["overhead"] = report(overhead)
    threads = range(1, args.threads + 1) if args.cases in "mask" and absence() is None else []
    results["mask"] = report(measure_mask(count, args.seconds) for count in threads)
    results["saved"] = report(map(measure_saved, SAVED_CASES if args.cases in "saved" else []))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
