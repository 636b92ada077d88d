"""The cost model: seconds that each way of computing a layer should take, from rates and counts.

    frozen       the layer without an adapter: one GEMM of the library's
    PEFT         frozen + the passes that PEFT's operators make over x, y, dy and dx
    library      frozen + two passes, and a part of y or dx, which the GEMM reads again at its end
    one launch   launches + max(products, memory) + a tenth of the other + xa columns' delay
                 + backward's sums over rows

A quantised W is decoded by a launch before any of them; or in the loop, which then issues the
decoding's instructions beside the products', once for each row panel, and reads codes alone.

products  waves of tiles, each at the tile's share of a multiprocessor's peak
memory    what must be read and written once, at the bandwidth that the busy multiprocessors reach
delay     what a tile that also makes xa (dxa), over its part of K, takes longer than others, which
          wait for it once, and what sums take on their way from part to part

The rates are those of rates.json, with their sources; the shares below are estimates, until `tune`
has measured.
"""

from lora_kernels.impl.triton.plan.config import Config, Problem, shrink_config
from lora_kernels.impl.triton.plan.device import Device

# Of the mask per element (Philox, compare, select); and what a multiprocessor issues.
MASK_INSTRUCTIONS = 11 / 32
ISSUES_PER_SECOND = 4 * 1.4e9
# A multiprocessor alone reaches this multiple of its share of the memory bandwidth.
SOLO_BANDWIDTH = 1.7
# Share of the peak by elements of the tile: small tiles read more operands per product.
_SHARE_BY_TILE = ((32768, 0.80), (16384, 0.75), (8192, 0.62), (4096, 0.50), (2048, 0.34), (0, 0.2))
# Of the shorter of products and memory: the two don't overlap fully.
NOT_OVERLAPPED = 0.1
PLAIN_COPIES = 1.05  # copies by pointers cost issue slots that descriptors save
# What the GEMM's reading of y or dx costs, of a pass over it: most lies beside its products.
READ_AGAIN = 0.4
# The second reading of dy, from L2.
TWICE_FROM_L2 = 1.2
# Instructions of a warp that decode a weight in the loop: SASS, 128x128x64, sm_80, 2026-11-30. That
# they hide behind nothing is an assumption: no GPU has run them.
DECODE_INSTRUCTIONS = 4.2 / 32
CODE_BITS = {"nf4": 4.5, "fp4": 4.5, "int8": 8, "float8": 8}  # a weight, with float32 scales


def frozen_seconds(problem: Problem, device: Device) -> float:
    """Return the time of the layer without an adapter: x Wᵀ, or dy W where dx is wanted."""
    m, n, k = problem[:3]
    if problem.backward and not problem.needs[0]:
        return 0.0
    products = 2 * m * n * k / _gemm_rate(problem, device)
    data = problem.bits // 8 * (m * n + m * k + n * k)
    gemm = max(products, data / _streaming(device)) + device.rates.gemm_seconds
    return gemm + decode_seconds(problem, device)


def decode_seconds(problem: Problem, device: Device) -> float:
    """Return the time of the launch that decodes W to memory of its own; 0 of a dense one."""
    if problem.form == "dense" or (problem.backward and not problem.needs[0]):
        return 0.0
    data = problem.n * problem.k * (CODE_BITS[problem.form] + problem.bits) / 8
    return _pass_seconds(data, device)


def peft_seconds(problem: Problem, device: Device) -> float:
    """Return the time of what PEFT's layer launches; its mask is a byte an element."""
    x, y = _sides(problem)
    passes: list[float]
    if problem.backward:
        dx, da, db, _ = problem.needs
        passes = [2 * y, *[y] * db, *[y] * (dx or da), *[x] * da, *[x, 3 * x] * dx]
        passes += [2.5 * x] * (problem.dropout and dx)
    else:
        passes = [x, y, 2 * y, 3 * y] + [2.5 * x] * problem.dropout
    if problem.gain:  # its norm, and what it multiplies by g, which is summed for dmagnitude
        w = problem.bits // 8 * problem.n * problem.k
        passes += [8 * y] if problem.backward else [9.0 * w, 5 * y]
        passes += [frozen_seconds(problem, device) * _streaming(device)] * problem.dropout
    return frozen_seconds(problem, device) + sum(_pass_seconds(p, device) for p in passes)


def dora_seconds(problem: Problem, device: Device, own: bool) -> float:
    """Return what DoRA adds: the norm's pass over W, u, dz, and with dropout a product of D(x).

    own: whether the large product is Triton's, whose launch makes the norm and multiplies by g.
    """
    if not problem.gain:
        return 0.0
    (x, y), drops = _sides(problem), problem.dropout
    again = (frozen_seconds(problem, device) + _pass_seconds(2 * x, device)) * drops
    if problem.backward:
        return _pass_seconds((3 + drops) * y, device) + again
    w = problem.n * problem.k * problem.bits // 8
    if own:  # moved within its launch
        return again + (w + y) / _streaming(device)
    return again + _pass_seconds(w, device) + _pass_seconds(2 * y, device)


