"""Shared fixtures: a fresh, printed seed for every run, and poisoned uninitialised memory.

LORA_KERNELS_TEST_NEEDS names what must be there, such as "cpu cuda": without it tests would skip.
"""

import importlib.util
import os
import random
from pathlib import Path

import pytest
import torch

from lora_kernels import native

SEED = int(os.environ.get("LORA_KERNELS_TEST_SEED") or random.SystemRandom().randrange(1 << 31))


def _module(name):
    return None if importlib.util.find_spec(name) else f"module {name} can't be imported"


# Why something isn't there, or None.
ABSENCES = {
    "cpu": lambda: native.absence("cpu"),
    "cuda": lambda: native.absence("cuda"),
    "triton": lambda: _module("triton"),
    "machine": lambda: _module("ptxvm"),
    "gpu": lambda: None if torch.cuda.is_available() else "torch finds no CUDA GPU",
}
NAMES = ", ".join(ABSENCES)


def pytest_report_header(config):
    return f"LORA_KERNELS_TEST_SEED={SEED}, torch {torch.__version__}"


def pytest_configure(config):
    os.environ["LORA_KERNELS_TEST_SEED"] = str(SEED)  # of other processes that share the tests, too
    # One busy core makes every parallel region wait 8 ms; tests of threads ask for them.
    torch.set_num_threads(1)
    # `make sanitize` tests an instrumented build of the compiled part.
    if library := os.environ.get("LORA_KERNELS_TEST_LIBRARY"):
        native.LIBRARIES["cpu"] = Path(library)
    needs = os.environ.get("LORA_KERNELS_TEST_NEEDS", "").split() + ["cpu"] * bool(library)
    for name in needs:
        if name not in ABSENCES:
            raise pytest.UsageError(f"LORA_KERNELS_TEST_NEEDS: expected {NAMES}, got {name}")
        if (reason := ABSENCES[name]()) is not None:
            raise pytest.UsageError(f"LORA_KERNELS_TEST_NEEDS: {name}: {reason}")
    # Plans measured on this machine must not decide what is tested.
    os.environ["LORA_KERNELS_TUNED"] = os.devnull
    config.addinivalue_line("markers", "unpoisoned: torch.empty is left alone (compiled code)")
    config.addinivalue_line("markers", "many: of many slow cases, `--one-in N` runs some")
    config.addinivalue_line("markers", "slow: of these tests `--one-in N` runs a sixth")


def pytest_addoption(parser):
    parser.addoption(
        "--share", metavar="I/N", help="of the tests selected every N-th, from the I-th"
    )
    parser.addoption(
        "--one-in",
        metavar="N",
        type=int,
        default=1,
        help="of the cases of each test marked `many` one in N, of tests marked `slow` a sixth; "
        "others with each run's seed",
    )


def _items_by_test(mark, items):
    """Return the cases of each test that has a mark, by its name."""
    cases = {}
    for item in items:
        if mark in item.keywords:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return cases


def _beyond_one_in(n, items):
    """Return the items to leave out: of each test with many cases all but one in n, by the seed."""
    dropped = set()
    for name, of_one in _items_by_test("many", items).items():
        fewer = -(-len(of_one) // n)
        kept = random.Random(f"{SEED}/{name}").sample(range(len(of_one)), fewer)
        dropped.update(item for i, item in enumerate(of_one) if i not in kept)
    slow = _items_by_test("slow", items)
    for name in random.Random(SEED).sample(sorted(slow), len(slow) * 5 // 6):
        dropped.update(slow[name])
    return dropped


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if (n := config.getoption("--one-in")) > 1:
        dropped = _beyond_one_in(n, items)
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]
    if share := config.getoption("--share"):
        first, step = map(int, share.split("/"))
        kept = items[first - 1 :: step]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(autouse=True)
def _seeded(request):
    """Seed torch from the run's seed and the test's name: one test can be repeated alone."""
    torch.manual_seed(random.Random(f"{SEED}/{request.node.nodeid}").randrange(1 << 62))


@pytest.fixture(autouse=True)
def _poisoned(request, monkeypatch):
    """Fill what torch.empty and new_empty return with NaN or an odd integer: unwritten shows."""
    if "unpoisoned" in request.keywords:
        return

    def poisoned(allocate):
        def allocate_and_fill(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_meta or tensor.numel() == 0:
                return tensor
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(85)

        return allocate_and_fill

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder of all processes that share the tests."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture
def float32_precision():
    """torch.set_float32_matmul_precision, undone after the test."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")
