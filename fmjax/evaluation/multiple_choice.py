"""Questions that are answered by what a model finds most probable, and texts that it should know.

An `Item` is a context and what could follow it. Of several choices the model's is the most probable
by the sum of the logarithms of its tokens' probabilities, by their mean, or by that over its bytes
(Gao et al. 2023, lm-evaluation-harness: `acc` is by the sum, `acc_bytes` by bytes, of which the
space that joins a choice to its context is none); or by its gain, the sum less that after the same
words with nothing in them, which takes out what the model says anyway (Zhao et al. 2021; Holtzman
et al. 2021). Of a single one is measured whether it is what the model would write, and its
perplexity.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmjax.errors import ConfigError
from fmjax.evaluation.loglikelihood import Likely

NORMS = ("sum", "token", "byte", "gain")
DRAWS = 1000  # of the bootstrap


class Item(NamedTuple):
    """`label` is the number of the right choice; `group` what it counts for beside all."""

    context: str
    choices: tuple[str, ...]
    label: int
    group: str = ""
    bare: str | None = None  # the context with nothing asked in it, where there is such a thing


class Found(NamedTuple):
    """A model's judgement of an item: minus log probabilities, tokens and bytes of its choices."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    greedy: tuple[bool, ...]
    bare: tuple[float, ...] = ()  # nats of the choices after the bare context

    def choice(self, norm: str) -> int:
        """The model's; the first of equal ones."""
        if norm == "gain":
            return int(np.argmin(np.subtract(self.nats, self.bare)))
        sizes = dict(sum=(1,) * len(self.nats), token=self.tokens, byte=self.bytes)[norm]
        return int(np.argmin([n / max(1, size) for n, size in zip(self.nats, sizes, strict=True)]))


def judged(
    scorer: Callable[[list[tuple[list[int], list[int]]]], list[Likely]],
    encode: Callable[[str, str], tuple[list[int], list[int]]],
    items: Sequence[Item],
) -> list[Found]:
    """Judge each item by a `loglikelihood.Scorer`; `encode` makes tokens of a context and of its
    continuation."""
    contexts = [
        (item.context,) if item.bare is None else (item.context, item.bare) for item in items
    ]
    asked = [
        (context, choice)
        for item, both in zip(items, contexts, strict=True)
        for context in both
        for choice in item.choices
    ]
    once = list(dict.fromkeys(asked))
    said = dict(zip(once, scorer([encode(*pair) for pair in once]), strict=True))
    found = []
    for item, (context, *bare) in zip(items, contexts, strict=True):
        likely: list[Likely] = [said[context, choice] for choice in item.choices]
        found.append(
            Found(
                tuple(x.nats for x in likely),
                tuple(x.tokens for x in likely),
                tuple(len(choice.removeprefix(" ").encode()) for choice in item.choices),
                tuple(x.greedy for x in likely),
                tuple(said[one, choice].nats for one in bare for choice in item.choices),
            )
        )
    return found


def metrics(items: Sequence[Item], found: Sequence[Found]) -> dict[str, dict[str, Any]]:
    """{metric: its mean, standard error, 95 % interval (bootstrap over items), number of items and,
    where items have groups, the mean of each group}."""
    values: dict[str, list[float]] = {}
    for item, one in zip(items, found, strict=True):
        if len(item.choices) == 1:
            values.setdefault("accuracy", []).append(float(one.greedy[0]))
            values.setdefault("nats", []).append(one.nats[0])
            continue
        for norm in NORMS if one.bare else NORMS[:3]:
            name = "accuracy" if norm == "sum" else f"accuracy_by_{norm}"
            values.setdefault(name, []).append(float(one.choice(norm) == item.label))
    if sizes := {name: len(x) for name, x in values.items() if len(x) != len(items)}:
        raise ConfigError(f"items with one choice stand beside others, {sizes} of {len(items)}.")
    groups = [item.group for item in items]
    return {name: mean(x, groups) for name, x in values.items()}


def mean(values: Sequence[float], groups: Sequence[str]) -> dict[str, Any]:
    """Mean, error and interval of one value per item, and the means of groups."""
    values = np.array(values, float)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    rng = np.random.default_rng(0)
    draws = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(DRAWS)]
    interval = [float(x) for x in np.quantile(draws, (0.025, 0.975))]
    found = {"mean": float(values.mean()), "error": float(error), "interval": interval}
    found["items"] = len(values)
    names = sorted(set(groups) - {""})
    if names:
        groups = np.array(groups)
        found["groups"] = {name: float(values[groups == name].mean()) for name in names}
    return found


def encoder(words: Any, decodes: bool = False) -> Callable[[str, str], tuple[list[int], list[int]]]:
    """Makes tokens of a context and of what follows it, which are cut where the text of both is cut
    by the tokens of the context: a space between them belongs to what follows. The target of an
    encoder–decoder is tokenised alone, as in training."""
    ids = lambda text: list(words(text, add_special_tokens=False)["input_ids"])

    def encode(context: str, said: str) -> tuple[list[int], list[int]]:
        if decodes:
            return ids(context), ids(said.strip())
        space = len(context) - len(context.rstrip())
        if space:
            context, said = context[:-space], context[-space:] + said
        before, whole = ids(context), ids(context + said)
        return before, whole[len(before) :]

    return encode
