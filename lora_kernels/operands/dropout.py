"""The numbers that every implementation's dropout agrees on.

Adapter dropout keeps an element iff its 16-bit random lane is at least a threshold, so a
probability is quantised once, here, and crosses every border as that integer. The expectation
stays exact because kept values are scaled by the quantised probability's inverse.
"""

LEVELS = 65536
LANES = 8  # elements served by one Philox-4x32 call: four 32-bit words, two 16-bit lanes each


def drop_threshold(dropout_p: float) -> int:
    """Return t = round(65536 p), at most 65535: an element is dropped iff its lane is below t."""
    return min(round(dropout_p * LEVELS), LEVELS - 1)


def keep_scale(threshold: int) -> float:
    """Return 65536 / (65536 - t), the factor on kept elements; 1.0 without dropout."""
    return LEVELS / (LEVELS - threshold)
