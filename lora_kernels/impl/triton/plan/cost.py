"""The cost model: seconds that a configuration should take on a layer, from rates and counts.

    time = launches + max(products, memory) + a tenth of the other + xa columns' delay

products  waves of tiles, each at the tile's share of a multiprocessor's peak
memory    what must be read and written once, at the bandwidth that the busy multiprocessors reach
delay     what a tile that also makes xa (dxa), over its part of K, takes longer than others, which
          wait for it once, and what sums take on their way from part to part

The rates are the vendor's; the shares below are estimates until `tune` has measured: a plan is the
smallest prediction, so only their order matters.
"""

from lora_kernels.impl.triton.plan.config import Config, Problem, shrink_config
from lora_kernels.impl.triton.plan.device import Device

LAUNCH_SECONDS = 4e-6
# Of the mask per element (Philox, compare, select); and what a multiprocessor issues.
MASK_INSTRUCTIONS = 11 / 32
ISSUES_PER_SECOND = 4 * 1.4e9
# From one program's store to the next one's sum: a release, a poll and a load.
SPLIT_K_SECONDS = 2e-6
# A multiprocessor alone reaches this multiple of its share of the memory bandwidth.
SOLO_BANDWIDTH = 1.7
# Share of the peak by elements of the tile: small tiles read more operands per product.
_SHARE_BY_TILE = ((32768, 0.80), (16384, 0.75), (8192, 0.62), (4096, 0.50), (2048, 0.34), (0, 0.2))
# What a step of the loop costs beside its products (barriers), and a tile beside its steps (to
# fill the pipeline and to store).
STEP_SECONDS = 25e-9
TILE_SECONDS = 1.5e-6
# Of the shorter of products and memory: the two don't overlap fully.
NOT_OVERLAPPED = 0.1
PLAIN_COPIES = 1.05  # copies by pointers cost issue slots that descriptors save


def floor_seconds(problem: Problem, device: Device) -> float:
    """Return the time of the frozen layer's own product at the device's peaks."""
    flops = 2 * problem.m * problem.n * problem.k
    rate = device.flops_16 if problem.bits == 16 else device.flops_32
    size = problem.bits // 8
    data = size * (problem.m * problem.n + problem.m * problem.k + problem.n * problem.k)
    return max(flops / rate, data / device.bandwidth)


def seconds(config: Config, problem: Problem, device: Device) -> float:
    """Return the predicted time of a call, launches included."""
    tiles = -(-problem.m // config.block_m) * -(-problem.out // config.block_n)
    waves = -(-tiles // device.multiprocessors)
    steps = -(-problem.depth // config.block_k)
    tile = steps * _step_seconds(config, problem, device) + TILE_SECONDS
    products = waves * tile
    busy = min(tiles, device.multiprocessors)
    reach = device.bandwidth * min(1.0, SOLO_BANDWIDTH * busy / device.multiprocessors)
    memory = _bytes(problem) / reach
    if problem.backward:
        products += _sums_seconds(problem, device)
    total = LAUNCH_SECONDS + max(products, memory) + NOT_OVERLAPPED * min(products, memory)
    if config.xa_columns:
        return total + _xa_delay(config, problem, tile)
    if not problem.backward or problem.needs[0] or problem.needs[1]:
        return total + shrink_seconds(problem, device)
    return total


def shrink_seconds(problem: Problem, device: Device) -> float:
    """Return the time of the split path's first launch: x (or dy) read once more, and masked."""
    data = problem.m * problem.depth * problem.bits // 8
    busy = min(-(-problem.m // shrink_config(problem, device).block_m), device.multiprocessors)
    reach = device.bandwidth * min(1.0, SOLO_BANDWIDTH * busy / device.multiprocessors)
    masked = problem.m * problem.k if problem.dropout and not problem.backward else 0
    mask = masked * MASK_INSTRUCTIONS / (ISSUES_PER_SECOND * busy)
    return LAUNCH_SECONDS + max(data / reach, mask)


def _step_seconds(config: Config, problem: Problem, device: Device) -> float:
    rate = device.flops_16 if problem.bits == 16 else device.flops_32
    area = config.block_m * config.block_n
    share = next(share for size, share in _SHARE_BY_TILE if area >= size)
    time = 2 * area * config.block_k * device.multiprocessors / (rate * share)
    if device.descriptors and not config.descriptors:
        time *= PLAIN_COPIES
    return time + STEP_SECONDS


def _bytes(problem: Problem) -> int:
    size = problem.bits // 8
    large = problem.n * problem.k + problem.m * (problem.n + problem.k)
    if problem.backward:
        large += problem.m * problem.k * problem.needs[1] + problem.m * problem.n * problem.needs[2]
    return size * (large + problem.r * (problem.n + problem.k + 2 * problem.m))


def _sums_seconds(problem: Problem, device: Device) -> float:
    """Return what dA and dB add to the products: issue slots of the mask; their reads are bytes."""
    masked = problem.m * problem.k if problem.dropout and any(problem.needs[:2]) else 0
    return masked * MASK_INSTRUCTIONS / (ISSUES_PER_SECOND * device.multiprocessors)


def _xa_delay(config: Config, problem: Problem, tile: float) -> float:
    shrink = tile * problem.block_r / config.block_n
    masked = config.block_m * problem.depth if problem.dropout and not problem.backward else 0
    made = shrink + masked * MASK_INSTRUCTIONS / ISSUES_PER_SECOND
    return made / config.xa_columns + SPLIT_K_SECONDS * (config.xa_columns - 1)
