"""The benchmark suite's own logic: what it counts, refuses, keeps and says; never a time."""

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

import bench.__main__ as program
from bench import agree, eager_launches, growth, layer, published, report, results, shapes, timing
from bench.calls import make_slots
from bench.footprint import footprint
from bench.gate import RIGHT, WRONG, verdicts
from bench.options import parse
from bench.providers import BY_NAME, Provider, replace_forward
from bench.rivals import addmm_lora
from bench.shapes import Case, cases
from bench.timing import Spread
from lora_kernels import native
from lora_kernels.impl.triton.plan.config import Problem
from tests.support.paths import ROOT

SMALL = Case("minilm", "q+k+v+o", 96, 64, 128, 16, "fp32", "fp32", 0.25)
BUILT = pytest.mark.skipif(
    native.absence("cpu") is not None, reason="the compiled part is not built"
)


def _wrong(name, function):
    return Provider(name, name, replace_forward(function))


def _scaled_y(x, weight, a, b, scaling, p):
    return addmm_lora(x, weight, a, b, scaling * 1.01, p)


def _wrong_gradient(x, weight, a, b, scaling, p):
    y = addmm_lora(x, weight, a, b, scaling, p)
    a.register_hook(lambda grad: grad * 1.01)
    return y


def _raising(x, weight, a, b, scaling, p):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("function", "named"),
    [(_scaled_y, "y"), (_wrong_gradient, "da"), (_raising, "no such kernel")],
)
def test_gate_finds_what_is_wrong(function, named):
    found = verdicts(SMALL, [_wrong("wrong", function)], "cpu")
    state, reason = found["wrong"]
    assert state == WRONG
    assert named in reason


