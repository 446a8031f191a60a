"""Tokenizers: load one in transformers format, or train one on the training documents."""

import collections
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax import snapshot
from fmjax.data import cache
from fmjax.data.settings import TokenizerSettings
from fmjax.data.sources import Source
from fmjax.errors import ConfigError, quoted

# Special tokens of a trained tokenizer, by the family that has them: what each is to transformers.
SPECIAL = {
    "bert": {f"{name}_token": f"[{name.upper()}]" for name in "pad unk cls sep mask".split()},
    "gpt": {f"{name}_token": "<|endoftext|>" for name in "unk bos eos".split()},
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}
SPECIAL["fim"] = SPECIAL["gpt"]
# Before, between and behind where a middle is filled in, as families call them; the first is ours.
FIM = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # Qwen 2.5 Coder, CodeGemma
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),  # StarCoder
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),  # SantaCoder
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),  # Code Llama
    ("<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>"),  # DeepSeek Coder
)
SENTINELS = 100  # that a trained T5 tokenizer has
# A vocabulary does not get better by reading more; minutes at most.
TRAINING_CHARACTERS = 200_000_000
MAX_VOCAB = 2**24  # ids; tables of this length are made before a model is
MAX_ALPHABET = 1000  # characters, as in tokenizers' own trainer
SUFFIXES = (".json", ".txt", ".model", ".jinja")  # of what a tokenizer is made of


class Vocab(NamedTuple):
    """What training needs to know of a tokenizer. `special` and `word_start` are bool [V]."""

    size: int
    pad_id: int  # 0 where there is none: padding is known by its segment
    mask_id: int | None
    first: tuple[int, ...]  # what stands before a text: [CLS], or <s>, or nothing
    last: tuple[int, ...]  # and behind it: [SEP], or </s>
    special: np.ndarray
    word_start: np.ndarray  # True where a token begins a word
    sentinels: tuple[int, ...] = ()  # that can stand for spans: <extra_id_0>, <extra_id_1>, …
    bytes: np.ndarray | None = None  # int [V], of the text that each stands for; None: unknown
    fim: tuple[int, int, int] | None = None  # what marks prefix, middle, suffix (objectives/fim.py)


class Prepared(NamedTuple):
    """A tokenizer in the cache: `folder` is in transformers format."""

    vocab: Vocab
    folder: Path
    digest: str


def prepare(
    settings: TokenizerSettings,
    source: Source,
    root: Path,
    log: Callable[[str], None],
    poll: Callable[[], None],
) -> Prepared:
    """Load or train the tokenizer, or reuse the one that the cache has."""
    identity = {"version": 5, **_identity(settings, source)}
    home = root / f"tokenizer-{cache.digest(identity)}"
    with cache.lock(root / f"{home.name}.lock", log, poll):
        index = cache.verified(home, log)
        if index is None:
            index = cache.build(home, lambda folder: _write(folder, settings, source, log))
    with np.load(home / "vocab.npz") as stored:
        tables = {name: stored[name] for name in stored.files}
    ids = index["vocab"]
    several = ("first", "last", "sentinels", "fim")
    given = {name: tuple(ids[name]) for name in several if ids[name] is not None}
    vocab = Vocab(**ids | given, **tables)
    return Prepared(vocab, home / "files", index["files"]["files/tokenizer.json"][1])


def load(source: str | Path, revision: str = ""):
    """The fast tokenizer of a folder in transformers format, or of a hub id.

    The files are data: no code among them is run, and none may name a file elsewhere.

    Raises:
      ConfigError: `source` is neither, or holds no fast tokenizer.
    """
    folder = snapshot.find(source, revision, files=snapshot.TOKENIZER)
    try:
        _check_options(folder / "tokenizer_config.json")
        tokenizer = _transformers().AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False
        )
        tokenizer("a \U0010ffff")  # a word that no vocabulary has: some fail at the first of these
    except Exception as error:  # the library raises whatever its parsers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"The tokenizer of {source} cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{source} has no tokenizer.json, nor can one be made of it.")
    return tokenizer


def encoder(folder: Path):
    """The `tokenizers.Tokenizer` in `folder`, without the truncation and padding of its file."""
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True  # "[MASK]" in a text is seven characters, not a mask
    return encoder


