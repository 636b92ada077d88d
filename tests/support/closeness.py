"""How near results must be whose sums may cancel."""

import torch


def assert_close(ours, theirs, tolerance=1e-5, what=""):
    """Within `tolerance` of the largest element; in float32 some ten roundings."""
    largest = theirs.abs().max().item()
    message = None if not what else lambda text: f"{what}: {text}"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * largest, msg=message)