@pytest.mark.parametrize("name", ["base", "peft", "peft16", "addmm", "eager", "cpu", "packed"])
@pytest.mark.parametrize("dtypes", [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_gate_passes_every_provider(name, dtypes):
    case = replace(SMALL, dtype=dtypes[0], adapters=dtypes[1])
    if (reason := BY_NAME[name].absence("cpu") or BY_NAME[name].refuse(case)) is not None:
        pytest.skip(reason)
    assert verdicts(case, [BY_NAME[name]], "cpu")[name] == (RIGHT, "")


def test_a_call_keeps_no_gradients():
    """What one round keeps decides where the heap has room in the next."""
    [[call]] = make_slots([BY_NAME["peft"]], SMALL, "cpu", 1)
    call()
    assert all(leaf.grad is None for leaf in call.leaves)
    assert call.results().keys() == {"y", "dx", "da", "db"}
    assert all(leaf.grad is None for leaf in call.leaves)


def test_a_wrong_provider_is_reported_and_not_timed():
    timed = []

    class Clock:
        def prepare(self, call):
            return call

        def rounds(self, slots):
            timed.extend(call for slot in slots for call in slot)
            return [[1.0] * len(slots[0])] * timing.MIN_ROUNDS, 0

    counted = SimpleNamespace(run=lambda *_: None)
    providers = [BY_NAME["base"], BY_NAME["peft"], _wrong("wrong", _scaled_y)]
    ceilings = SimpleNamespace(seconds=lambda case: 5e-4)
    session = SimpleNamespace(
        device="cpu", providers=providers, layer_clock=Clock(), probe=counted, ceilings=ceilings,
        cache_bytes=1,
    )  # fmt: skip
    rows = {row.provider: row for row in layer.measure(SMALL, session)}
    assert rows["wrong"].state == WRONG
    assert rows["wrong"].ms is None
    assert len(timed) == 2 * rows["peft"].slots
    assert rows["peft"].state == timing.TIMED
    assert rows["peft"].roofline == pytest.approx(0.5)
    assert rows["base"].over_peft == Spread(1.0, 1.0, 1.0)
    assert rows["base"].over_base is None


def test_slots_exceed_the_cache():
    size = shapes.floor_bytes(SMALL)
    assert layer.slot_count(SMALL, 5 * size) == 10
    assert layer.slot_count(SMALL, 1) == 2
    assert layer.slot_count(SMALL, 10**12) == layer.MAX_SLOTS


def test_flops_and_bytes_are_those_of_the_formulas():
    case = replace(SMALL, m=3, n=5, k=7, r=2)
    base, thin = 2 * 3 * 5 * 7, 2 * 3 * 2 * (5 + 7)
    assert shapes.flops(case) == 2 * base + 3 * thin
    assert shapes.flops(replace(case, mode="infer")) == base + thin
    elements = 3 * 7 + 5 * 7 + 3 * 5
    assert shapes.floor_bytes(replace(case, mode="infer")) == 4 * (elements + 2 * (5 + 7))
    assert shapes.floor_bytes(replace(case, r=0)) == 2 * 4 * elements


def test_models_have_their_sizes():
    assert shapes.MODELS["llama3-8b"]["k+v"] == (1024, 4096)
    assert shapes.MODELS["llama3-8b"]["down"] == (4096, 14336)
    assert shapes.MODELS["qwen3-4b"]["q"] == (4096, 2560)
    assert shapes.MODELS["minilm"]["up"] == (1536, 384)
    for twin, of in shapes.TWINS.items():
        assert shapes.MODELS[twin] == shapes.MODELS[of]
    found = cases(shapes.CHOICES, shapes.Grid(tokens=[16]))
    assert len(found) == len(set(found)) > 100


def test_unknown_names_are_refused(capsys):
    for asked, expected in (
        (["--shapes", "llama3-8b/kv"], "expected one of llama3-8b/q+o"),
        (["--shapes", "gpt"], "expected one of targets"),
        (["--suite", "layers"], "expected some of layer"),
        (["--providers", "peft,vllm"], "expected some of base"),
        (["--seconds", "0"], "expected a positive number"),
        (["--dropouts", "1"], "expected a list"),
    ):
        try:
            status = program.main([*asked, "--list"])
        except SystemExit as left:
            status = left.code
        assert status == 2
        assert expected in capsys.readouterr().err


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


@pytest.mark.parametrize("dropout", [False, True])
def test_eager_launches_multiply_what_the_formulas_ask(dropout):
    m, n, k, r = 96, 64, 128, 16

    def flops(steps_of):
        both = [steps_of(Problem(m, n, k, r, 16, dropout, True, way)) for way in (False, True)]
        products = [s for steps in both for s in steps if isinstance(s, eager_launches.Product)]
        return sum(2 * math.prod(product[:3]) for product in products)

    assert flops(eager_launches.peft) == shapes.flops(SMALL)
    assert flops(eager_launches.plain) == shapes.flops(replace(SMALL, r=0))
    again = 2 * m * k * r  # the addmm order computes x Aᵀ a second time
    assert flops(eager_launches.addmm) == shapes.flops(SMALL) + again


@BUILT
def test_footprint_counts_what_is_saved_and_launched():
    case = replace(SMALL, m=512, n=256, k=256)
    x_bytes = 4 * case.m * case.k
    base, peft, ours = (footprint(case, name, "cpu") for name in ("base", "peft", "cpu"))
    assert base.launches == 2  # x Wᵀ, dy W
    assert base.saved_bytes == 0
    assert peft.saved_bytes >= x_bytes  # the dropped x, or its mask
    assert ours.saved_bytes <= 0.1 * x_bytes  # D(x) Aᵀ and the seed: R / K of x
    assert ours.launches < peft.launches


@dataclass(frozen=True)
class _Row:
    """A row of a suite that there is not."""

    provider: str
    ms: Spread


def _session():
    return SimpleNamespace(probe=SimpleNamespace(close=lambda: None))


def test_results_are_whole_after_each_point(tmp_path):
    path = tmp_path / "new" / results.FILE
    kept = results.Results(path, {"run": {"revision": "abc"}, "value": 1 / 3})
    for count in range(3):
        assert {suite: len(rows) for suite, rows in results.load(path)["rows"].items()} == (
            {"layer": count} if count else {}
        )
        kept.add("layer", [_Row("cpu", Spread(1 / 3, 0.25, 0.5))])
    row = results.load(path)["rows"]["layer"][0]
    assert (row.provider, row.ms.median) == ("cpu", 0.33333)
    assert json.loads(path.read_text())["value"] == 0.33333
    other = tmp_path / "other.json"
    other.write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="expected results of"):
        results.load(other)


def test_interruption_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    def measured(session):
        yield _Row("cpu", Spread(1.0, 1.0, 1.0))

    def interrupted(session):
        yield _Row("peft", Spread(2.0, 2.0, 2.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write", lambda path, folder: folder / report.PAGE)
    points = [program.Point("layer", str(f), "", f) for f in (measured, interrupted, measured)]
    kept = results.Results(tmp_path / results.FILE, {})
    assert program.measure(points, _session(), kept) == program.INTERRUPTED
    data = results.load(kept.path)
    assert [row.provider for row in data["rows"]["layer"]] == ["cpu", "peft"]
    assert data["interrupted"]
    assert "2 rows kept" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small run of the program."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "bench", "--quick", "--seconds", "0.02", "--out", str(folder)]
    asked = ["--suite", "layer,memory", "--shapes", "minilm/up", "--tokens", "64"]
    done = subprocess.run(
        [*command, *asked, "--providers", "addmm,cpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_page_holds_everything_itself(run):
    page = (run / report.PAGE).read_text()
    data = results.load(run / results.FILE)
    sources = re.findall(r'<img src="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<(script|link)|https?://|url\(", page)
    assert len(sources) == len(list(run.glob("*.png")))
    rows = sum(len([r for r in rows if not r.reason]) for rows in data["rows"].values())
    assert page.count("<tr><td") >= rows
    assert data["run"]["revision"] in page


def test_rows_carry_what_the_suite_promises(run):
    data = results.load(run / results.FILE)
    timed = [row for row in data["rows"]["layer"] if row.state == "timed"]
    assert {row.provider for row in timed} >= {"base", "peft", "addmm"}
    for row in timed:
        assert row.rounds >= timing.MIN_ROUNDS
        assert row.ms.low <= row.ms.median <= row.ms.high
        assert row.flops > 0
        assert row.floor_bytes > 0
        assert row.roofline > 0
        assert row.footprint.launches > 0
        assert row.footprint.peak_bytes > 0
    assert data["ceilings"]["bytes_per_second"] > 0
    assert all(rate > 0 for rate in data["ceilings"]["flops_per_second"].values())


def _changed(source, target, change):
    """Write a run of its layers compared with PEFT alone, changed: others may be quiet, too."""
    data = json.loads(source.read_text())
    rows = [row for row in data["rows"]["layer"] if row["over_peft"] is not None]
    assert rows
    for row in rows:
        change(row)
    target.write_text(json.dumps(data | {"rows": {"layer": rows}}))
    return str(target)


def test_runs_agree_where_quiet_ratios_do(run, tmp_path, capsys):
    def quiet(row):
        row["over_peft"] = {"median": 0.5, "low": 0.495, "high": 0.505}
        row["over_base"] = None

    def apart(row):
        row["over_peft"], row["over_base"] = {"median": 0.6, "low": 0.595, "high": 0.605}, None

    def apart_and_loud(row):
        row["over_peft"], row["over_base"] = {"median": 0.6, "low": 0.5, "high": 0.7}, None

    def apart_and_slower(row):
        apart(row)
        row["ms"]["median"] *= 1.2

    first = _changed(run / results.FILE, tmp_path / "first.json", quiet)
    nothing = 2  # is quiet in both
    changes = (
        (quiet, 0),
        (apart, agree.FAILED),
        (apart_and_loud, nothing),
        (apart_and_slower, nothing),
    )
    for change, status in changes:
        second = _changed(run / results.FILE, tmp_path / "second.json", change)
        assert agree.main([first, second]) == status
        assert ("0.500, then 0.600" in capsys.readouterr().out) == (status == agree.FAILED)


def test_the_page_shows_the_results_that_it_names():
    text = published.PAGE.read_text()
    [named] = published.BLOCK.findall(text)
    assert published.with_block(text, ROOT / named) == text


def test_quick_runs_ask_for_little():
    quick, whole = parse(["--quick"]), parse([])
    assert quick.seconds < whole.seconds
    assert len(cases(quick.shapes, quick.grid)) < len(cases(whole.shapes, whole.grid))
    assert quick.providers == whole.providers == list(BY_NAME)
