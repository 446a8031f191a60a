"""What a model of n-grams knows, beside a run that read the same tokens.

    python benchmarks/ngram.py --folder=runs/clm-… --blimp=blimp/ --lambada=lambada.jsonl

Interpolated Kneser–Ney (Chen and Goodman 1999, §4.1.6) of `--order`, with one discount, over as
many tokens of the run's training rows as the run has read; the same questions in the same tokens as
configs/fewshot.py asks. No model is computed.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from fmjax import data
from fmjax.checkpoints import pretrained
from fmjax.data import tokenizer as tokenizers
from fmjax.data import vocabulary
from fmjax.evaluation import benchmarks, multiple_choice, scoring
from fmjax.evaluation.loglikelihood import Likely
from fmjax.params import sharding

DISCOUNT = 0.75


class Order:
    """n-grams of one length: codes are numbers whose digits, to the base of the vocabulary, are the
    tokens; `counts` of how often each is there, or behind how many different tokens."""

    def __init__(self, codes: np.ndarray, counts: np.ndarray, base: int):
        self.codes, self.counts = codes, counts
        self.before, first = np.unique(codes // base, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.kinds = np.diff(np.append(first, len(codes)))

    def found(self, codes: np.ndarray, base: int) -> tuple[np.ndarray, np.ndarray]:
        """(what is certain, the weight of what shorter n-grams say) of each."""
        count = _at(self.codes, self.counts, codes)
        total, kinds = (_at(self.before, x, codes // base) for x in (self.totals, self.kinds))
        known = np.maximum(total, 1)
        sure = np.where(total > 0, np.maximum(count - DISCOUNT, 0) / known, 0)
        return sure, np.where(total > 0, DISCOUNT * kinds / known, 1)


def _at(codes, values, wanted):
    place = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    return np.where(codes[place] == wanted, values[place], 0)


class Model:
    """Judges texts as `likelihood.Scorer` does."""

    def __init__(self, tokens: np.ndarray, order: int, size: int, first: list[int]):
        assert float(size) ** order < 2**63, "the codes of so long n-grams do not fit into 64 bits"
        self.base, self.order, self.first = size, order, first
        codes = [tokens.astype(np.int64)]
        for n in range(1, order):
            codes.append(codes[-1][:-1] * size + tokens[n:])
        grams, counts = np.unique(codes[-1], return_counts=True)
        self.orders = [Order(grams, counts, size)]
        for n in range(order - 1, 0, -1):  # behind how many different tokens each is
            grams, counts = np.unique(grams % size**n, return_counts=True)
            self.orders.append(Order(grams, counts, size))
        self.orders.reverse()

    def probabilities(self, text: np.ndarray, start: int) -> np.ndarray:
        """Of each token of the text from `start` on."""
        p = np.full(len(text) - start, 1 / self.base)
        for n, order in enumerate(self.orders, 1):
            at = np.arange(max(start, n - 1), len(text))  # where so many are before
            codes = sum(text[at - i].astype(np.int64) * self.base**i for i in range(n))
            sure, rest = order.found(codes, self.base)
            p[at - start] = sure + rest * p[at - start]
        return p

    def __call__(self, pairs: list) -> list[Likely]:
        found = []
        for context, said in pairs:
            text = np.array([*self.first, *context, *said])
            p = self.probabilities(text, len(text) - len(said))
            found.append(Likely(float(-np.log(p).sum()), False, len(said)))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", required=True, help="of a decoder's run")
    parser.add_argument("--order", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=0, help="0: as many as the run has read")
    parser.add_argument("--blimp", default="")
    parser.add_argument("--lambada", default="")
    flags = parser.parse_args()
    opened = pretrained.open_folder(flags.folder, sharding.make_mesh())
    config = opened.config
    dataset = data.prepare(config.data.to_dict(), {"name": str(opened.tokenizer)})
    split = dataset.splits["train"]
    wanted = flags.tokens or opened.step * config.batch_size * split.seq_len
    rows = split.rows(np.arange(min(len(split), -(-wanted // split.seq_len))))
    tokens = rows["input_ids"][rows["segment_ids"] > 0][:wanted]
    words = tokenizers.load(opened.tokenizer)
    start = time.perf_counter()
    first = vocabulary.around(words)[0]
    model = Model(tokens, flags.order, len(words), list(first))
    print(f"{flags.order}-grams of {len(tokens):,} tokens, {time.perf_counter() - start:.1f} s")
    text = split_text(dataset)
    print(f"validation: {-np.log(model.probabilities(text, 1)).mean():.3f} nats a token")
    for name, path in (("blimp", flags.blimp), ("lambada", flags.lambada)):
        if path:
            _, found = scoring.judged(
                model, multiple_choice.encoder(words), benchmarks.items(name, path)
            )
            print(f"{name} of {Path(path).name}\n{scoring.table(found)}")
            print(json.dumps({key: found[key]["mean"] for key in found}))


def split_text(dataset: data.Dataset) -> np.ndarray:
    """The tokens of the validation rows, in order."""
    split = dataset.splits["validation"]
    rows = split.rows(np.arange(len(split)))
    return rows["input_ids"][rows["segment_ids"] > 0]


if __name__ == "__main__":
    main()
