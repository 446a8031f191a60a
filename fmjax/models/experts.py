"""Mixtures of experts: many MLPs a layer, of which a router chooses a few for each token.

    y = Σ_e w_e · MLP_e(x) over the top k experts of softmax(x R)  [+ σ(x s) · MLP_shared(x)]

(Shazeer et al. 2017; Mixtral, Jiang et al. 2024, §2.1; the shared one: Qwen 2, 2024, §2.2.2.) The
router computes in float32; dispatch.py brings tokens to their experts. Letters: B batch, T
time, D width, E experts, k of a token.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fmjax.models import dispatch, layers
from fmjax.params import paths, sharding
from fmjax.params.precision import DTYPES

COLLECTION = "routing"  # where layers leave their sums: `model.apply(…, mutable=[COLLECTION])`


class Routing(NamedTuple):
    """Router statistics of a model for a batch."""

    loss: Float[Array, ""]  # to be added to a mean loss
    metrics: dict[str, tuple[jax.Array, jax.Array]]  # (sum, weight)


class Experts(nn.Module):
    """The MLP of a layer with experts; `cfg` is a `models.llama.Config`."""

    cfg: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], real: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        cfg, dtype = self.cfg, DTYPES[self.cfg.dtype]
        linear = lambda features, name: layers.Linear(features, False, jnp.float32, name=name)
        logits = linear(cfg.experts, "router")(x)
        weights, chosen, probabilities = route(logits, cfg.experts_per_token, cfg.experts_normed)
        kernels = Weights(cfg.experts, cfg.expert_mlp or cfg.mlp, name="experts")(x.shape[-1])
        how = dict(activation=cfg.activation, dtype=dtype)
        way = functools.partial(dispatch.dropless, **how)
        if cfg.capacity:
            way = functools.partial(dispatch.limited, **how, capacity=cfg.capacity)
        y, served = dispatch.by_device(way, len(x), cfg.experts)(x, weights, chosen, real, *kernels)
        if not self.is_initializing():
            found = sums(logits, probabilities, chosen, real, served)
            self.sow(COLLECTION, "sums", found, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        if cfg.shared_mlp:
            shared = layers.Mlp(cfg.shared_mlp, cfg.activation, True, False, dtype, name="shared")
            y += jax.nn.sigmoid(linear(1, "shared_gate")(x)) * shared(x).astype(jnp.float32)
        return y.astype(dtype)


class Weights(nn.Module):
    """The matrices of all experts, each of the three kinds in one array."""

    experts: int
    hidden: int

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        shapes = {name: (width, self.hidden) for name in ("up", "gate")}
        shapes["down"] = self.hidden, width
        return tuple(Matrices((self.experts, *shapes[name]), name=name)() for name in shapes)


class Matrices(nn.Module):
    """One matrix an expert."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> Float[Array, "E I O"]:
        kernel = self.param("kernel", nn.initializers.normal(0.02), self.shape, jnp.float32)
        # In float32, as the devices' gradients are to be added up in.
        return sharding.gather(kernel, sharding.spec_of("/".join((*self.path, "kernel"))))


def route(
    logits: Float[Array, "B T E"], k: int, normed: bool
) -> tuple[Float[Array, "B T k"], Int[Array, "B T k"], Float[Array, "B T E"]]:
    """(weights of the k most probable experts, which they are, probabilities of all).

    If `normed` the weights of a token sum to 1.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probabilities, k)
    if normed:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen, probabilities


# --- What keeps the router balanced ---


def sums(
    logits: Float[Array, "B T E"],
    probabilities: Float[Array, "B T E"],
    chosen: Int[Array, "B T k"],
    real: Bool[Array, "B T"],
    served: Bool[Array, "B T k"],
) -> dict[str, jax.Array]:
    """The sums that `report` needs of one layer, over the tokens that are no padding."""
    each, weight = probabilities.shape[-1], real.astype(jnp.float32)
    taken = jax.nn.one_hot(chosen, each, dtype=jnp.float32) * weight[..., None, None]
    squares = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    return {
        "taken": jnp.sum(taken, axis=(0, 1, 2)),  # (E)
        "probability": jnp.sum(probabilities * weight[..., None], axis=(0, 1)),  # (E)
        "squares": jnp.sum(squares * weight),
        "tokens": jnp.sum(weight),
        "dropped": jnp.sum(~served & real[..., None], dtype=jnp.float32),
    }


def report(cfg: Any, kept: Mapping[str, Any]) -> Routing | None:
    """The losses of the routers, of what the layers left in `COLLECTION`; None where none did.

    balance: E Σ_e (share of tokens that take e) (mean probability of e), over all layers at once,
    which is k where all are alike (Switch, Fedus et al. 2022, §2.2; as transformers has it).
    router_z: mean of logsumexp(logits)² (ST-MoE, Zoph et al. 2022, §3). dropped: the share of the
    choices that an expert with `capacity` had no room for.

    The first is no mean over examples, and so not the same for a batch and for its parts.
    """
    if not kept:
        return None
    found: dict[str, jax.Array] = {}
    for path, value in paths.flatten(kept).items():
        name = path.rpartition("/")[2]
        own = jnp.sum(value, axis=0) if paths.is_stacked(path) else value
        found[name] = found[name] + own if name in found else own
    tokens = found["tokens"]
    count = jnp.where(tokens > 0, tokens, 1)
    share = jax.lax.stop_gradient(found["taken"]) / count
    balance = cfg.experts * jnp.sum(share * found["probability"] / count)
    loss = cfg.router_aux_loss * balance + cfg.router_z_loss * found["squares"] / count
    metrics = {
        "balance": (balance * tokens, tokens),
        "router_z": (found["squares"], tokens),
        "dropped": (found["dropped"], tokens * cfg.experts_per_token),
    }
    return Routing(loss, metrics)
