"""Text whose tokens a smaller model guesses: ours and that of transformers, each with and without.

    python benchmarks/speculative.py --folder=big --draft=small --prompts=stories.txt

Both folders are in Hugging Face format, of Llamas with the same tokens. What is written goes on
from the first `--prompt` tokens of each of the first lines, one by one; greedy, or `--sampled` with
temperature 0.8. Rounds take turns. Greedy texts must be the same with and without guesses; those of
transformers are in float32 as well, and their sameness is printed. Times have the prompts in them.
"""

import argparse
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import jax

from fmjax.checkpoints import pretrained
from fmjax.data import tokenizer as tokenizers
from fmjax.generation import decoder
from fmjax.generation.sampling import Sampling
from fmjax.generation.speculative import SpeculativeGenerator
from fmjax.params import sharding


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", required=True, help="a text file, a prompt a line")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ahead", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--weights", default="", choices=["", "int8"], help="of our big model")
    flags = parser.parse_args()
    print(
        f"{flags.count} x {flags.prompt} + {flags.length} {flags.weights}"
        + ", sampled" * flags.sampled
        + f", {flags.runs} rounds on {jax.devices()[0].device_kind}; "
        + ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers")),
        flush=True,
    )
    prompts = [ids[: flags.prompt] for ids in texts(flags)]
    sides = ours(flags) | theirs(flags)
    written = {name: write(prompts) for name, (write, _) in sides.items()}
    if not flags.sampled:
        alone = written["ours"]
        print(f"transformers writes the same: {written['transformers'] == alone}")
        assert all(found == alone for name, found in written.items() if name.startswith("ours"))
    seconds = {name: [] for name in sides}
    for write, _ in sides.values():
        write(prompts)
    for _ in range(flags.runs):
        for name, (write, _) in sides.items():
            start = time.perf_counter()
            write(prompts)
            seconds[name].append(time.perf_counter() - start)
    tokens = flags.count * flags.length
    print(f"{'':26} {'ms a token':>10} {'min':>7} {'max':>7}  read at once  without / this")
    for name, (_, at_once) in sides.items():
        found = [1e3 * x / tokens for x in seconds[name]]
        alone = seconds[name.partition(",")[0]]
        each = [a / b for a, b in zip(alone, seconds[name], strict=True)]
        print(
            f"{name:26} {statistics.median(found):10.3f} {min(found):7.3f} {max(found):7.3f}  "
            f"{at_once():12.2f}  {statistics.median(each):.2f} ({min(each):.2f} … {max(each):.2f})"
        )


def texts(flags: argparse.Namespace) -> list[list[int]]:
    words = tokenizers.load(Path(flags.folder))
    lines = Path(flags.prompts).read_text(encoding="utf-8").splitlines()
    found = [words(line)["input_ids"] for line in lines]
    return [ids for ids in found if len(ids) >= flags.prompt][: flags.count]


def ours(flags: argparse.Namespace) -> dict:
    """{what it is: (writes behind the prompts, tokens that the model read at once)}."""
    mesh = sharding.make_mesh(data=1)
    big, small = (pretrained.open_folder(x, mesh) for x in (flags.folder, flags.draft))
    alone = decoder.Generator(big.model, big.params, weights=flags.weights)
    guesser = decoder.Generator(small.model, small.params)
    how = Sampling(temperature=0.8 if flags.sampled else 0)
    sides = {"ours": (lambda prompts: one_by_one(alone, prompts, flags.length, how), lambda: 1)}
    for ahead in flags.ahead:
        both = SpeculativeGenerator(alone, guesser, ahead)
        write = lambda prompts, both=both: both(prompts, flags.length, how)
        at_once = lambda both=both: both.written / both.rounds
        sides[f"ours, {ahead} ahead"] = write, at_once
    return sides


def one_by_one(writer, prompts, length, how) -> list[list[int]]:
    return [writer([ids], length, how, first=i)[0] for i, ids in enumerate(prompts)]


def theirs(flags: argparse.Namespace) -> dict:
    """As `ours`; how many tokens are read at once is not told."""
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    big, small = (load(x, dtype=torch.float32).eval() for x in (flags.folder, flags.draft))
    for model in (big, small):
        model.generation_config.eos_token_id = None
    how = dict(do_sample=flags.sampled)
    how |= dict(temperature=0.8, top_k=0) if flags.sampled else {}  # else of the 50 likeliest
    how |= dict(max_new_tokens=flags.length, min_new_tokens=flags.length, pad_token_id=0)

    @torch.inference_mode()
    def write(prompts, **draft):
        found = []
        for ids in prompts:
            ids = torch.tensor([ids])
            out = big.generate(ids, attention_mask=torch.ones_like(ids), **how, **draft)
            found.append(out[0, ids.shape[1] :].tolist())
        return found

    guessed = lambda prompts: write(prompts, assistant_model=small)
    nan = lambda: float("nan")
    return {"transformers": (write, lambda: 1), "transformers, assisted": (guessed, nan)}


if __name__ == "__main__":
    main()
