"""Tokenizers: load one in transformers format, or train one on the training documents."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax.data import endings, lines, tokenizer_training, vocabulary
from fmjax.data.backend import Backend, guarded, reason
from fmjax.data.settings import TokenizerSettings
from fmjax.data.sources import Source
from fmjax.data.vocabulary import Vocab
from fmjax.errors import ConfigError, DataError, quoted
from fmjax.io import disk_cache, snapshot
from fmjax.io.storage import rust_errors

SUFFIXES = (".json", ".txt", ".model", ".jinja")  # of what a tokenizer is made of
FILE, OPTIONS = "tokenizer.json", "tokenizer_config.json"
ENDS = ("add_bos_token", "add_eos_token")  # options that change what surrounds a text
# Files of older formats, and a class of transformers that makes FILE of them.
OLDER = {"vocab.txt": "BertTokenizer", "vocab.json": "GPT2Tokenizer"}


class Prepared(NamedTuple):
    """A tokenizer in the cache: `folder` is in transformers format."""

    vocab: Vocab
    folder: Path
    digest: str


def prepare(
    settings: TokenizerSettings,
    source: Source,
    root: Path,
    log: Callable[[str], None],
    poll: Callable[[], None],
    rows: int | None = None,
) -> Prepared:
    """Load or train the tokenizer, or reuse the one that the cache has.

    `rows` is the number of ids that the model has embeddings of, None where it will have all.
    """
    of_files = _identity(settings, source)
    identity = {"version": 6, **of_files}

    def write(folder: Path) -> dict:
        written = _write(folder, settings, source, log, poll)
        if _identity(settings, source) != of_files:
            raise DataError(
                f"config.tokenizer.name={quoted(settings.name)}: files of the folder have changed "
                "while they were read: start again."
            )
        return written

    home = root / f"tokenizer-{disk_cache.digest(identity)}"
    with disk_cache.lock(root / f"{home.name}.lock", log, poll):
        index = disk_cache.verified(home, log)
        if index is None:
            index = disk_cache.build(home, write)
    with np.load(home / "vocab.npz") as stored:
        tables = {name: stored[name] for name in stored.files}
    ids = index["vocab"]
    several = ("first", "last", "sentinels", "fim")
    given = {name: tuple(ids[name]) for name in several if ids[name] is not None}
    vocab = Vocab(**ids | given, **tables)
    digest = index["files"][f"files/{FILE}"][1]
    if rows is not None and rows < vocab.size:
        added = encoder(home / "files").get_added_tokens_decoder()
        vocab, digest = vocabulary.limited(vocab, rows, added), disk_cache.digest([digest, rows])
    return Prepared(vocab, home / "files", digest)


def load(source: str | Path, revision: str = ""):
    """The fast tokenizer of a folder in transformers format, or of a hub id.

    The files are data: no code among them is run, and none may name a file elsewhere. Where there
    is a tokenizer.json, texts are tokenised by it, whatever class tokenizer_config.json names.

    Raises:
      ConfigError: `source` is neither, or holds no fast tokenizer.
    """
    folder = snapshot.find(source, revision, files=snapshot.TOKENIZER)
    try:
        _check_options(folder / OPTIONS)
        auto = _transformers().AutoTokenizer.from_pretrained
        tokenizer = guarded(auto, str(folder), trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ValueError("it has no tokenizer.json, nor can one be made of it")
        if (folder / FILE).is_file():
            _follow_file(tokenizer, folder)
        tokenizer._tokenizer = Backend(tokenizer.backend_tokenizer)
        tokenizer("a \U0010ffff")  # a word that no vocabulary has: some fail at the first of these
    except Exception as error:  # the library raises whatever its parsers raise
        raise ConfigError(
            f"The tokenizer of {source} cannot be loaded: {reason(error)}{_missing(folder)}"
        ) from error
    return tokenizer


def digests(folder: Path) -> dict[str, str]:
    """{name: digest} of the files of a tokenizer."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): disk_cache.file_digest(path) for path in files}


def encoder(folder: Path) -> Backend:
    """The tokenizer in a folder of the cache or of a run, to encode texts with."""
    import tokenizers

    return _plain(guarded(tokenizers.Tokenizer.from_file, str(folder / FILE)))


def encoder_of(tokenizer) -> Backend:
    """A copy of what `load` returned, to encode texts with."""
    import tokenizers

    return _plain(tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))


def _plain(encoder) -> Backend:
    """The encoder without the truncation and padding of its file."""
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True  # "[MASK]" in a text is seven characters, not a mask
    return Backend(encoder)


