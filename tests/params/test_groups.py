import jax
import numpy as np
import pytest
import tiny
from common import ROOT
from jax.sharding import PartitionSpec as P

from fmjax.config import load as configs
from fmjax.errors import ConfigError
from fmjax.models import param_init
from fmjax.params import groups, paths, sharding

NAMES = ["embed/token/embedding", "head/mlm/bias"] + [f"block_{i:02d}/up/kernel" for i in range(4)]


def test_first_full_match_wins():
    patterns = ((r"block_0[01]/.*", "freeze"), (r"head/.*", "head"), (r".*", "train"))
    assigned = groups.assign(NAMES, patterns)
    assert [assigned[name] for name in NAMES] == [
        "train",
        "head",
        "freeze",
        "freeze",
        "train",
        "train",
    ]


def test_layers_can_be_counted_from_the_last():
    assigned = groups.assign(NAMES, ((r"block_-[12]/.*|head/.*", "train"), (r".*", "freeze")))
    moving = [name for name, group in assigned.items() if group == "train"]
    assert moving == ["head/mlm/bias", "block_02/up/kernel", "block_03/up/kernel"]


TOWERS = [f"image/{name}" for name in NAMES] + [f"text/{name}" for name in NAMES[:-2]]


def test_each_trunk_counts_its_layers_from_its_last():
    patterns = ((r"image/block_-1/.*|text/block_-1/.*", "train"), (r".*", "freeze"))
    assigned = groups.assign(TOWERS, patterns)
    moving = [name for name, group in assigned.items() if group == "train"]
    assert moving == ["image/block_03/up/kernel", "text/block_01/up/kernel"]
    kinds = {"image/": ["rest"] * 4, "text/": ["rest"] * 2}
    stacks = groups.stacks(kinds, assigned, dict(decay=".*"), {})
    assert stacks == {"image/": (3, 1), "text/": (1, 1)}


@pytest.mark.parametrize(
    "patterns, message",
    [
        (((r"head/.*", "train"),), "covers no group for parameter 'embed/token/embedding'"),
        (((r".*", "train"), (r"head/.*", "freeze")), "'head/.*' .*decides no parameter"),
        (((r"head", "train"), (r".*", "train")), "'head' .*decides no parameter"),
        (((r".*", "freeze"),), "freezes every parameter"),
    ],
)
def test_row50_groups_that_cannot_be_meant_are_refused(patterns, message):
    with pytest.raises(ConfigError, match=message):
        groups.assign(NAMES, patterns)


def test_layers_are_stacked_where_they_train_alike():
    kinds = ["rest"] * 4
    assign = lambda *patterns: groups.assign(NAMES, patterns)
    stacks = lambda kinds, assigned, decay=".*": groups.stacks(
        kinds, assigned, dict(decay=decay), {}
    )
    assert stacks(kinds, assign((".*", "train"))) == (4,)
    assert stacks(kinds, assign((r"block_0[01]/.*", "freeze"), (".*", "train"))) == (2, 2)
    assert stacks(["first", "rest", "rest", "rest"], assign((".*", "train"))) == (1, 3)
    assert stacks(kinds, assign((".*", "train")), decay=r"block_02/.*") == (2, 1, 1)


def test_split_and_merge_are_inverse():
    named = {name: np.full((2, 3), i) for i, name in enumerate(NAMES)}
    values = paths.stack(named, (2, 2))
    assigned = groups.assign(NAMES, ((r"block_0[01]/.*|embed/.*", "freeze"), (".*", "train")))
    trainable, frozen = groups.split(values, assigned)
    assert list(paths.flatten(trainable)) == ["blocks_02_03/up/kernel", "head/mlm/bias"]
    jax.tree.map(np.testing.assert_array_equal, groups.merge(trainable, frozen), values)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_configs_train_of_each_family(family):
    model = tiny.model(family, lm_head=False, classes={"classify": 3})
    names = list(paths.unstack(param_init.abstract_params(model)))

    def moving(file):
        patterns = configs.load(f"{ROOT}/configs/{file}").groups
        return set(groups.trained(groups.assign(names, patterns))) - heads

    having = lambda *parts: {name for name in names if name.startswith(parts)} - heads
    heads = {name for name in names if name.startswith("head/")}
    biases = {name for name in names if name.endswith("/bias")} - heads
    assert moving("finetune_head.py") == set()
    assert moving("finetune_last.py:layers=2") == having("block_01/", "block_02/", "norm/")
    norms = {name for name in names if name.rpartition("/")[0].endswith("norm")} - heads
    assert moving("finetune_bitfit.py:classify,norms") == norms
    assert moving("finetune_bitfit.py") == biases
    # Some families have none: where nothing else is asked for, that is refused.
    assert bool(biases) == (family not in ("llama", "t5"))
    if not any(name.endswith("/bias") for name in names):
        with pytest.raises(ConfigError, match="'.*/bias' .'train'. decides no parameter"):
            groups.assign(names, ((".*/bias", "train"), (".*", "freeze")))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_parameter_lies_on_the_mesh_as_under_any_prefix(family):
    for name in paths.flatten(param_init.abstract_params(tiny.model(family))):
        assert sharding.spec_of(f"text/{name}") == sharding.spec_of(name)
    assert sharding.spec_of("image/head/mlm/bias") == sharding.spec_of("head/mlm/bias") != P()
