"""A grouped LoRA linear's tensors by name: rows sorted by group, each with a weight and adapter."""

from operator import gt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.operands.call import Adapter
from lora_kernels.operands.dropout import Dropout

NO_ADAPTER = -1


class Groups(NamedTuple):
    """What belongs to which group; S is the number of sorted rows.

    offsets: int32 [G], where each group ends among them.
    rows: int32 or int64 [S], the row of x that each reads; None: x's own rows are sorted.
    scatter: likewise, the row of y that each writes, and of the dropout mask; None: y is sorted.
    adapters, weights: int32 [G], the number of each group's adapter, `NO_ADAPTER` for none, and of
        its weight and bias; None: the group's own number.
    """

    offsets: Tensor
    rows: Tensor | None = None
    scatter: Tensor | None = None
    adapters: Tensor | None = None
    weights: Tensor | None = None


class Span(NamedTuple):
    """A group that has rows: sorted rows from `begin` to `end`."""

    begin: int
    end: int
    adapter: int
    weight: int


class GroupedCall(NamedTuple):
    """y[to] = x[from] W[w]ᵀ + bias[w] + scaling[a] · D(x[from]) A[a]ᵀ B[a]ᵀ for each sorted row.

    weight [G, N, K], adapter of A [G, R, K] and B [G, N, R], bias [G, N] or None; the scaling is a
    number, a 0-dim tensor or one of an adapter each. tokens: the rows of x.
    """

    weight: Tensor
    adapter: Adapter
    bias: Tensor | None
    groups: Groups
    dropout: Dropout | None
    tokens: int

    @property
    def sorted_rows(self) -> int:
        """S."""
        rows = self.groups.rows
        return self.tokens if rows is None else rows.shape[0]

    def scaling_of(self, adapter: int) -> float | Tensor:
        """Return the factor of one adapter's product."""
        scaling = self.adapter.scaling
        return scaling[adapter] if isinstance(scaling, Tensor) and scaling.ndim else scaling

    def spans(self) -> list[Span]:
        """Return the groups that have rows; the host waits for a GPU to say so.

        Raises:
            ValueError: offsets that don't ascend to at most S, or no such adapter or weight.
        """
        ends: list[int] = self.groups.offsets.tolist()
        begins = [0, *ends[:-1]]
        if ends and (ends[-1] > self.sorted_rows or any(map(gt, begins, ends))):
            raise ValueError(
                f"offsets: expected ends in ascending order, at most {self.sorted_rows}, got {ends}"
            )
        adapters = _numbers(
            "adapters", self.groups.adapters, len(ends), NO_ADAPTER, len(self.adapter.a)
        )
        weights = _numbers("weights", self.groups.weights, len(ends), 0, len(self.weight))
        found = map(Span, begins, ends, adapters, weights)
        return [span for span in found if span.begin < span.end]

    def check_rows(self) -> None:
        """Check which rows of x and y are named, on a CPU; a GPU's own operators assert it.

        Raises:
            ValueError: one that isn't there.
        """
        for name, named, limit in (
            ("rows", self.groups.rows, self.tokens),
            ("scatter", self.groups.scatter, self.sorted_rows),
        ):
            if named is None or not named.is_cpu or not named.numel():
                continue
            low, high = (int(end) for end in named.aminmax())
            if low < 0 or high >= limit:
                raise ValueError(
                    f"{name}: expected numbers of {limit} rows, got {low if low < 0 else high}"
                )

    def summed(self, dx: Tensor) -> Tensor:
        """Return the sum of sorted rows' gradients over each row of x, in one order."""
        rows = self.groups.rows
        if rows is None:
            return dx
        total = dx.new_zeros(self.tokens, dx.shape[1], dtype=torch.float32)
        # index_put_ sorts on a GPU, where index_add_ has no order of its own.
        return total.index_put_((rows,), dx.float(), accumulate=True).to(dx.dtype)

    def flat(self) -> tuple[Any, ...]:
        """Return what an operator takes after x: W, bias aside, which backward doesn't read."""
        (a, b, _), (seed, threshold) = self.adapter, self.dropout or (None, 0)
        return self.weight, a, b, *self.groups, seed, threshold, *self.adapter.flat_scaling()


def grouped_call_of(bias: Tensor | None, tokens: int, *flat: Any) -> GroupedCall:
    """Return the call that an operator was given."""
    weight, a, b, *given, seed, threshold, tensor, number = flat
    adapter = Adapter(a, b, number if tensor is None else tensor)
    dropout = None if seed is None or threshold == 0 else Dropout(seed, threshold)
    return GroupedCall(weight, adapter, bias, Groups(*given), dropout, tokens)


def _numbers(name: str, given: Tensor | None, count: int, least: int, limit: int) -> list[int]:
    """Return each group's number of what there are `limit` of."""
    numbers: list[int] = list(range(count)) if given is None else given.tolist()
    wrong = next((number for number in numbers if not least <= number < limit), None)
    if wrong is not None:
        raise ValueError(f"{name}: expected numbers from {least} to {limit - 1}, got {wrong}")
    return numbers
