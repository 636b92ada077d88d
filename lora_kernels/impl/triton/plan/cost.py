"""The cost model: seconds that a configuration should take on a layer, from rates and counts.

    time = launches + max(products, memory) + a tenth of the other + producers' delay

products  waves of tiles, each at the tile's share of a multiprocessor's peak
memory    what must be read and written once, at the bandwidth that the busy multiprocessors reach
delay     what a tile that also makes xa (dxa), over its part of K, takes longer than others, which
          wait for it once, and what sums take on their way from part to part

The rates are the vendor's; the shares below are estimates until `tune` has measured: a plan is the
smallest prediction, so only their order matters.
"""

from lora_kernels.impl.triton.plan.config import MIN_TILE, Config, Layer, ThinConfig
from lora_kernels.impl.triton.plan.device import Device

LAUNCH_SECONDS = 4e-6
# Of the mask per element (Philox, compare, select); and what a multiprocessor issues.
MASK_INSTRUCTIONS = 11 / 32
ISSUES_PER_SECOND = 4 * 1.4e9
# From one program's store to the next one's sum: a release, a poll and a load.
HANDING_SECONDS = 2e-6
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


def floor_seconds(layer: Layer, device: Device) -> float:
    """Return the time of the frozen layer's own product at the device's peaks."""
    flops = 2 * layer.m * layer.n * layer.k
    rate = device.flops_16 if layer.bits == 16 else device.flops_32
    size = layer.bits // 8
    data = size * (layer.m * layer.n + layer.m * layer.k + layer.n * layer.k)
    return max(flops / rate, data / device.bandwidth)


def seconds(config: Config, layer: Layer, device: Device) -> float:
    """Return the predicted time of a call, launches included."""
    tiles = -(-layer.m // config.rows) * -(-layer.out // config.columns)
    waves = -(-tiles // device.multiprocessors)
    steps = -(-layer.depth // config.depth)
    tile = steps * _step_seconds(config, layer, device) + TILE_SECONDS
    products = waves * tile
    busy = min(tiles, device.multiprocessors)
    reach = device.bandwidth * min(1.0, SOLO_BANDWIDTH * busy / device.multiprocessors)
    memory = _bytes(layer) / reach
    if layer.backward:
        products += _sums_seconds(layer, device)
    total = LAUNCH_SECONDS + max(products, memory) + NOT_OVERLAPPED * min(products, memory)
    if config.producers:
        return total + _producer_delay(config, layer, tile)
    if not layer.backward or layer.needs[0] or layer.needs[1]:
        return total + thin_seconds(layer, device)
    return total


def thin_seconds(layer: Layer, device: Device) -> float:
    """Return the time of the split path's first launch: x (or dy) read once more, and masked."""
    data = layer.m * layer.depth * layer.bits // 8
    busy = min(-(-layer.m // thin_config(layer, device).rows), device.multiprocessors)
    reach = device.bandwidth * min(1.0, SOLO_BANDWIDTH * busy / device.multiprocessors)
    masked = layer.m * layer.k if layer.dropout and not layer.backward else 0
    mask = masked * MASK_INSTRUCTIONS / (ISSUES_PER_SECOND * busy)
    return LAUNCH_SECONDS + max(data / reach, mask)


def thin_config(layer: Layer, device: Device) -> ThinConfig:
    """Return the thin product's tile: few rows, so that many multiprocessors stream.

    Of the rank's tiles those that spill no registers on any architecture (`inspect` says).
    """
    if layer.bits == 32:  # operands lie in registers: the larger the rank, the fewer rows
        most, depth, stages = max(MIN_TILE, min(64, 2048 // layer.block_r)), 32, 2
    else:
        most, depth, stages = 32 if layer.block_r in (16, 256) else 64, 64, 3
    rows = MIN_TILE
    while rows < most and layer.m > 2 * rows * device.multiprocessors:
        rows *= 2
    if layer.block_r == 256:
        depth //= 2
    elif layer.bits == 16 and layer.block_r == 32 and rows > MIN_TILE:
        depth = 128
    # With four warps ptxas gives such small tiles 32 or 72 registers, and spills 8 bytes of dxa's.
    few = layer.bits == 32 and rows == MIN_TILE and layer.block_r <= 64
    return ThinConfig(rows, depth, 2 if few else 4, stages)


def _step_seconds(config: Config, layer: Layer, device: Device) -> float:
    rate = device.flops_16 if layer.bits == 16 else device.flops_32
    area = config.rows * config.columns
    share = next(share for size, share in _SHARE_BY_TILE if area >= size)
    time = 2 * area * config.depth * device.multiprocessors / (rate * share)
    if device.descriptors and not config.descriptors:
        time *= PLAIN_COPIES
    return time + STEP_SECONDS


def _bytes(layer: Layer) -> int:
    size = layer.bits // 8
    large = layer.n * layer.k + layer.m * (layer.n + layer.k)
    if layer.backward:
        large += layer.m * layer.k * layer.needs[1] + layer.m * layer.n * layer.needs[2]
    return size * (large + layer.r * (layer.n + layer.k + 2 * layer.m))


def _sums_seconds(layer: Layer, device: Device) -> float:
    """Return what dA and dB add to the products: issue slots of the mask; their reads are bytes."""
    masked = layer.m * layer.k if layer.dropout and any(layer.needs[:2]) else 0
    return masked * MASK_INSTRUCTIONS / (ISSUES_PER_SECOND * device.multiprocessors)


def _producer_delay(config: Config, layer: Layer, tile: float) -> float:
    thin = tile * layer.block_r / config.columns
    masked = config.rows * layer.depth if layer.dropout and not layer.backward else 0
    made = thin + masked * MASK_INSTRUCTIONS / ISSUES_PER_SECOND
    return made / config.producers + HANDING_SECONDS * (config.producers - 1)
