import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.errors import ConfigError
from fmjax.models import alibi
from fmjax.models.attention import attention, mask
from fmjax.params import randomness

B, N, T, H = 2, 3, 8, 4


def inputs(dtype=jnp.float32):
    q, k, v = jax.random.normal(jax.random.key(0), (3, B, N, T, H), dtype)
    segment_ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8])
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 0, 0], list(range(8))])
    return q, k, v, segment_ids, positions


def naive(q, k, v, may_see, bias=0.0, softcap=0.0):
    scores = jnp.einsum("bnqh,bnkh->bnqk", q, k) / np.sqrt(H)
    scores = (softcap * jnp.tanh(scores / softcap) if softcap else scores) + bias
    p = jax.nn.softmax(jnp.where(may_see, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnqk,bnkh->bnqh", jnp.nan_to_num(p), v)


@pytest.mark.parametrize("shape, softcap", [((), 0.0), ((1, N, T, T), 0.0), ((B, N, T, T), 2.0)])
def test_matches_the_formula_and_its_derived_gradient(shape, softcap):
    q, k, v, segment_ids, positions = inputs()
    bias = jax.random.normal(jax.random.key(2), shape)
    may_see = mask(segment_ids, positions)
    weights = jax.random.normal(jax.random.key(1), (B, N, T, H))
    real = (segment_ids > 0)[:, None, :, None]

    def ours(q, k, v, bias):
        added = None if not bias.ndim else bias if len(bias) == B else bias[0]
        how = dict(segment_ids=segment_ids, softcap=softcap, bias=added)
        out = attention(q, k, v, may_see, **how)
        return (out * weights * real).sum(), out

    def theirs(q, k, v, bias):
        # The last rows see nothing: give them something finite and ignore it.
        out = naive(q, k, v, may_see | ~real, bias, softcap)
        return (out * weights * real).sum(), out

    gradient = lambda f: jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)
    ((_, out), grads), ((_, expected), wanted) = gradient(ours), gradient(theirs)
    np.testing.assert_allclose(out * real, expected * real, atol=1e-6)
    for a, b in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_bias_of_two_keys_by_hand():
    """Of products 0 and a bias (b, 0) the first key has p = σ(b), and d out / d b is
    p (1 - p) (v0 - v1), summed over the two rows that share the bias."""
    q = jnp.zeros((2, 1, 1, 2))
    v = jnp.array([[[[3.0, 0], [1, 0]]], [[[0, 5], [0, 4]]]])  # (B, N, S, H)
    bias, ids = jnp.array([[[1.5, 0.0]]]), jnp.ones((2, 1), jnp.int32)

    def total(bias):
        return attention(
            q, v, v, jnp.ones((2, 1, 1, 2), bool), segment_ids=ids, bias=bias
        ).sum()  # fmt: skip

    found, gradient = jax.value_and_grad(total)(bias)
    p = 1 / (1 + np.exp(-1.5))
    assert float(found) == pytest.approx(1 + 2 * p + 4 + p, abs=1e-6)
    by_hand = p * (1 - p) * (2 + 1)
    np.testing.assert_allclose(gradient, [[[by_hand, -by_hand]]], atol=1e-6)


def test_slopes_and_biases_of_alibi_by_hand():
    """Press et al. 2022, §3: 8 heads have 1/2, 1/4 …; the last two of 6 are 1st and 3rd of 8."""
    np.testing.assert_allclose(alibi.slopes(8), 0.5 ** np.arange(1, 9))
    np.testing.assert_allclose(alibi.slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    found = alibi.bias(2, *[jnp.array([[2, 3]])] * 2, before=2)  # slopes 1/16 and 1/256
    np.testing.assert_allclose(found[0, 0], -np.array([[2, 1, 0, 1], [3, 2, 1, 0]]) / 16)
    np.testing.assert_allclose(found[0, 1] * 16, found[0, 0])


def test_row38_a_query_that_sees_nothing_gets_zeros_and_no_nan():
    q, k, v, segment_ids, positions = inputs()

    def total(q, k, v):
        out = attention(q, k, v, mask(segment_ids, positions), segment_ids=segment_ids)
        return out.sum(), out

    (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    assert not np.any(np.asarray(out)[0, :, 6:])
    assert all(np.isfinite(g).all() for g in grads)
    assert not np.any(np.asarray(grads[0])[0, :, 6:])


def test_packed_documents_do_not_see_each_other():
    q, k, v, segment_ids, positions = inputs()
    out = attention(q, k, v, mask(segment_ids, positions), segment_ids=segment_ids)
    alone = attention(
        q[:1, :, 3:6], k[:1, :, 3:6], v[:1, :, 3:6],
        mask(jnp.ones((1, 3), jnp.int32), jnp.arange(3)[None]),
        segment_ids=jnp.ones((1, 3), jnp.int32),
    )  # fmt: skip
    np.testing.assert_allclose(out[:1, :, 3:6], alone, atol=1e-6)


def test_window():
    """Position i sees i-1, i, i+1 of its own document for a window of one."""
    _, _, _, segment_ids, positions = inputs()
    may_see = np.asarray(mask(segment_ids, positions, window=1))[:, 0]
    assert may_see[0, 3].tolist() == [False] * 3 + [True, True] + [False] * 3
    assert may_see[1, 4].tolist() == [False] * 3 + [True] * 3 + [False] * 2


def test_a_prefix_is_seen_by_all_of_its_document_and_a_window_still_holds():
    """Documents of three tokens, of which two are the first one's prefix; and one of eight."""
    _, _, _, segment_ids, positions = inputs()
    prefix = jnp.asarray([[1, 1, 0, 0, 0, 0, 0, 0], [1] * 4 + [0] * 4]) == 1
    may_see = np.asarray(mask(segment_ids, positions, causal=True, prefix=prefix))[:, 0].astype(int)
    assert may_see[0, :6, :6].tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    near = np.asarray(mask(segment_ids, positions, 1, True, prefix))[1, 0].astype(int)
    assert near[[0, 3, 4]].tolist() == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
    ]


def test_dropout_keeps_the_mean_and_its_gradient_uses_the_same_mask():
    q, k, v, segment_ids, positions = inputs()
    may_see = mask(segment_ids, positions)
    seeds = randomness.seeds(jax.random.key(3), jnp.arange(B))

    def out(v, seeds):
        return attention(q, k, v, may_see, segment_ids=segment_ids, dropout=0.5, seeds=seeds)

    many = [out(v, randomness.fold(seeds, i)) for i in range(400)]
    plain = attention(q, k, v, may_see, segment_ids=segment_ids)
    np.testing.assert_allclose(np.mean(many, axis=0), plain, atol=0.35)
    # Linear in v, so the directional derivative is the function itself.
    primal, tangent = out(v, seeds), jax.vjp(lambda v: out(v, seeds), v)[1]
    g = jnp.ones_like(primal)
    np.testing.assert_allclose((tangent(g)[0] * v).sum(), primal.sum(), rtol=1e-5)


def test_gradient_through_dropout_matches_finite_differences():
    q, k, v, segment_ids, positions = inputs()
    may_see = mask(segment_ids, positions)
    seeds = randomness.seeds(jax.random.key(3), jnp.arange(B))
    total = lambda q, k: jnp.sin(
        attention(q, k, v, may_see, segment_ids=segment_ids, dropout=0.3, seeds=seeds)
    ).sum()
    dq, dk = jax.grad(total, (0, 1))(q, k)
    for argument, gradient in enumerate((dq, dk)):
        direction = jax.random.normal(jax.random.key(argument), q.shape)
        step = lambda e, a=argument, d=direction: total(
            *[x + e * d * (i == a) for i, x in enumerate((q, k))]
        )
        numeric = (step(1e-2) - step(-1e-2)) / 2e-2
        np.testing.assert_allclose((gradient * direction).sum(), numeric, rtol=2e-3)


def test_a_kernel_asked_for_by_name_says_why_it_cannot_serve():
    q, k, v, segment_ids, positions = inputs()
    may_see = mask(segment_ids, positions)
    with pytest.raises(ConfigError, match="bfloat16 or float16, not float32"):
        attention(q, k, v, may_see, segment_ids=segment_ids, implementation="cudnn")
    with pytest.raises(ConfigError, match="multiple of 128"):
        attention(q, k, v, may_see, segment_ids=segment_ids, implementation="tpu")
    half, bias = (x.astype(jnp.bfloat16) for x in (q, jnp.zeros((N, T, T))))
    how = dict(segment_ids=segment_ids, bias=bias)
    for kernel in ("cudnn", "tpu"):
        with pytest.raises(ConfigError, match=f"{kernel}.*adds no bias"):
            attention(half, half, half, may_see, **how, implementation=kernel)
    with pytest.raises(ConfigError, match="it shows nothing that is behind"):
        attention(q, k, v, may_see, segment_ids=segment_ids, prefix=True, implementation="tpu")
    with pytest.raises(ConfigError, match="no target beside a source"):
        attention(q, k, v, may_see, segment_ids=segment_ids, cross=True, implementation="tpu")
    with pytest.raises(ConfigError, match="Possible: auto, cudnn, tpu, xla"):
        attention(q, k, v, may_see, segment_ids=segment_ids, implementation="flash")


def test_the_tpu_kernel_lowers_for_tpu():
    """No TPU here: the Pallas kernel and its gradient must at least become a TPU program."""
    q = jnp.ones((1, 2, 128, 64), jnp.bfloat16)
    ids = jnp.ones((1, 128), jnp.int32)
    total = lambda q: attention(
        q, q, q, mask(ids, ids), segment_ids=ids, implementation="tpu"
    ).astype(jnp.float32).sum()  # fmt: skip
    text = jax.jit(jax.grad(total)).trace(q).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


def test_dropout_of_a_row_does_not_depend_on_how_wide_it_is_padded():
    key = jax.random.key(0)
    q, k, v = (jax.random.normal(jax.random.fold_in(key, i), (2, 3, 12, 8)) for i in range(3))
    seeds = randomness.seeds(key, jnp.arange(2))
    segments = jnp.where(jnp.arange(12) < 7, 1, 0)[None].repeat(2, 0)

    def out(width):
        ids = segments[:, :width]
        cut = (x[:, :, :width] for x in (q, k, v))
        seen = mask(ids, jnp.zeros_like(ids))
        return attention(*cut, seen, segment_ids=ids, dropout=0.5, seeds=seeds)

    np.testing.assert_allclose(out(12)[:, :, :7], out(7), atol=1e-6)
