"""Conversations to tokens, and which of them are learnt: the assistant's words, and what ends them.

A chat template makes one text of a conversation: the tokenizer's own, or one of `TEMPLATES`. It is
Jinja of whoever made the tokenizer, and is rendered under bounds (templates.py).

An answer is looked for in the text of the whole conversation, as templates write one otherwise when
more follows (Qwen 3 leaves out what was thought). It is what changes in the text with its words. It
begins where the prompt for it ends, as far as the text has that prompt, and ends with the last
special token of what the template closes it by; a line break behind that is the template's, not the
model's.

The text is then tokenised as a whole, but a model that answers is given what is before the answer
alone: where that has other tokens alone, as one would reach into the answer, the text is cut there.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.data import sources, store, templates
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
                    found.append(reader.tokens(messages(document, self.settings)))
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
        self._render = templates.renderer(template, words.special_tokens_map)
        self._encode = tokenizers.encoder(folder)
        self._encode.encode_special_tokens = False  # those of the template
        self._encode.post_processor = None  # which would trim the offsets of spaces
        added = words.added_tokens_decoder.values()
        self._special = _any_of([token.content for token in added if token.special])
        # Some end a turn with a token that is not special; Gemma lists line breaks among these.
        self._other = _any_of([token.content for token in added if token.content.strip()])

    def tokens(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n], bool [n]: which are learnt) of a conversation. Raises Unfit."""
        self._refuse_special(messages)
        text, spans = self.spans(messages)
        ids, begins = self._tokenised(text, [start for start, _ in spans])
        learnt = np.zeros(len(ids), bool)
        for start, end in spans:
            learnt |= (begins >= start) & (begins < end)
        return ids, learnt

    def opening(self, messages: list[dict[str, Any]]) -> list[int]:
        """The tokens that an answer to the messages comes behind. Raises Unfit."""
        self._refuse_special(messages)
        text = self.text(messages, add_generation_prompt=True)
        return self._encode.encode(text, add_special_tokens=False).ids

    def end(self) -> int:
        """The token that ends an answer."""
        ids, learnt = self.tokens(PROBE)
        return int(ids[learnt][-1])

    def unfinished(self, messages: list[dict[str, Any]]) -> str:
        """The text of the messages, of which the last is to be gone on with. Raises Unfit."""
        text = self.text(messages)
        return text[: self._words_in(text, messages, len(messages) - 1)[1]]

    def spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """(text, (first character, last + 1) of each of the assistant's turns that is to be learnt,
        as its "weight" says). Raises Unfit."""
        text = self.text(messages)
        answers = [
            i
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("weight", 1)
        ]
        return text, [self._span(text, messages, i) for i in answers]

    def text(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """What the template makes of the messages. Raises Unfit."""
        said = [{key: message[key] for key in ("role", "content")} for message in messages]
        try:
            return self._render(said, add_generation_prompt)
        except templates.TemplateError as error:
            raise Unfit(f"the chat template fails: {quoted(str(error))}") from error

    def _refuse_special(self, messages):
        for number, message in enumerate(messages, 1):
            if found := self._special.search(message["content"]):
                raise Unfit(f"message {number} holds {quoted(found[0])}, a special token")

    def _span(self, text: str, messages: list[dict[str, Any]], i: int) -> tuple[int, int]:
        first, last = self._words_in(text, messages, i)
        prompt = self.text(messages[:i], add_generation_prompt=True)
        if text.startswith(prompt):
            start = len(prompt)
        else:  # what is before it is written in another way, or the prompt begins the answer
            before = self._words_in(text, messages, i - 1)[1] if i else 0
            prompt = (
                self._around(messages[:i], i - 1, add_generation_prompt=True)[1] if i else prompt
            )
            start = before + _shared(text[before:first], prompt)
        closing = text[last:]
        if i + 1 < len(messages):
            closing = self._around(messages[: i + 1], i)[1]
        end = last + self._closed(closing, _shared(closing, text[last:]))
        if start > last:
            raise Unfit(f"message {i + 1}: {_AMBIGUOUS}")
        if end == last:
            raise Unfit(f"message {i + 1}: the chat template has no special token at its end")
        return start, end

    def _closed(self, closing: str, shared: int) -> int:
        """How many characters of what closes an answer the model says, of `shared` that the text
        has too; 0 where no token ends it."""
        for pattern in (self._special, self._other):
            ends = [match.end() for match in pattern.finditer(closing)]
            if ends and not closing[ends[-1] :].strip():
                return max((end for end in ends if end <= shared), default=0)
        return 0

    def _words_in(self, text: str, messages: list[dict[str, Any]], i: int) -> tuple[int, int]:
        """(first character, last + 1) of what the text has of the words of message `i`."""
        before, behind = self._around(messages, i)
        last = len(text) - len(behind)
        first = _shared(text, before)
        if not text.endswith(behind) or first > last:
            raise Unfit(f"message {i + 1}: {_AMBIGUOUS}")
        return first, last

    def _around(
        self, messages: list[dict[str, Any]], i: int, add_generation_prompt: bool = False
    ) -> tuple[str, str]:
        """The texts before and behind the words of message `i`, were these another character."""
        mark = _unused(messages)
        other = [*messages[:i], messages[i] | {"content": mark}, *messages[i + 1 :]]
        before, *behind = self.text(other, add_generation_prompt).split(mark)
        if len(behind) != 1:
            raise Unfit(f"message {i + 1}: {_AMBIGUOUS}")
        return before, behind[0]

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


_AMBIGUOUS = (
    "the chat template does not write it just once, or writes something else behind it for each "
    "thing that it says, so that nobody can tell where it is"
)


def _unused(messages: list[dict[str, Any]]) -> str:
    """A character of private use that no message has; templates neither trim nor change it."""
    used = set().union(*(message["content"] for message in messages))
    for character in map(chr, range(0xE000, 0xF900)):
        if character not in used:
            return character
    raise Unfit("the conversation has all characters of private use")


def _shared(one: str, other: str) -> int:
    """How many characters the beginnings of both have in common."""
    if other.startswith(one) or one.startswith(other):
        return min(len(one), len(other))
    return len(os.path.commonprefix((one, other)))


def _any_of(texts: list[str]) -> re.Pattern:
    """Matches each of the texts, and nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
