"""Tokenizers trained on the training documents."""

import collections
import json
import re
from collections.abc import Callable, Iterator

from fmjax.data.backend import guarded, reason
from fmjax.data.settings import TokenizerSettings
from fmjax.data.sources import Source
from fmjax.data.vocabulary import FIM
from fmjax.errors import ConfigError, DataError

# Special tokens of a trained tokenizer, by the family that has them: what each is to transformers.
SPECIAL = {
    "bert": {f"{name}_token": f"[{name.upper()}]" for name in "pad unk cls sep mask".split()},
    "gpt": {f"{name}_token": "<|endoftext|>" for name in "unk bos eos".split()},
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}
SPECIAL["fim"] = SPECIAL["gpt"]
SENTINELS = 100  # that a trained T5 tokenizer has
# A vocabulary does not get better by reading more; minutes at most.
TRAINING_CHARACTERS = 200_000_000
MAX_ALPHABET = 1000  # characters, as in tokenizers' own trainer
# Trainers take time quadratic in the length of a word, and base64 or DNA teaches them none.
MAX_WORD = 1000  # characters
_LONG = re.compile(
    rf"(?<!\S)\S{{{MAX_WORD}}}\S+|(?<!\s)\s{{{MAX_WORD}}}\s+"  # looked for where runs begin alone
)


def train(settings: TokenizerSettings, source: Source, poll: Callable[[], None]):
    """(a `tokenizers.Tokenizer`, what its special tokens are to transformers).

    `poll` is called for each document, and may raise to stop.

    Raises ConfigError where the vocabulary is too small for the corpus's alphabet, DataError for
    documents that no vocabulary can be made of.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    named = dict(SPECIAL[settings.special])
    if settings.special in ("gpt", "fim") and settings.kind != "bpe":  # bytes are all known
        named["unk_token"] = "<|unknown|>"
    more = list(FIM[0]) if settings.special == "fim" else []
    if settings.special == "t5":
        more = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    special, unknown = [*dict.fromkeys(named.values()), *more], named["unk_token"]
    known = {
        "special_tokens": [*special],
        "vocab_size": settings.vocab_size,
        "show_progress": False,
    }
    # What a model writes should be able to be what it has read: that is told apart by bytes.
    cleaning = [normalizers.NFC()] * (settings.special == "bert")
    cleaning += [normalizers.Lowercase()] * settings.lowercase
    if settings.kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=settings.lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        # The trainer numbers the characters it finds inside words ("##x") in the order of a hash
        # map, and breaks ties by number: two runs differ. Naming all of them settles it.
        texts = _training_texts(source, poll)
        characters = _alphabet(texts, tokenizer.normalizer, settings.vocab_size // 4)
        known["special_tokens"] += characters + [f"##{c}" for c in characters]
        trainer = trainers.WordPieceTrainer(limit_alphabet=0, **known)
    elif settings.kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(cleaning)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **known)
    elif settings.kind == "char":
        tokenizer = Tokenizer(models.WordLevel(unk_token=unknown))
        tokenizer.normalizer = normalizers.Sequence(cleaning)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(**known)
        found = set()
        for text in _training_texts(source, poll):
            found.update(tokenizer.normalizer.normalize_str(text))
        if len(special) + len(found) > settings.vocab_size:
            raise ConfigError(
                f"config.tokenizer.vocab_size={settings.vocab_size} is too small: this corpus has "
                f"{len(found):,} characters, and {len(special)} tokens are special."
            )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence(cleaning)
        words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token=unknown, **known)
    _train(tokenizer, trainer, _training_texts(source, poll))
    tokenizer = _settled(tokenizer, settings.kind, special)
    if tokenizer.get_vocab_size() > settings.vocab_size:
        raise ConfigError(
            f"config.tokenizer.vocab_size={settings.vocab_size} is too small: this corpus's "
            f"alphabet and the special tokens alone take {tokenizer.get_vocab_size()}."
        )
    if settings.special == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
        )
    if settings.special == "t5":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>",
            pair="$A </s> $B </s>",
            special_tokens=[("</s>", tokenizer.token_to_id("</s>"))],
        )
    named["extra_special_tokens"] = more
    return tokenizer, named


def _train(tokenizer, trainer, texts: Iterator[str]) -> None:
    try:
        guarded(tokenizer.train_from_iterator, texts, trainer)
    except Exception as error:
        if type(error) not in (Exception, RuntimeError):  # raised by what reads the texts
            raise
        raise DataError(
            f"No tokenizer can be trained on these documents: {reason(error)}"
        ) from error


def _training_texts(source: Source, poll: Callable[[], None]) -> Iterator[str]:
    seen = 0
    for document in source.documents():
        poll()
        if document.split == "train":
            yield from pieces(document.text)
            seen += len(document.text)
            if seen > TRAINING_CHARACTERS:
                return


def pieces(text: str) -> Iterator[str]:
    """The text, cut in runs of more than `MAX_WORD` characters without, or of, white space."""
    start = 0
    for run in _LONG.finditer(text):
        for end in range(run.start() + MAX_WORD, run.end(), MAX_WORD):
            yield text[start:end]
            start = end
    yield text[start:]


def _alphabet(texts: Iterator[str], normalizer, limit: int) -> list[str]:
    counts = collections.Counter()
    for text in texts:
        counts.update(text)
    normal = collections.Counter()
    for character, count in counts.items():
        for c in normalizer.normalize_str(character):
            if not c.isspace():
                normal[c] += count
    frequent = sorted(normal, key=lambda c: (-normal[c], c))
    return sorted(frequent[: min(limit, MAX_ALPHABET)])


def _settled(tokenizer, kind: str, special: list[str]):
    """The same tokenizer with its model's own vocabulary: only `special` are special, unigram
    scores are rounded.
    """
    from tokenizers import AddedToken, Tokenizer

    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    if kind == "unigram":
        # Sums over threads leave noise in the last digits, and in the order of equal scores.
        pieces = [[piece, round(score, 6)] for piece, score in state["model"]["vocab"]]
        first, learnt = pieces[: len(special)], pieces[len(special) :]
        state["model"]["vocab"] = first + sorted(learnt, key=lambda pair: (-pair[1], pair[0]))
    settled = Tokenizer.from_str(json.dumps(state))
    settled.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return settled
