"""Text of ours against that of transformers on torch: same weights, prompts and tokens.

    python benchmarks/decode.py --variant=gpt2 --batch=1 --precision=float32

Needs torch (`pip install torch`). Greedy, `--prompt` tokens and then `--length` more, of which a
round times as many as they are and one alone: the difference is decoding, the rest prefill. Rounds
take turns; ratios are of neighbours: theirs / ours, so above 1 we are faster. Before anything is
timed both must write the same, in float32. Bytes are those of the weights, once a step, over the
time of a step. `--sampled` draws with temperature 0.8 and top-k 50; `--peer` is the precision of
theirs, to compare with their best; `--weights=int8` has our matrices in eight bits.
"""

import argparse
import statistics
import tempfile
import time
from importlib.metadata import version

import jax
import numpy as np
import sides

from fmjax import convert
from fmjax.generation import decoder
from fmjax.generation.sampling import Sampling
from fmjax.models import gpt2, param_init
from fmjax.params import paths, sharding


def main() -> None:
    parser = sides.arguments(__doc__, ["tiny", "gpt2", "medium"])
    parser.set_defaults(batch=1, seq=512, dropout=0.0)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--peer", default="", help="precision of theirs, where it is not ours")
    parser.add_argument("--weights", default="", choices=["", "int8"], help="of ours")
    parser.add_argument("--cache", default="", choices=["", "int8"], help="of ours")
    flags = parser.parse_args()
    flags.peer = flags.peer or flags.precision
    print(
        f"{flags.variant}, {flags.batch} x {flags.prompt} + {flags.length}, ours {flags.precision} "
        f"{flags.weights}, theirs {flags.peer}"
        + ", sampled" * flags.sampled
        + f", {flags.runs} rounds on {jax.devices()[0].device_kind}; "
        + ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers")),
        flush=True,
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 50257, (flags.batch, flags.prompt)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        sides.decoder(flags, folder)
        made = {
            "transformers": theirs(folder, flags, prompts),
            "ours": ours(folder, flags, prompts),
        }
    texts = {name: write(flags.length) for name, (write, _) in made.items()}
    same = texts["transformers"] == texts["ours"]
    print(f"the same {flags.length} tokens of each: {same}")
    exact = flags.precision == flags.peer == "float32" and not flags.weights + flags.cache
    assert same or flags.sampled or not exact
    seconds = {name: {"prefill": [], "token": []} for name in made}
    for write, _ in made.values():
        write(1), write(flags.length)
    for _ in range(flags.runs):
        for name, (write, _) in made.items():
            write(1)  # what the others left cold
            one, whole = timed(write, 1), timed(write, flags.length)
            seconds[name]["prefill"].append(one)
            seconds[name]["token"].append((whole - one) / (flags.length - 1))
    print(f"{'':22} {'median ms':>9} {'min':>8} {'max':>8} {'tok/s':>7} {'GB/s':>6}  this / ours")
    for part, tokens in (("prefill", flags.prompt), ("token", 1)):
        for name, (_, size) in made.items():
            found, own = seconds[name][part], seconds["ours"][part]
            each = [a / b for a, b in zip(found, own, strict=True)]
            middle = statistics.median(found)
            print(
                f"{name:12} {part:9} {1e3 * middle:9.2f} {1e3 * min(found):8.2f} "
                f"{1e3 * max(found):8.2f} {flags.batch * tokens / middle:7.0f} "
                f"{size / middle / 1e9:6.1f}  {statistics.median(each):.2f} "
                f"({min(each):.2f} … {max(each):.2f})"
            )


def timed(write, length) -> float:
    start = time.perf_counter()
    write(length)
    return time.perf_counter() - start


def theirs(folder: str, flags: argparse.Namespace, prompts: list[list[int]]):
    """(writes so many tokens, bytes of the weights)."""
    import torch
    import transformers

    dtype = getattr(torch, flags.peer)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    model.config.use_cache = model.generation_config.use_cache = True
    ids = torch.tensor(prompts)
    how = dict(do_sample=False) if not flags.sampled else dict(temperature=0.8, top_k=50)
    how |= dict(do_sample=flags.sampled, eos_token_id=None, pad_token_id=0)
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    @torch.inference_mode()
    def write(length):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **how)
        return out[:, ids.shape[1] :].tolist()

    return write, size


def ours(folder: str, flags: argparse.Namespace, prompts: list[list[int]]):
    _, described = convert.describe(folder)
    model = gpt2.Model(**described, dtype=flags.precision)
    abstract = param_init.abstract_params(model, sharding.make_mesh(data=1))
    params, _ = convert.load(folder, abstract)
    writer = decoder.Generator(model, params, weights=flags.weights, cache=flags.cache)
    how = Sampling(temperature=0.8, top_k=50) if flags.sampled else Sampling(temperature=0)
    return lambda length: writer(prompts, length, how), paths.nbytes(writer.params)


if __name__ == "__main__":
    main()
