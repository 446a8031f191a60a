"""The Vision Transformer: patches as a convolution, parity with transformers, its refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import build
from fmjax.errors import ConfigError
from fmjax.models import param_init, vit
from fmjax.objectives import classify
from fmjax.params import paths

SIZES = dict(image_shape=(6, 8, 3), patch=2, width=16, depth=2, heads=2, mlp=24)


@functools.cache
def made(**changes):
    model = vit.Model("base", **SIZES | {"classes": (("classify", 5),)} | changes)
    model = model.clone(stacks=paths.runs(model.kinds))
    params = jax.jit(model.init)(jax.random.key(0), *model.example())["params"]
    # Larger than at initialisation, so that attention really depends on what it sees.
    return model, jax.tree.map(lambda x: x * 2 if x.ndim > 1 else x + 0.1, params)


def images(count=4, shape=SIZES["image_shape"]):
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, *shape)), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits(model, params, pixels, pool=""):
    hidden = model.apply({"params": params}, pixels, method="encode")
    how = dict(pool=pool, method="classify")
    return model.apply({"params": params}, hidden, None, "classify", **how)


def encoded(model, params):
    encode = lambda params: model.apply({"params": params}, images(), method="encode")
    return np.asarray(jax.jit(encode)(params))


def headed(params, vectors):
    head = {name: np.asarray(x) for name, x in params["head"]["classify"].items()}
    return vectors @ head["kernel"] + head["bias"]


def test_a_linear_map_of_patches_is_a_convolution():
    pixels, kernel = images(2), np.random.default_rng(1).normal(size=(2, 2, 3, 5))
    kernel = kernel.astype(np.float32)
    form = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(pixels, kernel, (2, 2), "VALID", dimension_numbers=form)
    found = vit.patches(pixels, 2) @ kernel.reshape(12, 5)
    np.testing.assert_allclose(found, expected.reshape(2, 12, 5), atol=1e-5)


def test_patches_go_from_left_to_right_and_from_top_to_bottom():
    pixels = jnp.arange(24.0).reshape(1, 4, 6, 1)
    found = vit.patches(pixels, 2)
    assert found.shape == (1, 6, 4)
    assert found[0, :4].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19]]


def test_an_image_has_the_same_logits_alone_and_in_a_batch():
    model, params = made()
    whole = logits(model, params, images())
    alone = [logits(model, params, image[None])[0] for image in images()]
    np.testing.assert_allclose(alone, whole, atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 1e-2


def test_where_a_patch_lies_matters():
    model, params = made()
    turned = images()[:, :, ::-1]
    difference = np.abs(logits(model, params, images()) - logits(model, params, turned))
    assert difference.max() > 1e-2


def test_every_parameter_has_a_gradient():
    model, params = made()
    loss = lambda params: jnp.square(logits(model, params, images())).sum()
    for name, gradient in paths.unstack(jax.grad(loss)(params)).items():
        size = np.abs(gradient).max()  # a bias of all keys shifts all logits of a query alike
        assert (size < 1e-3) if name.endswith("key/bias") else (size > 1e-2), (name, size)


def test_the_class_token_or_the_mean_of_the_patches_stands_for_the_image():
    model, params = made()
    hidden = encoded(model, params)
    assert hidden.shape == (4, 13, 16)
    for pool, vector in {"": hidden[:, 0], "mean": hidden[:, 1:].mean(1)}.items():
        found = logits(model, params, images(), pool)
        np.testing.assert_allclose(found, headed(params, vector), atol=1e-4)
    without, params = made(class_token=False)
    assert without.cfg.tokens == 12 and "class_token" not in params["embed"]
    mean = encoded(without, params).mean(1)
    found = logits(without, params, images())
    np.testing.assert_allclose(found, headed(params, mean), atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(patch=4), "patch=4 does not divide images of 6 x 8 pixels"),
        (dict(class_token=False, pool="first"), "pool='first' is the class token.*class_token"),
        (dict(heads=3), "heads=3 does not divide config.model.width=16"),
        (dict(pacth=2), "config.model.pacth is not known.*patch"),
        (dict(variant="digit"), "variant='digit' is not known.*digits"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        vit.Model(**{"variant": "base"} | SIZES | changes)


@pytest.mark.parametrize(
    "variant, millions", [("tiny", 5.7), ("small", 22.1), ("base", 86.6), ("large", 304.3)]
)
def test_published_sizes(variant, millions):
    """Touvron et al. 2021, table 1, and timm's counts, with 1,000 classes."""
    model = vit.Model(variant, classes={"classify": 1000})
    model = model.clone(stacks=paths.runs(model.kinds))
    assert round(paths.size(param_init.abstract_params(model)) / 1e6, 1) == millions


