"""The mesh and the split of the batch: derived, never guessed; what does not fit says what would."""

import dataclasses

import jax
import pytest

from lmx.config import Mesh, Train
from lmx.errors import ConfigError
from lmx.parallel.hardware import read_devices
from lmx.parallel.mesh import make_mesh, on_hardware, split_batch


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU as a mesh looks at."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


def test_minus_one_is_what_is_left():
    shape = make_mesh(Mesh(data=-1, fsdp=2, tensor=2), jax.devices()).shape
    assert (shape["data"], shape["fsdp"], shape["tensor"], shape["stage"]) == (2, 2, 2, 1)


@pytest.mark.parametrize("sizes", [Mesh(data=3), Mesh(data=2, fsdp=2), Mesh(data=-1, tensor=3), Mesh(data=16)])
def test_sizes_that_do_not_fit_say_which_would(sizes):
    with pytest.raises(ConfigError, match=r"there are 8.*1, 2, 4, 8"):
        make_mesh(sizes, jax.devices())


def test_an_axis_may_have_a_part_of_a_dimension_of_the_torus():
    """Eight devices of a 4 x 4 x 4 torus are a whole dimension and half of another one, which JAX refuses at first."""
    torus = [Chip(i, (i // 16, i // 4 % 4, i % 4)) for i in range(64)]
    mesh = make_mesh(Mesh(data=1, fsdp=-1, tensor=8), torus)
    assert (mesh.shape["fsdp"], mesh.shape["tensor"]) == (8, 8)
    for row in mesh.devices.reshape(8, 8):  # neighbours stay near: no row spans all three dimensions in full
        assert sorted(len({chip.coords[i] for chip in row}) for i in range(3)) == [1, 2, 4]


def test_neighbours_on_the_tensor_axis_are_neighbours_of_the_machine():
    mesh = make_mesh(Mesh(data=1, stage=2, fsdp=2, tensor=2), jax.devices())
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert [axis for axis, size in mesh.shape.items() if size > 1] == ["stage", "fsdp", "tensor"]


H100 = read_devices("h100:8").hardware


def test_sizes_for_a_kind_of_device_hold_there_alone_and_only_where_none_are_given():
    config = Mesh(on=("v5p: fsdp=-1, tensor=4", "h100: data=-1, fsdp=8"))
    assert on_hardware(config, None) == config
    found = on_hardware(config, H100)
    assert (found.data, found.fsdp, found.tensor) == (-1, 8, 1)
    given = dataclasses.replace(config, tensor=2)
    assert on_hardware(given, H100) == given
    found = on_hardware(config, read_devices("v5p:2x2x2").hardware)
    assert (found.data, found.fsdp, found.tensor) == (1, -1, 4)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("h1000: fsdp=2", "'h1000: fsdp=2' is not KIND.*did you mean 'h100'"),
        ("h100", "is not KIND"),
        ("h100: fdsp=2", "'fdsp=2'.*did you mean 'fsdp'"),
        ("h100: fsdp=0", "'fsdp=0'"),
        ("h100: fsdp=-2", "'fsdp=-2'"),
    ],
)
def test_a_wrong_entry_says_what_is_wrong(entry, message):
    with pytest.raises(ConfigError, match=message):
        on_hardware(Mesh(on=(entry,)), H100)


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
    with pytest.raises(ConfigError, match=r"\(12\).*data x fsdp x expert = 8.*8 or 16"):
        split_batch(Train(global_batch_size=12), mesh)