def _identity(settings: TokenizerSettings, source: Source) -> dict:
    if settings.name == "train":
        keys = ("kind", "vocab_size", "lowercase", "special")
        return {"source": source.identity} | {key: getattr(settings, key) for key in keys}
    if os.path.isdir(os.path.expanduser(settings.name)):
        folder = snapshot.find(settings.name)
        files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
        return {"files": {path.name: cache.file_digest(path) for path in files}}
    if settings.name.startswith((".", "/", "~")):
        raise ConfigError(f"config.tokenizer.name={quoted(settings.name)}: no such folder.")
    return {"name": settings.name, "revision": settings.revision}


def _write(folder: Path, settings: TokenizerSettings, source: Source, log) -> dict:
    if settings.name == "train":
        log(f"tokenizer: training {settings.kind} with {settings.vocab_size} tokens")
        tokenizer = _train(settings, source)
    else:
        tokenizer = _load(settings)
    vocab = _vocab(tokenizer, settings)
    try:
        tokenizer.save_pretrained(folder / "files")
    except ValueError as error:  # chat templates whose names lead out of the folder
        name = quoted(settings.name)
        raise ConfigError(f"config.tokenizer.name={name} cannot be saved: {error}") from error
    found = vocab._asdict()
    tables = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    np.savez(folder / "vocab.npz", **tables)
    ids = ("size", "pad_id", "mask_id", "first", "last", "sentinels", "fim")
    return {"vocab": {name: found[name] for name in ids}}


def _transformers():
    # Its import tells people without torch that models will not work: they are not used here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


def _load(settings: TokenizerSettings):
    try:
        return load(settings.name, settings.revision)
    except ConfigError as error:
        raise ConfigError(
            f"config.tokenizer.name={quoted(settings.name)}: {error} "
            "Give 'train', a folder in transformers format, or a tokenizer's hub id."
        ) from error


def _check_options(path: Path) -> None:
    """transformers reads a file named by "vocab" or "merges" instead of their content: anybody's
    file would become a vocabulary, and be saved and shared as one."""
    options = snapshot.read_json(path) if path.is_file() else {}
    if named := [key for key in ("vocab", "merges") if isinstance(options.get(key), str)]:
        raise ValueError(f"{path.name} names files of its own as {named}")


# ---- training ----


def _train(settings: TokenizerSettings, source: Source):
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
        characters = _alphabet(source, tokenizer.normalizer, settings.vocab_size // 4)
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
        found = set().union(*map(tokenizer.normalizer.normalize_str, _training_texts(source)))
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
    tokenizer.train_from_iterator(_training_texts(source), trainer)
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
    return _transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _training_texts(source: Source) -> Iterator[str]:
    seen = 0
    for document in source.documents():
        if document.split == "train":
            yield document.text
            seen += len(document.text)
            if seen > TRAINING_CHARACTERS:
                return


def _alphabet(source: Source, normalizer, limit: int) -> list[str]:
    counts = collections.Counter()
    for text in _training_texts(source):
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


# ---- vocabulary ----


def _vocab(tokenizer, settings: TokenizerSettings) -> Vocab:
    vocab = tokenizer.get_vocab()
    size = max(vocab.values(), default=-1) + 1
    if not 0 < size <= MAX_VOCAB:
        raise ConfigError(
            f"The tokenizer {settings.name!r} has {size:,} ids, the limit is {MAX_VOCAB:,}."
        )
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


def around(tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and behind a text; where it leaves them open, its own tokens
    for that."""
    whole = tokenizer("a")["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(inner) + 1)
    at = next(i for i in starts if whole[i : i + len(inner)] == inner)
    first, last = whole[:at], whole[at + len(inner) :]
    if not first and not last:
        first = _one_of(tokenizer.cls_token_id, tokenizer.bos_token_id)
    last = last or _one_of(tokenizer.sep_token_id, tokenizer.eos_token_id)
    return tuple(first), tuple(last)


def _one_of(*ids: int | None) -> list[int]:
    """The first that there is."""
    return [i for i in ids if i is not None][:1]


def _bytes(state: dict) -> Callable[[str], int] | None:
    """How many bytes of text a token stands for, where tokens are the text itself."""
    if state["normalizer"] not in (None, {"type": "Sequence", "normalizers": []}):
        return None
    if (state["pre_tokenizer"] or {}).get("type") == "Split":  # of characters
        return lambda token: len(token.encode())
    if '"ByteLevel"' in json.dumps(state["decoder"]):
        return len  # each byte is a character of its own
    return None


def _word_start(state: dict) -> Callable[[str], bool]:
    """Whether a token begins a word, by the convention of the model: "##x", "Ġx" or "▁x"."""
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
