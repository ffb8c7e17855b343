"""The table of devices: each kind that JAX names is found, and no other."""

from types import SimpleNamespace

import pytest

from lmx.parallel.hardware import hardware_of, read_devices


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_kinds_are_told_apart(kind, name):
    assert hardware_of(SimpleNamespace(device_kind=kind)).name == name


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA L4"])
def test_what_the_table_lacks_is_not_taken_for_another(kind):
    assert hardware_of(SimpleNamespace(device_kind=kind)) is None


@pytest.mark.parametrize(
    ("name", "shape", "chips"),
    [("v5p:8x8x16", (8, 8, 16), 1024), ("v5e:4x4", (4, 4), 16), ("h100:64", (64,), 64), ("H100:8", (8,), 8)],
)
def test_a_request_is_a_kind_and_a_shape(name, shape, chips):
    devices = read_devices(name)
    assert (devices.hardware.name, devices.shape, devices.chips) == (name.lower().partition(":")[0], shape, chips)
