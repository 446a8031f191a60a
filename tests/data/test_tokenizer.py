"""Tokenizers: trained ones, loaded ones, and what a masked language model needs of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fmjax import data, objectives
from fmjax.data import chat, tokenizer, tokenizer_training, vocabulary
from fmjax.errors import ConfigError, DataError

# Words enough for a few merges, in 60 documents.
TEXT = "\n\n".join(
    f"The quick brown fox number {i} jumps over {i + 3} lazy dogs, thoroughly and unhurriedly."
    for i in range(60)
)


@pytest.mark.parametrize("kind, size", [("wordpiece", 150), ("bpe", 400), ("unigram", 100)])
def test_a_trained_tokenizer_loads_in_transformers(prepare, kind, size):
    dataset = prepare(TEXT, {"kind": kind, "vocab_size": size}, seq_len=64)
    vocab = dataset.vocab
    loaded = AutoTokenizer.from_pretrained(dataset.tokenizer_dir)
    assert len(loaded) == vocab.size == len(vocab.special) == len(vocab.word_start) <= size
    assert (loaded.pad_token_id, loaded.mask_token_id) == (vocab.pad_id, vocab.mask_id)
    assert ((loaded.cls_token_id,), (loaded.sep_token_id,)) == (vocab.first, vocab.last)
    assert sorted(loaded.all_special_ids) == np.flatnonzero(vocab.special).tolist()

    text = "the quick brown fox"
    alone = loaded(text)["input_ids"]
    assert alone[:1] == [*vocab.first] and alone[-1:] == [*vocab.last]
    assert vocab.word_start[alone].sum() in (
        5,
        6,
    )  # four words and two marks, BPE's first lacks "Ġ"
    assert loaded.decode(alone, skip_special_tokens=True).strip() == text
    assert loaded(text.upper())["input_ids"] == alone
    pair = loaded("the fox", "the dogs")
    assert pair["input_ids"].count(vocab.last[0]) == 2

    # What the store holds is what the tokenizer gives.
    row = dataset.splits["train"].rows(np.array([0]))
    first = row["input_ids"][0][row["segment_ids"][0] == 1]
    again = loaded(loaded.decode(first, skip_special_tokens=True).strip())["input_ids"]
    assert again == first.tolist()


def test_lower_case_is_a_choice(prepare):
    dataset = prepare(TEXT, {"vocab_size": 200, "lowercase": False})
    loaded = AutoTokenizer.from_pretrained(dataset.tokenizer_dir)
    assert loaded("The")["input_ids"] != loaded("the")["input_ids"]


def test_the_wordpiece_vocabulary_is_the_same_in_every_process(prepare, tmp_path):
    first = prepare(TEXT, {"vocab_size": 150}).tokenizer_dir / "tokenizer.json"
    script = (
        "import sys; from fmjax import data; dataset = data.prepare({'train': sys.argv[1], "
        "'validation_fraction': 0, 'cache': sys.argv[2]}, {'vocab_size': 150}); "
        "print(dataset.tokenizer_dir)"
    )
    command = [sys.executable, "-c", script, tmp_path / "corpus.txt", tmp_path / "other"]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    second = Path(output.stdout.splitlines()[-1]) / "tokenizer.json"
    assert second != first and second.read_text() == first.read_text()


def test_a_vocabulary_smaller_than_the_alphabet_is_refused(prepare):
    with pytest.raises(ConfigError, match="vocab_size=200 is too small.*take 261"):
        prepare(TEXT, {"kind": "bpe", "vocab_size": 200})


def save(folder, tokens, model=None, **names):
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(model(vocab) if model else models.WordLevel(vocab, unk_token=tokens[0]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    wrapped.save_pretrained(folder)
    return backend


def test_row48_a_tokenizer_without_mask_or_padding(prepare, tmp_path):
    save(tmp_path / "gpt", ["<|endoftext|>", "a"], eos_token="<|endoftext|>")
    dataset = prepare("a", {"name": str(tmp_path / "gpt")})
    assert dataset.vocab[:5] == (2, 0, None, (), (0,))
    facts = dict(target="", vocab=dataset.vocab)
    with pytest.raises(ConfigError, match="mlm needs a tokenizer with a mask token.*tokenizer.na"):
        objectives.build({"mlm": {}}, facts)


def test_a_tokenizer_for_decoders_ends_documents_and_counts_bytes(prepare):
    text = "abc abd, ähm\n\n" * 50
    settings = dict(name="train", kind="bpe", special="gpt", vocab_size=300, lowercase=False)
    dataset = prepare(text, settings, frame="document", seq_len=64)
    vocab, split = dataset.vocab, dataset.splits["train"]
    rows = split.rows(np.arange(len(split)))
    real = rows["input_ids"][rows["segment_ids"] > 0]
    assert vocab.first == vocab.last == (0,) and vocab.mask_id is None
    assert (real == 0).sum() == 2 * 50
    assert vocab.bytes[real].sum() == 50 * len("abc abd, ähm".encode())


def test_a_tokenizer_of_characters(prepare):
    settings = dict(name="train", kind="char", special="gpt", vocab_size=300, lowercase=False)
    dataset = prepare("To be, or\tnot ä to be\n\nTo\n\n", settings, frame="document", seq_len=8)
    characters = {*"To be, or\tnot ä to be"}
    assert dataset.vocab.size == 2 + len(characters)
    assert sorted(dataset.vocab.bytes) == [0, 0] + [1] * (len(characters) - 1) + [2]
    words = tokenizer.load(dataset.tokenizer_dir)
    assert words.decode(words("not ä\tTo")["input_ids"]) == "not ä\tTo"
    unknown = words("not Ω")["input_ids"][-1]
    assert unknown == words.unk_token_id != words.eos_token_id
    with pytest.raises(ConfigError, match="vocab_size=32 is too small: this corpus has 52 char"):
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
        prepare(letters, settings | {"vocab_size": 32})


def test_row48_roberta_names_are_as_good(prepare, tmp_path):
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "a", "Ġb", "c", "<mask>"]
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    save(tmp_path / "roberta", tokens, **names)
    vocab = prepare("a b", {"name": str(tmp_path / "roberta")}).vocab
    assert vocab[:5] == (8, 1, 7, (0,), (2,))
    assert np.flatnonzero(vocab.special).tolist() == [0, 1, 2, 7]
    assert np.flatnonzero(vocab.word_start & ~vocab.special).tolist() == [5]


def test_word_starts_by_the_convention_of_the_model(letters, prepare):
    def begins(model, decoder=None):
        state = {"model": model, "pre_tokenizer": None, "decoder": decoder}
        return [vocabulary._word_start(state)(token) for token in ("##x", "Ġx", "▁x", "x", ",")]

    assert begins({"continuing_subword_prefix": "##"}) == [False, True, True, True, True]
    assert begins({}, {"type": "ByteLevel"}) == [False, True, False, False, False]
    assert begins({}, {"type": "Metaspace"}) == [False, False, True, False, False]
    assert begins({}) == [True] * 5


def test_special_tokens_in_a_text_are_text(prepare):
    dataset = prepare("ab [MASK] [SEP]", seq_len=32)
    ids = dataset.splits["train"].rows(np.array([0]))["input_ids"][0].tolist()
    assert dataset.vocab.mask_id not in ids and ids.count(dataset.vocab.last[0]) == 1
    assert ids[:4] == [2, 5, 6, 1]  # "[" and the capitals are unknown to this tokenizer


def test_truncation_and_padding_in_the_file_are_ignored(prepare, tmp_path, letters):
    backend = Tokenizer.from_file(str(letters / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    for path in letters.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    backend.save(str(tmp_path / "tokenizer.json"))
    counts = prepare("abcdefgh\n\na", {"name": str(tmp_path)}).counts["train"]
    assert counts["source_tokens"] == 9


def test_a_folder_that_changes_while_it_is_read(prepare, tmp_path, letters, monkeypatch):
    """Otherwise another tokenizer would be cached under the digest of the earlier files."""
    for path in letters.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    load = tokenizer.load

    def changed(*words, **named):
        found = load(*words, **named)
        (tmp_path / "added_tokens.json").write_text("{}")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "load", changed)
        with pytest.raises(DataError, match="config.tokenizer.name=.* have changed while"):
            prepare("a", {"name": str(tmp_path)})
    prepare("a", {"name": str(tmp_path)})


@pytest.mark.parametrize("name", ["./nowhere", "/no/where"])
def test_a_folder_that_is_not_there(prepare, name):
    with pytest.raises(ConfigError, match="config.tokenizer.name=.*no such folder"):
        prepare("a", {"name": name})


def test_a_folder_that_holds_no_tokenizer(prepare, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="config.tokenizer.name=.*cannot be loaded"):
        prepare("a", {"name": str(tmp_path)})


def test_code_beside_a_tokenizer_is_not_run(prepare, tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        prepare("a", {"name": str(folder)})
    assert not marker.exists()


def test_unknown_choices_are_named(prepare):
    with pytest.raises(ConfigError, match="config.tokenizer.kind='wordpeice'.*'wordpiece'"):
        prepare("a", {"kind": "wordpeice"})
    with pytest.raises(ConfigError, match=r"Unknown key config\.tokenizer\.size.*vocab_size"):
        data.prepare({}, {"size": 3})


def save_unigram(folder, **options):
    """A Unigram vocabulary, in which "Paris" is a token, under the name of a class of BPE."""
    pieces = ["<unk>", "<s>", "</s>", "▁Mary", "▁likes", "▁Paris", "▁", *"MarylikesP"]
    scores = [(piece, 0.0 if i < 3 else -1.0 - i) for i, piece in enumerate(dict.fromkeys(pieces))]
    backend = Tokenizer(models.Unigram(scores, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"} | options
    path.write_text(json.dumps(content))
    return backend


def test_texts_are_tokenised_by_the_file_whatever_class_is_named(prepare, tmp_path):
    folder = tmp_path / "unigram"
    save_unigram(folder)
    words = tokenizer.load(folder)
    right = ["▁Mary", "▁likes", "▁Paris"]
    assert words.convert_ids_to_tokens(words("Mary likes Paris")["input_ids"]) == right
    assert words.decode(words("Mary likes Paris")["input_ids"]) == "Mary likes Paris"
    assert words.eos_token == "</s>"  # what the other files say stays

    dataset = prepare("Mary likes Paris", {"name": str(folder)})
    ids = words.convert_tokens_to_ids(right)
    assert dataset.splits["train"].rows(np.array([0]))["input_ids"][0, 1:4].tolist() == ids
    # What a run keeps and exports is read alike by transformers, and by conversations.
    for place in (folder, dataset.tokenizer_dir):
        reader = chat.Reader(place, chat.TEMPLATES["plain"])
        assert reader._encode.encode("Mary likes Paris", add_special_tokens=False).tokens == right
    assert (
        AutoTokenizer.from_pretrained(dataset.tokenizer_dir).tokenize("Mary likes Paris") == right
    )


def test_options_beside_the_file_say_what_stands_around_a_text(tmp_path):
    save_unigram(tmp_path, add_bos_token=True)
    assert vocabulary.around(tokenizer.load(tmp_path)) == ((1,), (2,))


def processor(kind):
    pair = ("[SEP]", 2), ("[CLS]", 1)
    template = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[*pair])
    return {
        "template": template,
        "bert": processors.BertProcessing(*pair),
        "roberta": processors.RobertaProcessing(*pair),
        "sequence": processors.Sequence([processors.ByteLevel(), template]),
    }[kind]


@pytest.mark.parametrize("kind", ["template", "bert", "roberta", "sequence"])
def test_the_frame_of_an_alphabet_without_letters(prepare, tmp_path, kind):
    """A tokenizer of DNA drops "a"; its file says what stands around a text."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", *"ACGT"])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.post_processor = processor(kind)
    names = {f"{token[1:-1].lower()}_token": token for token in list(vocab)[:4]}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path / "dna")
    dataset = prepare("GATTACA", {"name": str(tmp_path / "dna")}, format="padded")
    whole = backend.encode("GATTACA").ids
    assert whole[:2] == [1, 6] and whole[8:] == [2]
    assert (dataset.vocab.first, dataset.vocab.last) == ((1,), (2,))
    ids = dataset.splits["train"].rows(np.array([0]))["input_ids"][0]
    assert ids[: len(whole)].tolist() == whole


