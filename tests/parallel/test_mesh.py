"""The mesh and the split of the batch: derived, never guessed; what does not fit says what would."""

import math

import jax
import pytest

from lmx.config import Mesh, Train
from lmx.errors import ConfigError
from lmx.parallel.mesh import make_mesh, split_batch
from lmx.parallel.sharding import fit_spec

P = jax.P


def test_minus_one_is_what_is_left():
    shape = make_mesh(Mesh(data=-1, fsdp=2, tensor=2), jax.devices()).shape
    assert (shape["data"], shape["fsdp"], shape["tensor"], shape["stage"]) == (2, 2, 2, 1)


@pytest.mark.parametrize("sizes", [Mesh(data=3), Mesh(data=2, fsdp=2), Mesh(data=-1, tensor=3), Mesh(data=16)])
def test_sizes_that_do_not_fit_say_which_would(sizes):
    with pytest.raises(ConfigError, match=r"there are 8.*1, 2, 4, 8"):
        make_mesh(sizes, jax.devices())


@pytest.mark.parametrize("axis", ["sequence", "expert", "stage"])
def test_axes_that_are_not_there_yet_are_refused_by_name(axis):
    with pytest.raises(ConfigError, match=rf"mesh\.{axis}=2"):
        make_mesh(Mesh(data=4, **{axis: 2}), jax.devices())


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("rows", [8, 24, 40])
def test_the_global_batch_is_the_invariant(rows, shards, limit):
    mesh = make_mesh(Mesh(), jax.devices()[:shards])
    split = split_batch(Train(global_batch_size=rows, max_rows_per_device=limit), mesh)
    assert split.shards * split.microbatches * split.rows_per_device == rows
    assert limit is None or split.rows_per_device <= limit
    fewer = [n for n in range(1, split.microbatches) if (rows // shards) % n == 0]
    assert all(rows // shards // n > limit for n in fewer)  # no fewer micro-batches would do
    assert str(rows) in str(split)


def test_a_batch_that_does_not_divide_names_sizes_that_do():
    mesh = make_mesh(Mesh(data=4, fsdp=2), jax.devices())
    with pytest.raises(ConfigError, match=r"\(12\).*data x fsdp = 8.*8 or 16"):
        split_batch(Train(global_batch_size=12), mesh)


def test_dimensions_that_do_not_divide_stay_whole():
    mesh = make_mesh(Mesh(data=1, fsdp=4, tensor=2), jax.devices())
    assert fit_spec(P("fsdp", "tensor"), (8, 6), mesh) == P(("fsdp",), ("tensor",))
    assert fit_spec(P("fsdp", "tensor"), (6, 5), mesh) == P(None, None)
    assert fit_spec(P(("data", "fsdp")), (8, 3), mesh) == P(("data", "fsdp"), None)
    assert math.prod(mesh.shape.values()) == 8
