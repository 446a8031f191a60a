"""Batches that are generated from the current parameters: the examples of a larger draw that the
towers match worst."""

import jax
import numpy as np

from fmjax import build
from outside import match


class Source:
    """Of twice as many rows as a batch has, the half with the least similar views."""

    def __init__(self, run, split):
        self.split, self.size, self.seed = split, run.config.batch_size, run.config.seed
        self.step, self.seen = 0, []
        apply = build.apply(run.model)

        @jax.jit
        def similarity(params, batch):
            found = match.outputs(apply, params, batch | {"seeds": None})
            return (found["left"] * found["right"]).sum(axis=-1)

        self.similarity = similarity

    def next(self, state):
        draw = np.random.default_rng((self.seed, self.step))
        rows = draw.choice(len(self.split), 2 * self.size, replace=False)
        examples = self.step * 2 * self.size + np.arange(2 * self.size)
        batch = self.split.rows(rows, examples, self.seed)
        worst = np.argsort(np.asarray(self.similarity(state.params, batch)), kind="stable")
        kept = np.sort(worst[: self.size])
        self.step += 1
        self.seen.append(rows[kept].tolist())
        batch = {name: array[kept] for name, array in batch.items()}
        index = examples[kept].astype(np.int32)
        return {**batch, "units": self.split.units(batch), "index": index}

    def state(self):
        return {"step": self.step, "seen": self.seen}

    def restore(self, state):
        self.step, self.seen = state["step"], state["seen"]

    def close(self):
        pass
