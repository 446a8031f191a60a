"""The two sides of a comparison: one model with the same weights, in transformers + torch and here.

A side has `step(arrays) -> loss`, one update, and `loss(arrays)`, without dropout or update. Torch
runs fused AdamW and SDPA attention; dropout, weights and arithmetic are the same on both. It is
imported where it is needed, so that the memory of our side alone is ours.
"""

import argparse
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import adapters, build, convert, objectives
from fmjax.checkpoints import pretrained
from fmjax.models import bert, gpt2, param_init
from fmjax.params import groups, sharding
from fmjax.training import optim, setup, state
from fmjax.training.step import make_train_step

OPTIM = dict(
    name="adamw",
    args=dict(b1=0.9, b2=0.999, eps=1e-8),
    lr=1e-4,
    schedule="constant",
    warmup=0,
    cooldown=0,
    delay=0,
    end=0.0,
    clip=0.0,
    weight_decay=0.01,
    decay=".*",
    layer_decay=1.0,
    ema=0.0,
    skip_spikes=0.0,
)


class Side(NamedTuple):
    """One of the two programs that are compared."""

    step: Callable[[dict[str, np.ndarray]], float]
    loss: Callable[[dict[str, np.ndarray]], float]


def arguments(
    description: str, sizes: Sequence[str] = ("tiny", "mini", "small", "medium", "base", "large")
) -> argparse.ArgumentParser:
    """The flags that all comparisons of a training step have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default=sizes[1], choices=sizes)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--dropout", type=float, default=0.1, help="as in the original: 0.1")
    parser.add_argument("--remat", default="none", choices=["none", "block", "dots"])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile the peer")
    return parser


def peer(flags: argparse.Namespace, folder: str, kind: str = "BertForMaskedLM") -> Any:
    """A model of the size `flags.variant` and the class `kind`, initialised and saved in
    `folder`."""
    import torch
    import transformers

    sizes = bert.VARIANTS[flags.variant]
    config = transformers.BertConfig(
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["mlp"],
        max_position_embeddings=max(512, flags.seq),
        hidden_dropout_prob=flags.dropout,
        attention_probs_dropout_prob=flags.dropout,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    model.save_pretrained(folder)
    return model


def decoder(flags: argparse.Namespace, folder: str) -> Any:
    """A GPT-2 of the size `flags.variant`, initialised and saved in `folder`."""
    import torch
    import transformers

    sizes = gpt2.Config(**gpt2.VARIANTS[flags.variant])
    config = transformers.GPT2Config(
        n_embd=sizes.width,
        n_layer=sizes.depth,
        n_head=sizes.heads,
        n_inner=sizes.mlp,
        n_positions=max(1024, flags.seq),
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), flags.dropout),
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    return model


def theirs(model: Any, flags: argparse.Namespace) -> Side:
    """Arrays: `input_ids`, `labels` (-100 where nothing is asked), maybe `attention_mask`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0.01, fused=True)
    run = torch.compile(model) if flags.compile else model

    def loss_of(module, arrays):
        tensors = {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}
        half = flags.precision == "bfloat16"
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            return module(**tensors).loss

    def step(arrays):
        optimizer.zero_grad()
        value = loss_of(run.train(), arrays)
        value.backward()
        optimizer.step()
        return float(value.detach())

    def loss(arrays):
        with torch.no_grad():
            return float(loss_of(model.eval(), arrays))

    return Side(step, loss)


def ours(
    folder: str,
    flags: argparse.Namespace,
    name: str,
    loss_fn: Callable,
    *,
    patterns: Any = ((".*", "train"),),
    adapter: Any = None,
    quantise: Any = None,
    heads: Any = None,
    **options: Any,
) -> Side:
    """Arrays: a batch as `fmjax.data` gives it, with the targets that `loss_fn` wants.

    `patterns` as config.groups, `adapter` and `quantise` as config has them, `heads` the
    parameters under head/ that the folder lacks, `options` of the model.
    """
    how = {"dtype": flags.precision, "remat": flags.remat}
    family, described = convert.describe(folder)
    model = importlib.import_module(f"fmjax.models.{family}").Model(**described | how | options)
    net, assigned = setup.grouped(
        adapters.wrap(model, dict(adapter=adapter, quantise=quantise)), patterns, OPTIM, {}
    )
    split = functools.partial(groups.split, assigned=assigned)
    mesh = sharding.make_mesh(data=1)
    made = optim.make(
        split(param_init.abstract_params(net))[0],
        assigned,
        steps=lambda _: 100,
        depths={"": net.cfg.depth},
        optim=OPTIM,
        group_optim={},
    )
    abstract = state.abstract(net, made.tx, split, mesh)
    fresh = functools.partial(param_init.init_params, net, jax.random.key(0))
    params, _ = convert.load(
        folder,
        abstract.params,
        may_miss=pretrained.FRESH,
        packings=adapters.packings(net),
        initial=fresh,
    )
    if heads:
        params["head"].update(heads)
    holder = {"state": state.create(abstract, net, made.tx, split, 0, params)}
    goals = [objectives.Objective(name, 1.0, None, loss_fn)]
    train_step = make_train_step(build.apply(net), goals, made.tx, split)
    train_step = jax.jit(train_step, donate_argnums=0)

    @jax.jit
    def metrics(params, arrays):
        rng = jax.random.key(0)
        return objectives.metrics(goals, build.apply(net), params, arrays, rng, False)

    def step(arrays):
        holder["state"], found = train_step(holder["state"], jax.tree.map(jnp.asarray, arrays))
        return float(found["loss"])

    def loss(arrays):
        total, weight = metrics(holder["state"].params, arrays)[f"{name}/loss"]
        return float(total / weight)

    return Side(step, loss)
