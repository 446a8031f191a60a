"""Contrastive matching of two towers (Radford et al. 2021, figure 3), of which `left` and `right`
are models of the run with a linear head `project`."""

import jax.numpy as jnp

from fmjax.objectives import losses

SCORES = ("nearest",)


def features(apply, params, batch):
    """The embeddings of both views, (B, D) each."""
    return _embeddings(apply, params, batch)


def compare(found, batch, *, temperature=0.1):
    """Symmetric cross-entropy in nats of each example's other view among all of the batch."""
    left, right = found
    real = losses.real_rows(batch)
    similar = left @ right.T / temperature
    absent = jnp.where(real > 0, 0.0, -1e30)
    labels = {"labels": jnp.arange(len(real)), "units": batch["units"]}
    one = losses.classification(similar + absent[None], labels)
    other = losses.classification(similar.T + absent[None], labels)
    return {
        name: ((one[name][0] + other[name][0]) / 2, one[name][1]) for name in ("loss", "accuracy")
    }


def outputs(apply, params, batch):
    """The embeddings of both views, (B, D) each."""
    return dict(zip(("left", "right"), _embeddings(apply, params, batch), strict=True))


def score(found, labels):
    """The share of left views whose nearest right view of the split is their own."""
    nearest = (found["left"] @ found["right"].T).argmax(axis=1)
    return {"nearest": float((nearest == range(len(nearest))).mean())}


def _embeddings(apply, params, batch):
    def embedding(name):
        inputs = {"images": batch[name], "seeds": batch["seeds"]}
        hidden = apply(params, inputs, method="encode", model=name)
        whole = apply(params, hidden, None, "project", method="classify", model=name)
        return whole / jnp.maximum(jnp.linalg.norm(whole, axis=-1, keepdims=True), 1e-6)

    return embedding("left"), embedding("right")
