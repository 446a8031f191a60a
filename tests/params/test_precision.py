import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import dots

from fmjax.params import precision

SHAPES = [  # leading axes, D, F: square, wide, narrow, one row, odd rows, single output
    ((4, 16), 32, 32),
    ((4, 16), 32, 128),
    ((4, 16), 128, 32),
    ((1,), 32, 64),
    ((7,), 32, 64),
    ((3, 5), 48, 2),
    ((2, 3, 5), 16, 1000),
]


@pytest.mark.parametrize("lead, d, f", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out_in", [False, True])
def test_linear_and_its_gradients_run_and_match_numpy(lead, d, f, dtype, out_in):
    """Executed, not only compiled: some bfloat16 dots fail on CPU only when they run."""
    rng = np.random.default_rng(0)
    # Small integers are exact in bfloat16, so both dtypes must give the exact product.
    x = rng.integers(-3, 4, (*lead, d)).astype(np.float32)
    w = rng.integers(-3, 4, (d, f)).astype(np.float32)
    g = rng.integers(-3, 4, (*lead, f)).astype(np.float32)
    dtype = precision.DTYPES[dtype]

    @jax.jit
    def run(x, w, g):
        y, back = jax.vjp(lambda x, w: precision.linear(x, w, dtype, out_in), x, w)
        return y, *back(g)

    y, dx, dw = run(x, w.T if out_in else w, g)
    dw = dw.T if out_in else dw
    assert y.dtype == dx.dtype == dw.dtype == jnp.float32
    np.testing.assert_array_equal(y, x @ w)
    np.testing.assert_array_equal(dx, g @ w.T)
    np.testing.assert_array_equal(dw, x.reshape(-1, d).T @ g.reshape(-1, f))


def test_accumulation_is_float32():
    """256 + 1 + 1 + … is lost in bfloat16 sums, kept in float32 ones."""
    x = jnp.concatenate([jnp.full((1, 1), 256.0), jnp.ones((1, 255))], axis=1)
    y = precision.linear(x, jnp.ones((256, 1)), jnp.bfloat16)
    assert float(y[0, 0]) == 511.0


def test_no_bfloat16_dot_is_upcast():
    """Every dot of the forward and backward pass keeps bfloat16 operands and a float32 result."""

    def loss(x, w):
        return precision.linear(x, w, jnp.bfloat16).sum()

    found = dots(
        jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.ones((8, 32)), jnp.ones((32, 16)))
    )
    assert len(found) == 3
    for dot in found:
        assert all(x.aval.dtype == jnp.bfloat16 for x in dot.invars)
        assert dot.outvars[0].aval.dtype == jnp.float32


@pytest.mark.parametrize("lead", [(1,), (5,), (3, 4)])
def test_a_product_in_eight_bits_is_one_of_whole_numbers(lead):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*lead, 48)), jnp.float32)
    matrix = rng.integers(-127, 128, (6, 48)).astype(np.int8)
    scales = rng.uniform(0.1, 1, 6).astype(np.float32)
    kept = precision.Rows(jnp.asarray(matrix), jnp.asarray(scales))
    unit = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    whole = np.rint(x / unit).astype(np.int64)
    expected = (whole @ matrix.T.astype(np.int64)) * unit.astype(np.float64) * scales
    np.testing.assert_allclose(precision.linear(x, kept, jnp.float32), expected, rtol=1e-6)
    assert not precision.linear(0 * x, kept, jnp.float32).any()


def test_rows_of_a_table_are_those_it_was_made_of():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(7, 16)), jnp.float32)
    ids = jnp.asarray([[3, 0], [6, 9]])
    kept = precision.coded(table)
    for rows, made in (
        (precision.Rows(table.astype(jnp.bfloat16)), table.astype(jnp.bfloat16)),
        (precision.Rows(kept.codes, kept.scales[:, 0]), kept.whole(jnp.float32)),
    ):
        found = rows.rows(ids)
        np.testing.assert_array_equal(found[0], made[ids[0]].astype(jnp.float32))
        np.testing.assert_array_equal(found[1, 0], made[6].astype(jnp.float32))
        assert not found[1, 1].any()  # no row 9
    np.testing.assert_allclose(
        kept.whole(jnp.float32), table, atol=float(jnp.abs(table).max()) / 254 * 1.01
    )