def _follow_file(tokenizer, folder: Path) -> None:
    """Put tokenizer.json in the place of what the tokenizer's class has built of its vocabulary.

    Classes of transformers 5 build their own normalizer, pre-tokenizer and model: a Unigram
    vocabulary under the name LlamaTokenizer becomes a BPE without merges. Tokens that other files
    add stay added, and so does what their options put around a text.
    """
    import tokenizers

    built = tokenizer.backend_tokenizer
    file = tokenizers.Tokenizer.from_file(str(folder / FILE))
    if _same(built, file):
        return
    present = {token.content for token in file.get_added_tokens_decoder().values()}
    for _, token in sorted(built.get_added_tokens_decoder().items()):
        if token.content not in present:
            (file.add_special_tokens if token.special else file.add_tokens)([token])
    options = snapshot.read_json(folder / OPTIONS) if (folder / OPTIONS).is_file() else {}
    if any(key in options for key in ENDS):
        file.post_processor = built.post_processor
    tokenizer._tokenizer = file


def _same(built, file) -> bool:
    """True if two tokenizers cut a text alike."""
    parts = ("normalizer", "pre_tokenizer", "model", "decoder")
    state = lambda part: part and part.__getstate__()
    return all(state(getattr(built, name)) == state(getattr(file, name)) for name in parts)


def _missing(folder: Path) -> str:
    """The remedy for a folder without tokenizer.json, "" if there is one or no older file."""
    if (folder / FILE).is_file():
        return ""
    models = sorted(path.name for path in folder.glob("*.model"))
    if models and importlib.util.find_spec("sentencepiece") is None:
        return (
            f". It has {models[0]} but no {FILE}, which sentencepiece makes of it: pip install "
            "sentencepiece protobuf, or give a folder with the file."
        )
    for name, kind in OLDER.items():
        if (folder / name).is_file():
            return (
                f'. It has {name} but no {FILE}: make one, as for a {kind} by python -c "from '
                f"transformers import {kind} as T; T.from_pretrained('{folder}').save_pretrained("
                f"'{folder}')\""
            )
    return ""


def _identity(settings: TokenizerSettings, source: Source) -> dict:
    if settings.name == "train":
        keys = ("kind", "vocab_size", "lowercase", "special")
        return {"source": source.identity} | {key: getattr(settings, key) for key in keys}
    if os.path.isdir(os.path.expanduser(settings.name)):
        folder = snapshot.find(settings.name)
        with lines.readable(folder, "tokenizer.name"):
            files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
            files += sorted(folder.glob("additional_chat_templates/*.jinja"))
            name = lambda path: str(path.relative_to(folder))
            return {"files": {name(path): disk_cache.file_digest(path) for path in files}}
    if settings.name.startswith((".", "/", "~")):
        raise ConfigError(f"config.tokenizer.name={quoted(settings.name)}: no such folder.")
    return {"name": settings.name, "revision": settings.revision}


def _write(folder: Path, settings: TokenizerSettings, source: Source, log, poll) -> dict:
    if settings.name == "train":
        log(f"tokenizer: training {settings.kind} with {settings.vocab_size} tokens")
        trained, named = tokenizer_training.train(settings, source, poll)
        tokenizer = _transformers().PreTrainedTokenizerFast(tokenizer_object=trained, **named)
    else:
        tokenizer = _load(settings)
    vocab = vocabulary.of(tokenizer, settings.name)
    try:
        with rust_errors():
            tokenizer.save_pretrained(folder / "files")
        if settings.name != "train":
            _name_class(folder / "files", tokenizer.backend_tokenizer)
    except ValueError as error:  # chat templates whose names lead out of the folder
        name = quoted(settings.name)
        raise ConfigError(f"config.tokenizer.name={name} cannot be saved: {error}") from error
    if settings.name != "train":  # a run continues to end its texts as the model of the folder does
        source = snapshot.find(settings.name, settings.revision, files=snapshot.TOKENIZER)
        if ids := endings.listed(source):  # none: at the end of a text, which training teaches
            endings.write(folder / "files", ids)
    found = vocab._asdict()
    tables = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    np.savez(folder / "vocab.npz", **tables)
    ids = ("size", "pad_id", "mask_id", "first", "last", "sentinels", "fim")
    return {"vocab": {name: found[name] for name in ids}}


def _name_class(folder: Path, backend) -> None:
    """Let transformers read a saved tokenizer as it is read here: where the class that it names
    builds another, name the one that follows the file."""
    auto = _transformers().AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if _same(auto.backend_tokenizer, backend):
        return
    options = snapshot.read_json(folder / OPTIONS) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / OPTIONS).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def _transformers():
    # Its import tells people without torch that models will not work: they are not used here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


def _load(settings: TokenizerSettings):
    try:
        return load(settings.name, settings.revision)
    except ConfigError as error:
        raise ConfigError(
            f"config.tokenizer.name={quoted(settings.name)}: {error} "
            "Give 'train', a folder in transformers format, or a tokenizer's hub id."
        ) from error


def _check_options(path: Path) -> None:
    """transformers reads a file named by "vocab" or "merges" instead of their content: anybody's
    file would become a vocabulary, and be saved and shared as one."""
    options = snapshot.read_json(path) if path.is_file() else {}
    if named := [key for key in ("vocab", "merges") if isinstance(options.get(key), str)]:
        raise ValueError(f"{path.name} names files of its own as {named}")
