"""docs/models.md: what the census's rows say, as a page."""

import datetime
from importlib.metadata import version
from statistics import median

from tests.census.measure import SEEDS, Row
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "models.md"
MARK = "<!-- Written by `make census` (tests/census): not by hand. -->"
COLUMNS = (
    *("model", "recipe", "fused / LoRA layers", "left: parameters; FLOPs"),
    *("gradients", "bf16", "equal"),
)
HEAD = f"| {' | '.join(COLUMNS)} |"
TOLERANCES = {"loss": 1e-5, "gradient": 1e-4}
_PACKAGES = ("torch", "transformers", "peft", "diffusers")


def equal(found: Row) -> bool:
    """Whether a patched model does what the unpatched one does, in float32."""
    within = found.loss <= TOLERANCES["loss"] and found.gradient <= TOLERANCES["gradient"]
    return within and found.tokens is not False


def row(found: Row) -> str:
    """Return a model's line of the table."""
    shares = "0; 0" if not found.left else f"{found.parameters:.2f}; {found.flops:.2f}"
    ratio = "" if found.ratio is None else f"{found.ratio:.2f}"
    same = {None: "", True: ", tokens", False: ""}[found.tokens]
    verdict = f"yes{same}" if equal(found) else "**no**"
    cells = [
        *(found.model, found.recipe, f"{found.fused} / {found.layers}", shares),
        *(f"{found.gradient:.0e}", ratio, verdict),
    ]
    return f"| {' | '.join(cells)} |"


_TEXT = """\
{mark}

# Models and recipes

{date}, {versions}, CPU: tiny models of random weights, r = 8,
one training step each, patched against unpatched. A layer that isn't fused keeps PEFT's forward.

- left: the shares of LoRA parameters and of the adapted layers' FLOPs that PEFT's forward has.
- gradients: the largest difference in float32, over the largest element of that gradient.
- bf16: of a bfloat16 model with float32 adapters, the distance of all LoRA gradients to those of
  the same model in float32, patched over unpatched, median of {batches} batches. Of these numbers
  the median is {median:.2f}, the least {least:.2f}, the worst {most:.2f}. They say little where a
  router chooses other experts in bfloat16.
- equal: loss within {loss:.0e}, gradients within {gradient:.0e}; "tokens": so is greedy generation.

{head}
|{rule}|
{rows}

## What is left, and why

| reason in the report | model, recipe: layers |
|---|---|
{left}
"""


def written(found: list[Row]) -> str:
    """Return the page."""
    ratios = [r.ratio for r in found if r.ratio is not None]
    return _TEXT.format(
        mark=MARK,
        date=datetime.date.today(),
        versions=", ".join(f"{name} {version(name)}" for name in _PACKAGES),
        batches=len(SEEDS),
        median=median(ratios),
        least=min(ratios),
        most=max(ratios),
        **TOLERANCES,
        head=HEAD,
        rule="|".join("---" for _ in COLUMNS),
        rows="\n".join(map(row, found)),
        left="\n".join(_left(found)),
    )


def _left(found: list[Row]) -> list[str]:
    where: dict[str, list[str]] = {}
    for r in found:
        for reason, count in r.left.items():
            where.setdefault(reason, []).append(f"{r.model}, {r.recipe}: {count}")
    return [f"| {reason} | {'; '.join(places)} |" for reason, places in where.items()]
