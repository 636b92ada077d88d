"""Errors of torch's own results over several draws of a problem, for tests of small ones."""

from lora_kernels.testing.budget import more_draws


def errors_of_draws(case, between, same, exact):
    """Return each result's errors against float64: a list by name, an error for each draw.

    between: the elements of the smallest tensor between two products. same, exact: what computes
    a case's results by name, in its own dtype and in float64.
    """
    expected = exact(case)
    draws = [case, *(_drawn_like(case) for _ in range(more_draws(expected.values(), between)))]
    errors = {name: [] for name in expected}
    for draw in draws:
        found, wanted = same(draw), exact(draw)
        for name, of_one in errors.items():
            of_one.append(found[name].double() - wanted[name])
    return errors


def _drawn_like(case):
    """Return other random tensors, as large as a case's; what isn't floating-point is kept."""
    return tuple(
        t.new_empty(t.shape).normal_() * t.detach().double().square().mean().sqrt().to(t.dtype)
        if t.is_floating_point()
        else t
        for t in case
    )
