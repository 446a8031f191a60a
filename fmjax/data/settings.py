"""The keys of `config.data` and `config.tokenizer`: their defaults, and what fits together.

What a single key may hold is a row of `fmjax.config.rules.RULES`.
"""

import dataclasses
from collections.abc import Mapping

from fmjax.config import rules
from fmjax.errors import ConfigError, did_you_mean

# What the columns and the label of a labelled format hold (records.KINDS): {format: (number of
# columns, kind of the columns, kind of the label)}. Of "choices" the last column is the choices.
LABELLED = {
    "classes": ((1, 2), "text", "label"),
    "labels": ((1, 2), "text", "set"),
    "values": ((1, 2), "text", "number"),
    "tags": ((1,), "texts", "labels"),
    "spans": ((2,), "text", "answers"),
    "choices": ((2,), "text", "label"),
    "texts": ((1, 2, 3), "text", ""),
    "seq2seq": ((1,), "passage", "targets"),
}
# {objective of labelled rows: the settings of rows for it}.
ROWS_OF_TASK = {
    "classify": {"long": "truncate", "format": "classes"},
    "regress": {"long": "truncate", "format": "values"},
    "tag": {"long": "truncate", "format": "tags", "columns": "tokens", "label": "tags"},
    "span": {
        "long": "split",  # into windows
        "format": "spans",
        "columns": "question,context",
        "label": "answers",
    },
    "choose": {"long": "truncate", "format": "choices", "columns": "text,endings"},
    "contrast": {"long": "truncate", "format": "texts"},
}
# What the columns of a conversation hold, by their number: all of its messages; what is asked and
# what is answered; an instruction, its input, which may be empty, and the answer.
CHAT = {1: ("messages",), 2: ("filled", "filled"), 3: ("filled", "text", "filled")}
# {format with several documents a row: the same with one}.
ALONE = {"packed": "padded", "chat": "chat_padded"}


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
    columns: str | tuple[str, ...] | list[str] = "text"  # names, or one text of names with commas
    label: str = "label"  # column of the labels; empty: there are none (to predict)
    classes: tuple[str, ...] | list[str] = ()  # names of the classes in order; empty: as found
    target_len: int = 0  # of seq2seq; 0: seq_len
    source_prefix: str = ""  # of seq2seq and texts: what stands before each, such as its task
    pack: bool = False  # several pairs of seq2seq in one row, which do not see each other
    stride: int = 64  # tokens that two windows of one long context share
    document: str = "blank_line"
    frame: str = "piece"  # what the tokenizer's tokens for begin and end stand around
    room: int = 0  # tokens left free after each piece, for what an objective adds to it
    template: str = "auto"  # of chat: the tokenizer's, where it has none "plain"; or see chat.py
    long: str = "split"
    on_bad_record: str = "raise"
    overlap: str = "keep"  # texts of `validation` that `train` has too; drop: not in training
    path: str = ""  # hub: id or local folder
    subset: str = ""
    revision: str = ""
    streaming: bool = False
    max_documents: int = 0  # of each part given (train, validation) before it is split; 0 = all
    examples: int = 0  # of the training rows, which training draws by its seed; 0 = all
    workers: int = 0  # processes that tokenise, 0 = chosen by the size of the corpus
    skip: tuple | list = ()  # ranges of examples that training passes over: see batches.py
    cache: str = ""  # empty: $FMJAX_CACHE, else ~/.cache/fmjax

    def __post_init__(self):
        _check("data", self)
        if self.validation and not self.train and self.name != "hub":
            raise ConfigError("config.data.validation needs config.data.train beside it.")
        if self.overlap == "drop" and not self.validation:
            raise ConfigError(
                "config.data.overlap='drop' needs config.data.validation: without it documents are "
                "split by a hash of their text, so that none is in both."
            )
        if self.name == "pycode" and self.train:
            raise ConfigError(
                "config.data.name='pycode' is the code of Python's library: leave "
                "config.data.train empty, or set config.data.name to 'text'."
            )
        if self.name == "text" and not self.train:
            raise ConfigError(
                "data.name='text' needs files: set config.data.train to names or globs."
            )
        if self.path and self.name != "hub":
            raise ConfigError(
                f"config.data.path={self.path!r} needs config.data.name='hub'; files are named by "
                "config.data.train."
            )
        if self.name == "hub" and not self.path:
            raise ConfigError("data.name='hub' needs config.data.path: a dataset id or a folder.")
        names = self.column_names
        numbers = LABELLED[self.format][0] if self.labelled else CHAT if self.chat else (1,)
        if len(names) not in numbers or len(set(names)) != len(names):
            raise ConfigError(
                f"config.data.columns={self.columns!r}: format={self.format!r} needs "
                f"{' or '.join(map(str, numbers))} different columns."
            )
        if self.label in names:
            raise ConfigError(f"config.data.label={self.label!r} is one of config.data.columns.")
        if (self.labelled or self.chat) and self.format != "spans" and self.long == "split":
            raise ConfigError(
                f"config.data.long='split' has no meaning with format={self.format!r}, where a "
                "piece would lack its label or its question. Set it to truncate, drop or error."
            )
        prefixed = self.source_prefix and self.format != "texts"
        if self.format != "seq2seq" and (self.target_len or prefixed or self.pack):
            raise ConfigError(
                "config.data.target_len, source_prefix and pack have no meaning with format="
                f"{self.format!r}: they are of 'seq2seq', source_prefix of 'texts' too. Leave them "
                "out."
            )
        if self.room and (self.labelled or self.format == "pairs"):
            raise ConfigError(
                f"config.data.room={self.room} has no meaning with format={self.format!r}, whose "
                "rows are no documents. Leave it at 0."
            )
        if self.frame == "document" and (self.labelled or self.chat or self.format == "pairs"):
            raise ConfigError(
                f"config.data.frame='document' has no meaning with format={self.format!r}, whose "
                "rows are no documents. Leave it at 'piece'."
            )
        if self.format == "pairs" and self.long != "split":
            raise ConfigError(
                f"config.data.long={self.long!r} has no meaning with format='pairs', which cuts "
                "documents into chunks of whole sentences. Leave it at 'split'."
            )

    @property
    def labelled(self) -> bool:
        """True if a record is an example with a label, and not a document."""
        return self.format in LABELLED

    @property
    def chat(self) -> bool:
        """True if a record is a conversation, of which the assistant's words are learnt."""
        return self.format in ("chat", "chat_padded")

    @property
    def unlabelled(self) -> bool:
        """True if the labels that the format has are left out, to predict them."""
        return self.labelled and bool(LABELLED[self.format][2]) and not self.label

    @property
    def target(self) -> str:
        """The meaning of the data's labels: a labelled format, a kind of pairs, "" for none."""
        return self.format if self.labelled else self.pair if self.format == "pairs" else ""

    @property
    def column_names(self) -> list[str]:
        given = self.columns
        names = given.split(",") if isinstance(given, str) else given
        return [name.strip() for name in names if name.strip()]

    @property
    def schema(self) -> dict[str, str]:
        """{column: kind of its values}: what readers look for in a record."""
        names = self.column_names
        if self.chat:
            return dict(zip(names, CHAT[len(names)], strict=True))
        if not self.labelled:
            return dict.fromkeys(names, "text")
        _, kind, label = LABELLED[self.format]
        schema = dict.fromkeys(names, kind)
        if self.format == "choices":
            schema[names[-1]] = "texts"
        return schema | ({self.label: label} if self.label and label else {})

    def key_of(self, column: str) -> str:
        """The config key that named a column."""
        return "config.data.label" if column == self.label else "config.data.columns"

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
    special: str = "bert"  # of a trained one: the special tokens of which family
    revision: str = ""

    def __post_init__(self):
        _check("tokenizer", self)
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


def _check(section: str, settings: DataSettings | TokenizerSettings) -> None:
    """Raise ConfigError for values that the rules of their keys forbid."""
    for name, value in dataclasses.asdict(settings).items():
        key, rule = f"config.{section}.{name}", rules.rule_of(f"{section}.{name}")
        if isinstance(rule, rules.Check):
            if not rule.accepts(value):
                raise ConfigError(f"{key}={value!r} must be {rule.words}.")
        elif rule is not None and value not in rule:
            raise ConfigError(f"{key}={value!r} is not known." + did_you_mean(value, rule))
