"""Mixing: how often each source of a mixture comes, and which comes when. Both are exact."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from fractions import Fraction

from lmx.config import Data
from lmx.errors import DataError
from lmx.text.corpora import Source


def mixing_shares(source: Source, counts: Sequence[int], data: Data) -> tuple[Fraction, ...]:
    """The part of each source in the training examples; they sum to 1.

    By weights they are those of the source string. In proportion to the number of examples e, a source's share is
    min(e, K) over the sum of these (Raffel et al. 2020, section 3.5.2), with K ``data.mixing_limit``; a temperature T
    raises it to the power of 1/T and divides by the new sum.

    Args:
      source: the mixture, or one source.
      counts: examples of each part.
      data: ``mixing``, ``mixing_limit`` and ``mixing_temperature``.

    Raises:
      DataError: the source string has weights and ``data.mixing`` asks for others, or it has none.
    """
    if len(source.sources) == 1:
        return (Fraction(1),)
    if data.mixing == "weights":
        if not source.weights:
            raise DataError(
                f"the parts of the mixture {source.spec!r} have no weights: write 0.7*SOURCE + 0.3*SOURCE, or set "
                "data.mixing='proportional'."
            )
        return source.weights
    if source.weights:
        raise DataError(
            f"the mixture {source.spec!r} has weights, but data.mixing is {data.mixing!r}: leave the weights out, or "
            "set data.mixing='weights'."
        )
    sizes = [Fraction(min(count, data.mixing_limit or count)) for count in counts]
    if data.mixing_temperature != 1:
        # Roots are no fractions; to nine digits they are.
        roots = [float(size / sum(sizes)) ** (1 / data.mixing_temperature) for size in sizes]
        sizes = [Fraction(root).limit_denominator(10**9) for root in roots]
    return tuple(size / sum(sizes) for size in sizes)


def check_epochs(
    source: Source, counts: Sequence[int], shares: Sequence[Fraction], examples: int, max_epochs: int
) -> None:
    """Raises a DataError where so many examples would go through a source more than ``max_epochs`` times."""
    for part, count, share in zip(source.sources, counts, shares, strict=True):
        if math.ceil(examples * share) > count * max_epochs:
            raise too_short(part.spec, count, max_epochs)


def too_short(spec: str, count: int, max_epochs: int) -> DataError:
    """The error for a source that training would have to go through too often."""
    return DataError(
        f"the source {spec!r} is too short: training goes through its {count:,} examples more than data.max_epochs "
        f"({max_epochs}) times. Add data, lower its share or train.steps, or raise data.max_epochs."
    )


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which source the n-th example is from, and which of that source's it is: a selection map for Grain.

    Of the first n examples each source has its share to within the number of sources, and exactly where the shares of
    n are whole. (Grain's own mixing rounds shares to hundredths of the smallest.)

    Attributes:
      weights: whole numbers in the proportion of the shares.
    """

    weights: tuple[int, ...]

    @classmethod
    def of(cls, shares: Sequence[Fraction]) -> "Selection":
        parts = math.lcm(*(share.denominator for share in shares))
        return cls(tuple(int(share * parts) for share in shares))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        # The first source takes its part of all examples, evenly spread; the next its part of those left over; so on.
        left = sum(self.weights)
        begin, end = index, index + 1  # of the examples left over, those before this one, and with it
        for source, weight in enumerate(self.weights):
            next_begin, next_end = begin * (left - weight) // left, end * (left - weight) // left
            if next_begin == next_end:  # it is not left over
                return source, begin - next_begin
            begin, end, left = next_begin, next_end, left - weight
        raise AssertionError("the last source takes everything that is left")