def save_gives_up(folder):
    """A tokenizer whose regular expression needs exponential time for many x without a y."""
    backend = save(folder, ["<unk>", "a", "x"], eos_token="<unk>")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    backend.save(str(folder / "tokenizer.json"))


def test_a_regular_expression_that_gives_up_names_the_record(prepare, tmp_path):
    save_gives_up(tmp_path / "regex")
    hard = "x" * 60
    name = {"name": str(tmp_path / "regex")}
    with pytest.raises(DataError, match="corpus.txt:3: the tokenizer fails on 'xxx.*retry-limit"):
        prepare(f"a\n\n{hard}\n\na\n", name)
    rows = tmp_path / "rows.jsonl"
    records = [{"text": "a", "label": "0"}, {"text": hard, "label": "1"}]
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match="rows.jsonl:2: the tokenizer fails.*retry-limit"):
        prepare(rows, name, format="classes", columns="text", label="label", long="drop")
    words = tokenizer.load(tmp_path / "regex")
    for method in (words, words.tokenize, words.encode):  # of prompts
        with pytest.raises(DataError, match="the tokenizer fails on 'xxx"):
            method(hard)
    with pytest.raises(DataError, match="the tokenizer fails"):
        words.decode([2**40])


def test_a_tokenizer_that_fails_on_any_text_is_refused(tmp_path):
    backend = save(tmp_path, ["<unk>", "a"], eos_token="<unk>")
    template = processors.TemplateProcessing(single="a $A a", special_tokens=[("a", 1)])
    backend.post_processor = processors.Sequence([template, template])  # the library panics
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="cannot be loaded: the tokenizer fails"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 10**5, '{"a": ' * 10**5, '{"version": 1' + "0" * 5000])
def test_files_that_no_parser_reads_are_refused_in_a_line(tmp_path, file, content):
    save(tmp_path, ["<unk>", "a"], eos_token="<unk>")
    (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match="cannot be loaded") as info:
        tokenizer.load(tmp_path)
    assert len(str(info.value)) < 800 and "\n" not in str(info.value)


