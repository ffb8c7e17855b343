"""From logical names to the mesh: who goes where, what is padded, what moves, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import Mesh
from lmx.errors import ConfigError
from lmx.parallel.sharding import (
    Layout,
    as_spec,
    constrain,
    gathered,
    like_params,
    moved_dimensions,
    param_shardings,
    use_layout,
)

P = jax.P


def layout(rules=(), **sizes):
    return Layout.of(Mesh(**({"data": 1} | sizes), rules=rules), jax.devices())


def param_spec(layout, names, shape):
    return as_spec(layout.param_axes(names, shape))


def activation_spec(layout, names, shape):
    return as_spec(layout.activation_axes(names, shape))


def test_parameters_go_where_their_names_say():
    found = layout(fsdp=4, tensor=2)
    assert param_spec(found, ("embed", "mlp"), (8, 6)) == P(("fsdp",), ("tensor",))
    assert param_spec(found, ("layers", "embed", "heads", "head_dim"), (2, 8, 4, 3)) == P(
        None, ("fsdp",), ("tensor",), None
    )
    assert param_spec(layout(expert=4, tensor=2), ("experts", "embed", "mlp"), (4, 8, 8)) == P(
        ("expert",), None, ("tensor",)
    )
    assert param_spec(layout(expert=8), ("embed", "mlp"), (8, 8)) == P(("expert",), None)
    assert param_spec(layout(stage=8), ("layers", "embed"), (16, 8)) == P(("stage",), None)


def test_an_axis_that_does_not_divide_its_dimension_divides_another():
    found = layout(fsdp=2, tensor=4)
    assert param_spec(found, ("vocab", "embed"), (37, 16)) == P(None, ("fsdp", "tensor"))
    assert param_spec(found, ("layers", "embed", "heads", "head_dim"), (8, 6, 3, 12)) == P(
        None, ("fsdp",), None, ("tensor",)
    )
    assert param_spec(found, ("vocab", "embed"), (37, 15)) == P(None, None)


def test_what_moved_or_stayed_whole_is_told():
    boxed = {
        "a": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((37, 16), jnp.float32), ("vocab", "embed")),
        "b": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((37,), jnp.float32), ("vocab",)),
        "c": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((16, 8), jnp.float32), ("embed", "mlp")),
    }
    assert moved_dimensions(boxed, layout(fsdp=2, tensor=4)) == [
        "a: vocab (37) does not divide over tensor (4), split by embed",
        "b: vocab (37) does not divide over tensor (4), kept whole",
    ]


def test_activations_are_cut_into_no_more_parts_than_they_have():
    found = layout(data=2, fsdp=2, tensor=2)
    assert activation_spec(found, ("batch", "length", None), (8, 16, 4)) == P(("data", "fsdp"), None, None)
    assert activation_spec(found, ("batch", "residual_length", None), (8, 16, 4)) == P(
        ("data", "fsdp"), ("tensor",), None
    )
    assert activation_spec(found, ("batch", "residual_length", None), (3, 1, 4)) == P(("data",), None, None)


@pytest.mark.parametrize(
    ("shape", "sizes"), [((8, 7, 5), {"data": 2, "tensor": 4}), ((3, 16, 4), {"data": 2, "fsdp": 4})]
)
def test_an_uneven_constraint_changes_neither_values_nor_shape(shape, sizes):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    with use_layout(layout(**sizes)):
        lowered = jax.jit(lambda x: constrain(x, "batch", "residual_length", "vocab") * 2).lower(x)
        assert "sdy.sharding_constraint" in lowered.as_text()
        np.testing.assert_array_equal(lowered.compile()(x), 2 * x)


def test_an_uneven_array_is_computed_in_parts():
    """Of 13 rows over 4 devices each one multiplies 4, not 13."""
    x, w = jnp.ones((8, 13, 64)), jnp.ones((64, 64))

    def product(x, w):
        return constrain(jnp.dot(constrain(x, "batch", "length", None), w), "batch", "length", None)

    with use_layout(layout(sequence=4, data=2)):
        flops = jax.jit(product).lower(x, w).compile().cost_analysis()["flops"]
    whole = 2 * 8 * 13 * 64 * 64
    assert flops < whole / 2 / 13 * 4.5


def test_factored_moments_go_with_their_parameters():
    params = {"a": {"kernel": jax.ShapeDtypeStruct((2, 16, 32), jnp.float32)}}
    found = layout(fsdp=2, tensor=4)
    boxed = {"a": {"kernel": nn.LogicallyPartitioned(params["a"]["kernel"], ("layers", "embed", "mlp"))}}
    shardings = param_shardings(boxed, found)
    state = {
        "mu": params,
        "a": {
            "kernel": {
                "v_row": jax.ShapeDtypeStruct((2, 16), jnp.float32),
                "v": jax.ShapeDtypeStruct((2, 1), jnp.float32),
            }
        },
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    placed = like_params(state, params, shardings, found.mesh)
    assert placed["mu"]["a"]["kernel"].spec == P(None, ("fsdp",), ("tensor",))
    assert placed["a"]["kernel"]["v_row"].spec == P(None, ("fsdp",))
    assert placed["a"]["kernel"]["v"].spec == P() and placed["count"].spec == P()


def test_rules_are_the_configs_to_change():
    found = layout(("embed=fsdp,tensor", "residual_length="), fsdp=4, tensor=2)
    assert param_spec(found, ("embed", "mlp"), (16, 6)) == P(("fsdp", "tensor"), None)
    assert activation_spec(found, ("residual_length",), (16,)) == P(None)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("embde=fsdp", "did you mean 'embed'"),
        ("embed", "is not LOGICAL_AXIS"),
        ("embed=fspd", "names 'fspd', which is no axis of the mesh; did you mean 'fsdp'"),
        ("batch=fsdp", "always split over data, fsdp, expert"),
    ],
)
def test_a_wrong_rule_says_what_is_wrong(rule, message):
    with pytest.raises(ConfigError, match=message):
        layout((rule,), fsdp=8)


def test_a_gathered_parameter_is_whole_where_it_is_used_and_its_gradient_split_at_once():
    x, y = jnp.arange(32.0 * 16).reshape(32, 16) / 10000, jnp.ones((4, 16))
    found = layout(fsdp=8)

    def loss(x):
        table = gathered(x, ("vocab", None), ("vocab", "embed"))
        return jnp.sum(jnp.sin(y @ table.T))

    expected = jax.grad(loss)(x)
    with use_layout(found):
        compiled = jax.jit(jax.grad(loss)).lower(x).compile()
        gradient = compiled(x)
    assert compiled.output_shardings.spec == jax.P(None, "fsdp")
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
