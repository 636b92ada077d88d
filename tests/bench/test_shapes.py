"""The list of shapes, and what a case costs by the formulas."""

from dataclasses import replace

from bench import shapes
from bench.shapes import cases
from tests.support.bench import SMALL


def test_flops_and_bytes_are_those_of_the_formulas():
    case = replace(SMALL, m=3, n=5, k=7, r=2)
    base, adapter = 2 * 3 * 5 * 7, 2 * 3 * 2 * (5 + 7)
    assert shapes.flops(case) == 2 * base + 3 * adapter
    assert shapes.flops(replace(case, mode="infer")) == base + adapter
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
