"""An adapter in a run: a base loads under it, it may start from the base, keys are checked."""

import re

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from fmjax import convert
from fmjax.adapters import lora, merge
from fmjax.config import constraints, rules
from fmjax.errors import ConfigError
from fmjax.models import bert, param_init
from fmjax.params import paths
from fmjax.training import initialize

TARGETS = ((r"block_0[12]/attn/query", 2), (r"block_.*/attn/(query|value)", 3))


def made(source, **settings):
    """(config, model, abstract parameters) as `setup` makes them."""
    adapter = dict(name="lora", targets=TARGETS, **settings)
    run = tiny.make(((r".*/lora_.", "train"), (".*", "freeze")), adapter=adapter)
    return (
        ConfigDict(dict(init=str(source), new_head=False, seed=3)),
        run.model,
        run.abstract.params,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder in Hugging Face format and what it holds."""
    folder = tmp_path_factory.mktemp("base") / "bert"
    model = bert.Model("tiny", **tiny.SIZES)
    params = jax.jit(lambda: param_init.init_params(model, jax.random.key(7)))()
    convert.export(folder, model, params)
    return folder, paths.unstack(params)


@pytest.mark.parametrize("init", ["uniform", "pissa"])
def test_any_base_loads_under_any_adapter(init, base, capsys):
    folder, expected = base
    config, model, abstract = made(folder, init=init)
    params = initialize.initial(config, model, abstract).params
    told = capsys.readouterr().out
    assert re.search(r"newly initialised: (block_00…02/\S+/lora_[ab](, )?)+$", told, re.M)
    found = paths.unstack(
        jax.jit(lambda p: merge.merge(model, p))(params)
    )  # PiSSA cuts the weights in two
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, atol=0 if init == "uniform" else 1e-6)
    first = params["block_00"] if "block_00" in params else params["blocks_00_00"]
    assert np.abs(first["attn"]["query"]["lora_a"]).max() > 0
    assert (np.abs(first["attn"]["query"]["lora_b"]).max() > 0) == (init == "pissa")
    same = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert all(jax.tree.leaves(jax.tree.map(same, params, abstract)))


def test_a_loaded_adapter_is_not_started_again(base, monkeypatch, tmp_path):
    config, model, abstract = made(tmp_path, init="pissa")
    trained = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract)
    monkeypatch.setattr(initialize, "is_run", lambda source: True)
    saved = lambda source: (trained, {"step": 5}, False)
    monkeypatch.setattr(initialize.checkpointer, "load_params", saved)
    params = initialize.initial(config, model, abstract).params
    assert all((np.asarray(leaf) == 1).all() for leaf in jax.tree.leaves(params))


def test_a_base_of_a_run_loads_under_an_adapter(base, monkeypatch, tmp_path):
    _, expected = base
    config, model, abstract = made(tmp_path)
    monkeypatch.setattr(initialize, "is_run", lambda source: True)
    saved = lambda source: (paths.stack(expected, (3,)), {"step": 5}, False)
    monkeypatch.setattr(initialize.checkpointer, "load_params", saved)
    found = paths.unstack(initialize.initial(config, model, abstract).params)
    key = jax.random.fold_in(jax.random.key(3), 0)
    fresh = paths.unstack(jax.jit(lambda: param_init.init_params(model, key))())
    for name, leaf in found.items():
        adapter = name.rpartition("/")[2].startswith("lora_")
        np.testing.assert_allclose(leaf, (fresh if adapter else expected)[name], atol=1e-7)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("name", "lara", "Did you mean 'lora'"),
        ("targets", ((".*/query",),), r"\(regular expression, number\) pairs"),
        ("targets", (("(", 4),), "pairs"),
        ("targets", ((".*", -1),), "pairs"),
        ("targets", (), "pairs"),
        ("rank", 0, "from 1"),
        ("alpha", 0.0, "above 0"),
        ("dropout", 1.0, "below 1"),
        ("scaling", "sqrt", "rslora"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(key, value, message):
    with pytest.raises(ConfigError, match=f"adapter.{key}.*{message}"):
        rules.check({"adapter": {key: value}})


def test_a_start_from_weights_needs_weights():
    adapter = dict(name="lora", targets=TARGETS, init="pissa")
    constraints.check({"adapter": adapter, "init": "somewhere"})
    constraints.check({"adapter": {**adapter, "name": ""}, "init": ""})
    with pytest.raises(ConfigError, match="starts from the weights of a trained model"):
        constraints.check({"adapter": adapter, "init": ""})


def test_a_rank_above_the_weights_has_no_singular_values(base):
    config, model, abstract = made(base[0])
    model = lora.wrap(model.model.clone(stacks=None), targets=((r".*/query", 33),), init="pissa")
    with pytest.raises(ConfigError, match="32 singular values, fewer than its rank 33"):
        initialize.initial(config, model, param_init.abstract_params(model))
