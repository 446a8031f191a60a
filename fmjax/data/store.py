"""Documents to integers: tokenise a source once into memory-mapped shards that every run shares.

A shard is a folder `00007/` with, for each split, `train.tokens.npy` (uint16 or uint32),
`train.documents.npy` and `train.sentences.npy` (int64: where each document and sentence starts in
the tokens, and the end); and `bad.jsonl` with the records left out, where there are any. Shards are
cut by characters read, so a killed preparation finds the same ones again and redoes only those that
are missing.
"""

import collections
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax.data import vocabulary
from fmjax.data.sources import Document, Source
from fmjax.data.tokenizer import Prepared, encoder
from fmjax.distributed import signals
from fmjax.errors import DataError
from fmjax.io import disk_cache, progress
from fmjax.io.mapped import MappedFiles

SPLITS = ("train", "validation")
OVERLAP = "dropped_as_in_validation"  # counts of these, of which the user is told
SHARD_CHARACTERS = 1 << 23  # about 2 M tokens
ENCODE_CHARACTERS = 1 << 20  # what `tokenizers` gets at once: it needs hundreds of bytes a token
IN_PROCESS_SHARDS = 4  # `tokenizers`' threads are enough; with more, share out the Python part too


class Shard(NamedTuple):
    """One split of one shard; sentence k is tokens[sentences[k]:sentences[k + 1]], and so on."""

    tokens: np.ndarray
    documents: np.ndarray
    sentences: np.ndarray


class Conversations(NamedTuple):
    """The same of chat.py; `targets` [tokens] are 1 for what is learnt."""

    tokens: np.ndarray
    documents: np.ndarray
    targets: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of two dtypes that hold every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def tokenise(
    folder: Path,
    source: Source,
    tokenizer: Prepared,
    workers: int,
    log: Callable[[str], None],
    poll: Callable[[], None],
    write: Callable[..., dict] | None = None,
) -> list[dict]:
    """Fill `folder` with shards, or find it filled; returns the index of each shard.

    `write`: what makes a shard (None: of texts), given its folder, those of the tokenizer, the size
    of the vocabulary, and documents.
    """
    whole = disk_cache.verified(folder / "whole", log, poll)
    if whole is not None:
        indices = [
            disk_cache.verified(folder / f"{i:05d}", log, poll) for i in range(whole["shards"])
        ]
        if all(indices):
            return indices
    indices, tokens = [], 0
    with progress.part(log) as show:
        made = _make(folder, source, tokenizer, workers, log, poll, write or _write_shard)
        for index, done in made:
            indices.append(index)
            tokens += sum(index["tokens"].values())
            show(done, f"data: tokenised {tokens:,} tokens")
    disk_cache.build(folder / "whole", lambda _: {"shards": len(indices)})
    return indices


def read(folder: Path, shards: int, split: str, kind: type = Shard) -> Iterator:
    """The shards of one split in order; each a `kind`.

    Raises DataError where one is no longer what was written: what is made of it would be kept under
    the digest of the whole.
    """
    for i in range(shards):
        place = folder / f"{i:05d}"
        try:
            files = MappedFiles(place)
            with files.unchanged():
                shard = kind(*(np.array(files.npy(f"{split}.{p}.npy")) for p in kind._fields))
                disk_cache.checked(place, prefix=f"{split}.")
        except DataError:
            raise
        except disk_cache.DAMAGE as error:
            raise DataError(
                f"{place} has been changed while it was read ({error}). The same command prepares "
                "it again."
            ) from error
        yield shard


def _make(folder, source, tokenizer, workers, log, poll, write) -> Iterator[tuple[dict, float]]:
    """(index, share of the source read) of every shard, in order; intact ones are kept."""
    chunks = enumerate(_chunks(source.documents(), SHARD_CHARACTERS))
    first = list(itertools.islice(chunks, IN_PROCESS_SHARDS + 1))
    if workers == 0:
        workers = os.cpu_count() if len(first) > IN_PROCESS_SHARDS else 1

    def job(number: int, chunk: list[Document]) -> tuple:
        return folder / f"{number:05d}", tokenizer.folder, tokenizer.vocab.size, chunk

    jobs = itertools.starmap(job, itertools.chain(first, chunks))
    if workers == 1:
        for shard, *job in jobs:
            poll()
            index = disk_cache.verified(shard, log, poll) or write(shard, *job)
            yield index, job[-1][-1].done
        return

    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker)
    pending = collections.deque()  # in order: (index or future, its documents)
    try:
        for shard, *job in jobs:
            poll()
            index = disk_cache.verified(shard, log, poll)
            pending.append((index or _submit(pool, write, shard, *job), job[-1]))
            if len(pending) > 2 * workers:  # bounds the texts held in memory
                yield _finished(*pending.popleft())
        while pending:
            poll()
            yield _finished(*pending.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, *job) -> Future:
    try:
        return pool.submit(*job)
    except Exception as error:  # what a pool raises whose processes are dying depends on the moment
        raise _died(job[-1]) from error


