"""What an encoder–decoder makes of a file of sources, beside what it should: BLEU, chrF, ROUGE."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fmjax import beams, evaluate, generate, pretrained, processes
from fmjax.data import lines
from fmjax.decoding import Writer
from fmjax.errors import ConfigError, DataError
from fmjax.sampling import Sampling

FILE, TEXTS = "translate.jsonl", "translations.jsonl"
ROUGE = ("rouge1", "rouge2", "rougeLsum")


def run(config: Any, workdir: str | os.PathLike, *, dry_run: bool = False) -> None:
    """The task: writes translations.jsonl in `workdir`, {"source", "target", "written"} a line, and
    adds what they are worth to translate.jsonl in the run folder, else in `workdir`.
    """
    with processes.start(config) as mesh:
        if jax.process_count() > 1:
            raise ConfigError("config.task='translate' works in one process.")
        opened = pretrained.open_folder(config.folder, mesh, config.precision, config.step)
        if not opened.model.decodes:
            raise ConfigError(
                f"config.folder={config.folder!r} has no encoder–decoder, as configs/seq2seq.py "
                "trains one; what a decoder writes configs/generate.py shows."
            )
        how = config.to_dict()
        author = generate.Author(opened, bits=generate.bits_of(how))
        pairs = read(config.file, config.source, config.target, config.limit)
        prompts = [author.ids(how | {"prompt": source}) for source, _ in pairs]
        print(f"\n{opened}: {len(pairs):,} sources of {config.file}")
        if dry_run:
            return
        start = time.perf_counter()
        rows = written(author.writer, prompts, config)
        seconds = time.perf_counter() - start
        texts = [author.text([], row) for row in rows]
    found = scores(texts, [targets for _, targets in pairs]) if config.target else {}
    for name, value in found.items():
        print(f"  {name:<12} {value}")
    out = Path(workdir) / TEXTS
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for (source, targets), text in zip(pairs, texts, strict=True):
            row = {"source": source, "target": targets, "written": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"written to {out}, in {seconds:.1f} s")
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
    evaluate.append(Path(opened.source if opened.config else workdir) / FILE, record)


def read(file: str, source: str, target: str, limit: int = 0) -> list[tuple[str, list[str]]]:
    """(source, its targets) of JSON lines: lists of sources are joined, as in training; several
    targets are as many references. Raises DataError for a row without them."""
    path, pairs = Path(file).expanduser(), []
    if not path.is_file():
        raise ConfigError(f"config.file={file!r}: no such file.")
    for line in lines.read(path):
        if limit and len(pairs) == limit:
            break
        if line.bad or not line.text.strip():
            if line.bad:
                raise DataError(f"{path}:{line.number}: {line.bad}")
            continue
        try:
            row = json.loads(line.text)
            given, wanted = row[source], row[target] if target else []
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}:{line.number} has no column {source!r} or {target!r} "
                f"({type(error).__name__}: {error}): set config.source and config.target."
            ) from error
        given = " ".join(given) if isinstance(given, list) else given
        wanted = [wanted] if isinstance(wanted, str) else wanted
        if not isinstance(given, str) or not all(isinstance(x, str) for x in wanted):
            raise DataError(f"{path}:{line.number}: {source!r} and {target!r} are not texts.")
        pairs.append((given, list(wanted)))
    return pairs


def written(writer: Writer, prompts: Sequence[list[int]], config: Any) -> list[list[int]]:
    """What is written about each source, of `config.length` tokens at most."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, list[int]] = {}
    for first in range(0, len(order), config.batch_size):
        batch = order[first : first + config.batch_size]
        # The last is filled up: a batch of another size would be another program.
        rows = [prompts[i] for i in batch]
        rows += rows[:1] * (config.batch_size - len(rows))
        if config.beams > 1:
            how = beams.Beams(config.beams, config.length_penalty)
            new = [ids for ids, _ in beams.search(writer, rows, config.length, how)]
        else:
            new = writer(rows, config.length, Sampling(temperature=0))
        found |= dict(zip(batch, new, strict=False))
    return [found[i] for i in range(len(prompts))]


def scores(texts: Sequence[str], targets: Sequence[Sequence[str]]) -> dict[str, float | str]:
    """BLEU and chrF of the corpus with their signature (sacreBLEU: Post 2018), and the means of
    ROUGE's F1 (Lin 2004), of several references the best, in percent."""
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ConfigError(
            "config.target asks for BLEU and ROUGE: pip install sacrebleu rouge-score, or set it "
            "to ''."
        ) from error
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
