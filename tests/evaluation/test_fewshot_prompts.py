"""Labelled rows as questions in words."""

import pytest

from fmjax.errors import ConfigError, DataError
from fmjax.evaluation import benchmarks, prompt_templates
from fmjax.evaluation.multiple_choice import Item

FILES = {
    "sst2": ("sentence\tlabel", 'a "fine film\t1'),
    "cola": (None, "gj04\t0\t*\tHe are."),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tA b.\tB a."),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tIt rains.\tIt is wet.\tentailment"),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tWho?\tHe.\tnot_entailment"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tA saw B.\tB saw A.\t0"),
}
ITEMS = {
    "sst2": Item(
        'Review: a "fine film\nSentiment:',
        (" negative", " positive"),
        1,
        "",
        "Review: \nSentiment:",
    ),
    "cola": Item(
        "Sentence: He are.\nIs it grammatical?",
        (" no", " yes"),
        0,
        "gj04",
        "Sentence: \nIs it grammatical?",
    ),
    "rte": Item(
        "It rains.\nQuestion: is it so that It is wet.\nAnswer:",
        (" yes", " no"),
        0,
        "",
        "\nQuestion: is it so that \nAnswer:",
    ),
    "qnli": Item(
        "Question: Who?\nText: He.\nDoes the text answer the question?",
        (" yes", " no"),
        1,
        "",
        "Question: \nText: \nDoes the text answer the question?",
    ),
    "wnli": Item("A saw B.\nIs it so that B saw A.", (" no", " yes"), 0, "", "\nIs it so that "),
    "mrpc": Item(
        "First: A b.\nSecond: B a.\nDo they say the same?",
        (" no", " yes"),
        1,
        "",
        "First: \nSecond: \nDo they say the same?",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_glue_become_questions(tmp_path, name):
    heads, row = FILES[name]
    file = tmp_path / "dev.tsv"
    file.write_text("\n".join([*([heads] if heads else []), row, row]) + "\n")
    wanted = dict(name=name, path=str(file), examples=str(file), limit=1)
    ((items, examples),) = benchmarks.asked(wanted, (), (), True).values()
    assert len(items) == 1 and examples == items * 2  # the limit is of what is asked
    kind = prompt_templates.GLUE[name]
    assert items[0] == ITEMS[name]
    assert items[0].choices == tuple(f" {word}" for word in kind.words)
    assert items[0].choices[items[0].label] == f" {kind.words[kind.classes.index(row_label(name))]}"
    for template in ("{" + f"{next(iter(kind.columns))}" + "}?", "x " + kind.template):
        found = benchmarks.asked(wanted, (template,), ("a", "b"), False)
        assert list(found) == [template] and found[template][0][0].choices == (" a", " b")


def row_label(name):
    heads, row = FILES[name]
    names = heads.split("\t") if heads else prompt_templates.GLUE[name].heads
    return dict(zip(names, row.split("\t"), strict=True))[prompt_templates.GLUE[name].label]


@pytest.mark.parametrize(
    "rows, words",
    [
        (["text\tlabel", "a\t1"], "no column 'sentence'"),
        (["sentence\tlabel", "a\t1", "b"], "dev.tsv:3 is no row of 'sst2': 1 columns of 2"),
        (["sentence\tlabel", "a\t2"], "dev.tsv:2 is no row of 'sst2'.*label '2' of 0, 1"),
    ],
)
def test_files_that_are_no_glue_are_named(tmp_path, rows, words):
    file = tmp_path / "dev.tsv"
    file.write_text("\n".join(rows))
    with pytest.raises(DataError, match=words):
        list(prompt_templates.glue("sst2", file))


@pytest.mark.parametrize(
    "template", ["no column", "{other}", "{text.__class__}", "{text[0]}", "{text:>9}", "{", "{}"]
)
def test_templates_that_cannot_be_filled_are_refused(template):
    with pytest.raises(ConfigError, match="config.templates"):
        prompt_templates.check(template, ["text"])


def test_templates_that_can_are_not():
    prompt_templates.check("{{{text}}} and {text}", ["text"])


def test_a_file_of_nothing_is_named(tmp_path):
    file = tmp_path / "dev.tsv"
    file.write_text("sentence\tlabel\n")
    wanted = dict(name="sst2", path=str(file), examples="", limit=0)
    with pytest.raises(DataError, match="no row to ask"):
        benchmarks.asked(wanted, (), (), False)


@pytest.mark.parametrize(
    "limit, rows", [(0, range(7)), (3, (0, 2, 4)), (7, range(7)), (9, range(7))]
)
def test_some_rows_are_taken_evenly(limit, rows):
    given = [prompt_templates.Row({"text": str(i)}, i) for i in range(7)]
    assert prompt_templates.spread(given, limit) == [given[i] for i in rows]
    assert prompt_templates.spread([], limit) == []


def test_a_text_of_a_file_of_glue_may_be_long_and_hold_any_character(tmp_path):
    text = "a \r \x85 b " * 20_000  # beyond what the csv module takes for a value
    (tmp_path / "dev.tsv").write_text(f"sentence\tlabel\n{text}\t1\n", newline="")
    (row,) = prompt_templates.glue("sst2", tmp_path / "dev.tsv")
    assert row.columns == {"sentence": text} and row.label == 1
