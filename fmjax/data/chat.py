"""Conversations to tokens, and which of them are learnt: the assistant's words, and what ends them.

A chat template makes one text of a conversation: the tokenizer's own, or one of `TEMPLATES`. It is
Jinja, which transformers runs in jinja2's immutable sandbox, where it reaches no file and no
attribute of Python's, but may run for ever. What an assistant's turn adds to the text is found by
rendering: the conversation up to it, with the template's prompt for an answer, and with it. Of what
the turn adds is learnt all up to its last special token, which ends it; a line break behind that is
the template's, not the model's.

The text is then tokenised as a whole, but a model that answers is given what is before the answer
alone: where that has other tokens alone, as one would reach into the answer, the text is cut there.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.data import sources, store, vocabulary
from fmjax.data import tokenizer as tokenizers
from fmjax.data.records import EXCERPT
from fmjax.data.settings import DataSettings
from fmjax.data.sources import Document
from fmjax.errors import ConfigError, quoted

# Begins as a document of the tokenizer does; what ends a document ends each answer.
_FIRST, _LAST = "{{ bos_token or cls_token or '' }}", "eos_token or sep_token or ''"
TEMPLATES = {
    "plain": _FIRST + "{% for message in messages %}"
    "{{ '' if loop.first else '\\n\\n' }}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ " + _LAST + " }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}",
    # Taori et al. 2023; what the system says is in the place of the first sentences.
    "alpaca": _FIRST + "{% if messages and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}{% else %}Below is an instruction that describes a task. Write a "
    "response that appropriately completes the request.{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\n### Instruction:\\n' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\n### Response:\\n' + message['content'] + (" + _LAST + ") }}"
    "{% elif not loop.first %}{{ raise_exception('the system speaks first or not at all') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}",
}
# Between an instruction and its input, where these are columns of their own.
INPUT = {"alpaca": "\n\n### Input:\n"}
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Unfit(Exception):
    """Why a conversation cannot be learnt from."""


@dataclasses.dataclass(frozen=True)
class Writer:
    """Makes the shards of conversations (see `store.tokenise`)."""

    template: str  # Jinja
    settings: DataSettings
    identity: Any  # JSON; changes when the same conversations give other tokens

    def __call__(
        self, folder: Path, tokenizer: Path, vocab_size: int, chunk: list[Document]
    ) -> dict:
        reader = Reader(tokenizer, self.template)
        dtype = store.token_dtype(vocab_size)

        def tokenised(documents: list[Document]):
            found, bad = [], []
            for document in documents:
                try:
                    ids, targets = reader.tokens(messages(document, self.settings))
                    if problem := vocabulary.beyond(ids, vocab_size):
                        raise Unfit(problem)
                    found.append((ids, targets))
                except Unfit as error:
                    bad.append(self._bad(document, str(error), len(bad) + 1))
            ids = [np.zeros(0, np.int64), *(ids for ids, _ in found)]
            targets = [np.zeros(0, bool), *(targets for _, targets in found)]
            ends = np.cumsum([len(part) for part in ids])
            return (
                store.Conversations(
                    np.concatenate(ids).astype(dtype),
                    ends,
                    np.concatenate(targets).astype(np.uint8),
                ),
                0,
                bad,
            )

        return store.build(folder, chunk, tokenised)

    def _bad(self, document: Document, why: str, count: int) -> Document:
        policy = self.settings.on_bad_record
        sources.check_bad(document.where, why, policy, count)
        kept = document.text[:EXCERPT] if policy == "quarantine" else ""
        return document._replace(text=kept, split="bad", bad=why)


def writer(folder: Path, settings: DataSettings, log: Callable[[str], None]) -> Writer:
    """The writer for the tokenizer in `folder`; which template it uses is logged.

    Raises ConfigError for a template that cannot be used: it fails, or no special token of the
    tokenizer ends what an assistant says, so that nothing would teach a model to end.
    """
    words = tokenizers.load(folder)
    name, template, _ = fitting(folder, words, settings.template, "config.data.template")
    log(f"data: conversations have the template {name!r}")
    return Writer(template, settings, [name, template, words.special_tokens_map])


def fitting(folder: Path, words: Any, name: str, key: str) -> tuple[str, str, "Reader"]:
    """(its name, the template, what reads by it) for the tokenizer `words` in `folder`, where the
    config has `name` under `key`. Raises ConfigError as `writer` does."""
    own = words.chat_template
    if isinstance(own, dict):  # several, of which this is the one for conversations
        own = own.get("default")
    if name == "auto":
        name = "tokenizer" if own else "plain"
    if name == "tokenizer" and not own:
        raise ConfigError(
            f"{key}='tokenizer', but the tokenizer has no chat template: set it to "
            f"{' or '.join(map(repr, TEMPLATES))}, or to 'auto'."
        )
    template = own if name == "tokenizer" else TEMPLATES[name]
    reader = Reader(folder, template)
    try:
        reader.tokens(PROBE)
    except Unfit as error:
        raise ConfigError(
            f"{key}={name!r} cannot be used with this tokenizer: {error}. Set it to "
            f"{' or '.join(map(repr, TEMPLATES))}."
        ) from error
    return name, template, reader


def messages(document: Document, settings: DataSettings) -> list[dict[str, str]]:
    """The conversation of a record: its messages, or a question and the answer."""
    values = [document.fields[name] for name in settings.column_names]
    if len(values) == 1:
        return values[0]
    asked = values[0]
    if len(values) == 3 and values[1].strip():
        asked += INPUT.get(settings.template, "\n\n") + values[1]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": values[-1]}]


class Reader:
    """Turns conversations into tokens by a template."""

    def __init__(self, folder: Path, template: str):
        self._words, self._template = tokenizers.load(folder), template
        self._encode = tokenizers.encoder_of(self._words)
        self._encode.encode_special_tokens = False  # those of the template
        self._encode.post_processor = None  # which would trim the offsets of spaces
        added = self._words.added_tokens_decoder.values()
        self._ends = _any_of([token.content for token in added])
        self._special = _any_of([token.content for token in added if token.special])

    def tokens(self, messages: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], bool [n]: which are learnt) of a conversation. Raises Unfit."""
        self._refuse_special(messages)
        text, spans = self.spans(messages)
        ids, begins = self._tokenised(text, [start for start, _ in spans])
        learnt = np.zeros(len(ids), bool)
        for start, end in spans:
            learnt |= (begins >= start) & (begins < end)
        return ids, learnt

    def opening(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens that an answer to the messages comes behind. Raises Unfit."""
        self._refuse_special(messages)
        text = self._rendered(messages, add_generation_prompt=True)
        return self._encode.encode(text, add_special_tokens=False).ids

    def end(self) -> int:
        """The token that ends an answer."""
        ids, learnt = self.tokens(PROBE)
        return int(ids[learnt][-1])

    def _refuse_special(self, messages):
        for number, message in enumerate(messages, 1):
            if found := self._special.search(message["content"]):
                raise Unfit(f"message {number} holds {quoted(found[0])}, a special token")

    def spans(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """(text, (first character, last + 1) of each of the assistant's turns). Raises Unfit."""
        text, found = self._rendered(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:i], add_generation_prompt=True)
            after = self._rendered(messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise Unfit(
                    f"message {i + 1}: the chat template writes it, or what is before it, in "
                    "another way when more follows, so that nobody can tell what it says"
                )
            said = after[len(before) :]
            end = max((match.end() for match in self._ends.finditer(said)), default=0)
            if not end or said[end:].strip():
                raise Unfit(f"message {i + 1}: the chat template has no special token at its end")
            found.append((len(before), len(before) + end))
        return text, found

    def _rendered(self, messages: list[dict[str, str]], **how: bool) -> str:
        how |= dict(chat_template=self._template, tokenize=False)
        try:
            return self._words.apply_chat_template(messages, **how)
        except Exception as error:  # a template may raise whatever it likes
            raise Unfit(f"the chat template fails: {quoted(str(error))}") from error

    def _tokenised(self, text: str, borders: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], first characters [n]) of the text, cut at borders before which it would have
        other tokens alone."""
        encode = lambda text: self._encode.encode(text, add_special_tokens=False)
        start, rest, parts = 0, encode(text), []
        for border in borders:
            alone = encode(text[start:border])
            if rest.ids[: len(alone.ids)] != alone.ids:
                parts.append((start, alone))
                start, rest = border, encode(text[border:])
        parts.append((start, rest))
        ids = [i for _, part in parts for i in part.ids]
        begins = [start + begin for start, part in parts for begin, _ in part.offsets]
        return np.array(ids, np.int64), np.array(begins, np.int64)


def _any_of(texts: list[str]) -> re.Pattern:
    """Matches each of the texts, and nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
