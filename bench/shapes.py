"""What is measured: the one list of shapes, from the linear layers of known models, and their cost.

A shape is N x K, out_features x in_features, as in y [M, N] = x [M, K] Wᵀ. Layers of equal size
stand together: "q+o" are the query and the output projection of an attention.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch

from bench.quantised import BYTES, coded
from lora_kernels import testing
from lora_kernels.testing import LINEAR, Spec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALING = 2.0  # lora_alpha = 2 r


class Shape(NamedTuple):
    """A linear layer of a model, or several of the same size."""

    n: int
    k: int


def _llama_style(
    hidden: int, intermediate: int, heads: int, kv_heads: int = 8, head_dim: int = 128
) -> dict[str, Shape]:
    """Return the projections of a decoder with grouped-query attention and a gated MLP."""
    queries = heads * head_dim
    attention = {"q": Shape(queries, hidden), "o": Shape(hidden, queries)}
    if queries == hidden:
        attention = {"q+o": Shape(hidden, hidden)}
    return {
        **attention,
        "k+v": Shape(kv_heads * head_dim, hidden),
        "gate+up": Shape(intermediate, hidden),
        "down": Shape(hidden, intermediate),
    }


def _encoder(hidden: int, intermediate: int) -> dict[str, Shape]:
    """Return the projections of a BERT-style encoder."""
    return {
        "q+k+v+o": Shape(hidden, hidden),
        "up": Shape(intermediate, hidden),
        "down": Shape(hidden, intermediate),
    }


MODELS: dict[str, dict[str, Shape]] = {
    "minilm": _encoder(384, 1536),
    "bert-base": _encoder(768, 3072),
    "vit-b": _encoder(768, 3072),
    # Of the UNet's two widths; "cross" projects the text's 2048 features.
    "sdxl": {
        "640-self": Shape(640, 640),
        "640-cross": Shape(640, 2048),
        "1280-self": Shape(1280, 1280),
        "1280-cross": Shape(1280, 2048),
    },
    "qwen3-4b": _llama_style(2560, 9728, heads=32),
    "llama3-8b": _llama_style(4096, 14336, heads=32),
    "mistral-7b": _llama_style(4096, 14336, heads=32),
    "qwen3-32b": _llama_style(5120, 25600, heads=64),
    "llama3-70b": _llama_style(8192, 28672, heads=64),
}
# Equal sizes under another name: measured once unless asked for by name.
TWINS = {"vit-b": "bert-base", "mistral-7b": "llama3-8b"}
# A layer of these takes seconds a call on a few cores.
LARGE = ("qwen3-32b", "llama3-70b")
TARGETS, GROWTH, QLORA, PLANS = "targets", "growth", "qlora", "plans"
CHOICES = (TARGETS, GROWTH, QLORA, PLANS, *MODELS)
# What decides between a GPU's plans: a square layer, a wide one, a narrow one; and how many rows.
PLAN_SHAPES = (Shape(4096, 4096), Shape(14336, 4096), Shape(1024, 4096))
PLAN_TOKENS = (8192, 2048, 512, 16)
DENSE = "dense"
MODES = {"train": "forward + backward", "infer": "forward without gradient"}


@dataclass(frozen=True)
class Case:
    """A row: a spec with a size.

    adapters: dtype of lora_A and lora_B. p: dropout. mode: "train" is forward + backward, "infer" a
    forward without gradient. limits: what the project allows ours, by provider, of PEFT's time.
    base: how the frozen weight is kept, "dense" or a word of bitsandbytes' formats.
    """

    model: str
    projection: str
    m: int
    n: int
    k: int
    r: int
    dtype: str
    adapters: str
    p: float
    mode: str = "train"
    limits: tuple[tuple[str, float], ...] = ()
    base: str = DENSE

    @property
    def reference(self) -> str:
        """The provider whose time others' are compared with: PEFT, on W as it is kept."""
        return reference_of(self)

    @property
    def spec(self) -> Spec:
        """The op's cases, inputs and oracle."""
        return LINEAR

    def inputs(self, device: str) -> testing.Inputs:
        """Draw the call's tensors."""
        made: testing.Inputs = self.spec.inputs(self.parity, device)
        return made if self.base == DENSE else coded(made, self.base)

    def __str__(self) -> str:
        adapters = "" if self.adapters == self.dtype else f", {self.adapters} adapters"
        return (
            f"{self.model} {self.projection}: {self.mode} {self.m}x{self.n}x{self.k} r={self.r} "
            f"p={self.p:g} {self.dtype}{adapters}{how_kept(self)}"
        )

    @property
    def parity(self) -> testing.Case:
        """The same call without dropout, as the spec describes one."""
        dtypes = DTYPES[self.dtype], DTYPES[self.adapters]
        return testing.Case((self.m,), self.n, self.k, self.r, *dtypes, 0.0, False, SCALING)


