from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from fmjax import build
from fmjax.evaluation import eval_loop, sample_predictions


class Words:
    """Tokens that are read as their numbers."""

    mask_token_id = tiny.VOCAB.mask_id

    def decode(self, ids):
        return " ".join("[MASK]" if i == self.mask_token_id else f"w{i}" for i in ids)


def test_masks_stand_where_the_targets_are_and_guesses_are_those_that_accuracy_counts(monkeypatch):
    made, batch = tiny.make(), tiny.batch(8)
    step = jax.jit(eval_loop.make_step(build.apply(made.model), made.objectives))
    sums, outputs = step(made.state().params, batch, jax.random.key(0))
    outputs = jax.device_get(outputs)
    found = outputs["mlm"]
    right = np.sum(found["weights"] * (found["guesses"] == found["labels"]))
    assert right == pytest.approx(float(sums["mlm/accuracy"][0]))

    monkeypatch.setattr(sample_predictions, "load_tokenizer", lambda folder: Words())
    ids = np.asarray(batch["input_ids"])
    split = SimpleNamespace(rows=lambda rows: {"input_ids": ids[rows]})
    dataset = SimpleNamespace(tokenizer_dir="", splits={"validation": split}, labels=())
    run = SimpleNamespace(objectives=made.objectives, dataset=dataset)
    samples = sample_predictions.of(run, [outputs])
    assert len(samples) == sample_predictions.EXAMPLES
    for row, sample in enumerate(samples):
        right, said = (sample[key].split(", ") for key in ("right", "said"))
        filled = sample["text"]
        for word in right:
            filled = filled.replace("[MASK]", word, 1)
        assert filled == Words().decode(ids[row][: len(filled.split())])
        order = np.argsort(found["positions"][row])
        kept = [i for i in order if found["weights"][row][i] > 0][: sample_predictions.MASKS]
        assert said == [f"w{i}" for i in found["guesses"][row][kept]]


def test_there_are_none_where_nothing_is_said_of_single_examples():
    run = SimpleNamespace(objectives=[SimpleNamespace(name="clm")])
    assert sample_predictions.of(run, [{"rows": ()}]) == []
