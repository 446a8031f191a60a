"""Few-shot and zero-shot evaluation: benchmarks by name, after some examples or none."""

import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax.checkpoints import pretrained
from fmjax.data import tokenizer as tokenizers
from fmjax.distributed import launch
from fmjax.errors import ConfigError
from fmjax.evaluation import (
    benchmarks,
    exact_answer,
    multiple_choice,
    prompt_templates,
)
from fmjax.evaluation.multiple_choice import Item
from fmjax.evaluation.results_log import ResultsLog
from fmjax.evaluation.scoring import judged, scorer_of, table, with_shots
from fmjax.generation import text_generator
from fmjax.io import environment, metrics_log, results
from fmjax.io.atomic import write_arrays, write_atomic
from fmjax.io.workdir import EXAMPLES

FILE, SUMMARY = "fewshot.jsonl", "summary.json"
ROWS = {"format": "classes", "long": "truncate", "validation_fraction": 0.2}


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: asks the model of `config.folder` what `config.benchmark` names, in the words of
    each template, after each number of examples in `config.shots`. Adds a line for each to
    fewshot.jsonl in the run folder, else in `workdir`; of classes in one way, summary.json and
    examples.npz in `workdir` are as of a training run, for a sweep to compare.
    """
    with launch.start(config) as mesh:
        if jax.process_count() > 1:
            raise ConfigError("config.task='fewshot' works in one process.")
        log, summary = ResultsLog(config.folder, workdir, FILE), Path(workdir) / SUMMARY
        if config.benchmark.name == "classes":
            results.check_file(summary)
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        wanted, shown = config.benchmark.to_dict(), any(config.shots)
        if wanted["name"] == "classes":
            found, about = of_data(config, opened)
        else:
            about = {}
            found = benchmarks.asked(wanted, tuple(config.templates), tuple(config.words), shown)
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
            log.append(record)
    if about and len(ways) == 1:
        summarise(summary, given, told, config.norm, record | about)


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
    rows = prompt_templates.labelled(settings, dataset.labels)
    parts = prompt_templates.spread(rows["validation"], config.benchmark.limit), rows["train"]
    found = benchmarks.prompted(
        *parts, tuple(config.templates), tuple(config.words), dataset.labels
    )
    return found, dict(data_digest=dataset.digest, rows_digest=dataset.rows_digest, data=settings)


def asker(config: Any, opened: pretrained.Opened):
    """A function from items to (the model's judgement of each item, metrics)."""
    words = tokenizers.load(opened.tokenizer)
    if config.benchmark.name == "gsm8k":
        # Names of special tokens may hold a number: <|reserved_7|>.
        author = text_generator.TextGenerator(opened, alone=True)
        how = dict(length=config.length, long=config.long)

        def ask(items):
            told = exact_answer.written(author, items, how, config.batch_size)
            return told, exact_answer.metrics(items, told)

        return ask
    scorer = scorer_of(opened, words, config.batch_size, config.score)
    return functools.partial(judged, scorer, multiple_choice.encoder(words, opened.model.decodes))


def summarise(
    file: Path, items: Sequence[Item], told: Sequence[Any], norm: str, record: Mapping[str, Any]
) -> None:
    """summary.json (`file`) and examples.npz beside it of an answer to each item, under the names
    that a trained classifier's have; `norm` is what counts as the choice."""
    labels = np.array([item.label for item in items], np.int32)  # as of a trained classifier
    right = np.array([one.choice(norm) for one in told]) == labels
    own = {"trainable_parameters": 0, "kept_bytes": 0, "environment": environment.environment()}
    metrics = {"validation/classify/accuracy": float(right.mean())}
    own |= {"all_metrics": record["metrics"], "metrics": metrics, "norm": norm}
    results.make_folder(file.parent)
    write_atomic(file, json.dumps(metrics_log.plain({**record, **own}), indent=2))
    write_arrays(file.with_name(EXAMPLES), {"label": labels, "classify/accuracy": right})
