"""Tokenizers: load one in transformers format, or train one on the training documents."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax import snapshot
from fmjax.data import cache, endings, tokenizer_training, vocabulary
from fmjax.data.settings import TokenizerSettings
from fmjax.data.sources import Source
from fmjax.data.vocabulary import Vocab
from fmjax.errors import ConfigError, quoted

SUFFIXES = (".json", ".txt", ".model", ".jinja")  # of what a tokenizer is made of


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
) -> Prepared:
    """Load or train the tokenizer, or reuse the one that the cache has."""
    identity = {"version": 6, **_identity(settings, source)}
    home = root / f"tokenizer-{cache.digest(identity)}"
    with cache.lock(root / f"{home.name}.lock", log, poll):
        index = cache.verified(home, log)
        if index is None:
            index = cache.build(home, lambda folder: _write(folder, settings, source, log))
    with np.load(home / "vocab.npz") as stored:
        tables = {name: stored[name] for name in stored.files}
    ids = index["vocab"]
    several = ("first", "last", "sentinels", "fim")
    given = {name: tuple(ids[name]) for name in several if ids[name] is not None}
    vocab = Vocab(**ids | given, **tables)
    return Prepared(vocab, home / "files", index["files"]["files/tokenizer.json"][1])


def load(source: str | Path, revision: str = ""):
    """The fast tokenizer of a folder in transformers format, or of a hub id.

    The files are data: no code among them is run, and none may name a file elsewhere.

    Raises:
      ConfigError: `source` is neither, or holds no fast tokenizer.
    """
    folder = snapshot.find(source, revision, files=snapshot.TOKENIZER)
    try:
        _check_options(folder / "tokenizer_config.json")
        tokenizer = _transformers().AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False
        )
        tokenizer("a \U0010ffff")  # a word that no vocabulary has: some fail at the first of these
    except Exception as error:  # the library raises whatever its parsers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"The tokenizer of {source} cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{source} has no tokenizer.json, nor can one be made of it.")
    return tokenizer


def encoder(folder: Path):
    """The `tokenizers.Tokenizer` in `folder`, without the truncation and padding of its file."""
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True  # "[MASK]" in a text is seven characters, not a mask
    return encoder


def _identity(settings: TokenizerSettings, source: Source) -> dict:
    if settings.name == "train":
        keys = ("kind", "vocab_size", "lowercase", "special")
        return {"source": source.identity} | {key: getattr(settings, key) for key in keys}
    if os.path.isdir(os.path.expanduser(settings.name)):
        folder = snapshot.find(settings.name)
        files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
        return {"files": {path.name: cache.file_digest(path) for path in files}}
    if settings.name.startswith((".", "/", "~")):
        raise ConfigError(f"config.tokenizer.name={quoted(settings.name)}: no such folder.")
    return {"name": settings.name, "revision": settings.revision}


def _write(folder: Path, settings: TokenizerSettings, source: Source, log) -> dict:
    if settings.name == "train":
        log(f"tokenizer: training {settings.kind} with {settings.vocab_size} tokens")
        trained, named = tokenizer_training.train(settings, source)
        tokenizer = _transformers().PreTrainedTokenizerFast(tokenizer_object=trained, **named)
    else:
        tokenizer = _load(settings)
    vocab = vocabulary.of(tokenizer, settings.name)
    try:
        tokenizer.save_pretrained(folder / "files")
    except ValueError as error:  # chat templates whose names lead out of the folder
        name = quoted(settings.name)
        raise ConfigError(f"config.tokenizer.name={name} cannot be saved: {error}") from error
    if settings.name != "train":  # a run goes on to end its texts as the model of the folder does
        source = snapshot.find(settings.name, settings.revision, files=snapshot.TOKENIZER)
        if ids := endings.listed(source):
            endings.write(folder / "files", ids)
    found = vocab._asdict()
    tables = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    np.savez(folder / "vocab.npz", **tables)
    ids = ("size", "pad_id", "mask_id", "first", "last", "sentinels", "fim")
    return {"vocab": {name: found[name] for name in ids}}


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
