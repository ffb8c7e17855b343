"""What a compiled program sends between devices: every collective, over which mesh axes, how many bytes, how often.

It is read off the optimized HLO, where a scan over layers is a loop that the text has once: each computation counts as
often as the loops around it turn.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{?$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*)$")
_OPERATION = re.compile(r"(?<![\w%.-])([a-z][\w-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(?:\{([^}]*)\}|(%?[\w.-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"\bconstant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=(\{\{.*?\}\}|\{\}|\[[^\]]*\]<=\[[^\]]*\](?:T\([\d,]*\))?)")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_PART = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same axes.

    Attributes:
      kind: the operation.
      axes: the mesh axes that it is over.
      size: devices of a group.
      count: times that it runs in a step.
      bytes: of the whole array on one device (what an all-gather gives, a reduce-scatter takes), all runs together.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    count: int
    bytes: float

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, by a ring (Thakur et al. 2005): an all-reduce goes round twice."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (2 if self.kind == "all-reduce" else 1) * (self.size - 1) / self.size


def find_collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """The collectives of a program, the most bytes sent first.

    Args:
      text: optimized HLO, ``compiled.as_text()``.
      mesh: that it was compiled for.
    """
    computations, entry = _parse(text)
    times = _times(computations, entry)
    counts: collections.Counter = collections.Counter()
    sizes: collections.Counter = collections.Counter()
    for name, lines in computations.items():
        for line in lines if times[name] else ():
            found = _collective(line, name, mesh)
            if found is not None:
                kind, axes, size, payload = found
                counts[kind, axes, size] += times[name]
                sizes[kind, axes, size] += times[name] * payload
    found = [Collective(*key, count, sizes[key]) for key, count in counts.items()]
    return sorted(found, key=lambda one: -one.sent)


def _parse(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation (what follows the ``=``), and the entry's name."""
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            match = _COMPUTATION.match(line)
            if match:
                current = match[2]
                computations[current] = []
                entry = current if match[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append(match[1])
    return computations, entry


def _times(computations: Mapping[str, Iterable[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    callers: dict[str, list[tuple[str, int]]] = {name: [] for name in computations}
    for name, lines in computations.items():
        for line in lines:
            turns = _turns(line, computations) if " while(" in f" {line}" else 1
            for several, one in _CALLS.findall(line):
                for callee in (several or one).replace("%", "").split(", "):
                    if callee in callers:
                        callers[callee].append((name, turns))
    times: dict[str, int] = {entry: 1}

    def count(name: str) -> int:
        if name not in times:
            times[name] = 0  # a computation does not call itself
            times[name] = sum(count(caller) * trips for caller, trips in callers[name])
        return times[name]

    for name in computations:
        count(name)
    return times


def _turns(line: str, computations: Mapping[str, Iterable[str]]) -> int:
    """How often a loop turns, once where that cannot be told.

    Compilers for CPUs and GPUs say so. In a TPU's program it is what the counter of a scan, which starts at 0, stays
    below: the one constant of the loop's condition.
    """
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = computations.get(_CONDITION.search(line)[1], ())
    limits = [int(found[1]) for other in condition if (found := _CONSTANT.search(other))]
    return limits[0] if len(limits) == 1 else 1


def _collective(line: str, computation: str, mesh: jax.sharding.Mesh) -> tuple[str, tuple[str, ...], int, float] | None:
    operation = _OPERATION.search(line)
    if operation is None:
        return None
    kind = operation[1].removesuffix("-start")
    if kind not in KINDS:
        return None
    shapes = [_size(*shape) for shape in _SHAPE.findall(line[: operation.start()])]
    if operation[1].endswith("-start") and kind != "all-reduce":  # operands and results, in this order
        shapes = [size for size in shapes if size > 4]  # beside semaphores
        shapes = shapes[len(shapes) // 2 :]
    payload = float(sum(shapes))
    axes, size = _group(line, mesh)
    if size < 2:
        return None
    if kind == "all-reduce" and "reduce-scatter" in computation:  # a TPU's fusion of all-reduce and slice
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        payload *= size
    return kind, axes, size, payload


def _size(kind: str, dims: str) -> int:
    bits = BITS.get(kind) or int(re.search(r"\d+", kind)[0]) if re.search(r"\d", kind) or kind in BITS else 0
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8


def _group(line: str, mesh: jax.sharding.Mesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the members of a group differ, and how many members there are."""
    if pairs := _PAIRS.search(line):
        members = [[int(i) for i in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", f"{pairs[0]}")]
        members = [pair for pair in members if pair[0] != pair[1]]
    elif named := _NAMED.search(line):
        members = [_along(named[1], named[2])]
    elif groups := _GROUPS.search(line):
        members = _members(groups[1], mesh.size)
    else:
        members = [list(range(mesh.size))]
    if not members:
        return (), 1
    varying = set()
    for group in members[:64]:  # they all look alike
        places = np.array(np.unravel_index(np.asarray(group) % mesh.size, mesh.devices.shape))
        varying |= {axis for axis, row in zip(mesh.axis_names, places, strict=True) if len(set(row)) > 1}
    axes = tuple(axis for axis in mesh.axis_names if axis in varying)
    return axes, math.prod(mesh.shape[axis] for axis in axes) if _PAIRS.search(line) else len(members[0])


def _along(mesh: str, axes: str) -> list[int]:
    """The first group of ``mesh['a'=4,'b'=6] {'a','b':(2)3}``: along all of a, and the part of b that is 3 after 2."""
    parts = {axis: (int(before or 1), int(size or 0)) for axis, before, size in _PART.findall(axes)}
    dims, chosen = [], []
    for axis, whole in re.findall(r"'(\w+)'=(\d+)", mesh):
        before, size = parts.get(axis, (1, 1))
        size = size or int(whole)
        dims += [before, size, int(whole) // before // size]
        chosen += [False, axis in parts, False]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids[tuple(slice(None) if along else 0 for along in chosen)].ravel().tolist()


def _members(groups: str, devices: int) -> list[list[int]]:
    """``{{0,1},{2,3}}``, ``{}`` (everybody) or ``[2,2]<=[2,2]T(1,0)`` as lists of ids."""
    if groups.startswith("["):
        shape, _, source = groups.partition("<=")
        source, _, order = source.partition("T")
        shape, source, order = ([int(i) for i in re.findall(r"\d+", part)] for part in (shape, source, order))
        ids = np.arange(math.prod(source)).reshape(source)
        return (ids.transpose(order) if order else ids).reshape(shape).tolist()
    found = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", groups)]
    return found or [list(range(devices))]
