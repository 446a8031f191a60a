"""Text that a model writes, after a prompt or, of an encoder–decoder, about a source."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from fmjax import adapters
from fmjax.checkpoints import pretrained
from fmjax.data import tokenizer as tokenizers
from fmjax.data import vocabulary
from fmjax.errors import ConfigError
from fmjax.generation import beam_search, conversations, speculative
from fmjax.generation.decoder import Generator
from fmjax.generation.sampling import Sampling

EVERY = 8  # tokens between looks at what is written, where somebody waits for it


def quantization_of(how: Mapping[str, Any]) -> dict[str, str]:
    """Quantization settings of weights and KV cache."""
    return {key: how.get(key, "") for key in ("weights", "cache")}


def sampling_of(how: Mapping[str, Any]) -> Sampling:
    """Sampling settings, from the keys of configs/generate.py."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    return Sampling(**{name: how[name] for name in names if name in how})


def shown(prompt: str, texts: Sequence[str]) -> str:
    """The continuations after their prompt, a line between them."""
    return "\n---\n".join(prompt + text for text in texts)


def texts(opened: pretrained.Opened, how: Mapping[str, Any], seed: int) -> list[str]:
    """As `Author.texts`."""
    return TextGenerator(opened).texts(how, seed)


class TextGenerator:
    """A model that is in a folder, with its tokenizer: text to text. Besides what ends its texts
    the tokens `stop` do; `bits` are `weights` and `cache` of a `Generator`. What it writes is
    decoded together with its prompt, or `alone` and without special tokens, as transformers
    does."""

    def __init__(
        self,
        opened: pretrained.Opened,
        stop: Sequence[int] = (),
        bits: Mapping[str, str] = MappingProxyType({}),
        alone: bool = False,
    ):
        check_model(opened.model)
        opened.require_output()
        self.opened, self.model = opened, opened.model
        self.alone = alone or opened.model.decodes
        self.words = tokenizers.load(opened.tokenizer)
        check_tokens(self.model, self.words)
        self.first, self.last = vocabulary.around(self.words)
        goals = opened.config.objectives if opened.config else ()
        self.writer = Generator(
            self.model,
            opened.params,
            stop=tuple(dict.fromkeys((*conversations.stop_tokens(opened, self.words), *stop))),
            tokens=min(len(self.words), self.model.cfg.vocab_size),
            prefix="prefix_lm" in goals,
            first=conversations.start_token(opened, self.words),
            **bits,
        )

    def use_draft(self, draft: "TextGenerator", ahead: int) -> None:
        """Let another model draft so many tokens at a time. Raises ConfigError if their tokenizers
        differ."""
        if self.words.get_vocab() != draft.words.get_vocab():
            raise ConfigError(
                f"config.draft={draft.opened.source!r} has other tokens than config.folder="
                f"{self.opened.source!r}: give a model with the same tokenizer."
            )
        self.writer = speculative.SpeculativeGenerator(self.writer, draft.writer, ahead)

    def ids(self, how: Mapping[str, Any]) -> list[int]:
        """The tokens of `how["prompt"]` (`prompt_ids`)."""
        data = self.opened.config.data if self.opened.config else {}
        source_prefix = data.get("source_prefix") or ""
        return prompt_ids(self.model, self.words, how, data.get("seq_len"), before=source_prefix)

    def before(self, prompt: str) -> str:
        """The text shown before the continuation: the prompt; nothing for a source."""
        return "" if self.model.decodes else prompt

    def texts(
        self, how: Mapping[str, Any], seed: int, show: Callable[[str], None] | None = None
    ) -> list[str]:
        """`how["count"]` continuations of `how["prompt"]` (`after`)."""
        return self.behind(self.ids(how), how, seed, show)

    def behind(
        self,
        ids: Sequence[int],
        how: Mapping[str, Any],
        seed: int,
        show: Callable[[str], None] | None = None,
    ) -> list[str]:
        """`how["count"]` texts after the tokens, one where nothing is drawn; each up to its end,
        to one of the texts `how["stop"]`, or of `how["length"]` tokens. `show` is given the first
        as it grows."""
        stop = tuple(how.get("stop", ()))
        if how.get("beams", 1) > 1:
            return [self._likeliest(ids, how, show)]
        sampling = sampling_of(how)
        count = how["count"] if sampling.draws else 1
        text = lambda row: cut(self.text(ids, row), stop)
        printed = 0

        def ends_early(rows: np.ndarray) -> list[bool]:
            nonlocal printed
            found = [text(row) for row in rows.tolist()]
            if show:
                grown = settled(found[0][0], stop)
                show(grown[printed:])
                printed = max(printed, len(grown))
            return [over for _, over in found]

        given = dict(ends_early=ends_early, every=EVERY) if show or stop else {}
        rows = self.writer([ids] * count, how["length"], sampling, seed, **given)
        found = [text(row)[0] for row in rows]
        if show:
            show(found[0][printed:])
        return found

    def each(
        self,
        prompts: Sequence[Sequence[int]],
        length: int,
        how: Sampling,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """One text after each of the prompts, up to its end or to one of the texts `stop`."""

        def over(rows: np.ndarray) -> list[bool]:
            found = zip(prompts, rows.tolist(), strict=True)
            return [cut(self.text(ids, row), stop)[1] for ids, row in found]

        looks = dict(ends_early=over) if stop else {}
        rows = self.writer(prompts, length, how, **looks)
        return [cut(self.text(ids, row), stop)[0] for ids, row in zip(prompts, rows, strict=True)]

    def _likeliest(self, ids, how, show) -> str:
        """The result of beam search."""
        taken = dict(temperature=0, top_k=None, repetition_penalty=1, stop=(), draft="")
        for key, value in taken.items():
            if how.get(key, value) != value:
                raise ConfigError(
                    f"config.{key}={how[key]!r} does not go with config.beams={how['beams']}, "
                    f"which finds the likeliest text: set it to {value!r}, or config.beams to 1."
                )
        kind = beam_search.Beams(how["beams"], how.get("length_penalty", 1.0))
        ((row, _),) = beam_search.search(self.writer, [list(ids)], how["length"], kind)
        found = self.text(ids, row)
        if show:
            show(found)
        return found

    def text(self, ids: Sequence[int], row: Sequence[int]) -> str:
        """The text of the tokens `row` after `ids`, without what ends it."""
        row = [i for i in row if i >= 0]
        if row and row[-1] in self.writer.spec.stop:
            row = row[:-1]
        if self.alone:
            return self.words.decode(row, skip_special_tokens=True)
        # Together with the prompt: alone, a first token may lose the space before it.
        before = self.words.decode(ids)
        return self.words.decode([*ids, *row]).removeprefix(before)


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """(the text before the first of `stop`, whether there is one)."""
    found = [at for one in stop if (at := text.find(one)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of a growing text that more tokens will not take back: no half of a character, nor
    the beginning of what would end it."""
    text = text.rstrip("\ufffd")
    starts = (n for one in stop for n in range(len(one) - 1, 0, -1) if text.endswith(one[:n]))
    return text[: len(text) - max(starts, default=0)]


def check_model(model: Any) -> None:
    """Raises ConfigError for a model that does not write."""
    if not model.causal and not model.decodes:
        raise ConfigError(
            "the model is an encoder, which fills gaps (configs/fill_mask.py) but does not go on "
            "with a text: give config.folder of a decoder, as configs/clm.py trains one."
        )


def check_tokens(model: Any, words: Any) -> None:
    """Raises ConfigError for a tokenizer that is not the model's."""
    around = itertools.chain(*vocabulary.around(words))
    added = words.added_tokens_decoder
    vocabulary.check_rows(len(words), model.cfg.vocab_size, added, tuple(around))


def room(model: Any, trained: int | None) -> int:
    """Largest number of tokens that the model reads and writes; `trained` is the length of its
    training rows, None if unknown."""
    places = model.cfg.max_len - adapters.positions(model)
    if trained is not None and not adapters.base(model).endless:
        return min(places, trained)
    return places


def prompt_ids(
    model: Any,
    words: Any,
    how: Mapping[str, Any],
    trained: int | None,
    of: str = "config",
    before: str = "",
) -> list[int]:
    """The tokens of `how["prompt"]`, after those that begin a document; of a source, with the text
    `before` and those that end it too.

    `trained` is how long the rows of training were, None where nobody knows; `of` what the keys of
    `how` are keys of. With `how["long"]` "cut" only the end of a long prompt is read, of a source
    the beginning.

    Raises ConfigError for a model that does not write, a prompt of nothing that no token begins,
    and one that leaves no room for `how["length"]` more.
    """
    check_model(model)
    check_tokens(model, words)
    first, last = vocabulary.around(words)
    ids = list(words(before + how["prompt"], add_special_tokens=False)["input_ids"])
    last = list(last) if model.decodes else []
    places = room(model, trained)
    written = 0 if model.decodes else how["length"]
    around = len(first) + len(last) + written
    if how.get("long") == "cut" and len(ids) + around > places > around:
        kept = places - around
        ids = ids[:kept] if model.decodes else ids[-kept:]
    ids = [*first, *ids, *last]
    if not ids:
        raise ConfigError(
            f"{of}.prompt is empty, and the tokenizer has no token that begins a text: give one."
        )
    if problem := vocabulary.beyond(ids, model.cfg.vocab_size):
        raise ConfigError(f"{of}.prompt cannot be read: {problem}.")
    if len(ids) + written > places or how["length"] > model.cfg.max_len:
        raise ConfigError(
            f"{of}.prompt has {len(ids)} tokens and {of}.length={how['length']}, but the model has "
            f"{places} positions that were trained: make one of them shorter"
            + (f", or set {of}.long='cut' to read only a part of it." if "long" in how else ".")
        )
    return ids
