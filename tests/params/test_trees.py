import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.params import paths

NAMED = {
    "embed/token/embedding": jnp.arange(6.0).reshape(3, 2),
    **{f"block_{i:02d}/attn/kernel": jnp.full((2, 2), float(i)) for i in range(5)},
}


@pytest.mark.parametrize("stacks", [None, (5,), (3, 2), (1, 1, 3)])
def test_stacking_is_storage_only(stacks):
    stored = paths.stack(NAMED, stacks)
    back = paths.unstack(stored)
    assert back.keys() == NAMED.keys()
    jax.tree.map(np.testing.assert_array_equal, back, NAMED)


def test_restack_from_any_to_any():
    a = paths.restack(paths.stack(NAMED, (3, 2)), (1, 4))
    assert paths.flatten(a)["blocks_01_04/attn/kernel"].shape == (4, 2, 2)
    assert float(paths.flatten(a)["blocks_01_04/attn/kernel"][2, 0, 0]) == 3.0


def test_names_of_a_stack():
    assert paths.names("blocks_08_10/mlp/up/kernel") == [
        "block_08/mlp/up/kernel",
        "block_09/mlp/up/kernel",
        "block_10/mlp/up/kernel",
    ]
    assert paths.names("head/mlm/bias") == ["head/mlm/bias"]


def test_a_run_cannot_mix_layers_that_lack_a_parameter():
    with pytest.raises(ValueError, match="blocks_00_04 mixes"):
        paths.stack({**NAMED, "block_02/extra": jnp.ones(1)}, (5,))


TWO = {f"image/{name}": leaf for name, leaf in NAMED.items()}
TWO |= {f"text/{name}": leaf + 1 for name, leaf in NAMED.items()}


@pytest.mark.parametrize("text", [None, (5,), (1, 1, 3)])
def test_each_trunk_has_stacks_of_its_own(text):
    stored = paths.stack(TWO, {"image/": (3, 2), "text/": text})
    flat = paths.flatten(stored)
    assert flat["image/blocks_03_04/attn/kernel"].shape == (2, 2, 2)
    assert flat.get("text/block_04/attn/kernel", jnp.zeros(())).shape == (() if text else (2, 2))
    jax.tree.map(np.testing.assert_array_equal, paths.unstack(stored), TWO)
    again = paths.restack(stored, {"image/": (5,), "text/": (5,)})
    assert paths.flatten(again)["text/blocks_00_04/attn/kernel"][2, 0, 0] == 2.0 + 1
    runs = paths.stored_layers(stored)
    assert runs["image/block_04"] == "image/blocks_03_04"
    assert ("text/block_04" in runs) == bool(text)


def test_layers_are_those_of_their_trunk():
    assert paths.layer("image/block_07/attn/out/bias") == ("image/", 7, "attn/out/bias")
    assert paths.layer("block_07/attn/bias").prefix == "block_07"
    assert paths.layer("text/encoder/block_11/x").trunk == "text/encoder/"
    assert paths.layer("head/mlm/bias") is None and paths.layer("blocks_00_11/x") is None
    assert paths.depths(["a/block_00/x", "a/block_02/x", "block_00/x", "b"]) == {"a/": 3, "": 1}
    assert paths.names("text/blocks_01_02/mlp") == ["text/block_01/mlp", "text/block_02/mlp"]
    assert paths.span("a/block_00/x", "a/block_11/x") == "a/block_00…11/x"
    assert paths.span("head/x", "head/x") == "head/x"


def test_runs():
    assert paths.runs("aab") == (2, 1)
    assert paths.runs([]) == ()


def test_shapes_without_memory():
    shapes = jax.eval_shape(lambda: paths.stack(NAMED, (5,)))
    assert paths.unstack(shapes)["block_03/attn/kernel"].shape == (2, 2)
    assert paths.size(shapes) == 6 + 5 * 4
    assert paths.nbytes(shapes) == 4 * 26
