"""The step suite: a training step of a small Llama-style model, and its memory.

r = 16 on all seven linears, AdamW, random weights. The floor is the step of the frozen model:
forward, and the gradient of its embeddings' output. Ratios are formed within each round of
interleaved steps. Peak memory is what a step adds to a process's memory, after one warmed it up.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.measure.correctness import REFUSED, RIGHT, WRONG
from bench.measure.footprint import MIB, peak_bytes
from bench.measure.session import Session
from bench.measure.timing import BUSY, MIN_ROUNDS, TIMED, Spread, compared
from bench.providers.registry import BY_NAME, FLOOR, Provider
from bench.quantised import quantise
from bench.shapes import DENSE, DTYPES, SCALING, Case, how_kept, reference_of

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
R = 16
# Of the first loss, which sums many roundings.
LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Sizes:
    """A model and its batch."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    batch: int
    length: int
    vocabulary: int = 2048

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.layers} layers, hidden {self.hidden}, "
            f"batch {self.batch}x{self.length}"
        )


SMALLEST = Sizes("smallest", 64, 128, 1, 2, 2, 1, 16, vocabulary=128)
SMALL = Sizes("small", 512, 1408, 4, 8, 8, 4, 256)
QUICK = Sizes("quick", 256, 704, 2, 4, 4, 2, 256)
LARGE = Sizes("llama3-8b layers", 4096, 14336, 4, 32, 8, 4, 2048)
SIZES = {"cpu": SMALL, "cuda": LARGE}


@dataclass(frozen=True)
class StepCase:
    """A step to measure.

    limits: what the project allows, as time and memory over PEFT's. base: how the linears' weights
    are kept, as a layer's case says it.
    """

    sizes: Sizes
    dtype: str
    adapters: str
    p: float
    limits: tuple[tuple[str, float], ...] = ()
    base: str = DENSE

    @property
    def reference(self) -> str:
        """The provider whose time others' are compared with."""
        return reference_of(self)

    def __str__(self) -> str:
        adapters = "" if self.adapters == self.dtype else f", {self.adapters} adapters"
        return f"{self.sizes}; {self.dtype}{adapters} p={self.p:g}{how_kept(self)}"


# Of time by provider, and of peak memory.
LIMITS = {
    ("bf16", 0.05): (("packed", 0.72), ("memory", 0.70)),
    ("bf16", 0.0): (("packed", 0.93),),
    ("fp32", 0.05): (("packed", 0.76), ("memory", 0.70)),
    ("fp32", 0.0): (("packed", 0.86),),
}


def step_cases(sizes: Sizes, dtypes: Sequence[str], dropouts: Sequence[float]) -> list[StepCase]:
    """Return the steps of a model: adapters of its dtype, and float32 ones, PEFT's default."""
    found = []
    for dtype, p in product(dtypes, dropouts):
        limits = LIMITS.get((dtype, p), ()) if sizes == SMALL else ()
        found.append(StepCase(sizes, dtype, dtype, p, limits))
        if dtype != "fp32":
            found.append(StepCase(sizes, dtype, "fp32", p))
    return found


def qlora_cases(sizes: Sizes, dtypes: Sequence[str], dropouts: Sequence[float]) -> list[StepCase]:
    """Return the steps of a model whose linears bitsandbytes keeps in NF4, float32 adapters."""
    return [StepCase(sizes, d, "fp32", p, base="nf4") for d, p in product(dtypes, dropouts)]


@dataclass(frozen=True)
class StepRow:
    """One provider's figures on one case; no times unless `state` is "timed"."""

    case: StepCase
    provider: str
    state: str
    reason: str = ""
    rounds: int = 0
    rejected: int = 0
    ms: Spread | None = None
    over_peft: Spread | None = None
    over_base: Spread | None = None
    peak_bytes: int | None = None
    limit: float | None = None
    memory_limit: float | None = None

    LINE = "  {:<28}{:>9}{:>17}{:>19}{:>19}{:>10}{:>8}"
    HEADER = LINE.format("", "ms", "quartiles", "/ PEFT", "/ base", "peak MiB", "limit")

    def __str__(self) -> str:
        label = BY_NAME[self.provider].label
        if self.ms is None:
            return f"  {label:<28}{self.state}: {self.reason}"
        return self.LINE.format(
            label,
            f"{self.ms.median:.1f}",
            f"{self.ms.low:.1f}-{self.ms.high:.1f}",
            str(self.over_peft or "-"),
            str(self.over_base or "-"),
            "-" if self.peak_bytes is None else f"{self.peak_bytes / MIB:.1f}",
            "-" if self.limit is None else f"<={self.limit:.2f}",
        )


