"""Multiple choice: numbers worked out by hand, what must not change them, and parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
import torch_heads

from fmjax import build, objectives
from fmjax.models import bert
from fmjax.objectives import choose
from fmjax.params import randomness

ROWS = ("input_ids", "segment_ids", "positions", "token_types")


def fake(values):
    """An `apply` that scores the B · K rows like this, whatever they are."""
    return lambda params, *arrays, method: jnp.asarray(values, jnp.float32).reshape(-1, 1)


def batch(examples, choices, labels):
    real = jnp.ones((examples, choices, 2), jnp.int32)
    units = jnp.full(examples, choices * 2)
    return dict.fromkeys(ROWS, real) | {
        "labels": jnp.asarray(labels),
        "seeds": None,
        "units": units,
    }


def random(examples=4, choices=3):
    """Rows of the tiny model as examples of several choices each."""
    rows = tiny.batch(examples * choices)
    found = {name: rows[name].reshape(examples, choices, -1) for name in ROWS}
    labels = jnp.arange(examples) % choices
    units = jnp.sum(found["segment_ids"] > 0, axis=(1, 2))
    return found | {"labels": labels, "index": jnp.arange(examples), "units": units}


@functools.cache
def model():
    sizes = tiny.SIZES | dict(depth=1, lm_head=False, attention="xla")
    made = bert.Model("tiny", **sizes, classes={"choose": 1})
    return made, jax.jit(made.init)(jax.random.key(0), *made.example())["params"]


@functools.cache
def metrics(train):
    made, _ = model()
    goals = objectives.build({"choose": {}}, dict(target="choices"))
    run = lambda params, batch: objectives.metrics(
        goals, build.apply(made), params, batch, jax.random.key(0), train
    )
    return jax.jit(run)


def test_loss_and_accuracy_among_the_choices_of_an_example():
    """One example is right for sure, one a choice between two equals, its first the wrong one."""
    values = [[0.0, 100.0, 0.0], [5.0, 5.0, -100.0]]
    found = choose.loss_fn(fake(values), None, batch(2, 3, [1, 1]))
    np.testing.assert_allclose(found["loss"], (np.log(2), 2), rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], (1, 2))


def test_outputs_and_their_description():
    found = choose.outputs(fake([[0.0, np.log(3)]]), None, batch(1, 2, [0]))
    found = {"probabilities": np.asarray(found["probabilities"])}
    np.testing.assert_allclose(found["probabilities"], [[0.25, 0.75]], rtol=1e-6)
    (one,) = choose.describe(found)
    assert one["choice"] == 1 and len(one["probabilities"]) == 2


def test_padding_and_empty_rows_change_no_number():
    whole, (_, params) = random(), model()
    longest = int(jnp.max(jnp.sum(whole["segment_ids"] > 0, axis=-1)))
    short = whole | {name: whole[name][..., :longest] for name in ROWS}
    more = {name: jnp.concatenate([x, jnp.zeros_like(x[:1])]) for name, x in whole.items()}
    assert longest < tiny.T
    expected = metrics(False)(params, whole)["choose/loss"]
    for same in (short, more):
        np.testing.assert_allclose(metrics(False)(params, same)["choose/loss"], expected, rtol=1e-5)


def test_the_order_of_choices_does_not_matter_without_dropout():
    whole, (_, params) = random(), model()
    turned = whole | {name: whole[name][:, ::-1] for name in ROWS}
    turned["labels"] = 2 - whole["labels"]
    first, second = (metrics(False)(params, x)["choose/loss"] for x in (whole, turned))
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_each_choice_has_dropout_of_its_own_whatever_the_batch():
    whole = random() | {"seeds": randomness.seeds(jax.random.key(0), jnp.arange(4))}
    seeds = choose.flat(whole)["seeds"]
    assert len({tuple(row) for row in np.asarray(seeds).tolist()}) == 12
    half = choose.flat({name: x[2:] for name, x in whole.items()})["seeds"]
    np.testing.assert_array_equal(seeds[6:], half)
    _, params = model()
    whole.pop("seeds")
    dropped, not_dropped = (
        metrics(train)(params, whole)["choose/loss"][0] for train in (True, False)
    )
    assert abs(dropped - not_dropped) > 1e-3


def test_logits_and_loss_are_those_of_transformers(tmp_path):
    reference = torch_heads.make(
        "BertForMultipleChoice", "classifier", "choose", tmp_path, outputs=1
    )
    labels = np.array([2, 0])
    ours, theirs = torch_heads.batch((12, 7, 9, 12, 4, 11), labels, choices=3)
    logits = functools.partial(choose._logits, reference.apply, pool="first")
    found = jax.jit(logits)(reference.params, ours)
    expected = reference.torch(**theirs).logits.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)
    torch_heads.losses_agree(reference, ours, theirs, {"labels": labels})