@pytest.mark.parametrize("digits", [20, 400])
def test_numbers_of_hundreds_of_digits_are_refused(tmp_path, digits):
    save(tmp_path, ["<unk>", "a"], eos_token="<unk>")
    path = tmp_path / "tokenizer_config.json"
    added = {"9" * digits: {"content": "b", "special": True}}
    path.write_text(json.dumps({"added_tokens_decoder": added, "model_max_length": 10**digits}))
    words = tokenizer.load(tmp_path)  # the number is no id: the token gets the next
    assert words.convert_tokens_to_ids("b") == 2
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["c"] = 10**digits
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        tokenizer.load(tmp_path)


def test_older_files_alone_say_what_lacks(tmp_path, monkeypatch):
    for name, content in {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n"}.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(
        ConfigError, match="one of: .1. .*vocab.json but no tokenizer.json.*GPT2Tokenizer.*save"
    ):
        tokenizer.load(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(b"\n\x03abc")
    with pytest.raises(ConfigError, match="spiece.model but no tokenizer.json.*install sentenc"):
        tokenizer.load(folder)


def test_training_texts_have_no_long_word():
    most = tokenizer_training.MAX_WORD
    pieces = lambda text: [*tokenizer_training.pieces(text)]
    for short in ("", "a b", "x" * most, " " * most, "a b " * most):
        assert pieces(short) == [short]
    text = "a " + "x" * (2 * most + 1) + " b" + " " * (most + 1) + "c"
    lengths = [2 + most, most, 1 + 2 + most, 1 + 1]
    assert [len(piece) for piece in pieces(text)] == lengths
    assert "".join(pieces(text)) == text


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_a_long_word_is_trained_on_in_pieces(prepare, kind, monkeypatch):
    """A trainer needs hours for a word of some hundred thousand characters."""
    longest = 0
    train = tokenizer_training._train

    def measured(words, trainer, texts):
        nonlocal longest
        texts = [*texts]
        longest = max(len(word) for text in texts for word in text.split())
        train(words, trainer, iter(texts))

    monkeypatch.setattr(tokenizer_training, "_train", measured)
    letters = np.random.default_rng(0).choice([*"abcdefghij"], 20_000)
    prepare(TEXT + "\n\n" + "".join(letters), {"kind": kind, "vocab_size": 400})
    assert longest == tokenizer_training.MAX_WORD


class Stopped(Exception):
    """What a poll raises to stop."""


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram", "char"])
def test_training_polls_for_each_document(prepare, kind):
    polls = 0

    def poll():
        nonlocal polls
        polls += 1
        if polls == 30:
            raise Stopped

    with pytest.raises(Stopped):
        prepare(TEXT, {"kind": kind, "vocab_size": 400}, poll=poll)
    assert polls == 30


class Fails:
    """A tokenizer whose trainer fails as the library's do."""

    def train_from_iterator(self, texts, trainer):
        raise Exception("The vocabulary is not large enough\nfor characters")


def test_documents_that_no_vocabulary_can_be_made_of():
    with pytest.raises(DataError, match="No tokenizer can be trained.*large enough$"):
        tokenizer_training._train(Fails(), None, iter(()))