def build_model(case: StepCase, provider: Provider, device: str) -> nn.Module:
    """Build PEFT's model, with a B that isn't zero, and convert it; the same weights each time."""
    torch.manual_seed(0)
    sizes = case.sizes
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
    )
    base: Any = LlamaForCausalLM(config)
    base = base.to(device, DTYPES[case.dtype]).requires_grad_(False)
    if case.base != DENSE:
        quantise(base, LINEARS, case.base, provider.codes)
    # What a frozen model's backward is needed for: gradients of what stands before it.
    base.enable_input_require_grads()
    alpha = int(SCALING * R)
    lora = LoraConfig(r=R, lora_alpha=alpha, lora_dropout=case.p, target_modules=LINEARS)
    as_x = case.adapters == case.dtype or provider.adapters_as_x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what peft 0.21 asks of transformers 5
        model = get_peft_model(base, lora, autocast_adapter_dtype=not as_x)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return provider.convert(model)


class Step:
    """A training step of one provider's model."""

    def __init__(self, case: StepCase, provider: Provider, device: str) -> None:
        self.model = build_model(case, provider, device).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
        generator, sizes = torch.Generator().manual_seed(1), case.sizes
        shape = (sizes.batch, sizes.length)
        self.ids = torch.randint(sizes.vocabulary, shape, generator=generator).to(device)

    def __call__(self) -> Tensor:
        """Run forward, backward and the optimizer's step, and return the loss."""
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def verdict(case: StepCase, provider: Provider, theirs: float, device: str) -> tuple[str, str]:
    """Return whether a provider may be timed, and why not; `theirs` is PEFT's first loss."""
    refusal = provider.refuse(_as_layer(case))
    if provider.compiles and case.sizes == QUICK:
        refusal = "its compilations would take most of a quick run"
    if refusal is not None:
        return REFUSED, refusal
    try:
        loss = first_loss(case, provider, device)
    except Exception as error:  # other packages raise many kinds
        return WRONG, f"{type(error).__name__}: {error}".splitlines()[0]
    if provider.adapted and not abs(loss - theirs) <= LOSS_TOLERANCE * abs(theirs):
        return WRONG, f"first loss {loss:.5f}, PEFT's {theirs:.5f}"
    return RIGHT, ""


def first_loss(case: StepCase, provider: Provider, device: str) -> float:
    """Return the loss of a model's first step without dropout."""
    step = Step(case, provider, device)
    step.model.eval()
    return step().item()


def _as_layer(case: StepCase) -> Case:
    hidden = case.sizes.hidden
    sizes = ("step", "hidden", 1, hidden, hidden, R)
    return Case(*sizes, case.dtype, case.adapters, case.p, base=case.base)


def peak_of_step(case: StepCase, name: str, device: str) -> int:
    """Return what a step adds at most to this process's memory."""
    step = Step(case, BY_NAME[name], device)
    step()
    return peak_bytes(step, device)


def measure(case: StepCase, session: Session) -> list[StepRow]:
    """Check every provider, time the steps of those that are right, and take their memory."""
    device = session.device
    theirs = first_loss(case, BY_NAME[case.reference], device)
    states = {p.name: verdict(case, p, theirs, device) for p in session.providers}
    right = [p for p in session.providers if states[p.name][0] == RIGHT]
    times, rejected = session.step_clock.rounds([[Step(case, p, device) for p in right]])
    columns = dict(zip((p.name for p in right), zip(*times, strict=True), strict=False))
    limits, rows = dict(case.limits), []
    for name, (state, reason) in states.items():
        fields: dict[str, Any] = {"rounds": len(times), "rejected": rejected}
        if state == RIGHT and len(times) < MIN_ROUNDS:
            state, reason = BUSY, f"{len(times)} quiet rounds of {len(times) + rejected}"
        elif state == RIGHT:
            state = TIMED
            fields |= {
                "ms": Spread.of(columns[name]),
                "over_peft": compared(columns, name, case.reference),
                "over_base": compared(columns, name, FLOOR),
                "peak_bytes": session.probe.run(peak_of_step, case, name, device),
                "limit": limits.get(name),
                "memory_limit": limits.get("memory") if BY_NAME[name].ours else None,
            }
        rows.append(StepRow(case, name, state, reason, **fields))
    return rows
