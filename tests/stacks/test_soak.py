"""A soak test: 2,000 steps of changing shapes; memory stays flat and no cache grows."""

import functools
import gc
import itertools
import random
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from tests.stacks.models import adapted_llama, llama, tokens

STEPS, WARM = 2000, 500
MIB = 1 << 20
# oneDNN keeps up to 1,024 kernels, about 1 GiB, by shape: of more shapes, and with PEFT's forward
# as much, memory is flat only after as many steps. Warm-up has each of these in both precisions.
SHAPES = tuple(itertools.product((1, 2, 3, 4), (2, 5, 8, 17, 24, 33, 48, 64)))


def resident_bytes():
    """Return this process's resident memory, in bytes."""
    page = 4096
    return int(Path("/proc/self/statm").read_text().split()[1]) * page


def census():
    """Count live tensors, live objects, and entries of the package's caches."""
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(isinstance(each, torch.Tensor) for each in objects)
    caches = [each for each in objects if isinstance(each, functools._lru_cache_wrapper)]
    own = [c for c in caches if getattr(c, "__module__", "").startswith("lora_kernels")]
    assert len(own) >= 4
    return tensors, len(objects), sum(c.cache_info().currsize for c in own)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_memory_is_flat_over_2000_steps():
    model = adapted_llama(base=llama(num_hidden_layers=1), lora_dropout=0.1)
    lk.patch_peft(model, prepack=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    draw = random.Random(torch.initial_seed())
    resident, counted = [], []
    for step in range(STEPS):
        rows = tokens(*(SHAPES[step // 5 % len(SHAPES)] if step < WARM else draw.choice(SHAPES)))
        with torch.autocast("cpu", torch.bfloat16, enabled=step % 5 == 4):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 249:  # what a long run does now and then
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=rows)
            model.merge_adapter()
            model.unmerge_adapter()
            lk.unpatch_peft(model)
            lk.patch_peft(model, prepack=True)
        if step + 1 in (WARM, STEPS):
            del loss, rows
            counted.append(census())
        if step >= WARM and step % 50 == 0:
            resident.append(resident_bytes())
    (tensors, objects, entries), (later, more, same) = counted
    assert later <= tensors
    assert same == entries
    assert more <= objects + 200
    third = len(resident) // 3
    growth = min(resident[-third:]) - max(resident[:third])
    assert growth < 2 * MIB, f"{growth / MIB:.1f} MiB more in the last third than in the first"
