"""Sums that a program leaves to the next: what of a float32 arrives, special values included."""

import pytest
import torch
import triton
import triton.language as tl

from lora_kernels.impl.triton.kernels.split_k import by_ranks, by_threads, load_part, store_part
from lora_kernels.impl.triton.launch import Options, current
from tests.support.executors import executors, running

PANELS = 3


@triton.jit
def there_and_back(
    given, taken, high, low, ROWS: tl.constexpr, RANKS: tl.constexpr, LOW: tl.constexpr
):
    """Hand a panel's sums on and take them: one program a panel."""
    panel = tl.program_id(0)
    places = tl.arange(0, RANKS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    sums = by_threads(tl.load(given + panel * ROWS * RANKS + places))
    store_part(sums, high, low, panel, LOW)
    tl.debug_barrier()
    back = by_ranks(load_part(high, low, panel, ROWS * RANKS // 8, LOW), RANKS)
    tl.store(taken + panel * ROWS * RANKS + places, back)


def _room_for_parts(given, rows, ranks, low):
    """What of given [panels, ranks, rows] arrives."""
    words, left = given.numel() // 2, given.numel() * low // 32
    args = {
        "given": given, "taken": torch.full_like(given, 7),
        "high": given.new_empty(words, dtype=torch.int32),
        "low": given.new_empty(left, dtype=torch.int32),
    }  # fmt: skip
    constants = {"ROWS": rows, "RANKS": ranks, "LOW": low}
    current().run(there_and_back, given.shape[0], args, constants, Options(4, 2))
    return args["taken"]


@pytest.mark.parametrize("low", [4, 8])
@pytest.mark.parametrize("size", [(16, 16), (64, 32), (128, 16)], ids=str)
@pytest.mark.parametrize("executor", executors())
def test_rounded_to_the_bits_kept(executor, size, low):
    rows, ranks = size
    given = (torch.randn(PANELS, ranks, rows) * torch.logspace(-30, 30, rows)).to(executor.memory)
    with running(executor()):
        taken = _room_for_parts(given, rows, ranks, low)
    assert ((taken - given).abs() <= given.abs() * 2.0 ** -(8 + low)).all()
    dropped = (1 << (16 - low)) - 1
    assert not (taken.view(torch.int32) & dropped).any()


@pytest.mark.parametrize("low", [4, 8])
@pytest.mark.parametrize("executor", executors())
def test_special_values(executor, low):
    """Infinities, zeros and NaN stay what they are; NVIDIA's NaN is 0x7fffffff."""
    kept = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1.0, -2.0, 2.0**-149, 3e38])
    given = kept.repeat(1, 16, 2).to(executor.memory)
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).to(executor.memory)
    given[:, ::2, ::3] = nan
    with running(executor()):
        taken = _room_for_parts(given, 16, 16, low)
    small = given.abs() == 2.0**-149
    assert torch.equal(taken.isnan(), given.isnan())
    same = ~given.isnan() & ~small
    assert torch.allclose(taken[same], given[same], rtol=2.0 ** -(8 + low), atol=0)
    assert torch.equal(taken[same].signbit(), given[same].signbit())
    assert not taken[small].any()
