"""Multiple-choice items judged by a model, after examples with their answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmjax.checkpoints import pretrained
from fmjax.data import vocabulary
from fmjax.errors import ConfigError
from fmjax.evaluation import multiple_choice
from fmjax.evaluation.loglikelihood import Scorer
from fmjax.evaluation.multiple_choice import Item
from fmjax.generation import conversations, text_generator

BETWEEN = "\n\n"  # examples, and what is asked after them


def judged(scorer: Scorer, encode: Any, items: Sequence[Item]) -> tuple[list, dict[str, dict]]:
    """(what the model says of each item, metrics)."""
    told = multiple_choice.judged(scorer, encode, items)
    return told, multiple_choice.metrics(items, told)


def scorer_of(opened: pretrained.Opened, words: Any, batch_size: int, way: str) -> Scorer:
    """A Scorer that judges texts with the model of a folder. Raises ConfigError if the model
    cannot."""
    model = opened.model
    opened.require_output()
    text_generator.check_tokens(model, words)
    found = vocabulary.of(words, str(opened.tokenizer))
    config = opened.config
    return Scorer(
        model,
        opened.params,
        first=found.first,
        last=found.last,
        mask_id=found.mask_id,
        word_start=found.word_start,
        way=way,
        start=conversations.trained_start(model, words),
        trained=config.data.seq_len if config else None,
        batch_size=batch_size,
        prefix=bool(config) and "prefix_lm" in config.objectives,
        decode=words.decode,
    )


def with_shots(
    items: Sequence[Item], examples: Sequence[Item], shots: int, seed: int
) -> list[Item]:
    """The items after so many examples with their answers each, which are drawn for each item by
    the seed; with fewer they are the first of those with more."""
    if not shots:
        return list(items)
    if len(examples) <= shots:
        raise ConfigError(
            f"config.shots has {shots}, and there are {len(examples)} examples to show: give a "
            "file of more in config.benchmark.examples, of classes in config.data.train."
        )
    told = [one.context + one.choices[one.label] for one in examples]
    given = []
    for i, item in enumerate(items):
        order = np.random.default_rng((seed, i)).permutation(len(told))
        drawn = [told[j] for j in order if examples[j] != item][:shots]
        bare = None if item.bare is None else BETWEEN.join([*drawn, item.bare])
        given.append(item._replace(context=BETWEEN.join([*drawn, item.context]), bare=bare))
    return given


def table(metrics: dict[str, dict[str, Any]]) -> str:
    """The means with their standard errors and intervals, and below the groups of the first."""
    rows = [
        f"  {name:<18} {one['mean']:8.4f} ± {one['error']:.4f}   "
        f"95 %: {one['interval'][0]:.4f} … {one['interval'][1]:.4f}   of {one['items']:,}"
        for name, one in metrics.items()
    ]
    groups = next(iter(metrics.values())).get("groups", {})
    width = max(map(len, groups), default=0)
    rows += [f"    {name:<{width}} {mean:.3f}" for name, mean in groups.items()]
    return "\n".join(rows)