def library_seconds(problem: Problem, device: Device) -> float:
    """Return the time of the library plan."""
    x, y = _sides(problem)
    mask = problem.m * problem.k * MASK_INSTRUCTIONS * problem.dropout
    drawn = mask / (ISSUES_PER_SECOND * device.multiprocessors)
    if not problem.backward:
        passes = _pass_seconds(x, device, drawn) + (1 + READ_AGAIN) * _pass_seconds(y, device)
        launches = 2
    else:
        dx, da, db, dbias = problem.needs
        shrinks, sums = dx or da, db or dbias
        passes = 0.0
        if shrinks or sums:
            passes += _pass_seconds(y * (TWICE_FROM_L2 if shrinks and sums else 1), device)
        if shrinks:
            passes += _pass_seconds(x * (dx + da), device, drawn)
        passes += READ_AGAIN * dx * _pass_seconds(x, device)
        launches = (shrinks or sums) + shrinks
    passes += launches * device.rates.latency_seconds
    passes += dora_seconds(problem, device, own=False)
    return frozen_seconds(problem, device) + passes


def _sides(problem: Problem) -> tuple[int, int]:
    """Return the bytes of x and of y."""
    size = problem.bits // 8 * problem.m
    return size * problem.k, size * problem.n


def _pass_seconds(data: float, device: Device, drawn: float = 0.0) -> float:
    """Return the time of a launch that moves so many bytes, and draws a mask meanwhile."""
    moved = data / _streaming(device)
    both = max(moved, drawn) + NOT_OVERLAPPED * min(moved, drawn)
    return max(both, device.rates.pass_seconds)


def _streaming(device: Device) -> float:
    return device.bandwidth * device.rates.streaming


def _gemm_rate(problem: Problem, device: Device) -> float:
    if problem.bits == 32 and not problem.tf32:
        return device.flops_32 * device.rates.gemm_32
    return _peak(problem, device) * device.rates.gemm


def _peak(problem: Problem, device: Device) -> float:
    """Return the peak of a call's products: TF32's tensor cores take half of 16 bits' rate."""
    if problem.bits == 16:
        return device.flops_16
    return device.flops_16 / 2 if problem.tf32 else device.flops_32


def seconds(config: Config, problem: Problem, device: Device) -> float:
    """Return the time of a configuration's one launch, or two, that included."""
    tiles = -(-problem.m // config.block_m) * -(-problem.out // config.block_n)
    waves = -(-tiles // device.multiprocessors)
    steps = -(-problem.depth // config.block_k)
    tile = steps * _step_seconds(config, problem, device) + device.rates.tile_seconds
    products = waves * tile
    busy = min(tiles, device.multiprocessors)
    reach = device.bandwidth * min(1.0, SOLO_BANDWIDTH * busy / device.multiprocessors)
    memory = _bytes(problem, config.codes) / reach
    if problem.backward:
        products += _sums_seconds(problem, device)
    total = (
        device.rates.launch_seconds + max(products, memory) + NOT_OVERLAPPED * min(products, memory)
    )
    total += _sums_bytes(problem) / _streaming(device) + dora_seconds(problem, device, own=True)
    if not config.codes:
        total += decode_seconds(problem, device)
    if config.xa_columns:
        return total + _xa_delay(config, problem, device, tile)
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
    return device.rates.launch_seconds + max(data / reach, mask)


def _step_seconds(config: Config, problem: Problem, device: Device) -> float:
    area = config.block_m * config.block_n
    share = next(share for size, share in _SHARE_BY_TILE if area >= size)
    if problem.bits == 16:
        share *= device.rates.tiles
    rate = _peak(problem, device) * share
    time = 2 * area * config.block_k * device.multiprocessors / rate
    if device.descriptors and not config.descriptors:
        time *= PLAIN_COPIES
    if config.codes:
        decoded = config.block_n * config.block_k
        time += decoded * DECODE_INSTRUCTIONS / ISSUES_PER_SECOND
    return time + device.rates.step_seconds


def _bytes(problem: Problem, codes: bool) -> float:
    w = problem.n * problem.k * (CODE_BITS[problem.form] if codes else problem.bits)
    others = problem.m * (problem.n + problem.k)
    others += problem.r * (problem.n + problem.k + 2 * problem.m)
    return (w + others * problem.bits) / 8


def _sums_bytes(problem: Problem) -> int:
    """Return what tiles of dA and dB read once more; all programs do so at the same time."""
    x, y = _sides(problem)
    return (x * problem.needs[1] + y * problem.needs[2]) * problem.backward


def _sums_seconds(problem: Problem, device: Device) -> float:
    """Return what dA and dB add to the products: issue slots of the mask."""
    masked = problem.m * problem.k if problem.dropout and any(problem.needs[:2]) else 0
    return masked * MASK_INSTRUCTIONS / (ISSUES_PER_SECOND * device.multiprocessors)


def _xa_delay(config: Config, problem: Problem, device: Device, tile: float) -> float:
    shrink = tile * problem.block_r / config.block_n
    masked = config.block_m * problem.depth if problem.dropout and not problem.backward else 0
    made = shrink + masked * MASK_INSTRUCTIONS / ISSUES_PER_SECOND
    return made / config.xa_columns + device.rates.split_k_seconds * (config.xa_columns - 1)
