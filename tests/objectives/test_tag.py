"""Tagging: numbers worked out by hand, what must not change them, and transformers' own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch_heads

from fmjax import build, objectives
from fmjax.evaluation import eval_loop
from fmjax.models import bert
from fmjax.objectives import tag

NAMES = ("B-x", "I-x", "O")


def fake(logits):
    """An `apply` that gives these logits, whatever it is asked."""
    return lambda params, *arrays, method: jnp.asarray(logits, jnp.float32)


def batch(labels, segment_ids=None):
    labels = jnp.asarray(labels, jnp.int32)
    names = ("input_ids", "segment_ids", "positions", "token_types")
    real = jnp.ones_like(labels) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    return dict.fromkeys(names, real) | {"labels": labels, "seeds": None}


def test_loss_and_accuracy_count_labelled_tokens_only():
    """Of two labelled tokens one is certain, one a choice between two equals; a third has none."""
    logits = [[[0.0, 100.0], [0.0, 0.0], [100.0, 0.0]]]
    found = tag.loss_fn(fake(logits), None, batch([[1, 1, -1]]))
    np.testing.assert_allclose(found["loss"], (np.log(2), 2), rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], (1, 2))


def test_neither_padding_nor_unknown_tags_weigh_anything():
    """An empty row, as it fills the last batch, holds zeros: class 0 of nothing."""
    logits = np.zeros((3, 2, 2))
    found = tag.loss_fn(
        fake(logits), None, batch([[1, -1], [0, 0], [-2, -1]], [[1, 1], [0, 0], [1, 1]])
    )
    np.testing.assert_allclose(found["loss"], (np.log(2), 1), rtol=1e-6)


def test_padding_changes_no_number():
    sizes = tiny.SIZES | dict(depth=1, lm_head=False, attention="xla")
    model = bert.Model("tiny", **sizes, classes={"tag": 3})
    whole = tiny.batch(4) | {"seeds": None}
    whole["labels"] = jnp.where(whole["segment_ids"] > 0, whole["input_ids"] % 3, -1)
    params = jax.jit(model.init)(jax.random.key(0), *model.example())["params"]
    assert "pooler" not in params["head"]
    longest = int(jnp.max(jnp.sum(whole["segment_ids"] > 0, axis=1)))
    assert longest < tiny.T
    short = {
        k: x[:, :longest] if k not in ("index", "seeds", "units") else x for k, x in whole.items()
    }
    loss = jax.jit(functools.partial(tag.loss_fn, build.apply(model)))
    first, second = (loss(params, x) for x in (whole, short))
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)


def test_outputs_are_the_tags_of_words_whose_label_is_unknown_too():
    logits = [[[5, 0, 0], [0, 5, 0], [0, 0, 5], [5, 0, 0]]]
    found = tag.outputs(fake(logits), None, batch([[-1, -2, 0, -1]]))
    found = {name: np.asarray(array) for name, array in found.items()}
    np.testing.assert_array_equal(found["tags"], [[-1, 1, 2, -1]])
    np.testing.assert_array_equal(found["words"], [[-1, 0, -1, -1]])


def test_words_that_the_model_does_not_see_have_no_tag():
    """Of four words the second has no token, and the row ends before the fourth."""
    logits = [[[5, 0, 0], [0, 5, 0], [0, 0, 5], [5, 0, 0]]]
    found = tag.outputs(fake(logits), None, batch([[-1, -2, -4, -1]]))
    found = {name: np.asarray(array) for name, array in found.items()}
    told = tag.describe(found, names=NAMES, words=[4])
    assert told == [{"tags": [NAMES[1], None, NAMES[2], None]}]


def test_logits_that_are_not_finite_are_seen():
    logits = [[[5, 0, 0], [0, float("nan"), 0], [0, 0, 5], [5, 0, 0]]] * 2
    found = tag.outputs(fake(logits), None, batch([[-1, -2, -3, -1], [-1, -1, -2, -1]]))
    found = {name: np.asarray(array) for name, array in found.items()}
    assert eval_loop.not_finite(found).tolist() == [True, False]


def test_entities_are_found_whole_or_not_at_all():
    """Of two entities one is found, one cut short, and one is made up: P 1/3, R 1/2, F1 2/5."""
    labels = np.array([[-1, 0, 1, 2, 2, -1], [0, 1, 2, 2, 2, -1]])
    chosen = np.array([[-1, 0, 1, 2, 0, -1], [0, 2, 2, 2, 2, -1]])
    found = tag.score({"tags": chosen}, labels, names=NAMES)
    assert found == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5})


def test_scores_of_nothing_and_of_tags_that_are_no_entities():
    nothing = np.array([[-1, 2, 2]])
    assert tag.score({"tags": nothing}, nothing, names=NAMES) == dict.fromkeys(tag.SCORES, 0.0)
    found = tag.score({"tags": nothing}, nothing, names=("NOUN", "PUNCT", "VERB"))
    assert found.keys() == set(tag.SCORES) and np.isnan(list(found.values())).all()


def test_an_entity_that_continues_nothing_begins_one():
    """As conlleval has it: I-x after O opens an entity."""
    labels, chosen = np.array([[0, 1, 2]]), np.array([[1, 1, 2]])
    assert tag.score({"tags": chosen}, labels, names=NAMES)["f1"] == 1.0


def test_names_come_from_the_data_and_no_config():
    with pytest.raises(Exception, match="config.objectives.tag.names is not known"):
        objectives.build({"tag": {"names": ("a",)}}, dict(target="tags"))


def test_logits_and_loss_are_those_of_transformers(tmp_path):
    reference = torch_heads.make("BertForTokenClassification", "classifier", "tag", tmp_path)
    labels = np.random.default_rng(0).integers(0, 3, (2, 12))
    labels[:, ::3] = -1
    labels[1, 7:] = -1
    ours, theirs = torch_heads.batch((12, 7), labels)
    logits = jax.jit(functools.partial(tag._logits, reference.apply))(reference.params, ours)
    expected = reference.torch(**theirs).logits.detach().numpy()
    real = np.asarray(ours["segment_ids"]) > 0
    np.testing.assert_allclose(logits[real], expected[real], atol=2e-5)
    torchs = {"labels": np.where(labels < 0, -100, labels)}
    torch_heads.losses_agree(reference, ours, theirs, torchs)
