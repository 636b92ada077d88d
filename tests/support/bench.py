"""A small case of the benchmarks, and a provider that is wrong."""

from bench.providers.registry import Provider, replace_forward
from bench.providers.rivals import addmm_lora
from bench.shapes import Case

SMALL = Case("minilm", "q+k+v+o", 96, 64, 128, 16, "fp32", "fp32", 0.25)


def wrong(name, function):
    return Provider(name, name, replace_forward(function))


def scaled_y(x, weight, a, b, scaling, p):
    return addmm_lora(x, weight, a, b, scaling * 1.01, p)


class Here:
    """Runs what a probe runs in a process of its own."""

    def run(self, function, *args):
        return function(*args)

    def close(self):
        pass
