"""Causal language modelling: which tokens are targets, and what the means are of."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fmjax.models.trunk import Vocabulary
from fmjax.objectives import clm

IDS = jnp.array([[5, 6, 7, 5, 6, 0], [7, 7, 7, 7, 7, 7]])
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
VOCAB = SimpleNamespace(bytes=np.array([0, 0, 0, 0, 0, 1, 2, 3]))


def test_the_last_token_of_a_document_predicts_nothing():
    labels, weights = clm.targets({"input_ids": IDS, "segment_ids": SEGMENTS})
    assert weights.tolist() == [[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert (labels[weights > 0] == jnp.array([6, 7, 6, 7, 7, 7, 7, 7])).all()


def test_of_a_conversation_what_is_marked_is_a_target():
    """The fourth token, behind which a document ends, is predicted by the third of its own only."""
    mask = jnp.array([[0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    batch = {"input_ids": IDS, "segment_ids": SEGMENTS, "loss_mask": mask}
    _, weights = clm.targets(batch)
    assert weights.tolist() == [[1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize("extra", [{}, dict(z_loss=0.1)])
def test_means_of_a_model_that_knows_no_token(extra):
    """All 8 logits are 0: log 8 nats a target, three bits; 1/8 of the mass each."""

    def apply(params, *args, method):
        if method == "encode_routed":
            assert args == (batch,)
            return jnp.zeros((2, 6, 4)), None
        return Vocabulary(jnp.zeros((8, 4)), True, P(), jnp.float32)

    batch = dict.fromkeys(("positions", "token_types", "seeds"), jnp.zeros((2, 6), jnp.int32))
    batch |= {"input_ids": IDS, "segment_ids": SEGMENTS}
    found = clm.loss_fn(apply, None, batch, vocab=VOCAB, **extra)
    targets, size = 8, 2 + 3 + 2 + 5 * 3  # tokens, and the bytes that they stand for
    nats = np.log(8)
    assert [float(x) for x in found["bits_per_byte"]] == pytest.approx([3 * targets, size])
    z = extra.get("z_loss", 0) * nats**2
    assert [float(x) for x in found["loss"]] == pytest.approx([targets * (nats + z), targets])
    assert ("nats" in found) == bool(extra)
    unknown = clm.loss_fn(apply, None, batch, vocab=SimpleNamespace(bytes=None))
    assert unknown.keys() == {"loss", "accuracy"}
