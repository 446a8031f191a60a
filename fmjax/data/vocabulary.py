"""The facts about a tokenizer that training needs: its ids and their meaning."""

import itertools
import json
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from fmjax.errors import ConfigError

# Before, between and after where a middle is filled in, as families call them; the first is ours.
FIM = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # Qwen 2.5 Coder, CodeGemma
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),  # StarCoder
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),  # SantaCoder
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),  # Code Llama
    ("<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>"),  # DeepSeek Coder
)
MAX_VOCAB = 2**24  # ids; tables of this length are made before a model is


class Vocab(NamedTuple):
    """The facts about a tokenizer that training needs. `special` and `word_start` are bool [V]."""

    size: int
    pad_id: int  # 0 where there is none: padding is known by its segment
    mask_id: int | None
    first: tuple[int, ...]  # what stands before a text: [CLS], or <s>, or nothing
    last: tuple[int, ...]  # and after it: [SEP], or </s>
    special: np.ndarray
    word_start: np.ndarray  # True where a token begins a word
    sentinels: tuple[int, ...] = ()  # that can stand for spans: <extra_id_0>, <extra_id_1>, …
    bytes: np.ndarray | None = None  # int [V], of the text that each stands for; None: unknown
    fim: tuple[int, int, int] | None = None  # what marks prefix, middle, suffix (objectives/fim.py)
    start_id: int | None = None  # before a target's first token, as the model has it; None: pad_id


def of(tokenizer, name: str) -> Vocab:
    """The vocabulary of a transformers tokenizer; `name` is what it was asked for by.

    Raises ConfigError for one of nothing, or of too many ids.
    """
    vocab = tokenizer.get_vocab()
    size = max(vocab.values(), default=-1) + 1
    if not 0 < size <= MAX_VOCAB:
        raise ConfigError(f"The tokenizer {name!r} has {size:,} ids, the limit is {MAX_VOCAB:,}.")
    special = np.zeros(size, bool)
    special[list(tokenizer.all_special_ids)] = True
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    begins, weighs = _word_start(state), _bytes(state)
    word_start, sizes = np.ones(size, bool), np.zeros(size, np.int32)
    for token, i in vocab.items():
        word_start[i] = begins(token)
        sizes[i] = weighs(token) if weighs and not special[i] else 0
    first, last = around(tokenizer)
    numbered = (vocab.get(f"<extra_id_{i}>") for i in itertools.count())
    sentinels = tuple(itertools.takewhile(lambda i: i is not None, numbered))
    special[list(sentinels)] = True
    fim = next((marks for marks in FIM if all(mark in vocab for mark in marks)), ())
    return Vocab(
        size=size,
        pad_id=tokenizer.pad_token_id or 0,
        mask_id=tokenizer.mask_token_id,
        first=first,
        last=last,
        special=special,
        sentinels=sentinels,
        word_start=word_start | special,
        bytes=sizes if weighs else None,
        fim=tuple(vocab[mark] for mark in fim) or None,
    )


def limited(vocab: Vocab, rows: int, added: Collection[int]) -> Vocab:
    """The vocabulary without ids from `rows` on, which a model has no embedding of.

    Models are published whose tokenizers have more tokens than their embeddings have rows: they
    were `added` (ids) and are in no text. Raises ConfigError where others are beyond, or what
    surrounds each text.
    """
    check_rows(vocab.size, rows, added, vocab.first + vocab.last)
    ids = dict(pad_id=vocab.pad_id if vocab.pad_id < rows else 0)
    if vocab.mask_id is not None and vocab.mask_id >= rows:
        ids["mask_id"] = None
    if vocab.fim and max(vocab.fim) >= rows:
        ids["fim"] = None
    tables = ("special", "word_start", "bytes")
    cut = {name: table[:rows] for name in tables if (table := getattr(vocab, name)) is not None}
    sentinels = tuple(itertools.takewhile(lambda i: i < rows, vocab.sentinels))
    return vocab._replace(size=rows, sentinels=sentinels, **ids, **cut)


def check_rows(size: int, rows: int, added: Collection[int], around: Collection[int]) -> None:
    """Raises ConfigError where a tokenizer of `size` ids does not belong to an embedding of `rows`:
    ids beyond it are not `added`, or stand `around` texts."""
    beyond = range(rows, size)
    if not set(beyond) <= set(added):
        raise ConfigError(
            f"the tokenizer has {size:,} tokens, the model {rows:,}: they do not belong together."
        )
    if outside := [i for i in around if i in beyond]:
        raise ConfigError(
            f"the tokenizer puts token {outside[0]} around a text, and the model's embedding has "
            f"{rows:,} rows (vocab_size): give the folder with the tokenizer of the model."
        )


