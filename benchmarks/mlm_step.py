"""One MLM training step of ours against transformers + torch: same weights, batch, masks, optimizer
and dropout.

    python benchmarks/mlm_step.py --variant=base --batch=16 --seq=128 --precision=float32

Needs torch (`pip install torch`). Before anything is timed, both losses must agree. Steps are timed
in turn, ours, theirs, ours, …; the ratio is theirs / ours for neighbours, so above 1 we are faster.
Two amounts of work:

    equal  every position goes through our vocabulary projection too, as it does in transformers
    best   only the masked positions do, as in our `mlm` objective
"""

import argparse
import functools
import platform
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from fmjax import build, convert, objectives, optim, setup, sharding, state
from fmjax.models import bert
from fmjax.objectives import mlm
from fmjax.step import make_train_step

OPTIM = dict(
    name="adamw",
    args=dict(b1=0.9, b2=0.999, eps=1e-8),
    lr=1e-4,
    schedule="constant",
    warmup=0,
    cooldown=0,
    end=0.0,
    clip=0.0,
    weight_decay=0.01,
    decay=".*",
    layer_decay=1.0,
    ema=0.0,
)


def main() -> None:
    flags = arguments()
    rng = np.random.default_rng(0)
    sizes = bert.VARIANTS[flags.variant]
    with tempfile.TemporaryDirectory() as folder:
        reference = peer(sizes, flags, folder)
        abstract_of = functools.partial(ours, folder, flags)
        batch = masked_batch(rng, flags, reference.config.vocab_size)
        sides = {"torch": torch_side(reference, batch, flags)}
        for work in ("equal", "best"):
            sides[work] = abstract_of(work, batch)

    losses = {name: side["loss"]() for name, side in sides.items()}
    print("loss before the first update, without dropout:", losses)
    spread = max(losses.values()) - min(losses.values())
    assert spread < (1e-4 if flags.precision == "float32" else 2e-2), (
        "the sides do not compute the same"
    )

    for side in sides.values():
        side["step"](), side["step"]()
    seconds = {name: [] for name in sides}
    for _ in range(flags.runs):
        for name, side in sides.items():
            start = time.perf_counter()
            side["step"]()
            seconds[name].append(time.perf_counter() - start)
    tokens = flags.batch * flags.seq
    how = " compiled" if flags.compile else ""
    print(
        f"\n{flags.variant} {flags.batch} x {flags.seq} {flags.precision}, "
        f"dropout {flags.dropout}, "
        f"{flags.runs} alternated runs on {jax.devices()[0].device_kind} ({platform.machine()})\n"
        f"jax {jax.__version__}, torch {torch.__version__}{how}, "
        f"transformers {transformers.__version__}"
    )
    header = f"{'':8} {'median s':>9} {'min':>7} {'max':>7} {'tok/s':>8}"
    print(f"{header}  torch / this: median (min … max)")
    for name, values in seconds.items():
        ratios = [t / v for t, v in zip(seconds["torch"], values, strict=True)]
        print(
            f"{name:8} {statistics.median(values):9.3f} {min(values):7.3f} {max(values):7.3f} "
            f"{tokens / statistics.median(values):8.0f}  {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} … {max(ratios):.2f})"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--variant", default="mini", choices=["tiny", "mini", "small", "medium", "base", "large"]
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--dropout", type=float, default=0.1, help="as in the original: 0.1")
    parser.add_argument("--remat", default="none", choices=["none", "block", "dots"])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile the peer")
    return parser.parse_args()


def masked_batch(rng: np.random.Generator, flags, vocab_size: int) -> dict[str, np.ndarray]:
    """Full rows with 15 % of the positions as targets."""
    count = int(np.ceil(0.15 * flags.seq))
    ids = rng.integers(5, vocab_size, (flags.batch, flags.seq))
    order = np.argsort(rng.random(ids.shape), axis=1)[:, :count]
    return {"input_ids": ids, "positions": np.sort(order, axis=1)}


def peer(sizes: dict, flags, folder: str) -> transformers.BertForMaskedLM:
    config = transformers.BertConfig(
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["mlp"],
        hidden_dropout_prob=flags.dropout,
        attention_probs_dropout_prob=flags.dropout,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(folder)
    return model


def torch_side(model, batch, flags) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.01, fused=True)
    ids = torch.tensor(batch["input_ids"]).to(device)
    labels = torch.full_like(ids, -100)
    rows = torch.arange(len(ids))[:, None]
    labels[rows, torch.tensor(batch["positions"])] = ids[rows, torch.tensor(batch["positions"])]
    run = torch.compile(model) if flags.compile else model

    def loss(module):
        half = flags.precision == "bfloat16"
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            return module(input_ids=ids, labels=labels).loss

    def step():
        optimizer.zero_grad()
        value = loss(run.train())
        value.backward()
        optimizer.step()
        return float(value.detach())

    def evaluated():
        with torch.no_grad():
            return float(loss(model.eval()))

    return {"loss": evaluated, "step": step}


def ours(folder: str, flags, work: str, batch: dict[str, np.ndarray]) -> dict:
    _, options = convert.describe(folder)
    net, assigned = setup.grouped(
        bert.Model(**{**options, "dtype": flags.precision, "remat": flags.remat}),
        ((".*", "train"),),
        OPTIM,
        {},
    )
    split = functools.partial(optim.split, assigned=assigned)
    mesh = sharding.make_mesh(data=1)
    made = optim.make(
        state.abstract_params(net),
        assigned,
        steps=lambda _: 100,
        depth=net.cfg.depth,
        optim=OPTIM,
        group_optim={},
    )
    abstract = state.abstract(net, made.tx, split, mesh)
    params, _ = convert.load(folder, abstract.params)
    current = state.create(abstract, net, made.tx, split, 0, params)
    loss_fn = mlm.loss_fn if work == "best" else every_position
    goals = [objectives.Objective("mlm", 1.0, None, loss_fn)]
    step_fn = jax.jit(make_train_step(build.apply(net), goals, made.tx, split), donate_argnums=0)
    ids, places = batch["input_ids"], batch["positions"]
    arrays = {
        "input_ids": ids,
        "segment_ids": np.ones_like(ids),
        "positions": np.broadcast_to(np.arange(flags.seq), ids.shape),
        "token_types": np.zeros_like(ids),
        "index": np.arange(len(ids)),
        "mlm_positions": places,
        "mlm_labels": np.take_along_axis(ids, places, axis=1),
    }
    arrays = {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}
    arrays["mlm_weights"] = jnp.ones(places.shape, jnp.float32)
    holder = {"state": current}

    @jax.jit
    def loss(params):
        found = objectives.metrics(
            goals, build.apply(net), params, arrays, jax.random.key(0), False
        )
        return found["mlm/loss"][0] / found["mlm/loss"][1]

    def step():
        holder["state"], found = step_fn(holder["state"], arrays)
        return float(found["loss"])

    return {"loss": lambda: float(loss(holder["state"].params)), "step": step}


def every_position(apply, params, batch):
    """The masked-language-model loss with logits for all positions, most of which nothing is asked
    of."""
    keys = ("input_ids", "segment_ids", "positions", "token_types", "seeds")
    hidden = apply(params, *(batch[key] for key in keys), method="encode")
    logits = apply(params, hidden, method="logits")
    rows = jnp.arange(len(hidden))[:, None]
    weights = jnp.zeros(logits.shape[:2]).at[rows, batch["mlm_positions"]].set(1.0)
    labels = batch["input_ids"]
    nats = (
        jax.nn.logsumexp(logits, axis=-1)
        - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    )
    return {"loss": (jnp.sum(nats * weights), jnp.sum(weights))}


if __name__ == "__main__":
    main()
