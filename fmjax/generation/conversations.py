"""Chat template, start and stop tokens, as the folder of a model sets them."""

from typing import Any

from fmjax.checkpoints import pretrained
from fmjax.data import chat, endings, vocabulary
from fmjax.errors import ConfigError


def learnt_to_answer(opened: pretrained.Opened) -> bool:
    """True if the model is of a run on conversations."""
    return opened.config is not None and opened.config.data.format in ("chat", "chat_padded")


def template_of(
    opened: pretrained.Opened, words: Any, name: str = "auto", key: str = "config.data.template"
) -> tuple[str, str, chat.Reader]:
    """As `chat.fitting`, where "auto" is the template that the run was trained with, else the
    tokenizer's own, else "plain"."""
    trained = opened.config.data.get("template") if opened.config else None
    return chat.fitting(opened.tokenizer, words, name if name != "auto" else trained or name, key)


def stop_tokens(opened: pretrained.Opened, words: Any) -> tuple[int, ...]:
    """The tokens that end what a model writes: those that its folder lists, or where it has no
    settings of generation the end of a text of its tokenizer `words`; and the end of an answer,
    where it was trained on conversations."""
    ids = endings.listed(opened.tokenizer)
    if ids is None:
        ids = vocabulary.around(words)[1][:1]
    if learnt_to_answer(opened):
        ids = (*ids, template_of(opened, words)[2].end())
    # Some folders list ids that the model has no row for, which it never writes.
    return tuple(i for i in dict.fromkeys(ids) if 0 <= i < opened.model.cfg.vocab_size)


def trained_start(model: Any, words: Any) -> int:
    """The token before the first of a target in the training of an encoder–decoder, which its loss
    is measured with: the model's own, else the padding of its tokenizer `words`."""
    start = getattr(model.cfg, "start_id", None)
    if start is None:
        start = words.pad_token_id or 0
    return start if start < model.cfg.vocab_size else 0


def start_token(opened: pretrained.Opened, words: Any) -> int:
    """The token that an encoder–decoder begins to write with: the one that transformers' generate
    takes from its folder, else `trained_start`."""
    start = endings.start(opened.tokenizer) if opened.model.decodes else None
    if start is None:
        return trained_start(opened.model, words)
    if not 0 <= start < opened.model.cfg.vocab_size:
        raise ConfigError(
            f"{opened.tokenizer} has {endings.STARTS[0]}={start}, but the model has "
            f"{opened.model.cfg.vocab_size:,} tokens (vocab_size)."
        )
    return start
