"""Labelled examples: what their rows hold, worked out by hand, and every bad input."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fmjax import data
from fmjax.data import token_rows
from fmjax.errors import ConfigError, DataError

CLS, SEP, PAD = 2, 3, 0


@pytest.fixture
def examples(tmp_path, letters):
    """examples(records, validation=[…], **config.data): a jsonl file of them, prepared."""

    def examples(records, validation=(), log=lambda line: None, **settings):
        for name, rows in (("train", records), ("validation", validation)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(text)
        defaults = dict(
            name="text",
            train=str(tmp_path / "train.jsonl"),
            validation=str(tmp_path / "validation.jsonl") if validation else "",
            validation_fraction=0,
            format="classes",
            long="truncate",
            seq_len=8,
            cache=str(tmp_path / "cache"),
        )
        return data.prepare(defaults | settings, {"name": str(letters)}, log=log)

    return examples


def rows(dataset, split="train"):
    found = dataset.splits[split]
    return found.rows(np.arange(len(found)))


def records(*pairs):
    return [{"text": text, "label": label} for text, label in pairs]


# ---- rows ----


def test_classes_are_rows_with_the_number_of_their_sorted_name(examples):
    dataset = examples(records(("ab", "yes"), ("c", "no"), ("", "yes")))
    assert dataset.labels == ("no", "yes") and dataset.target == "classes"
    batch = rows(dataset)
    a = [CLS, 5, 6, SEP, PAD, PAD, PAD, PAD]
    b = [CLS, 7, SEP, PAD, PAD, PAD, PAD, PAD]
    np.testing.assert_array_equal(batch["input_ids"][:2], [a, b])
    np.testing.assert_array_equal(batch["segment_ids"][0], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 3, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["labels"], [1, 0, 1])
    assert all(array.dtype == np.int32 for array in batch.values())


def test_pairs_and_their_token_types(examples):
    row = {"a": "ab", "b": "c", "label": 0}
    dataset = examples([row, row | {"label": 1}], columns=("a", "b"))
    batch = rows(dataset)
    np.testing.assert_array_equal(batch["input_ids"][0], [CLS, 5, 6, SEP, 7, SEP, PAD, PAD])
    np.testing.assert_array_equal(batch["token_types"][0], [0, 0, 0, 0, 1, 1, 0, 0])
    again = rows(examples([row, row | {"label": 1}], columns="a,b"))
    np.testing.assert_array_equal(batch["input_ids"], again["input_ids"])


def test_whole_numbers_are_classes_in_their_order(examples):
    assert examples(records(("a", 10), ("b", 2), ("c", "2"))).labels == ("2", "10")
    given = examples(records(("a", 10), ("b", 2)), classes=("10", "2", "3"))
    assert given.labels == ("10", "2", "3")
    np.testing.assert_array_equal(rows(given)["labels"], [0, 1])


def test_values_are_numbers(examples):
    batch = rows(examples(records(("a", "0.5"), ("b", 3)), format="values"))
    assert batch["labels"].dtype == np.float32
    np.testing.assert_array_equal(batch["labels"], [0.5, 3.0])


def test_a_tag_stands_at_the_first_piece_of_its_word(examples):
    words = {"text": ["ab", "c"], "label": ["B-x", "O"]}
    dataset = examples([words], format="tags")
    assert dataset.labels == ("B-x", "O")
    batch = rows(dataset)
    np.testing.assert_array_equal(batch["input_ids"][0][:5], [CLS, 5, 6, 7, SEP])
    np.testing.assert_array_equal(batch["labels"][0], [-1, 0, -1, 1, -1, -1, -1, -1])


def byte_level(prefix=False):
    return None, pre_tokenizers.ByteLevel(add_prefix_space=prefix)


SPACES = {
    "gpt2": byte_level(),
    "prefixed": byte_level(prefix=True),
    "llama3": (None, pre_tokenizers.Sequence([byte_level()[1]])),
    "gemma": (
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
    ),
    "llama2": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
    ),
    "t5": (None, pre_tokenizers.Metaspace()),
    "bare": (None, pre_tokenizers.Metaspace(prepend_scheme="never")),
}


@pytest.mark.parametrize("kind", SPACES)
def test_tagged_words_are_the_tokens_of_their_sentence(prepare, tmp_path, kind):
    """A model has learnt " dog" where a space is before the word: "Ġdog" or "▁dog"."""
    merges = [("T", "h"), ("Th", "e"), ("d", "o"), ("do", "g"), ("e", "e")]
    merges += [(space, word) for space in "Ġ▁" for word in ("dog", "The")]
    tokens = ["<unk>", "</s>", *"ĠThedogs▁", *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = SPACES[kind]
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    words.save_pretrained(tmp_path / kind)
    row = {"text": ["The", "dog", "sees", "dog"], "label": ["O", "B-x", "O", "B-x"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    settings = dict(format="tags", label="label", long="truncate")
    dataset = prepare(tmp_path / "rows.jsonl", {"name": str(tmp_path / kind)}, **settings)
    batch = rows(dataset)
    right = AutoTokenizer.from_pretrained(dataset.tokenizer_dir)("The dog sees dog")["input_ids"]
    ids = batch["input_ids"][0][batch["segment_ids"][0] > 0].tolist()
    assert ids == [*right, 1]
    tagged = words.convert_ids_to_tokens(batch["input_ids"][0][batch["labels"][0] >= 0].tolist())
    assert len(tagged) == 4 and "dog" in tagged[1] and "dog" in tagged[3]


def test_without_tags_the_first_pieces_are_known_still(examples):
    dataset = examples([{"text": ["ab", "c"]}], format="tags", label="", classes=("B-x", "O"))
    np.testing.assert_array_equal(rows(dataset)["labels"][0][:6], [-1, -2, -1, -3, -1, -1])


def test_choices_are_several_sequences_of_one_example(examples):
    row = {"text": "a", "endings": ["b", "cd"], "label": 1}
    dataset = examples([row, row], format="choices", columns="text,endings")
    batch = rows(dataset)
    assert batch["input_ids"].shape == (2, 2, 8)
    np.testing.assert_array_equal(batch["input_ids"][0][1], [CLS, 5, SEP, 7, 8, SEP, PAD, PAD])
    np.testing.assert_array_equal(batch["labels"], [1, 1])


def test_texts_have_no_label(examples):
    batch = rows(examples([{"a": "b", "b": "cd"}] * 2, format="texts", columns="a,b"))
    assert batch["input_ids"].shape == (2, 2, 8) and "labels" not in batch
    np.testing.assert_array_equal(batch["input_ids"][0][1][:4], [CLS, 7, 8, SEP])


PAIRS = [{"text": "ab", "label": "c"}, {"text": "c", "label": "de"}, {"text": "a", "label": ["b"]}]
SEQ2SEQ = dict(format="seq2seq", columns="text", label="label")


def test_a_target_is_a_sequence_of_its_own(examples):
    dataset = examples(PAIRS, **SEQ2SEQ, target_len=4, source_prefix="d")
    assert dataset.target == "seq2seq" and len(dataset.splits["train"]) == 3
    batch = rows(dataset)
    np.testing.assert_array_equal(batch["input_ids"][1], [CLS, 8, 7, SEP, PAD, PAD, PAD, PAD])
    np.testing.assert_array_equal(batch["target_ids"][0], [CLS, 7, SEP, PAD])
    np.testing.assert_array_equal(batch["target_segment_ids"][0], [1, 1, 1, 0])
    np.testing.assert_array_equal(batch["target_positions"][1], [0, 1, 2, 3])
    assert "labels" not in batch
    assert all(array.dtype == np.int32 for array in batch.values())
    without = examples(PAIRS, **SEQ2SEQ | dict(label=""))
    assert not [name for name in rows(without) if "target" in name]


def test_several_texts_are_one_source_or_each_a_target(examples):
    dataset = examples([{"text": ["a", "b"], "label": ["c", "d"]}], **SEQ2SEQ)
    batch = rows(dataset)
    assert batch["input_ids"].shape == (2, 8) and dataset.counts["train"]["documents"] == 1
    np.testing.assert_array_equal(batch["input_ids"][0], batch["input_ids"][1])
    np.testing.assert_array_equal(batch["input_ids"][0, :4], [CLS, 5, 6, SEP])
    np.testing.assert_array_equal(batch["target_ids"][:, 1], [7, 8])


def test_pairs_share_a_row_as_segments_of_their_own(examples):
    dataset = examples(PAIRS, **SEQ2SEQ, pack=True, target_len=7)
    assert len(dataset.splits["train"]) == 2  # a third target would have no room in the first row
    batch = rows(dataset)
    np.testing.assert_array_equal(batch["input_ids"][0], [CLS, 5, 6, SEP, CLS, 7, SEP, PAD])
    np.testing.assert_array_equal(batch["segment_ids"][0], [1, 1, 1, 1, 2, 2, 2, 0])
    np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 3, 0, 1, 2, 0])
    np.testing.assert_array_equal(batch["target_ids"][0], [CLS, 7, SEP, CLS, 8, 9, SEP])
    np.testing.assert_array_equal(batch["target_segment_ids"][0], [1, 1, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(batch["target_segment_ids"][1], [1, 1, 1, 0, 0, 0, 0])


def test_targets_are_cut_in_proportion_to_their_sources(examples):
    """Rows of 16 and targets of 8: a quarter of one is enough where it is of the other."""
    dataset = examples(PAIRS, **SEQ2SEQ, seq_len=16, target_len=8)
    split = dataset.splits["train"]
    assert split.widths(np.arange(3)).tolist() == [8, 8, 8]  # three or four of eight in the target
    batch = split.trim(rows(dataset), 8)
    assert batch["input_ids"].shape == (3, 8) and batch["target_ids"].shape == (3, 4)


def test_labels_are_trimmed_where_each_is_of_a_token_alone(examples):
    """As many labels of an example as a row has columns are no row of columns."""
    ids = np.ones((2, 8), np.int32)
    batch = {"input_ids": ids, "segment_ids": ids, "labels": np.arange(16).reshape(2, 8)}
    several = token_rows.TokenRows()
    assert several.trim(batch, 4)["input_ids"].shape == (2, 4)
    np.testing.assert_array_equal(several.trim(batch, 4)["labels"], batch["labels"])
    tags = [{"tokens": ["a", "b"], "tags": ["X", "Y"]}, {"tokens": ["a"], "tags": ["X"]}]
    settings = dict(format="tags", long="truncate", columns="tokens", label="tags")
    split = examples(tags, **settings).splits["train"]
    trimmed = split.trim(split.rows(np.arange(2)), 4)
    assert trimmed["labels"].shape == trimmed["input_ids"].shape == (2, 4)
    assert split.units(trimmed).tolist() == np.count_nonzero(trimmed["segment_ids"], 1).tolist()


@pytest.mark.parametrize("long, kept", [("truncate", 2), ("drop", 1)])
def test_a_target_that_is_too_long_is_cut_or_left_out_and_counted(examples, long, kept):
    found = [{"text": "a", "label": "abcdefghij"}, {"text": "a", "label": "b"}]
    dataset = examples(found, **SEQ2SEQ, long=long, target_len=5)
    counts = dataset.counts["train"]
    assert len(dataset.splits["train"]) == kept
    assert counts["truncated_documents"] + counts["dropped_documents"] == 1


def test_labels_can_be_left_out_to_predict(examples):
    dataset = examples([{"text": "ab"}, {"text": "c"}], label="", classes=("no", "yes"))
    assert dataset.labels == ("no", "yes") and "labels" not in rows(dataset)


@pytest.mark.parametrize("long, kept", [("truncate", 2), ("drop", 1)])
def test_what_is_too_long_is_cut_or_left_out_and_counted(examples, long, kept):
    lines = []
    found = records(("abcdefghij", "yes"), ("c", "no"))
    dataset = examples(found, long=long, classes=("no", "yes"), log=lines.append)
    assert len(dataset.splits["train"]) == kept
    said = "1 truncated documents" if long == "truncate" else "1 dropped documents"
    assert any(said in line for line in lines)
    if long == "truncate":
        row = rows(dataset)["input_ids"][0]
        np.testing.assert_array_equal(row, [CLS, 5, 6, 7, 8, 9, 10, SEP])


def test_equal_texts_are_in_one_split_whatever_their_label(examples):
    found = records(*[(chr(97 + i % 20), str(i // 20)) for i in range(40)])
    dataset = examples(found, validation_fraction=0.5)
    first = [set(rows(dataset, split)["input_ids"][:, 1]) for split in ("train", "validation")]
    assert not first[0] & first[1] and all(first)


def test_texts_of_both_files_can_be_left_out_of_training(examples):
    lines, train = [], records(*[(text, str(i % 2)) for i, text in enumerate("abcdefab")])
    validation, log = records(("b", "0"), ("f", "1"), ("g", "1"), ("h", "0")), lines.append
    every = rows(examples(train, validation))["input_ids"][:, 1].tolist()
    assert every == [5, 6, 7, 8, 9, 10, 5, 6]
    dataset = examples(train, validation, overlap="drop", log=log)
    assert rows(dataset)["input_ids"][:, 1].tolist() == [5, 7, 8, 9, 5]
    assert len(dataset.splits["validation"]) == 4
    assert "3 dropped as in validation" in lines[0]
    # Of what is not validated on nothing is left out, and training still has so many.
    few = dict(overlap="drop", max_documents=1, classes=("0", "1"))
    found = examples(train[1:], validation, **few)
    assert rows(found)["input_ids"][:, 1].tolist() == [7]
    found = examples(train[5:], validation, **few)  # f is validated on by more documents
    assert rows(found)["input_ids"][:, 1].tolist() == [10]


def test_bad_records_are_kept_apart(examples):
    found = [*records(("a", "yes"), ("b", "no")), {"text": "c"}]
    dataset = examples(found, on_bad_record="quarantine")
    assert len(dataset.splits["train"]) == 2 and dataset.counts["bad_records"] == 1


def test_tsv_has_no_quotation_marks(prepare, tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"a" b\tyes\n"a\tno\n')
    file = tmp_path / "a.tsv"
    dataset = prepare(file, format="classes", long="truncate", classes=("no", "yes"))
    np.testing.assert_array_equal(rows(dataset)["labels"], [1, 0])


def test_evaluation_has_rows_of_like_length_together(examples):
    found = records(*[("abcdefghij"[: 1 + i % 9], "xy"[i % 2]) for i in range(25)])
    split = examples(found, seq_len=12).splits["train"]

    def batches(**how):
        for batch in data.eval_batches(split, batch_size=4, **how):
            yield batch["index"][batch["segment_ids"].any(1)], batch["input_ids"].shape[1]

    rows, widths = zip(*batches(), strict=True)
    assert list(widths) == sorted(widths, reverse=True) and len(set(widths)) == 4
    assert sorted(np.concatenate(rows)) == list(range(25))
    assert sum(widths) < sum(width for _, width in batches(alike=False))
    # A part of them is the same part, and losses over whole batches can have them as they came.
    some = lambda **how: sorted(np.concatenate([rows for rows, _ in batches(limit=3, **how)]))
    assert some() == some(alike=False)
    first = next(batches(alike=False))[0]
    assert not np.array_equal(first, rows[0])


def test_a_batch_is_as_wide_as_its_longest_row_needs_in_quarters(examples):
    found = records(*[("abcdefgh"[: 1 + i % 3], "xy"[i % 2]) for i in range(8)], ("abcdef", "x"))
    split = examples(found, seq_len=16).splits["train"]
    whole = rows(examples(found, seq_len=16))
    assert split.widths(np.array([0, 2])).tolist() == [4, 8]
    for batch in data.eval_batches(split, batch_size=3):
        used = np.count_nonzero(batch["segment_ids"], axis=1).max()
        width = batch["input_ids"].shape[1]
        assert used <= width < used + 4 and width % 4 == 0
        for name in ("input_ids", "segment_ids", "positions", "token_types"):
            np.testing.assert_array_equal(batch[name], whole[name][batch["index"], :width])
    # Processes see parts of the same batch, as wide as the whole.
    one = data.batches(split, batch_size=4, seeds=[0])
    parts = [
        data.batches(split, batch_size=4, seeds=[0], process_index=i, process_count=2)
        for i in (0, 1)
    ]
    for _ in range(4):
        batch, halves = next(one), [next(part) for part in parts]
        for name in batch:
            np.testing.assert_array_equal(batch[name], np.concatenate([h[name] for h in halves]))
    for iterator in (one, *parts):
        iterator.close()


CONLL = "ab\tB-x\r\nc\tO\n\n\nd\tO\n"


@pytest.mark.parametrize("ending", ["conll", "bio"])
def test_conll_files_take_the_names_of_the_config(prepare, tmp_path, ending):
    (tmp_path / f"a.{ending}").write_text(CONLL)
    settings = dict(format="tags", long="truncate", columns="tokens", label="tags")
    dataset = prepare(tmp_path / f"a.{ending}", **settings)
    assert dataset.labels == ("B-x", "O")
    batch = rows(dataset)
    np.testing.assert_array_equal(batch["input_ids"][:, :5], [[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])
    np.testing.assert_array_equal(batch["labels"][:, :5], [[-1, 0, -1, 1, -1], [-1, 1, -1, -1, -1]])


def test_words_alone_have_no_tags(prepare, tmp_path):
    (tmp_path / "a.conll").write_text("ab\nc\tO\n\nd\n")
    settings = dict(format="tags", long="truncate", label="", classes=("B-x", "O"))
    batch = rows(prepare(tmp_path / "a.conll", **settings))
    np.testing.assert_array_equal(batch["labels"][:, :4], [[-1, -2, -1, -3], [-1, -2, -1, -1]])


def test_a_sentence_with_a_broken_line_is_left_out_and_named(prepare, tmp_path):
    (tmp_path / "a.conll").write_text("a\tO\nb\nc\n\nd\tO\ne\tB-x\n")
    settings = dict(format="tags", long="truncate")
    with pytest.raises(DataError, match="a.conll:2: 1 fields between tabs, not a word and its tag"):
        prepare(tmp_path / "a.conll", **settings)
    dataset = prepare(tmp_path / "a.conll", on_bad_record="skip", **settings)
    assert len(dataset.splits["train"]) == 1 and dataset.counts["bad_records"] == 1
    with pytest.raises(ConfigError, match="config.data.format='classes'. Set it to tags"):
        prepare(tmp_path / "a.conll", format="classes", long="truncate")


# ---- bad input ----


@pytest.mark.parametrize(
    "found, settings, said",
    [
        (records(("a", "yes"), ("b", "no")), dict(columns="txt"), r"1: no column 'txt' .*'text'"),
        ([{"text": "a"}], {}, r"no column 'label' \(config.data.columns, config.data.label\)"),
        (records(("a", "yes"), ("b", "yes")), {}, "All examples have the label.*nothing to tell"),
        (records(("a", 0.5), ("b", 1)), {}, "column 'label': the value is float, not text or a w"),
        (records(("a", "")), {}, "column 'label': an empty label"),
        (records(("a", "x")), dict(format="values"), "column 'label': 'x' is not a finite number"),
        (records(("a", None)), dict(format="values"), "column 'label': None is not a finite num"),
        (records(("a", ["O"])), dict(format="tags"), "column 'text': the value is str, not a list"),
        (
            records(("a", 3)),
            SEQ2SEQ,
            "column 'label': the value is int, not text or a list of texts",
        ),
        (records(("a", [])), SEQ2SEQ, "column 'label': the value is an empty list, not text or a"),
        (records((["a", 1], "b")), SEQ2SEQ, "jsonl:1: column 'text': the value is int, not text"),
        (records((["a"], ["O", "O"])), dict(format="tags"), "jsonl:1: 1 words but 2 tags"),
        (records(([], [])), dict(format="tags"), "the value is an empty list, not"),
        (records(("abcdefghi", "x")), dict(long="error"), "jsonl:1: longer than config.data.seq_l"),
        (records(("a", "yes")), dict(classes=("no", "maybe")), "label 'yes' of the train split"),
        (
            [{"text": "a", "e": ["b"], "label": 1}],
            dict(format="choices", columns="text,e"),
            "jsonl:1: the label '1' is no number of a choice, 0 to 0",
        ),
        (
            [{"text": "a", "e": ["b"] * n, "label": 0} for n in (1, 2)],
            dict(format="choices", columns="text,e"),
            "jsonl:2: 2 choices, the examples before it have 1",
        ),
    ],
)
def test_bad_examples_name_their_place_and_the_key(examples, found, settings, said):
    with pytest.raises(DataError, match=said):
        examples(found, **settings)


def test_a_label_that_only_validation_has(examples):
    with pytest.raises(DataError, match="validation.jsonl:1: the label 'yess' .*'yes'"):
        examples(records(("a", "yes"), ("b", "no")), validation=records(("a", "yess")))


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(columns="a,b,c"), "format='classes' needs 1 or 2 different columns"),
        (dict(columns="a,a"), "needs 1 or 2 different columns"),
        (dict(columns=""), "needs 1 or 2 different columns"),
        (dict(columns="label"), "config.data.label='label' is one of config.data.columns"),
        (dict(long="split"), "config.data.long='split' has no meaning with format='classes'"),
        (
            dict(pack=True),
            "target_len, source_prefix and pack have no meaning with format='classes'",
        ),
        (SEQ2SEQ | dict(long="split"), "config.data.long='split' has no meaning"),
        (dict(format="packed", columns="a,b"), "format='packed' needs 1 different columns"),
    ],
)
def test_settings_that_do_not_go_together(examples, settings, said):
    with pytest.raises(ConfigError, match=said):
        examples(records(("a", "yes"), ("b", "no")), **settings)


def test_text_files_have_no_labels(prepare):
    with pytest.raises(ConfigError, match="has one text and no columns.*'text', 'label'"):
        prepare("a b", format="classes", long="truncate")


def test_pydocs_has_classes_only(pydocs):
    with pytest.raises(ConfigError, match="pydocs' has no tags"):
        pydocs(format="tags", long="truncate")


def test_docstrings_and_their_packages(pydocs):
    dataset = pydocs(format="classes", long="truncate", validation_fraction=0.2, seq_len=32)
    assert len(dataset.labels) >= 8 and "asyncio" in dataset.labels
    assert len(dataset.splits["train"]) > 3 * len(dataset.splits["validation"]) > 1000