def beyond(ids: Sequence[int] | np.ndarray, rows: int) -> str:
    """The problem with ids that are not all below `rows`, "" if there is none."""
    largest = int(np.max(ids, initial=-1))
    if largest < rows:
        return ""
    return f"the tokenizer gives id {largest}, but the model has {rows:,} tokens (vocab_size)"


def around(tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the tokenizer puts before and after a text; if it leaves them open, its own
    tokens for that."""
    first, last = frame(tokenizer.backend_tokenizer)
    if not first and not last:
        first = _one_of(tokenizer.cls_token_id, tokenizer.bos_token_id)
    return first, last or _one_of(tokenizer.sep_token_id, tokenizer.eos_token_id)


def frame(backend) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids before, ids after) that the post-processor of a `tokenizers.Tokenizer` puts around a
    text. No text is asked: an alphabet may lack any letter."""
    processor = backend.post_processor
    return _frame(json.loads(processor.__getstate__())) if processor else ((), ())


def _frame(processor: dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
    kind = processor["type"]
    if kind == "Sequence":  # each around what the ones before it gave
        first, last = (), ()
        for inner in map(_frame, processor["processors"]):
            first, last = inner[0] + first, last + inner[1]
        return first, last
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (processor["cls"][1],), (processor["sep"][1],)
    if kind == "TemplateProcessing":
        ids = {name: token["ids"] for name, token in processor["special_tokens"].items()}
        pieces = processor["single"]
        text = next((i for i, piece in enumerate(pieces) if "Sequence" in piece), len(pieces))
        tokens = lambda part: tuple(i for piece in part for i in ids[piece["SpecialToken"]["id"]])
        return tokens(pieces[:text]), tokens(pieces[text + 1 :])
    return (), ()  # ByteLevel, which trims offsets


def _one_of(*ids: int | None) -> tuple[int, ...]:
    """The first that there is."""
    return tuple(i for i in ids if i is not None)[:1]


def spaces_words(backend) -> bool:
    """True if a word has other tokens after a space than alone, as " dog" of GPT-2, and the
    tokenizer puts no space before a word by itself."""
    steps = [*_steps(backend.normalizer), *_steps(backend.pre_tokenizer)]
    if any(
        step["type"] == "Prepend"
        or step.get("add_prefix_space")
        or step.get("prepend_scheme", "never") != "never"
        for step in steps
    ):
        return False
    marked = {"type": "Replace", "pattern": {"String": " "}}  # as in Gemma's normalizer
    return any(
        step["type"] in ("ByteLevel", "Metaspace") or marked.items() <= step.items()
        for step in steps
    )


def _steps(part) -> list[dict]:
    """The steps of a normalizer or a pre-tokenizer, those of sequences among them."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    if state["type"] != "Sequence":
        return [state]
    return state["normalizers"] if "normalizers" in state else state["pretokenizers"]


def _bytes(state: dict) -> Callable[[str], int] | None:
    """Number of bytes of text that a token stands for, where tokens are the text itself."""
    if state["normalizer"] not in (None, {"type": "Sequence", "normalizers": []}):
        return None
    if (state["pre_tokenizer"] or {}).get("type") == "Split":  # of characters
        return lambda token: len(token.encode())
    if '"ByteLevel"' in json.dumps(state["decoder"]):
        return len  # each byte is a character of its own
    return None


def _word_start(state: dict) -> Callable[[str], bool]:
    """True if a token begins a word, by the convention of the model: "##x", "Ġx" or "▁x"."""
    model, steps = state["model"], json.dumps([state["pre_tokenizer"], state["decoder"]])
    prefix = model.get("continuing_subword_prefix")
    if prefix:
        return lambda token: not token.startswith(prefix)
    if '"ByteLevel"' in steps:
        return lambda token: token.startswith(("Ġ", "Ċ", "ĉ"))
    if '"Metaspace"' in steps or "▁" in steps:
        return lambda token: token.startswith("▁")
    # Words end, not begin, with a mark (CLIP): every token counts as a word.
    return lambda token: True