def reference_of(case: Any) -> str:
    """Return the provider that others are compared with: PEFT, on W as it is kept."""
    return "peft" if getattr(case, "base", DENSE) == DENSE else "bitsandbytes"


def how_kept(case: Any) -> str:
    """Return in which format a case's W is; nothing of a dense one, as older files' all are."""
    base = getattr(case, "base", DENSE)
    return "" if base == DENSE else f", W in {base}"


@dataclass(frozen=True)
class Sweeps:
    """Sizes along each axis, the others at one point; M from 128 up.

    Below, a call costs what it costs to make one, whatever its size.
    """

    center: Mapping[str, int]
    axes: Mapping[str, Sequence[int]]

    def along(self, axis: str) -> list[tuple[int, int, int, int]]:
        """Return the sizes (m, n, k, r) of one axis."""
        sizes = ({**self.center, axis: value} for value in self.axes[axis])
        return [(size["m"], size["n"], size["k"], size["r"]) for size in sizes]


SWEEPS = Sweeps(
    {"m": 512, "n": 1024, "k": 1024, "r": 16},
    {
        "m": (128, 256, 512, 1024, 2048),
        "n": (256, 512, 1024, 2048, 4096),
        "k": (256, 512, 1024, 2048, 4096),
        "r": (4, 8, 16, 32, 64, 128),
    },
)
QUICK_SWEEPS = Sweeps(
    {"m": 256, "n": 512, "k": 512, "r": 16},
    {
        "m": (128, 256, 512, 1024),
        "n": (256, 512, 1024, 2048),
        "k": (256, 512, 1024, 2048),
        "r": (4, 16, 32, 64, 128),
    },
)


@dataclass(frozen=True)
class Grid:
    """What each shape is measured with; every combination is a case."""

    tokens: Sequence[int]
    ranks: Sequence[int] = (16,)
    dtypes: Sequence[str] = ("bf16",)
    dropouts: Sequence[float] = (0.05, 0.0)
    modes: Sequence[str] = ("train", "infer")
    adapters: str = "fp32"  # PEFT's default, whatever the model's dtype
    sweeps: Sweeps = SWEEPS

    @property
    def calls(self) -> list[tuple[str, float]]:
        """Modes with their dropout: inference has none."""
        train = [("train", p) for p in self.dropouts if "train" in self.modes]
        return [*train, ("infer", 0.0)] if "infer" in self.modes else train


def cases(names: Iterable[str], grid: Grid) -> list[Case]:
    """Return the cases of shape names: a model, model/projection, or one of `CHOICES`.

    Raises:
        ValueError: a name that the list doesn't have.
    """
    found: list[Case] = []
    for name in names:
        if name == TARGETS:
            found += _target_cases()
        elif name == GROWTH:
            found += _growth_cases(grid)
        elif name == QLORA:
            found += _qlora_cases(grid)
        elif name == PLANS:
            found += _plan_cases(grid)
        else:
            found += _model_cases(name, grid)
    return found


def _model_cases(name: str, grid: Grid) -> Iterator[Case]:
    model, _, wanted = name.partition("/")
    projections = MODELS.get(model, {})
    if not projections or (wanted and wanted not in projections):
        known = ", ".join(f"{model}/{p}" for p in projections) or ", ".join(CHOICES)
        raise ValueError(f"shapes: expected one of {known}, got {name!r}")
    for projection, (n, k) in projections.items():
        if wanted in ("", projection):
            for dtype, m, r, call in product(grid.dtypes, grid.tokens, grid.ranks, grid.calls):
                mode, p = call
                yield Case(model, projection, m, n, k, r, dtype, grid.adapters, p, mode)


