"""The keys of `config.data` and `config.tokenizer`: their defaults, and what they may hold."""

import dataclasses
from collections.abc import Mapping

from fmjax.errors import ConfigError, did_you_mean


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """`config.data`. Sizes in tokens; `validation_fraction` is a share of documents."""

    name: str = "pydocs"
    seq_len: int = 128
    format: str = "packed"
    pair: str = "nsp"
    train: str | tuple[str, ...] | list[str] = ""  # text: files or globs; hub: name of the split
    validation: str | tuple[str, ...] | list[str] = ""  # empty: a share of the documents of `train`
    validation_fraction: int | float = 0.05
    column: str = "text"
    document: str = "blank_line"
    long: str = "split"
    on_bad_record: str = "raise"
    path: str = ""  # hub: id or local folder
    subset: str = ""
    revision: str = ""
    streaming: bool = False
    max_documents: int = 0  # per split, 0 = all
    workers: int = 0  # processes that tokenise, 0 = chosen by the size of the corpus
    cache: str = ""  # empty: $FMJAX_CACHE, else ~/.cache/fmjax

    def __post_init__(self):
        _choice("data.name", self.name, ("pydocs", "text", "hub"))
        _choice("data.format", self.format, ("packed", "padded", "pairs"))
        _choice("data.pair", self.pair, ("nsp", "sop"))
        _choice("data.document", self.document, ("blank_line", "line", "file"))
        _choice("data.long", self.long, ("split", "truncate", "drop", "error"))
        _choice("data.on_bad_record", self.on_bad_record, ("raise", "skip", "quarantine"))
        _range("data.seq_len", self.seq_len, 8, 2**20)
        _range("data.validation_fraction", self.validation_fraction, 0, 0.99)
        _range("data.max_documents", self.max_documents, 0, 2**62)
        _range("data.workers", self.workers, 0, 1024)
        if self.validation and not self.train and self.name != "hub":
            raise ConfigError("config.data.validation needs config.data.train beside it.")
        if self.name == "text" and not self.train:
            raise ConfigError(
                "data.name='text' needs files: set config.data.train to names or globs."
            )
        if self.name == "hub" and not self.path:
            raise ConfigError("data.name='hub' needs config.data.path: a dataset id or a folder.")
        if self.format == "pairs" and self.long != "split":
            raise ConfigError(
                f"config.data.long={self.long!r} has no meaning with format='pairs', which cuts "
                "documents into chunks of whole sentences. Leave it at 'split'."
            )

    @property
    def source(self) -> str:
        """`name`, but files given to the default mean those files."""
        return "text" if self.name == "pydocs" and self.train else self.name


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """`config.tokenizer`: `name` is "train", a hub id or a folder in transformers format."""

    name: str = "train"
    kind: str = "wordpiece"
    vocab_size: int = 8192
    lowercase: bool = True
    revision: str = ""

    def __post_init__(self):
        _choice("tokenizer.kind", self.kind, ("wordpiece", "bpe", "unigram"))
        _range("tokenizer.vocab_size", self.vocab_size, 32, 2**24)
        if not self.name:
            raise ConfigError("config.tokenizer.name is empty. Give 'train', a hub id or a folder.")


def read(kind: type, values: Mapping, section: str):
    """`kind(**values)`; an unknown name is a `ConfigError` with its near misses."""
    possible = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in possible:
            raise ConfigError(
                f"Unknown key config.{section}.{name}." + did_you_mean(name, possible)
            )
    return kind(**values)


def _choice(key: str, value: str, possible: tuple[str, ...]) -> None:
    if value not in possible:
        raise ConfigError(f"config.{key}={value!r} is not known." + did_you_mean(value, possible))


def _range(key: str, value: int | float, low: int | float, high: int | float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"config.{key}={value!r} must be a number from {low} to {high}.")