def _finished(index: dict | Future, chunk: list[Document]) -> tuple[dict, float]:
    try:
        return index.result() if isinstance(index, Future) else index, chunk[-1].done
    except BrokenProcessPool as error:
        raise _died(chunk) from error


def _died(chunk: list[Document]) -> DataError:
    return DataError(
        f"A process died while it tokenised documents from {chunk[0].where} on: killed, or out of "
        "memory? Start again to resume; fewer processes (config.data.workers) need less memory. "
        "(A script of your own must call fmjax under `if __name__ == '__main__':`.)"
    )


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The parent decides when to stop: a Ctrl-C or a scheduler signals the whole group.
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    # Without this a SIGKILLed parent leaves its workers waiting for ever.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _chunks(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Lists of documents with about `size` characters."""
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= size:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _write_shard(folder: Path, tokenizer: Path, vocab_size: int, chunk: list[Document]) -> dict:
    """Tokenise the documents of one shard; returns its index."""
    encode = encoder(tokenizer)
    return build(folder, chunk, lambda documents: _tokenised(encode, documents, vocab_size))


def build(
    folder: Path,
    chunk: list[Document],
    tokenised: Callable[[list[Document]], tuple[Shard | Conversations, int, list[Document]]],
) -> dict:
    """Make the shard of a chunk; `tokenised` gives that of some documents, how many of them are
    empty, and those that turn out to be bad."""

    def write(temporary: Path) -> dict:
        counts = {"documents": {}, "tokens": {}, "empty_documents": {}}
        bad = write_bad(temporary, chunk)
        for split in SPLITS:
            documents = [document for document in chunk if document.split == split]
            shard, empty, more = tokenised(documents)
            bad += write_bad(temporary, more)
            for part, array in shard._asdict().items():
                np.save(temporary / f"{split}.{part}.npy", array)
            counts["documents"][split] = len(shard.documents) - 1
            counts["tokens"][split] = len(shard.tokens)
            counts["empty_documents"][split] = empty
        counts[OVERLAP] = {"train": overlapping(chunk), "validation": 0}
        return counts | {"bad_records": bad}

    return disk_cache.build(folder, write)


def overlapping(documents: list[Document]) -> int:
    """Number of documents that were left out because another split has them."""
    return sum(document.split == "overlap" for document in documents)


def write_bad(folder: Path, documents: list[Document]) -> int:
    """Adds those that are bad to bad.jsonl in `folder`; returns their number."""
    bad = [document for document in documents if document.split == "bad"]
    if bad:
        with open(folder / "bad.jsonl", "a") as file:
            for document in bad:
                record = {"where": document.where, "bad": document.bad, "text": document.text}
                file.write(json.dumps(record) + "\n")
    return len(bad)


def _tokenised(encode, documents: list[Document], vocab_size: int) -> tuple[Shard, int, list]:
    dtype = token_dtype(vocab_size)
    tokens, ends, starts = [np.zeros(0, dtype)], [0], []
    empty = 0
    for part in _chunks(documents, ENCODE_CHARACTERS):
        texts, places = [d.text for d in part], [d.where for d in part]
        encodings = encode.encode_records(texts, places, add_special_tokens=False)
        for document, encoding in zip(part, encodings, strict=True):
            ids = np.array(encoding.ids, np.int64)
            if not ids.size:
                empty += 1
                continue
            if problem := vocabulary.beyond(ids, vocab_size):
                raise DataError(f"{document.where}: {problem}.")
            characters = np.array(encoding.offsets, np.int64)[:, 0]
            starts.append(ends[-1] + sentence_starts(document.text, characters))
            ends.append(ends[-1] + len(ids))
            tokens.append(ids.astype(dtype))
    sentences = np.concatenate([*starts, [ends[-1]]]).astype(np.int64)
    return Shard(np.concatenate(tokens), np.array(ends, np.int64), sentences), empty, []


# A mark that ends a sentence, closing quotes, and white space before anything but a lower-case
# letter; full-width marks need no space; an empty line always ends one. Abbreviations are cut too:
# the splitter knows no language.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s+[^\sa-z])|[。！？]+[」』”’）]*|\n\s*\n")


def sentence_starts(text: str, characters: np.ndarray) -> np.ndarray:
    """Tokens that start a sentence of `text`; `characters` [n]: where each token starts in it."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    starts = np.searchsorted(characters, ends)  # the first token at or after each end
    return np.unique(np.concatenate([[0], starts[starts < len(characters)]]).astype(np.int64))