def _target_cases() -> list[Case]:
    """Return the layers that the project has set limits to."""
    rows: list[tuple[str, int, int, float, float | None, float | None]] = [
        ("bf16", 2048, 768, 0.05, 0.60, 0.58),
        ("bf16", 2048, 768, 0.0, 1.0, None),
        ("bf16", 512, 2048, 0.05, 0.78, 0.75),
        ("bf16", 512, 2048, 0.0, 0.97, 0.93),
        ("bf16", 16, 2048, 0.0, 0.88, 0.75),
        ("bf16", 1, 2048, 0.0, None, None),
        ("fp32", 512, 2048, 0.05, 0.83, 0.68),
        ("fp32", 512, 2048, 0.0, 1.0, None),
        ("fp32", 16, 2048, 0.0, 0.94, 0.57),
        ("fp32", 1, 2048, 0.0, None, None),
    ]
    with_fp32_adapters = [
        (2048, 768, 0.05, 0.70),
        (2048, 768, 0.0, 0.98),
        (512, 2048, 0.05, 0.70),
        (512, 2048, 0.0, 0.98),
        (128, 2048, 0.0, 0.98),
        (16, 2048, 0.0, 0.95),
    ]
    found = [
        _target(m, size, dtype, dtype, p, cpu=cpu, packed=packed)
        for dtype, m, size, p, cpu, packed in rows
    ]
    found += [
        _target(m, size, "bf16", "fp32", p, cpu=cpu, packed=None)
        for m, size, p, cpu in with_fp32_adapters
    ]
    return found


def _target(m: int, size: int, dtype: str, adapters: str, p: float, **limits: float | None) -> Case:
    kept = tuple((name, limit) for name, limit in limits.items() if limit is not None)
    return Case(TARGETS, "square", m, size, size, 16, dtype, adapters, p, limits=kept)


def _qlora_cases(grid: Grid) -> Iterator[Case]:
    """Yield layers over bitsandbytes' weights, with the limits that were set of bfloat16."""
    rows = [
        ("nf4", 512, 2048, 0.05, 0.70),
        ("nf4", 512, 2048, 0.0, 0.80),
        ("nf4", 512, 4096, 0.05, 0.68),
        ("nf4", 512, 4096, 0.0, 0.72),
        ("nf4", 2048, 768, 0.05, 0.50),
        ("nf4", 16, 2048, 0.0, 0.45),
        ("nf4", 16, 4096, 0.0, 0.18),
        ("nf4", 1, 2048, 0.0, 0.33),
        ("nf4", 1, 4096, 0.0, 0.11),
        ("int8", 512, 2048, 0.0, 0.65),
        ("int8", 512, 4096, 0.0, 0.36),
        ("int8", 16, 4096, 0.0, 0.05),
    ]
    for dtype, (base, m, size, p, limit) in product(grid.dtypes, rows):
        limits = (("cpu-codes", limit),) if dtype == "bf16" else ()
        yield Case(
            QLORA, "square", m, size, size, 16, dtype, grid.adapters, p, limits=limits, base=base
        )


def _plan_cases(grid: Grid) -> Iterator[Case]:
    """Yield what decides between plans: the largest calls first, which no picker may miss."""
    for m, (n, k), dtype, call in product(PLAN_TOKENS, PLAN_SHAPES, grid.dtypes, grid.calls):
        mode, p = call
        yield Case(PLANS, f"{n}x{k}", m, n, k, 16, dtype, grid.adapters, p, mode)


def _growth_cases(grid: Grid) -> Iterator[Case]:
    """Yield sweeps of M, K, N and R, each around one point."""
    sizes = {size for axis in grid.sweeps.axes for size in grid.sweeps.along(axis)}
    for dtype, p in product(grid.dtypes, grid.dropouts):
        for size in sorted(sizes):
            yield Case(GROWTH, "sweep", *size, dtype, dtype, p)


def flops(case: Case) -> int:
    """Return the floating-point operations of a case: two a multiplication."""
    base, adapter = case.m * case.n * case.k, case.m * case.r * (case.n + case.k)
    # Forward: x Wᵀ and two of low rank; backward: dy W and four.
    return 2 * (2 * base + 3 * adapter) if case.mode == "train" else 2 * (base + adapter)


def floor_bytes(case: Case) -> int:
    """Return the bytes of a case: each tensor that a pass needs read once, each result written."""
    size, adapter_size = DTYPES[case.dtype].itemsize, DTYPES[case.adapters].itemsize
    x, y = case.m * case.k, case.m * case.n
    w = int(case.n * case.k * BYTES.get(case.base, size))
    adapters = adapter_size * case.r * (case.n + case.k)
    forward = size * (x + y) + w + adapters
    if case.mode == "infer":
        return forward
    backward = size * (y + x) + w
    if case.r:  # x Aᵀ is written and read, x read again, dA and dB are written
        backward += size * (x + 2 * case.m * case.r) + 2 * adapters
    return forward + backward
