"""How time grows with a size, from rows of sweeps."""

from types import SimpleNamespace

import pytest

from bench import shapes
from bench.measure.timing import Spread
from bench.report import growth
from bench.shapes import Case


def test_growth_finds_the_exponent_and_who_grows_faster():
    sizes = [128, 256, 512, 1024, 2048]
    slope, error = growth.slope(sizes, [3e-3 * size**1.25 for size in sizes])
    assert slope == pytest.approx(1.25)
    assert error < 1e-6
    rows = []
    for name, power in (("base", 1.0), ("cpu", 0.9), ("peft", 1.2)):
        for m, n, k, r in shapes.SWEEPS.along("m"):
            ratio = None if name == "base" else Spread(*[m ** (power - 1)] * 3)
            case = Case(shapes.GROWTH, "sweep", m, n, k, r, "bf16", "bf16", 0.0)
            ms = Spread(*[m**power] * 3)
            rows.append(
                SimpleNamespace(case=case, provider=name, state="timed", ms=ms, over_base=ratio)
            )
    fits = {fit.provider: fit for fit in growth.fits(rows) if fit.axis == "m"}
    assert {name: fit.verdict for name, fit in fits.items()} == {
        "base": "-", "cpu": "no", "peft": "yes"
    }  # fmt: skip
    assert fits["cpu"].slope == pytest.approx(0.9)


@pytest.mark.parametrize("sweeps", [shapes.SWEEPS, shapes.QUICK_SWEEPS], ids=["full", "quick"])
def test_growth_finds_each_sweep_among_the_rows(sweeps):
    cases = shapes.cases([shapes.GROWTH], shapes.Grid([1], dropouts=[0.0], sweeps=sweeps))
    rows = [SimpleNamespace(case=case, provider="cpu") for case in reversed(cases)]
    assert growth.common_point(rows) == sweeps.center
    for axis, sizes in sweeps.axes.items():
        swept = growth.swept(rows, axis, "bf16", 0.0, "cpu")
        assert tuple(getattr(row.case, axis) for row in swept) == sizes
