"""One MLM training step of ours against transformers + torch: same weights, batch, masks, optimizer
and dropout.

    python benchmarks/mlm_step.py --variant=base --batch=16 --seq=128 --precision=float32

Needs torch (`pip install torch`). Before anything is timed, both losses must agree. Steps are timed
in turn, ours, theirs, ours, …; the ratio is theirs / ours for neighbours, so above 1 we are faster.
Two amounts of work:

    equal  every position goes through our vocabulary projection too, as it does in transformers
    best   only the masked positions do, as in our `mlm` objective
"""

import platform
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import sides
import torch
import transformers

from fmjax.objectives import losses, mlm


def main() -> None:
    flags = sides.arguments(__doc__).parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        reference = sides.peer(flags, folder)
        arrays, labels = batch(rng, flags, reference.config.vocab_size)
        for_torch = {"input_ids": arrays["input_ids"].astype(np.int64), "labels": labels}
        runs = {
            "torch": (sides.theirs(reference, flags), for_torch),
            "equal": (sides.ours(folder, flags, "mlm", every_position), arrays),
            "best": (sides.ours(folder, flags, "mlm", mlm.loss_fn), arrays),
        }

    losses = {name: side.loss(given) for name, (side, given) in runs.items()}
    print("loss before the first update, without dropout:", losses)
    spread = max(losses.values()) - min(losses.values())
    allowed = 1e-4 if flags.precision == "float32" else 2e-2
    assert spread < allowed, "the sides do not compute the same"

    for side, given in runs.values():
        side.step(given), side.step(given)
    seconds = {name: [] for name in runs}
    for _ in range(flags.runs):
        for name, (side, given) in runs.items():
            start = time.perf_counter()
            side.step(given)
            seconds[name].append(time.perf_counter() - start)
    show(flags, seconds)


def show(flags, seconds: dict[str, list[float]]) -> None:
    tokens = flags.batch * flags.seq
    how = " compiled" if flags.compile else ""
    print(
        f"\n{flags.variant} {flags.batch} x {flags.seq} {flags.precision}, "
        f"dropout {flags.dropout}, remat {flags.remat}, "
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


def batch(rng: np.random.Generator, flags, vocab_size: int) -> tuple[dict, np.ndarray]:
    """(our arrays, torch's labels): full rows with 15 % of the positions as targets."""
    count = int(np.ceil(0.15 * flags.seq))
    ids = rng.integers(5, vocab_size, (flags.batch, flags.seq))
    places = np.sort(np.argsort(rng.random(ids.shape), axis=1)[:, :count], axis=1)
    targets = np.take_along_axis(ids, places, axis=1)
    arrays = {
        "input_ids": ids,
        "segment_ids": np.ones_like(ids),
        "positions": np.broadcast_to(np.arange(flags.seq), ids.shape),
        "token_types": np.zeros_like(ids),
        "index": np.arange(len(ids)),
        "mlm_positions": places,
        "mlm_labels": targets,
    }
    arrays = {name: x.astype(np.int32) for name, x in arrays.items()}
    labels = np.full_like(ids, -100)
    np.put_along_axis(labels, places, targets, axis=1)
    return arrays | {"mlm_weights": np.ones(places.shape, np.float32)}, labels


def every_position(apply, params, batch):
    """The masked-language-model loss with logits for all positions, most of which nothing is asked
    of."""
    keys = ("input_ids", "segment_ids", "positions", "token_types", "seeds")
    hidden = apply(params, *(batch[key] for key in keys), method="encode")
    logits = apply(params, hidden, method="logits")
    rows = jnp.arange(len(hidden))[:, None]
    weights = jnp.zeros(logits.shape[:2]).at[rows, batch["mlm_positions"]].set(1.0)
    labels = batch["input_ids"]
    nats = losses.cross_entropy(logits, labels)
    return {"loss": (jnp.sum(nats * weights), jnp.sum(weights))}


if __name__ == "__main__":
    main()
