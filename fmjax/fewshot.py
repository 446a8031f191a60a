"""What a model knows without training: published questions, behind some examples or none."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import benchmarks, choices, evaluate, pretrained, processes
from fmjax.choices import Item
from fmjax.data import tokenizer as tokenizers
from fmjax.data import vocabulary
from fmjax.errors import ConfigError
from fmjax.likelihood import Scorer

FILE = "fewshot.jsonl"
BETWEEN = "\n\n"  # examples, and what is asked behind them


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: asks the model of `config.folder` what `config.benchmark` names, behind each number
    of examples in `config.shots`. Adds a line for each to fewshot.jsonl in the run folder, else in
    `workdir`.
    """
    with processes.start(config) as mesh:
        if jax.process_count() > 1:
            raise ConfigError("config.task='fewshot' works in one process.")
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        wanted = config.benchmark
        items = benchmarks.items(wanted.name, wanted.path, wanted.limit)
        examples = benchmarks.items(wanted.name, wanted.examples) if any(config.shots) else []
        words = tokenizers.load(opened.tokenizer)
        scorer = scorer_of(opened, words, config.batch_size, config.score)
        print(f"\n{opened}: {wanted.name} of {wanted.path}, {len(items):,} items")
        asked = {k: with_shots(items, examples, k, config.seed) for k in config.shots}
        if dry_run:
            return
        for shots, given in asked.items():
            start = time.perf_counter()
            found = choices.judged(scorer, choices.encoder(words, opened.model.decodes), given)
            metrics = choices.metrics(given, found)
            seconds = time.perf_counter() - start
            print(f"{shots} examples before each, {seconds:.1f} s\n{table(metrics)}", flush=True)
            record = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "folder": opened.source,
                "step": opened.step,
                "benchmark": wanted.to_dict(),
                "shots": shots,
                "seed": config.seed,
                "score": config.score,
                "precision": opened.model.cfg.dtype,
                "seconds": seconds,
                "metrics": metrics,
            }
            evaluate.append(Path(opened.source if opened.config else workdir) / FILE, record)


def scorer_of(opened: pretrained.Opened, words: Any, batch_size: int, way: str) -> Scorer:
    """What judges texts with the model of a folder. Raises ConfigError for one that cannot."""
    model = opened.model
    if not model.causal and not model.decodes:
        opened.require_head("mlm")
    if len(words) > model.cfg.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(words):,} tokens, the model {model.cfg.vocab_size:,}: they do "
            "not belong together."
        )
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
        start=found.pad_id,
        trained=config.data.seq_len if config else None,
        batch_size=batch_size,
        prefix=bool(config) and "prefix_lm" in config.objectives,
    )


def with_shots(
    items: Sequence[Item], examples: Sequence[Item], shots: int, seed: int
) -> list[Item]:
    """The items behind so many examples with their answers each, which are drawn for each item by
    the seed; with fewer they are the first of those with more."""
    if not shots:
        return list(items)
    if len(examples) <= shots:
        raise ConfigError(
            f"config.shots has {shots}, and config.benchmark.examples {len(examples)} examples: "
            "give a file of more."
        )
    told = [one.context + one.choices[one.label] for one in examples]
    given = []
    for i, item in enumerate(items):
        order = np.random.default_rng((seed, i)).permutation(len(told))
        drawn = [told[j] for j in order if examples[j] != item][:shots]
        given.append(item._replace(context=BETWEEN.join([*drawn, item.context])))
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
