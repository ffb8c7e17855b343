import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmx.config import Optimizer
from lmx.errors import CheckpointError
from lmx.training.checkpoints import Checkpoints
from lmx.training.optimizers import eval_params, make_optimizer
from lmx.training.state import TrainState


def make_state(seed: int = 0, features: int = 8, **options) -> TrainState:
    kernel = np.random.default_rng(seed).normal(size=(features, 16)).astype(np.float32)
    params = {"embeddings": {}, "heads": {"lm": {"kernel": jnp.asarray(kernel), "bias": jnp.arange(16.0)}}}
    opt_state = make_optimizer(Optimizer(**options), 10, params).init(params)
    return TrainState(jnp.int32(seed), params, jax.tree.map(lambda x: x + 1, opt_state))


def abstract(state: TrainState, sharding=None) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_everything_comes_back(tmp_path):
    state, position = make_state(7, ema_decay=0.9), {"epoch": 2, "rows": [3, 5]}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.save(7, state, position, {"eval/loss": np.float32(1.5)})
        assert not checkpoints.save(7, state, position, {})
    with Checkpoints(tmp_path) as checkpoints:
        restored, data_state, meta = checkpoints.restore(abstract(state))
    assert_equal(restored, state)
    assert data_state == position
    assert meta == {"step": 7, "metrics": {"eval/loss": 1.5}, "pending": []}


def test_newest_and_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: None, 5: 2.0, 6: None}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.best_step() is None
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), {}, {} if loss is None else {"eval/loss": loss})
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6]
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (6, 2)
        assert_equal(checkpoints.restore_params(step=checkpoints.best_step()), make_state(2).params)


def test_restore_onto_another_mesh(tmp_path):
    def sharding(shape, *axes):
        mesh = jax.make_mesh(
            shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: np.prod(shape)]
        )
        return NamedSharding(mesh, PartitionSpec(*axes))

    state, before, after = make_state(3), sharding((4, 2), "data", "tensor"), sharding((1, 4), None, "tensor")

    def place(sharding):
        return lambda x: sharding if x.ndim == 2 else NamedSharding(sharding.mesh, PartitionSpec())

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, jax.device_put(state, jax.tree.map(place(before), state)), {}, {})
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, jax.tree.map(place(after), state)
        )
        restored, _, _ = checkpoints.restore(wanted)
        on_one = checkpoints.restore_params()
    assert_equal(jax.device_get(restored), jax.device_get(state))
    kernel = restored.params["heads"]["lm"]["kernel"]
    assert kernel.sharding == after
    assert kernel.addressable_shards[0].data.shape == (8, 4)
    assert on_one["heads"]["lm"]["kernel"].devices() == {jax.devices()[0]}
    assert_equal(jax.device_get(on_one), jax.device_get(state.params))


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"name": "schedule_free_adamw", "ema_decay": 0.0}])
def test_params_for_inference_are_the_averaged_ones(tmp_path, options):
    state = make_state(1, **options)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {})
        checkpoints.wait()
        shutil.rmtree(checkpoints.folder / "1" / "optimizer")  # nothing of it is needed
        restored = checkpoints.restore_params()
    assert_equal(restored, eval_params(state))
    averaged = not np.array_equal(restored["heads"]["lm"]["bias"], state.params["heads"]["lm"]["bias"])
    assert averaged == bool(options)


def test_shapes_are_known_without_the_model(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {}, {})
        shapes = checkpoints.abstract_params()
    assert shapes["embeddings"] == {}
    assert shapes["heads"]["lm"]["kernel"].shape == (8, 16)
    assert shapes["heads"]["lm"]["bias"].dtype == jnp.float32


def test_half_saved_leftovers_are_swept_by_a_writer_only(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {}, {})
    leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    leftover.mkdir()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
    assert leftover.exists()
    Checkpoints(tmp_path).close()
    assert not leftover.exists()
    assert (tmp_path / "checkpoints" / "1").exists()


def test_missing_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="no workdir of `lmx train`"):
        Checkpoints(tmp_path, read_only=True)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
            checkpoints.restore(abstract(make_state()))
        checkpoints.save(4, make_state(), {}, {})
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it holds steps \[4\]"):
            checkpoints.restore_params(step=3)


def test_another_configuration_names_the_parameter_and_both_shapes(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {}, {})
        with pytest.raises(
            CheckpointError, match=r"heads/lm/kernel is \(8, 16\) in the checkpoint and \(4, 16\) in the"
        ):
            checkpoints.restore(abstract(make_state(features=4)))
        with pytest.raises(CheckpointError, match="in optimizer, .*missing in the checkpoint"):
            checkpoints.restore(abstract(make_state(ema_decay=0.9)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own, of its abandoned reads
@pytest.mark.parametrize("victim", ["params/manifest.ocdbt", "params/_METADATA", "meta/metadata"])
def test_damage_is_told_and_the_earlier_checkpoint_named(tmp_path, victim):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {}, {})
    path = tmp_path / "checkpoints" / "2" / victim
    path.write_bytes(path.read_bytes()[:5])
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="checkpoint 2 in .* is damaged .*delete it to go on from step 1"):
            checkpoints.restore(abstract(make_state()))
        assert int(checkpoints.restore(abstract(make_state()), step=1)[0].step) == 1


def test_saving_is_silent(tmp_path, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {}, {})
    Checkpoints(tmp_path, read_only=True).close()
    assert [record.getMessage() for record in caplog.records] == []


def test_position_in_the_data_is_plain_json(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {"next_index": 12}, {})
    assert json.loads((tmp_path / "checkpoints" / "1" / "data" / "metadata").read_text()) == {"next_index": 12}
