"""A tokenizer whose ids one can work out by hand, and a preparation that takes milliseconds."""

import string

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fmjax import data

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A tokenizer folder: one token a character, a = 5, b = 6, … z = 30, "." = 31."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *string.ascii_lowercase, "."])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    folder = tmp_path_factory.mktemp("letters")
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


@pytest.fixture
def prepare(tmp_path, letters):
    """prepare(text or path, **config.data): all in the training split, in a cache of its own."""

    def prepare(text, tokenizer=None, log=lambda line: None, poll=lambda: None, **settings):
        path = text
        if isinstance(text, str):
            path = tmp_path / "corpus.txt"
            path.write_text(text)
        defaults = {
            "name": "text",
            "train": str(path),
            "validation_fraction": 0,
            "seq_len": 16,
            "cache": str(tmp_path / "cache"),
        }
        words = tokenizer or {"name": str(letters)}
        return data.prepare(defaults | settings, words, log=log, poll=poll)

    return prepare


@pytest.fixture(scope="session")
def pydocs():
    """The default data, from the cache that all tests share."""

    def pydocs(**settings):
        return data.prepare(settings, {}, log=lambda line: None)

    return pydocs