# ---- parity with transformers ----

NAMES = {
    "attn_norm/scale": "layernorm_before.weight",
    "attn_norm/bias": "layernorm_before.bias",
    "mlp_norm/scale": "layernorm_after.weight",
    "mlp_norm/bias": "layernorm_after.bias",
}
LINEAR = {
    **{f"attn/{x}": f"attention.{x[0]}_proj" for x in ("query", "key", "value", "out")},
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}


def renamed(tensors):
    """Tensors under the names of transformers in our names and layouts, without stacks."""
    found = {
        "embed/patch/kernel": tensors["vit.embeddings.patch_embeddings.projection.weight"]
        .transpose(2, 3, 1, 0)
        .reshape(-1, 16),
        "embed/patch/bias": tensors["vit.embeddings.patch_embeddings.projection.bias"],
        "embed/class_token/embedding": tensors["vit.embeddings.cls_token"][0],
        "embed/position/embedding": tensors["vit.embeddings.position_embeddings"][0],
        "norm/scale": tensors["vit.layernorm.weight"],
        "norm/bias": tensors["vit.layernorm.bias"],
        "head/classify/kernel": tensors["classifier.weight"].T,
        "head/classify/bias": tensors["classifier.bias"],
    }
    for layer in range(SIZES["depth"]):
        block = f"vit.layers.{layer}."
        for ours, theirs in NAMES.items():
            found[f"block_{layer:02d}/{ours}"] = tensors[block + theirs]
        for ours, theirs in LINEAR.items():
            found[f"block_{layer:02d}/{ours}/kernel"] = tensors[f"{block}{theirs}.weight"].T
            found[f"block_{layer:02d}/{ours}/bias"] = tensors[f"{block}{theirs}.bias"]
    return found


@pytest.fixture(scope="module")
def reference():
    """A random model of transformers with its loss on four images: (model, output, states
    of the last layer, labels)."""
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=(6, 8),
        patch_size=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
        num_labels=5,
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    labels = torch.tensor([0, 3, 4, 1])
    pixels = torch.tensor(np.asarray(images())).permute(0, 3, 1, 2)
    last = model.vit(pixels).last_hidden_state.detach().numpy()
    output = model(pixels, labels=labels)
    output.loss.backward()
    return model, output, last, labels.numpy()


def test_parity_of_states_logits_loss_and_gradients(reference):
    theirs, output, last, labels = reference
    own = {name: np.array(x.detach().numpy()) for name, x in theirs.named_parameters()}
    model, _ = made()
    params = paths.stack(renamed(own), model.stacks)
    params = jax.tree.map(jnp.asarray, paths.unflatten(params))
    batch = {"images": images(), "labels": jnp.asarray(labels)}
    batch |= {"index": jnp.arange(4), "units": jnp.ones(4, jnp.int32), "seeds": None}

    hidden = model.apply({"params": params}, batch["images"], method="encode")
    np.testing.assert_allclose(hidden, last, atol=2e-5)
    found = logits(model, params, batch["images"])
    np.testing.assert_allclose(found, output.logits.detach().numpy(), atol=5e-5)

    @jax.jit
    def loss(params):
        total, weight = classify.loss_fn(build.apply(model), params, batch)["loss"]
        return total / weight

    value, gradients = jax.value_and_grad(loss)(params)
    assert value == pytest.approx(output.loss.item(), abs=1e-5)
    expected = renamed({name: x.grad.numpy() for name, x in theirs.named_parameters()})
    found = paths.unstack(gradients)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, atol=5e-5, err_msg=name)
