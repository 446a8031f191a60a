"""A tiny random BERT of transformers with a head, and the same in fmjax, to compare them."""

import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import build, convert, objectives
from fmjax.models import bert
from fmjax.params import paths

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
TABLES = dict(vocab_size=61, max_position_embeddings=20)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def make(architecture: str, theirs: str, objective: str, folder, outputs: int = 3):
    """`.torch`, the model of transformers, whose head is its module `theirs`; `.apply`, `.params`
    and `.goal`, fmjax's of the same weights with the objective."""
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**SIZES, **TABLES, **NO_DROPOUT, num_labels=outputs)
    model = model_class(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(float("norm" in key.lower() and key.endswith("weight")), 0.2)
    model.save_pretrained(folder)

    options = convert.describe(folder)[1] | dict(classes={objective: outputs}, lm_head=False)
    ours = bert.Model(**options, attention="xla")
    ours = ours.clone(stacks=paths.runs(ours.kinds))
    initial = lambda: ours.init(jax.random.key(0), *ours.example())["params"]
    abstract = jax.eval_shape(initial)
    params, report = convert.load(folder, abstract, may_miss="head/.*", initial=initial)
    assert set(report.kept) <= {f"head/{objective}/{leaf}" for leaf in ("kernel", "bias")}
    head = model.get_submodule(theirs)
    params["head"][objective] = {
        "kernel": jnp.asarray(head.weight.detach().numpy().T),
        "bias": jnp.asarray(head.bias.detach().numpy()),
    }
    targets = {"tag": "tags", "span": "spans", "choose": "choices", "classify": "classes"}
    (goal,) = objectives.build({objective: {}}, dict(target=targets[objective]))
    return SimpleNamespace(torch=model, apply=build.apply(ours), params=params, goal=goal)


def batch(lengths, labels, choices: int = 0, time: int = 12):
    """(fmjax's batch, transformers' arguments without labels) of random rows of these `lengths`, or
    of examples of `choices` rows each."""
    import torch

    rng = np.random.default_rng(1)
    lengths = np.array(lengths).reshape(-1, *([choices] if choices else []))
    real = np.arange(time) < lengths[..., None]
    ids = np.where(real, rng.integers(4, 61, real.shape), 0)
    types = np.where(real, rng.integers(0, 2, real.shape), 0)
    ours = {
        "input_ids": ids,
        "segment_ids": real,
        "positions": np.where(real, np.arange(time), 0),
        "token_types": types,
        "labels": labels,
        "units": real.sum(axis=tuple(range(1, real.ndim))),
    }
    ours = {key: jnp.asarray(value, jnp.int32) for key, value in ours.items()} | {"seeds": None}
    theirs = dict(input_ids=ids, attention_mask=real.astype(int), token_type_ids=types)
    return ours, {key: torch.tensor(value) for key, value in theirs.items()}


def losses_agree(reference, ours, theirs, labels) -> None:
    """The mean loss, and its gradient by the head's weights."""
    import torch

    labels = {key: torch.tensor(value) for key, value in labels.items()}
    out = reference.torch(**theirs, **labels)
    out.loss.backward()

    @jax.jit
    @jax.value_and_grad
    def found(params):
        total, weight = reference.goal.loss_fn(reference.apply, params, ours)["loss"]
        return total / weight

    loss, gradient = found(reference.params)
    np.testing.assert_allclose(loss, out.loss.item(), atol=1e-5)
    theirs = list(reference.torch.children())[-1].weight.grad.numpy()
    found = gradient["head"][reference.goal.name]["kernel"]
    np.testing.assert_allclose(found.T, theirs, atol=1e-5)
