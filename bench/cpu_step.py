"""Time a training step of a small Llama-style model against PEFT's on the CPU, and its memory.

4 layers, hidden 512, batch 4 x 256, r = 16 on all seven linears, AdamW; random weights. Ratios are
medians of those formed within each round of interleaved steps (timing.py). The floor is the step
of the frozen model: forward, and the gradient of its embeddings' output. Peak memory is what a step
adds to a process's resident memory, each in a process of its own, after a step that warmed it up.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from timing import MIN_ROUNDS, Meter, Ratio, describe_run
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk

BATCH, LENGTH, VOCABULARY = 4, 256, 2048
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A step to measure, and the limits set to packed weights' time and to memory, over PEFT's."""

    dtype: str
    p: float
    time: float
    memory: float | None = None

    @property
    def name(self) -> str:
        return f"{self.dtype} p={self.p:g}"


CASES = [
    Case("bf16", 0.05, 0.72, 0.70),
    Case("bf16", 0.0, 0.93),
    Case("fp32", 0.05, 0.76, 0.70),
    Case("fp32", 0.0, 0.86),
]


def base_model(case: Case) -> nn.Module:
    """Build the frozen model; the same weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
    )
    model = LlamaForCausalLM(config).to(DTYPES[case.dtype]).requires_grad_(False)
    # What a frozen model's backward is needed for: gradients of what stands before it.
    model.enable_input_require_grads()
    return model


def peft_model(case: Case) -> nn.Module:
    """Build PEFT's model, with adapters of the model's dtype and a B that isn't zero."""
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=case.p, target_modules=LINEARS)
    model = get_peft_model(base_model(case), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def patched_model(case: Case) -> nn.Module:
    """Build the same model, patched."""
    model = peft_model(case)
    report = lk.patch_peft(model)
    if report.left:
        raise RuntimeError(f"{case.name}: layers were not fused\n{report}")
    return model


def packed_model(case: Case) -> nn.Module:
    """Build the same model, patched and with packed weights."""
    model = patched_model(case)
    report = lk.prepack_(model)
    if report.left:
        raise RuntimeError(f"{case.name}: weights were not packed\n{report}")
    return model


# PEFT is first: the others' figures are divided by its.
PROVIDERS: dict[str, Callable[[Case], nn.Module]] = {
    "PEFT": peft_model,
    "ours": patched_model,
    "packed": packed_model,
    "floor": base_model,
}


class Step:
    """A training step of one provider's model."""

    def __init__(self, provider: str, case: Case) -> None:
        self.model = PROVIDERS[provider](case).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)

    def __call__(self) -> Tensor:
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def check(case: Case) -> None:
    """Raise unless the first loss without dropout is PEFT's."""
    losses = []
    for provider in ("PEFT", "ours", "packed"):
        step = Step(provider, case)
        step.model.eval()
        losses.append(step().item())
    worst = max(abs(loss - losses[0]) for loss in losses) / losses[0]
    if not worst <= 1e-3:
        raise RuntimeError(f"{case.name}: losses {losses} differ")


def peak_bytes(provider: str, case: Case) -> int:
    """Return what a step adds to this process's resident memory at most."""
    step, libc = Step(provider, case), ctypes.CDLL(None)
    step()
    libc.malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_in_a_process(provider: str, case: Case, threads: int) -> int:
    """Return `peak_bytes` of a fresh process."""
    which = ["--peak", provider, "--cases", case.name, "--threads", str(threads)]
    command = [sys.executable, __file__, *which]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@dataclass(frozen=True)
class Row:
    """A case's figures; no ratios where the machine was never quiet for long enough."""

    case: str
    rounds: int
    rejected: int
    peft_ms: float | None
    ratios: dict[str, Ratio]
    peak_mib: dict[str, float]
    limits: dict[str, float | None]

    LINE = "{:<14}{:>9}{:>18}{:>18}{:>18}{:>9}{:>24}"
    HEADER = LINE.format(
        "step",
        "PEFT ms",
        "ours/PEFT",
        "packed/PEFT",
        "floor/PEFT",
        "target",
        "MiB PEFT/ours/packed",
    )

    def __str__(self) -> str:
        times = [str(ratio) for ratio in self.ratios.values()] or ["busy machine"] * 3
        ms = "-" if self.peft_ms is None else f"{self.peft_ms:.0f}"
        peaks = "/".join(f"{self.peak_mib[name]:.0f}" for name in ("PEFT", "ours", "packed"))
        return self.LINE.format(self.case, ms, *times, f"<={self.limits['time']:.2f}", peaks)


def measure(case: Case, meter: Meter) -> Row:
    """Check a case, then time its steps and measure their memory."""
    check(case)
    times, rejected = meter.rounds([[Step(provider, case) for provider in PROVIDERS]])
    ms, ratios = None, {}
    if len(times) >= MIN_ROUNDS:
        columns = dict(zip(PROVIDERS, zip(*times, strict=True), strict=True))
        ms, peft = statistics.median(columns["PEFT"]), columns.pop("PEFT")
        ratios = {name: Ratio.of(column, peft) for name, column in columns.items()}
    peaks = {p: peak_in_a_process(p, case, meter.threads) / 2**20 for p in PROVIDERS}
    limits = {"time": case.time, "memory": case.memory}
    return Row(case.name, len(times), rejected, ms, ratios, peaks, limits)


def main() -> None:
    """Measure what the command line asks for, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, choices=[1, 2], default=1)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each row")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--cases", default="", metavar="SUBSTRING")
    parser.add_argument("--peak", choices=PROVIDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [case for case in CASES if args.cases in case.name]
    if args.peak:
        print(peak_bytes(args.peak, cases[0]))
        return
    run = describe_run()
    print(*run["implementations"], run["machine"], run["revision"], run["date"], sep="\n")
    print(f"\n{Row.HEADER}")
    rows = []
    for case in cases:
        rows.append(measure(case, Meter(args.seconds)))
        print(rows[-1], flush=True)
    if args.json is not None:
        results = {**run, "seconds": args.seconds, "steps": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
