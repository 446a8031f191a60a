"""Translation of a file of sources by an encoder–decoder, scored against references: BLEU, chrF,
ROUGE."""

import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fmjax.checkpoints import pretrained
from fmjax.data import json_rows, records
from fmjax.distributed import launch
from fmjax.errors import ConfigError, DataError, quoted
from fmjax.evaluation.results_log import ResultsLog
from fmjax.generation import beam_search, text_generator
from fmjax.generation.decoder import Generator
from fmjax.generation.sampling import Sampling
from fmjax.io import results

FILE, TEXTS = "translate.jsonl", "translations.jsonl"
ROUGE = ("rouge1", "rouge2", "rougeLsum")


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: writes translations.jsonl in `workdir`, {"source", "target", "written"} a line, and
    adds what they are worth to translate.jsonl in the run folder, else in `workdir`.
    """
    with launch.start(config) as mesh:
        if jax.process_count() > 1:
            raise ConfigError("config.task='translate' works in one process.")
        log, out = ResultsLog(config.folder, workdir, FILE), Path(workdir) / TEXTS
        results.check_file(out)
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        if not opened.model.decodes:
            raise ConfigError(
                f"config.folder={config.folder!r} has no encoder–decoder, as configs/seq2seq.py "
                "trains one; what a decoder writes configs/generate.py shows."
            )
        how = config.to_dict()
        author = text_generator.TextGenerator(opened, bits=text_generator.quantization_of(how))
        pairs = read(config.file, config.source, config.target, config.limit)
        prompts = [author.ids(how | {"prompt": source}) for source, _ in pairs]
        print(f"\n{opened}: {len(pairs):,} sources of {config.file}")
        if config.target:
            check_installed()
        if dry_run:
            return
        start = time.perf_counter()
        rows = written(author.writer, prompts, config)
        seconds = time.perf_counter() - start
        texts = [author.text([], row) for row in rows]
    row = lambda pair, text: {"source": pair[0], "target": pair[1], "written": text}
    results.write_lines(out, map(row, pairs, texts))
    print(f"written to {out}, in {seconds:.1f} s")
    found = scores(texts, [targets for _, targets in pairs]) if config.target else {}
    for name, value in found.items():
        print(f"  {name:<12} {value}")
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "folder": opened.source,
        "step": opened.step,
        "file": config.file,
        "beams": config.beams,
        "length_penalty": config.length_penalty,
        "seconds": seconds,
        "metrics": found,
    }
    log.append(record)


def read(file: str, source: str, target: str, limit: int = 0) -> list[tuple[str, list[str]]]:
    """(source, its targets) of JSON lines: lists of sources are joined, as in training; several
    targets are as many references. Raises DataError for a row without them."""
    path, pairs = Path(os.path.expanduser(file)), []
    if not path.is_file():
        raise ConfigError(f"config.file={file!r}: no such file.")
    for where, row in json_rows.read(path, "file"):
        if limit and len(pairs) == limit:
            break
        if missing := [name for name in (source, target) if name and name not in row]:
            raise DataError(
                f"{where} has no column {missing[0]!r}, but {quoted(list(row))}: set "
                "config.source and config.target."
            )
        given = _texts(row[source], f"{where}: column {source!r}")
        wanted = _texts(row[target], f"{where}: column {target!r}") if target else []
        pairs.append((" ".join(given), wanted))
    if not pairs:
        raise DataError(f"config.file={file!r} has no row.")
    return pairs


def _texts(value: Any, where: str) -> list[str]:
    """A text, or a list of some, as a list. Raises DataError for anything else."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{where}: {quoted(value)} is neither text nor a list of texts.")
    if bad := next(filter(None, map(records.fault, texts)), ""):
        raise DataError(f"{where}: {bad}")
    return texts


def written(writer: Generator, prompts: Sequence[list[int]], config: Any) -> list[list[int]]:
    """The text generated for each source, of `config.length` tokens at most."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, list[int]] = {}
    for first in range(0, len(order), config.batch_size):
        batch = order[first : first + config.batch_size]
        # The last is filled up: a batch of another size would be another program.
        rows = [prompts[i] for i in batch]
        rows += rows[:1] * (config.batch_size - len(rows))
        if config.beams > 1:
            how = beam_search.Beams(config.beams, config.length_penalty)
            new = [ids for ids, _ in beam_search.search(writer, rows, config.length, how)]
        else:
            new = writer(rows, config.length, Sampling(temperature=0))
        found |= dict(zip(batch, new, strict=False))
    return [found[i] for i in range(len(prompts))]


def check_installed() -> None:
    """Raises ConfigError where what `scores` needs is not installed."""
    missing = [name for name in ("sacrebleu", "rouge_score") if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(
            f"config.target asks for BLEU and ROUGE, but {missing[0]} is not installed: pip "
            "install sacrebleu rouge-score, or set it to ''."
        )


def scores(texts: Sequence[str], targets: Sequence[Sequence[str]]) -> dict[str, float | str]:
    """BLEU and chrF of the corpus with their signature (sacreBLEU: Post 2018), and the means of
    ROUGE's F1 (Lin 2004), of several references the best, in percent."""
    import sacrebleu  # slow to import, and an extra
    from rouge_score import rouge_scorer

    most = max(map(len, targets))
    references = [[one[min(i, len(one) - 1)] for one in targets] for i in range(most)]
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    found = {"bleu": round(bleu.corpus_score(texts, references).score, 2)}
    found["chrf"] = round(chrf.corpus_score(texts, references).score, 2)
    scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
    each = [scorer.score_multi(own, text) for text, own in zip(texts, targets, strict=True)]
    for name in ROUGE:
        found[name] = round(100 * sum(one[name].fmeasure for one in each) / len(each), 2)
    return found | {"signature": str(bleu.get_signature())}
