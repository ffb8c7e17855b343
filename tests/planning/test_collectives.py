"""What a program sends is read off its text: kinds, axes, bytes, and how often loops turn."""

import jax
import jax.numpy as jnp
import pytest

from lmx.config import Mesh
from lmx.parallel.mesh import make_mesh
from lmx.planning.collectives import find_collectives

P = jax.P


def program(function, mesh, specs, *shapes):
    """The optimized text of a function whose collectives are written out."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs[:-1], out_specs=specs[-1], check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Mesh(data=1, fsdp=4, tensor=2), jax.devices())


CASES = {  # function, input's and output's spec, kind, axes, bytes of the array, bytes a device sends
    "all-gather": (
        lambda x: jax.lax.all_gather(x, "fsdp", tiled=True),
        (P("fsdp"), P()),
        ("fsdp",),
        64 * 4,
        64 * 4 * 3 / 4,
    ),
    "all-reduce": (lambda x: jax.lax.psum(x, "tensor"), (P(), P()), ("tensor",), 64 * 4, 64 * 4),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
        (P(), P("fsdp")),
        ("fsdp",),
        64 * 4,
        64 * 4 * 3 / 4,
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x.reshape(4, -1), "fsdp", 0, 0, tiled=True),
        (P(), P("fsdp")),
        ("fsdp",),
        64 * 4,
        64 * 4 * 3 / 4,
    ),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
        (P(), P("fsdp")),
        ("fsdp",),
        64 * 4,
        64 * 4,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_kind_is_found_with_its_axes_and_bytes(kind, mesh):
    function, specs, axes, size, sent = CASES[kind]
    (found,) = find_collectives(program(function, mesh, specs, (64,)), mesh)
    assert (found.kind, found.axes, found.count) == (kind, axes, 1)
    assert (found.bytes, found.sent) == (size, sent)


@pytest.mark.parametrize("told", [True, False], ids=["told", "by the condition"])
def test_a_loop_counts_as_often_as_it_turns(mesh, told):
    def twice_nested(x):
        def inner(y, _):
            return jnp.tanh(jax.lax.psum(y, ("fsdp", "tensor"))), None

        def outer(y, _):
            return jax.lax.scan(inner, jnp.sin(y), None, length=5)[0], None

        return jax.lax.scan(outer, x, None, length=7)[0]

    text = program(twice_nested, mesh, (P(), P()), (64,))
    assert text.count("known_trip_count") == 2
    (found,) = find_collectives(text if told else text.replace("known_trip_count", "x"), mesh)  # a TPU's says nothing
    assert (found.kind, found.axes, found.count, found.bytes) == ("all-reduce", ("fsdp", "tensor"), 35, 35 * 256)


# As XLA's TPU and GPU compilers write them: asynchronous pairs, groups as a transposed iota, combined operands.
TEXT = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[8,16]) -> f32[4,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %all-reduce.9 = f32[8,16]{1,0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %slice = f32[4,16]{1,0} dynamic-slice(%all-reduce.9, %i, %j), dynamic_slice_sizes={4,16}
}

ENTRY %main (x: bf16[16,32]) -> f32[4,16] {
  %x = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %start = (bf16[16,32]{1,0:T(8,128)(2,1)}, bf16[64,32]{1,0:T(8,128)(2,1)}, u32[], u32[]) all-gather-start(%x), \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %done = bf16[64,32]{1,0} all-gather-done(%start)
  %both = (f32[8]{0}, f32[24]{0}) all-reduce(%a, %b), replica_groups={}, to_apply=%add
  ROOT %scatter = f32[4,16]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_groups_by_the_compilers_own_axes(mesh):
    line = "  %sum = f32[8]{0} all-reduce(%x), replica_groups=mesh['axis_0'=4,'axis_1'=2] {AXES}, to_apply=%add"
    text = "ENTRY %main (x: f32[8]) -> f32[8] {\n" + line + "\n}\n"
    for axes, expected in (
        ("'axis_0'", ("fsdp",)),
        ("'axis_1'", ("tensor",)),
        ("'axis_0':(2)2,'axis_1'", ("fsdp", "tensor")),
    ):
        (found,) = find_collectives(text.replace("AXES", axes), mesh)
        assert found.axes == expected
    assert found.size == 4  # half of fsdp, and tensor


def test_what_other_compilers_write(mesh):
    found = {one.kind: one for one in find_collectives(TEXT, mesh)}
    assert found.keys() == {"all-gather", "all-reduce", "reduce-scatter"}
    assert (found["all-gather"].axes, found["all-gather"].bytes) == (("fsdp",), 64 * 32 * 2)
    assert (found["all-reduce"].axes, found["all-reduce"].bytes) == (("fsdp", "tensor"), 32 * 4)
    assert (found["reduce-scatter"].axes, found["reduce-scatter"].bytes) == (("tensor",), 8 * 16 * 4)
