"""How a parameter of ours lies in the tensors of a published checkpoint, in both directions.

A :class:`Weight` is a row of a family's table. Its layout names the axes of the tensor, then ours::

    Weight("…/query/kernel", "….q_proj.weight", "(heads head_dim) embed -> embed heads head_dim")

Parentheses hold axes that the tensor has as one. A number is an axis of which this parameter has one ``part``, as of
queries, keys and values in one tensor: ``"embed (3 heads head_dim) -> embed heads head_dim"``. Where ``theirs`` has
``{experts}``, our first axis counts tensors. Without a layout both are the same.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lmx.models.lora import ADAPTERS

CHUNK_BYTES = 1 << 24  # read at once


class Reader(Protocol):
    """Reads a part of a tensor by name: a slice with numbers a dimension."""

    def __call__(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter and where it lies.

    Attributes:
      ours: path of the parameter, layers unrolled: ``encoder/layers_3/mlp/in/kernel``.
      theirs: name of the tensor; with ``{experts}``, of one an expert.
      layout: see the module's docstring.
      part: which of the layout's number this is.
    """

    ours: str
    theirs: str
    layout: str = ""
    part: int = 0

    def tensors(self, shape: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors that hold a parameter of this shape."""
        if "{experts}" not in self.theirs:
            return [(self.theirs, _Layout(self, shape).tensor_shape)]
        inner = _Layout(self, shape[1:]).tensor_shape
        return [(self.theirs.format(experts=expert), inner) for expert in range(shape[0])]

    def read(self, read: Reader, shape: Sequence[int], index: Sequence[slice], dtype: np.dtype) -> np.ndarray:
        """The part ``index`` (slices with numbers) of the parameter of ``shape``; no more than that is read."""
        out = np.empty([piece.stop - piece.start for piece in index], dtype)
        if "{experts}" in self.theirs:
            layout = _Layout(self, shape[1:])
            for place, expert in enumerate(range(index[0].start, index[0].stop)):
                layout.read(out[place], read, self.theirs.format(experts=expert), index[1:])
        else:
            _Layout(self, shape).read(out, read, self.theirs, index)
        return out

    def write(self, array: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        """Puts the parameter into ``tensors``; one that is not there yet is made."""
        names = [name for name, _ in self.tensors(array.shape)]
        arrays = array if "{experts}" in self.theirs else [array]
        for name, part in zip(names, arrays, strict=True):
            layout = _Layout(self, part.shape)
            if name not in tensors:
                tensors[name] = np.zeros(layout.tensor_shape, array.dtype)
            layout.part_of(tensors[name])[...] = np.transpose(part, layout.to_tensor)


class _Layout:
    """A layout with sizes: groups of axes of a tensor, and their order in ours."""

    def __init__(self, weight: Weight, shape: Sequence[int]):
        left, right = parse(weight.layout, len(shape))
        right = right[1:] if "{experts}" in weight.theirs else right
        self.sizes = dict(zip(right, shape, strict=True))
        self.groups, self.part = left, weight.part
        named = [axis for axis in itertools.chain(*left) if axis in self.sizes]
        self.to_tensor = [right.index(axis) for axis in named]  # ours, in the order of the tensor's axes
        self.tensor_shape = tuple(math.prod(map(self._size, group)) for group in left)

    def _size(self, axis: str) -> int:
        return self.sizes[axis] if axis in self.sizes else int(axis)

    def part_of(self, tensor: np.ndarray) -> np.ndarray:
        """This parameter's part of a whole tensor, with one dimension for each of our axes; a view."""
        axes = [axis for group in self.groups for axis in group]
        split = tensor.reshape([self._size(axis) for axis in axes])
        return split[tuple(slice(None) if axis in self.sizes else self.part for axis in axes)]

    def read(self, out: np.ndarray, read: Reader, name: str, index: Sequence[slice]) -> None:
        """Fills ``out`` with the part ``index`` of our parameter, a chunk at a time."""
        wanted = dict(zip(self.sizes, index, strict=True))
        view = out.transpose(self.to_tensor)
        first = next((axis for axis in self.groups[0] if axis in self.sizes), None)
        if first is None:
            view[...] = self._chunk(read, name, wanted)
            return
        whole, axis = wanted[first], [a for a in itertools.chain(*self.groups) if a in self.sizes].index(first)
        step = max(1, CHUNK_BYTES * (whole.stop - whole.start) // max(out.nbytes, 1))
        for start in range(whole.start, whole.stop, step):
            chunk = slice(start, min(start + step, whole.stop))
            place = (slice(None),) * axis + (slice(start - whole.start, chunk.stop - whole.start),)
            view[place] = self._chunk(read, name, wanted | {first: chunk})

    def _chunk(self, read: Reader, name: str, wanted: dict[str, slice]) -> np.ndarray:
        """The wanted part with one dimension for each of our axes, in the tensor's order."""
        ranges, shape, rest = [], [], []
        for group in self.groups:
            start, size, narrowed = 0, math.prod(map(self._size, group)), True
            for axis in group:
                size //= self._size(axis)
                low, high = (wanted[axis].start, wanted[axis].stop) if axis in wanted else (self.part, self.part + 1)
                if narrowed:  # contiguous as long as the axes further out have one index each
                    start, stop, narrowed = start + low * size, start + high * size, high - low == 1
                    low, high, length = 0, high - low, high - low
                else:
                    length = self._size(axis)
                shape.append(length)
                rest.append(slice(low, high) if axis in wanted else low)
            ranges.append(slice(start, stop if group else 1))
        return read(name, tuple(ranges)).reshape(shape)[tuple(rest)]


def adapter_weights(weight: Weight) -> tuple[Weight, Weight]:
    """The rows of a table for the adapter beside a kernel: its ``A`` [rank, inputs] and ``B`` [outputs, rank]."""
    groups, ours = parse(weight.layout)
    inputs = next(group for group in groups if ours[0] in group)
    outputs = next(group for group in groups if group is not inputs)
    stem, module = weight.ours.removesuffix("kernel"), weight.theirs.removesuffix("weight")
    named = " ".join(axis for axis in outputs if axis in ours)
    down, up = (f"{stem}{name}" for name in ADAPTERS)
    return (
        Weight(down, f"{module}lora_A.weight", f"rank ({' '.join(inputs)}) -> {' '.join(inputs)} rank"),
        Weight(up, f"{module}lora_B.weight", f"({' '.join(outputs)}) rank -> rank {named}", weight.part),
    )


def parse(layout: str, rank: int = 2) -> tuple[list[list[str]], list[str]]:
    """Groups of axes of the tensor, and our axes in order; without a layout, so many that are the same in both."""
    if not layout:
        axes = [f"axis_{i}" for i in range(rank)]
        return [[axis] for axis in axes], axes
    left, right = layout.split("->")
    groups = [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", left)]
    return groups, right.split()


def whole(shape: Sequence[int], index: Sequence[slice]) -> tuple[slice, ...]:
    """The index with numbers in place of None."""
    return tuple(slice(*piece.indices(size)[:2]) for piece, size in zip(index, shape, strict=True))
