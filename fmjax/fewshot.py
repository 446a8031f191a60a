"""What a model knows without training: questions by name, behind some examples or none."""

import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax import (
    answers,
    choices,
    evaluate,
    generate,
    logs,
    pretrained,
    processes,
    prompts,
    questions,
    report,
)
from fmjax.choices import Item
from fmjax.data import tokenizer as tokenizers
from fmjax.data import vocabulary
from fmjax.errors import ConfigError
from fmjax.likelihood import Scorer
from fmjax.workdir import EXAMPLES, write_arrays, write_atomic

FILE = "fewshot.jsonl"
BETWEEN = "\n\n"  # examples, and what is asked behind them
ROWS = {"format": "classes", "long": "truncate", "validation_fraction": 0.2}


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: asks the model of `config.folder` what `config.benchmark` names, in the words of
    each template, behind each number of examples in `config.shots`. Adds a line for each to
    fewshot.jsonl in the run folder, else in `workdir`; of classes in one way, summary.json and
    examples.npz in `workdir` are as of a training run, for a sweep to compare.
    """
    with processes.start(config) as mesh:
        if jax.process_count() > 1:
            raise ConfigError("config.task='fewshot' works in one process.")
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        wanted, shown = config.benchmark.to_dict(), any(config.shots)
        if wanted["name"] == "classes":
            found, about = of_data(config, opened)
        else:
            about = {}
            found = questions.asked(wanted, tuple(config.templates), tuple(config.words), shown)
        ask = asker(config, opened)
        count = len(next(iter(found.values()))[0])
        print(f"\n{opened}: {wanted['name']} of {wanted['path'] or 'config.data'}, {count:,} items")
        ways = {
            (template, k): with_shots(items, examples, k, config.seed)
            for template, (items, examples) in found.items()
            for k in config.shots
        }
        if dry_run:
            return
        for (template, shots), given in ways.items():
            start = time.perf_counter()
            told, metrics = ask(given)
            seconds = time.perf_counter() - start
            print(f"{shots} examples before each, {seconds:.1f} s: {template!r}\n{table(metrics)}")
            record = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "folder": opened.source,
                "step": opened.step,
                "benchmark": wanted,
                "template": template,
                "shots": shots,
                "seed": config.seed,
                "score": config.score,
                "precision": opened.model.cfg.dtype,
                "seconds": seconds,
                "metrics": metrics,
            }
            evaluate.append(Path(opened.source if opened.config else workdir) / FILE, record)
    if about and len(ways) == 1:
        summarise(Path(workdir), given, told, config.norm, record | about)


def of_data(config: Any, opened: pretrained.Opened) -> tuple[dict, dict[str, Any]]:
    """(as `questions.asked`, what a summary says of the data) of `config.data`, rows with classes
    as configs/finetune.py has them. Raises ConfigError where nothing is asked of them."""
    if not config.templates:
        raise ConfigError(
            "config.benchmark.name='classes' needs config.templates: texts that name the columns "
            "of config.data.columns in braces, such as 'Review: {sentence}\\nSentiment:'."
        )
    given = {key: value for key, value in config.data.items() if value is not None}
    settings = ROWS | {"seq_len": 128} | given
    dataset = opened.prepare(settings)
    rows = prompts.labelled(settings, dataset.labels)
    parts = prompts.spread(rows["validation"], config.benchmark.limit), rows["train"]
    found = questions.prompted(*parts, tuple(config.templates), tuple(config.words), dataset.labels)
    return found, dict(data_digest=dataset.digest, rows_digest=dataset.rows_digest, data=settings)


def asker(config: Any, opened: pretrained.Opened):
    """What gives (what the model says of each item, metrics) of items."""
    words = tokenizers.load(opened.tokenizer)
    if config.benchmark.name == "gsm8k":
        # Names of special tokens may hold a number: <|reserved_7|>.
        author = generate.Author(opened, alone=True)
        how = dict(length=config.length, long=config.long)

        def ask(items):
            told = answers.written(author, items, how, config.batch_size)
            return told, answers.metrics(items, told)

        return ask
    scorer = scorer_of(opened, words, config.batch_size, config.score)
    return functools.partial(judged, scorer, choices.encoder(words, opened.model.decodes))


def judged(scorer: Scorer, encode: Any, items: Sequence[Item]) -> tuple[list, dict[str, dict]]:
    """(what the model says of each item, metrics)."""
    told = choices.judged(scorer, encode, items)
    return told, choices.metrics(items, told)


def summarise(
    folder: Path, items: Sequence[Item], told: Sequence[Any], norm: str, record: Mapping[str, Any]
) -> None:
    """summary.json and examples.npz of an answer to each item, under the names that a trained
    classifier's have; `norm` is what counts as the choice."""
    labels = np.array([item.label for item in items], np.int32)  # as of a trained classifier
    right = np.array([one.choice(norm) for one in told]) == labels
    own = {"trainable_parameters": 0, "kept_bytes": 0, "environment": report.environment()}
    metrics = {"validation/classify/accuracy": float(right.mean())}
    own |= {"all_metrics": record["metrics"], "metrics": metrics, "norm": norm}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "summary.json", json.dumps(logs.plain({**record, **own}), indent=2))
    write_arrays(folder / EXAMPLES, {"label": labels, "classify/accuracy": right})


def scorer_of(opened: pretrained.Opened, words: Any, batch_size: int, way: str) -> Scorer:
    """What judges texts with the model of a folder. Raises ConfigError for one that cannot."""
    model = opened.model
    opened.require_output()
    generate.check_tokens(model, words)
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
        decode=words.decode,
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
