"""Conversations to tokens, and which of them are learnt: the assistant's words, and what ends them.

A chat template makes one text of a conversation: the tokenizer's own, or one of `TEMPLATES`. It is
Jinja of whoever made the tokenizer, and is rendered under bounds (templates.py). Where the text has
the answers says turns.py.

The text is then tokenised as a whole, but a model that answers is given what is before the answer
alone: where that has other tokens alone, as one would reach into the answer, the text is cut there.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.data import sources, store, turns, vocabulary
from fmjax.data import tokenizer as tokenizers
from fmjax.data.records import EXCERPT
from fmjax.data.settings import DataSettings
from fmjax.data.sources import Document
from fmjax.data.turns import Unfit
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
    version = 2  # of what is learnt of a conversation
    return Writer(template, settings, [name, template, words.special_tokens_map, version])


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


def messages(document: Document, settings: DataSettings) -> list[dict[str, Any]]:
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
        words = tokenizers.load(folder)
        self.turns = turns.Turns(words, template)
        self._encode = tokenizers.encoder_of(words)
        self._encode.encode_special_tokens = False  # those of the template
        self._encode.post_processor = None  # which would trim the offsets of spaces

    def tokens(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], bool [n]: which are learnt) of a conversation. Raises Unfit."""
        self._refuse_special(messages)
        text, spans = self.turns.spans(messages)
        ids, begins = self._tokenised(text, [start for start, _ in spans])
        learnt = np.zeros(len(ids), bool)
        for start, end in spans:
            learnt |= (begins >= start) & (begins < end)
        return ids, learnt

    def opening(self, messages: list[dict[str, Any]]) -> list[int]:
        """The tokens that an answer to the messages comes after. Raises Unfit."""
        self._refuse_special(messages)
        text = self.turns.text(messages, add_generation_prompt=True)
        return self._encode.encode(text, add_special_tokens=False).ids

    def end(self) -> int:
        """The token that ends an answer."""
        ids, learnt = self.tokens(PROBE)
        return int(ids[learnt][-1])

    def without_special(self, text: str) -> tuple[str, list[str]]:
        """The text without special tokens, and those that were in it."""
        found = []
        while match := self.turns.special.search(text):  # around one, others may come together
            found.append(match[0])
            text = text[: match.start()] + text[match.end() :]
        return text, found

    def _refuse_special(self, messages):
        for number, message in enumerate(messages, 1):
            if found := self.turns.special.search(message["content"]):
                raise Unfit(f"message {number} holds {quoted(found[0])}, a special token")

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
