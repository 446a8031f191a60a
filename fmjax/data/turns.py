"""Locations of the answers in the rendered text of a conversation.

An answer is looked for in the text of the whole conversation, as templates write one otherwise when
more follows (Qwen 3 leaves out what was thought). It is what changes in the text with its words. It
begins where the prompt for it ends, as far as the text has that prompt, and ends with the last
special token of what the template closes it by; a line break after that is the template's, not the
model's.
"""

import os
import re
from typing import Any

from fmjax.data import templates
from fmjax.errors import quoted

Message = dict[str, Any]  # {"role", "content"} and, of some, "weight"


class Unfit(Exception):
    """Why a conversation cannot be learnt from."""


class Turns:
    """Texts of conversations by a template of the tokenizer `words`."""

    def __init__(self, words: Any, template: str):
        self._render = templates.renderer(template, words.special_tokens_map)
        added = words.added_tokens_decoder.values()
        self.special = _any_of([token.content for token in added if token.special])
        # Some end a turn with a token that is not special; Gemma lists line breaks among these.
        self._other = _any_of([token.content for token in added if token.content.strip()])

    def unfinished(self, messages: list[Message]) -> str:
        """The text of the messages, of which the last is to be gone on with. Raises Unfit."""
        text = self.text(messages)
        return text[: self._words_in(text, messages, len(messages) - 1)[1]]

    def spans(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """(text, (first character, last + 1) of each of the assistant's turns that is to be learnt,
        as its "weight" says). Raises Unfit."""
        text = self.text(messages)
        answers = [
            i
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("weight", 1)
        ]
        return text, [self._span(text, messages, i) for i in answers]

    def text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The template's rendering of the messages. Raises Unfit."""
        said = [{key: message[key] for key in ("role", "content")} for message in messages]
        try:
            return self._render(said, add_generation_prompt)
        except templates.TemplateError as error:
            raise Unfit(f"the chat template fails: {quoted(str(error))}") from error

    def _span(self, text: str, messages: list[Message], i: int) -> tuple[int, int]:
        first, last = self._words_in(text, messages, i)
        start = self._begins(text, messages, i, first)
        if start > last:
            raise Unfit(f"message {i + 1}: {_AMBIGUOUS}")
        closing = text[last:]
        if i + 1 < len(messages):
            closing = self._around(messages[: i + 1], i)[1]
        end = last + self._closed(closing, _shared(closing, text[last:]))
        if end == last:
            raise Unfit(f"message {i + 1}: the chat template has no special token at its end")
        return start, end

    def _begins(self, text: str, messages: list[Message], i: int, first: int) -> int:
        """The first character that the model says of message `i`, whose words begin at `first`."""
        prompt = self.text(messages[:i], add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        # Earlier turns are written in another way, or the prompt has the beginning of an answer.
        if i == 0:
            return _shared(text[:first], prompt)
        before = self._words_in(text, messages, i - 1)[1]
        if before > first:
            raise Unfit(f"message {i + 1}: {_AMBIGUOUS}")
        prompt = self._around(messages[:i], i - 1, add_generation_prompt=True)[1]
        return before + _shared(text[before:first], prompt)

    def _closed(self, closing: str, shared: int) -> int:
        """Number of characters, out of the `shared` ones that the text has too, that close an
        answer and that the model says itself; 0 if no token ends it."""
        for pattern in (self.special, self._other):
            ends = [match.end() for match in pattern.finditer(closing)]
            if ends and not closing[ends[-1] :].strip():
                return max((end for end in ends if end <= shared), default=0)
        return 0

    def _words_in(self, text: str, messages: list[Message], i: int) -> tuple[int, int]:
        """(first character, last + 1) of what the text has of the words of message `i`."""
        before, behind = self._around(messages, i)
        last = len(text) - len(behind)
        first = _shared(text, before)
        if not text.endswith(behind) or first > last:
            raise Unfit(f"message {i + 1}: {_AMBIGUOUS}")
        return first, last

    def _around(
        self, messages: list[Message], i: int, add_generation_prompt: bool = False
    ) -> tuple[str, str]:
        """The texts before and after the words of message `i`, were these another character."""
        mark = _unused(messages)
        other = [*messages[:i], messages[i] | {"content": mark}, *messages[i + 1 :]]
        before, *behind = self.text(other, add_generation_prompt).split(mark)
        if len(behind) != 1:
            raise Unfit(f"message {i + 1}: {_AMBIGUOUS}")
        return before, behind[0]


_AMBIGUOUS = (
    "the chat template does not write it just once, or writes something else behind it for each "
    "thing that it says, so that nobody can tell where it is"
)


def _unused(messages: list[Message]) -> str:
    """A character of private use that no message has; templates neither trim nor change it."""
    used = set().union(*(message["content"] for message in messages))
    for character in map(chr, range(0xE000, 0xF900)):
        if character not in used:
            return character
    raise Unfit("the conversation has all characters of private use")


def _shared(one: str, other: str) -> int:
    """Length of the common beginning of both texts, in characters."""
    if other.startswith(one) or one.startswith(other):
        return min(len(one), len(other))
    return len(os.path.commonprefix((one, other)))


def _any_of(texts: list[str]) -> re.Pattern:
    """Matches each of the texts, and nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
