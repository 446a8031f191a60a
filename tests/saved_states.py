"""A small training state with every kind of leaf, and hands to save and to damage it."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax.io import manifest, retention


@flax.struct.dataclass
class TrainState:
    step: jax.Array
    params: dict
    opt_state: tuple
    rng: jax.Array


def make_state(step=1, width=8):
    """Every kind of leaf a run has. All values follow from `step`."""
    w = jnp.arange(16 * width, dtype=jnp.float32).reshape(16, width) + step
    params = {"dense": {"kernel": w, "bias": jnp.full((width,), step, jnp.bfloat16)}}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return TrainState(jnp.int32(step), params, tx.init(params), jax.random.key(step))


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_equal(a, b):
    def check(x, y):
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(check, a, b, is_leaf=lambda x: x is None)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def save(ckpt, *numbers, metric=None):
    for step in numbers:
        metrics = {} if metric is None else {"loss": metric}
        assert ckpt.save(step, make_state(step), {"position": step}, metrics)
        ckpt.wait()


def step_folder(tmp_path, step):
    return tmp_path / "checkpoints" / str(step)


def steps(tmp_path):
    """The finished steps."""
    return retention.finished(tmp_path / "checkpoints")


def problems(tmp_path, step):
    """What is damaged in a step."""
    return manifest.problems(step_folder(tmp_path, step))


def array_file(folder):
    """The file that holds most of the arrays."""
    return max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
